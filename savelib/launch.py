"""Training in a process of its own, started and watched from a notebook or a script."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from savelib.config import Config
from savelib.paths import code_digest, runs_dir
from savelib.runlog import new_run_id, read_jsonl, read_manifest


class RunFailed(RuntimeError):
    """The training process ended with an error; the message is its own."""


def launch(config: Config, say: Callable[[str], None] | None = None) -> Path:
    """Run `python -m savelib train` with this config, wait for it, and return the run's folder.

    say: called with the progress line whenever it changes; by default lines are printed (and, in JupyterLab, a live one
    is shown). The process dies with this one: on an interrupt, an error or a kill.
    Raises RunFailed with the process's own error.
    """
    config = config.model_copy(update={"run_id": new_run_id(config)})
    folder = runs_dir() / config.run_id
    folder.mkdir(parents=True, exist_ok=True)
    say = say or _Progress(config)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file, open(folder / "train.log", "a+") as log:
        file.write(config.to_yaml())
        file.flush()
        begin = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "savelib", "train", "--config", file.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            while process.poll() is None:
                say(_status(folder, config, begin))
                time.sleep(0.5)
            say(_status(folder, config, begin))
        finally:
            _stop(process)
        if process.returncode:
            raise RunFailed(_reason(folder / "train.log", begin, process.returncode))
    return folder


def run_once(config: Config, prefix: str) -> Path:
    """The folder of a finished run of this very config, under a name made of it; launched only if there is none yet."""
    key = code_digest() + config.model_dump_json(exclude={"run_id", "resume"})
    digest = hashlib.sha256(key.encode()).hexdigest()[:6]
    run_id = f"{prefix}-{config.profile}-{config.rule}-{config.algo}-s{config.seed}-{digest}"
    folder = runs_dir() / run_id
    if (folder / "manifest.json").is_file() and read_manifest(folder)["status"] == "done":
        return folder
    return launch(config.model_copy(update={"run_id": run_id, "resume": "auto"}))


def _die_with_parent() -> None:
    """In the child: ask the kernel for SIGKILL when the parent is gone, a killed kernel included."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _status(folder: Path, config: Config, begin: int) -> str:
    """One line on where the run is: the last step's figures and the time left, or the log's last line before step 1."""
    rows = [r for r in read_jsonl(folder / "metrics.jsonl") if r["step"] > 0]
    if not rows:
        lines = _log_since(folder / "train.log", begin).splitlines()
        return lines[-1].strip() if lines else "starting"
    last, recent = rows[-1], rows[-20:]
    figures = {
        "gold": last.get("gold/success_rate"),
        "reward": last["reward/mean"],
        "kept": last.get("filter/kept"),
        "KL": last.get("policy/kl"),
    }
    pace = (last["seconds"] - recent[0]["seconds"]) / max(len(recent) - 1, 1)
    left = f"{pace * (config.total_steps - last['step']):.0f} s left" if len(recent) > 1 else ""
    said = "  ".join(f"{k} {v:.3f}" for k, v in figures.items() if v is not None)
    return f"step {last['step']}/{config.total_steps}  {said}  {left}".rstrip()


class _Progress:
    """Prints a line each tenth of the steps; in a notebook's front end, one live line besides."""

    def __init__(self, config: Config):
        self.every, self.shown, self.printed = max(1, config.total_steps // 10), "", -1
        try:
            from IPython import get_ipython
            from IPython.display import display

            self.live = display({"text/plain": ""}, raw=True, display_id=True) if get_ipython() else None
        except ImportError:
            self.live = None

    def __call__(self, line: str) -> None:
        if line == self.shown:
            return
        self.shown = line
        if self.live:
            self.live.update({"text/plain": line}, raw=True)
        step = int(line.split()[1].split("/")[0]) if line.startswith("step ") else None
        if step is None or step // self.every != self.printed:
            self.printed = self.printed if step is None else step // self.every
            print(line, flush=True)


def _log_since(path: Path, begin: int) -> str:
    with open(path, errors="replace") as file:
        file.seek(begin)
        return file.read()


def _reason(path: Path, begin: int, code: int) -> str:
    """The process's own words: its one-sentence error, else its traceback."""
    text = _log_since(path, begin).strip()
    if text.splitlines() and text.splitlines()[-1].startswith("error: "):
        return text.splitlines()[-1].removeprefix("error: ")
    at = text.rfind("Traceback (most recent call last)")
    said = text[at:] if at >= 0 else "\n".join(text.splitlines()[-20:])
    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    return f"training {how}; the whole log is {path}\n{said}"
