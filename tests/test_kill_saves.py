"""kill at seeded moments of the final save and of a cache's build: the next run ends as if nothing had happened.

A run is a real process. Once it has written for the n-th time below the wanted folder, a timer ends it some
milliseconds later, inside a library's write too: SIGALRM, like SIGKILL, leaves no time to clean up.
"""

import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_resume import FORK, SMALL, outcome
from tiny_models import paper_run

from savelib.config import make_config
from savelib.runs.folder import read_manifest
from savelib.runs.train import train

pytestmark = pytest.mark.kill
VALUES = SMALL | dict(total_steps=2, checkpoint_every=1, eval_every=0, eval_prompts=2, bt_epochs=1, bt_head_lr=1e-3)
AIMS = {"final save": ("/run/.policy.", "/run/.reward_model."), "cache": ("/cache/.stage1-", "/cache/.stage2-")}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("base"), "qwen3") | VALUES | dict(run_id="run", resume="auto")


def _process(values: dict, env: dict, log: Path, aim: tuple[str, ...], after: int, seconds: float) -> None:
    """Train; from the `after`-th write below `aim` on, `seconds` are left."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    seen = 0

    def watch(event: str, details: tuple) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and any(
            a in str(details[0]) for a in aim
        ):
            seen += 1
            if seen == after:
                signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))

    sys.addaudithook(watch)
    train(make_config(**values))


def run(values: dict, folder: Path, aim: tuple[str, ...] = (), after: int = 0, seconds: float = 0.0) -> int:
    env = {"SAVE_RUNS": str(folder / "runs"), "SAVE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    process = FORK.Process(target=_process, args=(values, env, folder / "said.log", aim, after, seconds))
    process.start()
    process.join(300)
    return process.exitcode


@pytest.mark.parametrize("what", AIMS)
def test_ten_kills_while_it_saves_cost_nothing(values, tmp_path, what):
    draw, hit = random.Random(what), Counter()
    straight = tmp_path / "straight"
    straight.mkdir()
    assert run(values, straight) == 0, (straight / "said.log").read_text()
    expected = outcome(straight / "runs" / "run")
    cached = sorted(f.name for f in (straight / "cache").iterdir())
    for kill in range(10):
        folder = tmp_path / f"killed{kill}"
        folder.mkdir()
        if what == "final save":
            shutil.copytree(straight / "cache", folder / "cache")
        aim, after = AIMS[what][kill % 2], draw.randint(1, 12 if what == "final save" else 4)
        ended = run(values, folder, (aim,), after, draw.uniform(0, 0.01))
        parts = [f.name for where in ("runs/run", "cache") for f in (folder / where).glob(".*.part")]
        hit["killed" if ended == -signal.SIGALRM else "too late"] += 1
        hit["left a part"] += bool(parts)
        assert ended in (0, -signal.SIGALRM), (folder / "said.log").read_text()
        if ended and what == "final save":  # else the run has not begun
            assert read_manifest(folder / "runs" / "run")["status"] == "killed"
        assert run(values, folder) == 0, (folder / "said.log").read_text()
        assert outcome(folder / "runs" / "run") == expected, (what, kill, aim, after)
        assert sorted(f.name for f in (folder / "cache").iterdir() if not f.name.startswith(".")) == cached
        assert not list((folder / "runs" / "run").glob(".*.part"))
    print(what, dict(hit))
    assert hit["killed"] >= 5 and hit["left a part"]
