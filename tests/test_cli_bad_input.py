"""Bad command lines, in one process: each ends with exit code 2 and one sentence, and leaves nothing behind."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from savelib.cli import app
from savelib.config import ConfigError, make_config
from savelib.runs.folder import RunLog, read_metrics

STUDY = {"title": "t", "reference": "A", "cells": [{"name": "A"}]}
DEEP = "[" * 5000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CELL = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": "x = 1"}
NOTEBOOK = {"cells": [CELL], "metadata": {"kernelspec": {"name": "python3", "display_name": "p"}}}
FILES = {
    "empty.yaml": b"",
    "utf16.yaml": "seed: 1".encode("utf-16"),
    "latin.yaml": "prompts: \xe9".encode("latin-1"),
    "numbers.yaml": b"1: 2\n",
    "list.yaml": b"- seed\n",
    "deep.yaml": f"seed: {DEEP}".encode(),
    "bomb.yaml": BOMB.encode(),
    "bad.yaml": b"seed: [1\n",
    "tab.yaml": b"seed:\n\t1\n",
    "nested.yaml": b"seed: {a: 1}\n",
    "null.yaml": b"seed: null\n",
    "python.yaml": b"seed: !!python/object/apply:os.system ['true']\n",
    "no_notebook.ipynb": b"{}",
    "text.ipynb": b"hello",
    "untagged.ipynb": json.dumps(NOTEBOOK | {"nbformat": 4, "nbformat_minor": 5}).encode(),
    "prompts.json": b'[{"instruction": "a"}]',
    "table.yaml": yaml.safe_dump(STUDY).encode(),
    "other/table.yaml": yaml.safe_dump(STUDY).encode(),
    "foreign.yaml": yaml.safe_dump(STUDY).encode(),
    "grid.yaml": yaml.safe_dump(STUDY | {"grid": {"beta": []}}).encode(),
    "grid_name.yaml": yaml.safe_dump(STUDY | {"grid": {"bet": [1]}}).encode(),
    "worlds.yaml": yaml.safe_dump(STUDY | {"worlds": "0-"}).encode(),
    "times.yaml": yaml.safe_dump(STUDY | {"cells": [{"name": "A", "times": {"rule": 2}}]}).encode(),
    "no_table.yaml": yaml.safe_dump(STUDY | {"table": "table99"}).encode(),
    "cell.yaml": yaml.safe_dump(STUDY | {"cells": [{"name": "A", "set": {"beta": "x"}}]}).encode(),
    "a_run/config.yaml": b"profile: tiny\nrun_id: a_run\n",
    "runs/whole/config.yaml": b"profile: tiny\nrun_id: whole\n",
    "runs/void/config.yaml": b"",
    "runs/cut/config.yaml": b"profile: tiny\nrun_id: cut\n",
    "runs/cut/manifest.json": b'{"status": "do',
    "runs/lines/config.yaml": b"profile: tiny\nrun_id: lines\ntracker: none\n",
    "runs/lines/manifest.json": b'{"status": "stopped"}',
    "runs/lines/metrics.jsonl": b'{"step": 0, "seconds": 1.0}\n{"step": 1, "sec\n',
    "runs/studies/foreign/summary.csv": b"of somebody else\n",
}
FILES |= {f"runs/{name}/.lock": b"" for name in ("whole", "void", "cut", "lines")}
NB = str(Path(__file__).resolve().parent.parent / "notebooks" / "03_save_train.ipynb")
FIELDS = [
    ("train --set seed", "write name=value"),
    ("train --set =1", "unknown parameter ''"),
    ("train --set sede=1", "did you mean 'seed'"),
    ("train --set seed=x", "seed = 'x'"),
    ("train --set seed=-1", "seed = -1"),
    ("train --set seed=1.5", "seed = 1.5"),
    ("train --set seed=1e400", "seed = inf"),
    ("train --set beta=nan", "beta = nan"),
    ("train --set total_steps=", "total_steps = ''"),
    ("train --set freeze_policy=perhaps", "freeze_policy = 'perhaps'"),
    ("train --set run_id=studies", "run_id = 'studies'"),
    ("train --set run_id=a/b", "run_id = 'a/b'"),
    ("train --set run_id=..", "run_id = '..'"),
    (f"train --set run_id={'a' * 300}", "run_id = "),
    ("train --set resume=auto", "resume=auto needs run_id"),
    ("train --set resume=AUTO", "resume = 'AUTO': write auto"),
    ("train --set resume=nowhere", "resume = 'nowhere': write never, auto, or a checkpoint's folder"),
    ("train --set resume=a_run", "resume = 'a_run' is a run's folder: it has no checkpoint"),
    ("train --set resume=table.yaml", "resume = 'table.yaml': write never, auto, or a checkpoint's folder"),
    ("train --profile huge", "profile = 'huge'"),
    ("train --set run_id=whole", "already holds a run"),
    ("train --set run_id=void --set resume=auto", "void/config.yaml is damaged"),
    ("train --set run_id=cut --set resume=auto", "cut/manifest.json is damaged; delete it"),
    ("train --set run_id=lines --set resume=auto --set tracker=none --set bt_epochs=0 --set anchor_epochs=1",
     "was made with other values of bt_epochs, anchor_epochs"),
    ("config --set seed=x", "seed = 'x'"),
    ("plan --set seed=x", "seed = 'x'"),
    ("plan --gpus 0", "gpus"),
    ("plan --memory-gb -1", "memory"),
    ("plan --gpus x", "Invalid value for '--gpus'"),
]  # fmt: skip
CONFIGS = [
    ("utf16.yaml", "config file 'utf16.yaml'"), ("latin.yaml", "config file 'latin.yaml'"),
    ("numbers.yaml", "unknown parameter"), ("list.yaml", "must hold 'name: value' lines"),
    ("deep.yaml", "config file 'deep.yaml'"), ("bomb.yaml", "unknown parameter"), ("bad.yaml", "cannot be read"),
    ("tab.yaml", "cannot be read"), ("nested.yaml", "seed = {'a'"), ("null.yaml", "seed = 'null'"),
    ("python.yaml", "seed = "), ("none.yaml", "config file 'none.yaml' cannot be read"), (".", "config file '.'"),
]  # fmt: skip
COMMANDS = [
    ("nope", "No such command 'nope'"),
    ("--nope", "No such option"),
    ("train --nope", "No such option"),
    ("train --set", "requires an argument"),
    ("score", "Missing option"),
    ("judge --concurrency 0", "--concurrency"),
    ("notebook", "Missing argument"),
    ("notebook nowhere.ipynb", "notebook 'nowhere.ipynb' cannot be read"),
    ("notebook .", "notebook '.' cannot be read"),
    ("notebook no_notebook.ipynb", "is no notebook"),
    ("notebook text.ipynb", "is no notebook"),
    ("notebook table.yaml", "is no notebook"),
    ("notebook untagged.ipynb", "no cell tagged `parameters`"),
    (f"notebook {NB} -p alg=rloo", "did you mean 'algo'"),
    (f"notebook {NB} -p seed=[1]", "seed = '[1]'"),
    (f"notebook {NB} -p run_id=studies", "run_id = 'studies'"),
    (f"notebook {NB} -p run_id=whole", "already holds a run"),
    (f"notebook {NB} -p seed=nan", "seed = nan"),
]
STUDIES = [
    ("nowhere.yaml", "study 'nowhere.yaml' cannot be read"), (".", "study '.' cannot be read"),
    ("bad.yaml", "study 'bad.yaml' cannot be read"), ("empty.yaml", "study 'empty.yaml' cannot be read"),
    ("utf16.yaml", "study 'utf16.yaml' cannot be read"), ("deep.yaml", "study 'deep.yaml' cannot be read"),
    ("list.yaml", "study 'list.yaml'"), ("numbers.yaml", "study 'numbers.yaml'"),
    ("grid.yaml", "grid.beta has no values"),
    ("grid_name.yaml", "unknown parameter 'bet'"), ("worlds.yaml", "worlds = '0-'"), ("times.yaml", "times.rule"),
    ("no_table.yaml", "table = 'table99'"), ("cell.yaml", "beta = 'x'"), ("table.yaml --seeds 0-", "seeds = '0-'"),
    ("table.yaml --seeds 0-999999999", "are more than 10000"),
    ("table.yaml --seeds 0-99999999999999999999", "seeds = "),
    ("table.yaml --seeds 1,,2", "seeds = "), ("table.yaml --jobs 0", "--jobs"), ("table.yaml --set bet=1", "'bet'"),
    ("table.yaml --benchmarks nope", "benchmarks = 'nope': choose from"),
    ("table.yaml other/table.yaml", "two of the name"),
    ("table.yaml --benchmarks judgebench --data-dir nowhere", "no data of it"), ("foreign.yaml", "did not write"),
]  # fmt: skip
CASES = [*FIELDS, *[(f"config --config {file}", said) for file, said in CONFIGS], *COMMANDS]
CASES += [(f"study {words}", said) for words, said in STUDIES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    return made


@pytest.mark.parametrize(("words", "said"), CASES, ids=lambda v: v[:60])
def test_one_sentence(folder, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SAVE_RUNS", str(folder / "runs"))
    monkeypatch.setenv("SAVE_CACHE", str(folder / "cache"))
    before = {path: path.stat().st_size for path in folder.rglob("*")}
    refused(words.split(), said)
    assert {path: path.stat().st_size for path in folder.rglob("*")} == before


def refused(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("error:") == 1 and said in done.stderr, done.stderr
    assert "Traceback" not in done.output and len(done.stderr.splitlines()) == 1 and len(done.stderr) < 2100


@pytest.mark.parametrize("words", ["train --set total_steps=1", f"notebook {NB}", "study table.yaml --plain --seeds 0"])
@pytest.mark.parametrize("variable", ["SAVE_RUNS", "SAVE_CACHE"])
def test_folders_that_cannot_be_written_are_found_before_any_work(folder, tmp_path, monkeypatch, words, variable):
    monkeypatch.chdir(folder)
    for name in ("SAVE_RUNS", "SAVE_CACHE"):
        place = "/proc/none" if name == variable else tmp_path / name
        monkeypatch.setenv(name, str(place))
    monkeypatch.setattr("savelib.runs.train.prepare", None)
    refused(words.split(), f"{variable} = '/proc/none'")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_that_is_trained_elsewhere_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path))
    monkeypatch.setattr("savelib.runs.train.prepare", None)
    with RunLog(make_config(run_id="mine")):
        refused(["train", "--set", "run_id=mine"], "another process is training it at this moment")
    assert not list(tmp_path.iterdir()), "nothing came of it"


def test_damaged_runs_are_listed_beside_the_others(folder, monkeypatch):
    monkeypatch.setenv("SAVE_RUNS", str(folder / "runs"))
    done = CliRunner().invoke(app, ["runs"])
    assert done.exit_code == 0, done.output
    states = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:]}
    assert states == {"whole": "killed", "void": "unreadable", "cut": "unreadable", "lines": "unreadable"}


def test_a_damaged_line_of_metrics_is_named_with_what_to_do(folder, monkeypatch):
    monkeypatch.setenv("SAVE_RUNS", str(folder / "runs"))
    with pytest.raises(ConfigError, match=r"lines/metrics.jsonl, line 2 is damaged; restore it, or start a new run"):
        read_metrics("lines")
