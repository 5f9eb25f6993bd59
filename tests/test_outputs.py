"""No command overwrites an input, or a file that it did not write."""

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError
from test_judge import Script, alpaca_files, completion
from typer.testing import CliRunner

from savelib.benchmarks.judged.answers import Log
from savelib.benchmarks.judged.judge import judge
from savelib.cli import app
from savelib.config import ConfigError
from savelib.errors import sentence
from savelib.paths import atomic_folder, writable_file, writable_folder


def never(path: Path) -> bool:
    return False


def spellings(folder: Path) -> list[str]:
    """Other paths of folder/in.json."""
    (folder / "sub").mkdir()
    (folder / "soft.json").symlink_to(folder / "in.json")
    os.link(folder / "in.json", folder / "hard.json")
    return [str(folder / name) for name in ("in.json", "sub/../in.json", "./in.json", "soft.json", "hard.json")]


def test_an_output_that_is_an_input_is_refused_in_every_spelling(tmp_path, monkeypatch):
    (tmp_path / "in.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    for out in [*spellings(tmp_path), "in.json"]:
        with pytest.raises(ConfigError, match="is also given as prompts, and would be lost"):
            writable_file("out", out, {"none": None, "prompts": tmp_path / "in.json"}, lambda path: True)
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    with pytest.raises(ConfigError, match="is also given as model"):
        writable_folder("out", tmp_path / "link", {"model": "sub"})


def test_what_another_wrote_is_refused(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out, said in [
        ("other", "exists, and this command did not write it"),
        ("dangling", "exists"),
        ("", "is a folder; give a file"),
        ("new/", "is a folder"),
        ("other/new", "is a file, not a folder"),
    ]:
        with pytest.raises(ConfigError, match=said):
            writable_file("out", f"{tmp_path}/{out}", {}, never)
    with pytest.raises(ConfigError, match="out is empty"):
        writable_file("out", " ", {})
    with pytest.raises(ConfigError, match="no file can be written to /proc"):
        writable_file("out", "/proc/new", {})
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        writable_folder("out", tmp_path / "other", {})
    with pytest.raises(ConfigError, match="holds files that this command did not write"):
        writable_folder("out", tmp_path, {})
    assert writable_file("out", tmp_path / "a/b/c", {}) == tmp_path / "a/b/c"
    assert writable_folder("out", tmp_path / "a/b", {}) == tmp_path / "a/b" and not (tmp_path / "a").exists()
    assert writable_file("out", tmp_path / "other", {}, lambda path: path.read_text() == "mine")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)"),
])  # fmt: skip
def test_a_full_disk_is_told_by_the_path_that_was_to_be_written(tmp_path, error):
    with pytest.raises(OSError) as raised, atomic_folder(tmp_path / "world"):
        raise error
    assert sentence(raised.value) == f"{tmp_path}/world: No space left on device; make room"
    with pytest.raises(SafetensorError, match="header"), atomic_folder(tmp_path / "world"):
        raise SafetensorError("header too large")
    assert not list(tmp_path.iterdir())


def test_a_log_is_known_and_another_file_stays_as_it_is(tmp_path):
    with Log(tmp_path / "log") as log:
        log.append({"key": "a"})
        log.write(tmp_path / "out", "text")
    (tmp_path / "log").write_bytes((tmp_path / "log").read_bytes() + b'{"ke')
    with Log(tmp_path / "log") as log:
        assert log.rows == [{"key": "a"}]
    for other in (b"no newline", b'{"prompt": 1}\n', b'{"key": "a"}\n{"prompt": "x"', b"[1]\n", b"\xff\n"):
        (tmp_path / "other").write_bytes(other)
        with pytest.raises(ConfigError, match="no log of this command"):
            Log(tmp_path / "other")
        assert (tmp_path / "other").read_bytes() == other


def test_judge_loses_neither_its_inputs_nor_an_earlier_answer(tmp_path):
    ours, theirs = alpaca_files(tmp_path, ["<1>", "<2>"])
    before = {path: path.read_bytes() for path in (ours, theirs)}
    out = tmp_path / "judged.json"
    answer = "M"
    with Script(lambda prompt, *_: completion(answer)) as s:
        for place in (ours, theirs):
            with pytest.raises(ConfigError, match="would be lost"):
                judge("alpaca", ours, theirs, place, s.endpoint())
        assert {path: path.read_bytes() for path in before} == before and not s.asked
        judge("alpaca", ours, theirs, out, s.endpoint())
        first = out.read_text()
        judge("alpaca", ours, theirs, out, s.endpoint())  # its own output may be written again
        out.write_text("of somebody else")
        with pytest.raises(ConfigError, match="did not write it"):
            judge("alpaca", ours, theirs, out, s.endpoint())
        out.write_text(first)
        s.server.shutdown()
        with pytest.raises(ConfigError, match="No judgments are written .*judged.json is of an earlier call"):
            judge("alpaca", ours, theirs, out, s.endpoint(retries=0, timeout=0.5), settings={"n": 1})
        assert out.read_text() == first


@pytest.mark.parametrize(("words", "said"), [
    ("respond --policy P --benchmark alpaca --prompts in.json --out in.json", "prompts"),
    ("respond --policy P --benchmark alpaca --prompts in.json --out soft.json", "prompts"),
    ("evaluate --model sub --benchmarks judgebench --out sub", "model"),
    ("evaluate --model x --benchmarks judgebench --data-dir sub --out ./sub", "data_dir"),
    ("evaluate --model x --benchmarks judgebench --out in.json", "is a file; give a folder"),
    ("evaluate --model x --benchmarks judgebench --out .", "did not write"),
    ("bench --quick --out .", "did not write"),
    ("bench --quick --out in.json", "is a file; give a folder"),
])  # fmt: skip
def test_commands_refuse_before_any_work(tmp_path, monkeypatch, words, said):
    (tmp_path / "in.json").write_text(json.dumps([{"instruction": "a"}]))
    spellings(tmp_path)
    (tmp_path / "sub" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 2 and done.stderr.startswith("error: out = ") and said in done.stderr
    assert sorted(tmp_path.rglob("*")) == before and json.loads((tmp_path / "in.json").read_text())
