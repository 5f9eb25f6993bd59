"""The command line as a whole: what it imports, how every kind of error ends, and how it is called."""

import errno
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import papermill
import pytest
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillException
from typer.testing import CliRunner

from savelib import cli
from savelib.cli import app
from savelib.config import Config, ConfigError, from_texts, make_config
from savelib.errors import SavelibError, sentence
from savelib.runs.checkpoint import CheckpointError
from savelib.runs.launch import SENTENCES, RunFailed
from savelib.training.engine import FrozenWeightsError
from savelib.training.finite import NonFiniteError

ROOT = Path(__file__).resolve().parent.parent
SLOW = ("torch", "transformers", "datasets", "deepspeed", "pandas", "numpy")


def imported(code: str) -> set[str]:
    """The packages of SLOW that a fresh process imports for the code."""
    code += f"\nimport sys; print([name for name in {SLOW} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))


def test_help_imports_nothing_that_is_slow():
    words = ("[]", "['--help']", "['train', '--help']", "['judge', '--help']")
    calls = "\n".join(f"with suppress(SystemExit): app({w})" for w in words)
    assert imported(f"from contextlib import suppress\nfrom savelib.cli import app\n{calls}") == set()


def test_the_configuration_needs_torch_alone():
    assert not imported("import savelib.config") & {"transformers", "datasets", "deepspeed", "pandas"}


def test_help_lists_every_command_with_its_first_sentence():
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0 and not done.stderr
    for command in app.registered_commands:
        assert (command.name or command.callback.__name__) in done.stdout
    assert CliRunner().invoke(app, []).exit_code == 0


def test_the_console_command_is_main():
    from savelib.__main__ import main

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"savelib": f"{main.__module__}:{main.__name__}"}


OURS = (ConfigError, NonFiniteError, FrozenWeightsError, CheckpointError, RunFailed)


def test_our_errors_are_one_family():
    assert all(issubclass(kind, SavelibError) for kind in OURS) and {kind.__name__ for kind in OURS} == set(SENTENCES)


@pytest.mark.parametrize(("error", "said"), [
    (ConfigError("a = 1: bad"), "a = 1: bad"),
    (FrozenWeightsError("step 3:\n  bad"), "step 3: bad"),
    (RunFailed("rank 1 failed\nTraceback (most recent call last):\nKeyError: 1"), "rank 1 failed"),
    (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device; make room"),
    (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: Read-only file system; choose a place that can"),
    (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; choose a place that you may"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a: Is a directory; give a file"),
    (OSError("the hub\nsays no"), "the hub"),
    (ConfigError("a = \x1b[31m\udcff: bad"), r"a = \x1b[31m\udcff: bad"),
    (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "No module named 'wandb'; install it"),
    (ModuleNotFoundError("SmolLM2 needs the package gguf: run x"), "SmolLM2 needs the package gguf: run x"),
])  # fmt: skip
def test_an_error_of_a_command_is_one_sentence(monkeypatch, error, said):
    done = raising(monkeypatch, error)
    assert done.exit_code == 2 and done.stderr.count("error:") == 1
    assert done.stderr.startswith(f"error: {said}") and done.stdout == ""
    assert ("Traceback" in done.stderr) == ("Traceback" in str(error))


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyError("y"), ModuleNotFoundError("z", name="savelib.z")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    done = raising(monkeypatch, error)
    assert done.exit_code == 1 and "error:" not in done.stderr
    assert "Traceback" in done.stderr and "in raises" in done.stderr
    assert done.stderr.splitlines()[-1] == "this is a bug in savelib: please report it with the lines above"


def raising(monkeypatch, error: BaseException):
    def raises(*_):
        raise error

    monkeypatch.setattr(cli, "_made", raises)
    return CliRunner().invoke(app, ["config"])


def test_an_error_of_any_length_is_short(monkeypatch):
    assert len(raising(monkeypatch, ConfigError("x" * 10**6)).stderr) < 2100


def test_an_error_of_the_system_names_the_path(tmp_path):
    with pytest.raises(OSError) as error:
        (tmp_path / "none" / "file").write_text("")
    assert sentence(error.value) == f"{tmp_path}/none/file: No such file or directory; check the path"


def test_an_interrupt_says_how_to_resume(monkeypatch):
    from savelib.runs import launch

    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "worker", stop)
    done = CliRunner().invoke(app, ["train", "--set", "run_id=mine"])
    assert done.exit_code == 130 and "Traceback" not in done.stderr
    assert "resume with the same command and --set run_id=mine --set resume=auto" in done.stderr


# the text after --set


@pytest.mark.parametrize("text", [
    "0123", "1_000", "12:30:00", "a #b", "*.jsonl", "[", "@x", "a: b", "%d", "{a", "null", "true", "1e3", "!x", "&a",
    "'", "~", "- a", "a=b", '"', "0x10", "2024-01-01", "`", "|", ">", "? a", "é",
])  # fmt: skip
def test_a_text_field_keeps_its_text(text):
    assert make_config(**from_texts([f"prompts={text}"])).prompts == text


@pytest.mark.parametrize(("pair", "value"), [
    ("total_steps=1e3", 1000), ("total_steps=1_000", 1000), ("policy_lr=1e-6", 1e-6), ("policy_lr=2", 2.0),
    ("beta=0", 0.0), ("freeze_policy=true", True), ("freeze_policy=False", False), ("freeze_policy=1", True),
    ("seed=0007", 7), ("eval_preferences=", ""),
])  # fmt: skip
def test_other_fields_are_read(pair, value):
    name = pair.partition("=")[0]
    assert getattr(make_config(**from_texts([pair])), name) == value


def test_every_default_survives_the_command_line():
    base = make_config(profile="paper")
    texts = [f"{name}={getattr(base, name)}" for name in Config.model_fields]
    assert make_config(**from_texts(texts)) == base


# a notebook that does not end well


def kernel_error(name: str, value: str) -> papermill.PapermillExecutionError:
    return papermill.PapermillExecutionError(1, 1, "x", name, value, ["Traceback"])


@pytest.mark.parametrize(("error", "code", "said"), [
    (kernel_error("KeyboardInterrupt", ""), 130, "resume with the same command and -p run_id=mine -p resume=auto"),
    (DeadKernelError("x"), 2, "error: the notebook's kernel died"),
    (kernel_error("ConfigError", "a = 1: bad"), 2, "error: a = 1: bad; the executed notebook is {out}"),
    (kernel_error("RunFailed", "rank 1 failed\nTraceback (x):\nE: 1"), 2, "rank 1 failed; the executed notebook"),
    (kernel_error("KeyError", "'a'"), 2, "error: KeyError: 'a'; the executed notebook is {out}"),
    (PapermillException("no kernel"), 2, "cannot be run: no kernel"),
    (NoSuchKernel("odd"), 2, "cannot be run: No such kernel named odd"),
])  # fmt: skip
def test_a_notebook_that_stops(monkeypatch, tmp_path, error, code, said):
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path))
    given = {}

    def execute(source, out, values, **_):
        given.update(values)
        Path(out).write_text(nbformat.writes(nbformat.read(source, 4)))
        raise error

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    words = ["-p", "run_id=mine", "-p", "total_steps=1e1", "-p", "prompts=0123"]
    done = CliRunner().invoke(app, ["notebook", str(ROOT / "notebooks/03_save_train.ipynb"), *words])
    assert done.exit_code == code and said.format(out=tmp_path / "mine/03_save_train.ipynb") in done.stderr
    assert done.stderr.count("error:") == (code == 2) and "bug" not in done.stderr
    assert given == {"run_id": "mine", "total_steps": 10, "prompts": "0123"}
    assert (tmp_path / "mine/03_save_train.html").is_file(), "what was done can be read"


def test_a_notebook_of_somebody_else_is_not_overwritten(monkeypatch, tmp_path):
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path))
    (tmp_path / "mine").mkdir()
    source = ROOT / "notebooks/03_save_train.ipynb"
    for content in ("notes", source.read_text()):
        (tmp_path / "mine/03_save_train.ipynb").write_text(content)
        done = CliRunner().invoke(app, ["notebook", str(source), "-p", "run_id=mine"])
        assert done.exit_code == 2 and "this command did not write it" in done.stderr
        assert (tmp_path / "mine/03_save_train.ipynb").read_text() == content
    executed = tmp_path / "mine/03_save_train.ipynb"
    executed.write_text(json.dumps(json.loads(source.read_text()) | {"metadata": {"papermill": {}}}))
    done = CliRunner().invoke(app, ["notebook", str(executed), "-p", "run_id=mine"])
    assert done.exit_code == 2 and "is also given as its source" in done.stderr
