"""Thirty runs of `kill -9` at seeded moments, inside saves too: every run ends as if nothing had happened.

It takes minutes: `pytest -m kill -s tests/test_kill.py`. A save lasts milliseconds, so the moments are hunted: the
run's folder is watched, its processes are stopped when the wanted moment seems to be there, and killed if it is; else
they go on to the next save. What counts is what the folder shows while all are stopped.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from test_resume import SMALL, outcome
from tiny_models import paper_run
from transformers import AutoConfig, AutoModelForSequenceClassification

from savelib.runs.checkpoint import MANIFEST, check
from savelib.runs.folder import checkpoints, read_jsonl, read_manifest

pytestmark = [
    pytest.mark.kill,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of a run in /proc"),
]

STEPS, KEEP = 26, 2
MODES = {
    "single": dict(num_processes=1, backend="ddp"),
    "ddp": dict(num_processes=2, backend="ddp"),
    "zero2": dict(num_processes=2, backend="deepspeed_zero2"),
}
# what a kill aims at, and whom it hits where there are several: rank 0 writes, the agent is torchrun's
AIMS = (
    ("start", "all"), ("steps", "all"), ("steps", "rank 1"), ("between files", "rank 0"), ("inside a file", "all"),
    ("inside a file", "rank 0"), ("before checkpoint.json", "agent"), ("before the rename", "all"),
    ("after the rename", "rank 0"), ("deleting", "all"),
)  # fmt: skip
HIT = Counter()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Values of a run whose reward model has files of megabytes, so that its writing takes a while."""
    folder = tmp_path_factory.mktemp("base")
    values = paper_run(folder, "qwen3") | SMALL
    config = AutoConfig.from_pretrained(values["reward_model"])
    config.vocab_size, config.initializer_range = 40_000, 0.2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(values["reward_model"])
    return values | dict(total_steps=STEPS, checkpoint_every=1, keep_checkpoints=KEEP, eval_every=13, batch_size=2)


class Run:
    """A run's processes and folder, from outside."""

    def __init__(self, values: dict, runs: Path):
        self.folder, self.config, self.runs = runs / values["run_id"], runs.parent / f"{values['run_id']}.yaml", runs
        self.config.write_text(yaml.safe_dump(values | dict(resume="auto")))
        self.ranks = values["num_processes"]

    def start(self) -> None:
        env = os.environ | dict(
            SAVE_RUNS=str(self.runs), SAVE_CACHE=str(self.runs.parent / "cache"), OMP_NUM_THREADS="1"
        )
        words = ["nice", "-n", "10", sys.executable, "-m", "savelib", "train", "--config", str(self.config)]
        with open(self.config.with_suffix(".log"), "a") as log:
            self.top = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
        self.steps_before, self.pids, self.misses = self.steps(), {}, Counter()

    def said(self) -> str:
        return self.config.with_suffix(".log").read_text()[-3000:]

    def processes(self) -> dict[int, str]:
        """pid -> `rank N`, `agent` or `top`, of every live process that has this run's environment."""
        found, mark = {}, f"SAVE_RUNS={self.runs}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environ, words = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
            except OSError:
                continue
            if mark in environ:
                rank = environ.partition(b"\0RANK=")[2].partition(b"\0")[0].decode()
                agent = b"torch.distributed.run" in words
                found[int(process.name)] = f"rank {rank}" if rank else "agent" if agent else "top"
        return found

    def leaving(self) -> dict[int, str]:
        """Those of self.pids that have no environment any more, but have not given back all else, as the run's lock."""
        found = {}
        for pid, name in self.pids.items():
            with suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found[pid] = name
        return found

    def steps(self) -> int:
        return len(read_jsonl(self.folder / "metrics.jsonl"))

    def signal(self, number: int, who: str = "all") -> None:
        for pid, name in self.pids.items():
            if who in ("all", name):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def moment(self, sizes: dict[str, int]) -> str:
        """What the folder of checkpoints shows. sizes: those of the files of a whole one."""
        found = {}
        try:
            for entry in os.scandir(self.folder / "checkpoints"):
                if "step_" in entry.name:
                    found[entry.name] = int(entry.name.lstrip(".")[5:11])
            newest = max((n for name, n in found.items() if name[0] != "."), default=0)
            for name, step in found.items():
                if name[0] == ".":
                    return "deleting" if step <= newest else self._inside(self.folder / "checkpoints" / name, sizes)
        except FileNotFoundError:  # renamed or removed while it was looked at
            return "moving"
        return "after the rename" if len(found) > KEEP else "steps"

    @staticmethod
    def _inside(part: Path, sizes: dict[str, int]) -> str:
        there = {}
        for folder in (part, part / "policy", part / "reward_model"):
            if folder == part or folder.exists():
                for f in os.scandir(folder):
                    if f.is_file():
                        there[os.path.relpath(f.path, part)] = f.stat().st_size
        if MANIFEST in there:
            return "before the rename"
        # safetensors gives a file its length at once, and its name when its content is there
        if any(size < sizes.get(name, size + 1) for name, size in there.items()):
            return "inside a file"
        return "before checkpoint.json" if len(there) == len(sizes) - 1 else "between files"

    def hunt(self, aim: str, sizes: dict[str, int], draw: random.Random) -> str:
        """Stop all processes at the moment that is aimed at and tell which it is; `done` if the run ended before."""
        if aim == "start":
            time.sleep(draw.uniform(0.1, 6))
            self.pids = self.processes()
            self.signal(signal.SIGSTOP)
            return "start" if self.steps() == self.steps_before else self.moment(sizes)
        wanted = self.steps_before + draw.randint(1, 2)
        while self.steps() < wanted:
            if self.top.poll() is not None:
                return "done"
            time.sleep(0.002)
        self.pids = self.processes()
        if aim == "steps":
            time.sleep(draw.uniform(0, 0.5))
        skip = draw.randint(0, 8)  # sightings that are let go, so that not each kill has the first file
        late = time.monotonic() + 30  # then any moment is as good
        while self.top.poll() is None:
            tired = time.monotonic() > late
            if aim == "steps" or tired or self.moment(sizes) == aim:
                if skip and not tired and aim in ("inside a file", "between files"):
                    skip -= 1
                    continue
                self.signal(signal.SIGSTOP)
                time.sleep(0.005)  # until a system call that has begun is over
                real = self.moment(sizes)
                if aim in ("steps", real) or tired:
                    return real
                self.misses[real] += 1
                self.signal(signal.SIGCONT)
        return "done"

    def kill(self, who: str) -> list[str]:
        """SIGKILL to all, or to one of several; returns those of the others that have not ended a minute later."""
        if self.ranks == 1 or who not in self.pids.values():
            who = "all"
        self.signal(signal.SIGKILL, who)
        self.signal(signal.SIGCONT)
        until = time.monotonic() + 60
        while (left := self.processes() or self.leaving()) and time.monotonic() < until:
            self.top.poll()  # a child that has ended is one no more when it is waited for
            time.sleep(0.1)
        self.end()
        return [f"{name} after a kill of {who}" for name in left.values()]

    def end(self) -> None:
        self.pids = self.processes()
        self.signal(signal.SIGKILL)
        self.top.wait()


@pytest.fixture
def run(tmp_path):
    """Run(values) in this test's folder; no process of theirs outlives the test."""
    made = []

    def make(values: dict) -> Run:
        made.append(Run(values, tmp_path / "runs"))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.mark.parametrize("mode", MODES)
def test_a_run_killed_ten_times_ends_like_one_that_was_not(base, mode, run):
    begun, draw, values = time.monotonic(), random.Random(f"kill {mode}"), base | MODES[mode]
    straight = run(values | dict(run_id="straight"))
    straight.start()
    assert straight.top.wait() == 0, straight.said()
    expected = outcome(straight.folder)
    whole = checkpoints(straight.folder)[-1]
    sizes = {str(f.relative_to(whole)): f.stat().st_size for f in whole.rglob("*") if f.is_file()}
    aims, kills, left, chain = draw.sample(AIMS, len(AIMS)), [], [], 0
    while aims:  # a run that ends before all were done is followed by another
        chained = run(values | dict(run_id=f"chain{chain}"))
        chain += 1
        while True:
            chained.start()
            moment = chained.hunt(aims[0][0], sizes, draw) if aims else "done"
            if moment == "done":
                break
            aim, who = aims.pop(0)
            if chained.misses:
                print(f"{mode}: {aim} was missed: {dict(chained.misses)}")
            left += chained.kill(who)
            kills.append(dict(aim=aim, who=who, hit=moment, steps=chained.steps(), at=round(time.monotonic() - begun)))
            print(mode, json.dumps(kills[-1]), flush=True)
            if moment != "start":
                until = time.monotonic() + 10  # a process that ends gives up its name before its files, and the lock
                while (state := read_manifest(chained.folder)["status"]) == "running" and time.monotonic() < until:
                    time.sleep(0.1)
                assert state in ("killed", "failed", "stopped")
            assert all(check(f) for f in checkpoints(chained.folder)), "what is visible is whole"
        assert chained.top.wait() == 0, chained.said()
        assert read_manifest(chained.folder)["status"] == "done" and chained.steps() == STEPS + 1
        assert outcome(chained.folder) == expected, f"{mode}, chain {chain}"
        assert not list((chained.folder / "checkpoints").glob(".*")) and len(checkpoints(chained.folder)) == KEEP
    assert not left, "processes were left behind"
    HIT.update(k["hit"] for k in kills)
    HIT["kills"] += len(kills)
    print(f"{mode}: {len(kills)} kills in {time.monotonic() - begun:.0f} s, {dict(Counter(k['hit'] for k in kills))}")


def test_every_kind_of_moment_was_hit():
    if HIT["kills"] < 10 * len(MODES):
        pytest.skip("not all modes ran here")
    print(dict(HIT))
    assert all(HIT[aim] for aim, _ in AIMS) and HIT["inside a file"] > 1 and HIT["steps"] > 1
