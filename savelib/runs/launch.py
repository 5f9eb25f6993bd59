"""Training in processes of their own, started and watched from a notebook or a script."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from savelib.config import Config
from savelib.errors import SavelibError
from savelib.paths import code_digest, resolve, runs_dir
from savelib.processes import MEETING, launched_by_torchrun
from savelib.runs.folder import mark_failed, new_run_id, read_jsonl, read_manifest, step_line
from savelib.show.live import Picture
from savelib.signals import die_with_parent

# errors of a process whose partner is gone: never the reason, if there is another
PARTNER_GONE = re.compile(r"Connection (reset|closed|refused)|Broken pipe|gloo|NCCL|ProcessGroup|Socket", re.IGNORECASE)
SENTENCES = (
    "ConfigError",
    "NonFiniteError",
    "CheckpointError",
    "FrozenWeightsError",
    "RunFailed",
)  # errors that say all in their message
# the lines of train.log that tell where a run is before its first step
OWN_LINE = re.compile(r"stage \d|  epoch |resuming after |.* is already done$")
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
# of processes on one machine: none of their sockets is seen from outside
ALONE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}
GRACE = 5  # seconds from the request to end to the kill


class RunFailed(SavelibError):
    """The training process ended with an error; the message is its own."""


def needs_torchrun(config: Config) -> bool:
    return config.num_processes > 1 or config.backend != "ddp"


def worker(config: Config) -> Path:
    """`train` in this process; under torchrun an error is noted down for `launch`, with its traceback."""

    def run() -> Path:
        from savelib.runs.train import train

        return train(config)

    return record(run)() if launched_by_torchrun() else run()


def launch(config: Config, say: Callable[[str], None] | None = None) -> Path:
    """Run `python -m savelib train` with this config, wait for it, and return the run's folder.

    With several processes or DeepSpeed, torchrun starts them on this machine, on a free port. say: called with the
    progress line whenever it changes; by default lines are printed, and JupyterLab shows a picture of the run. All
    processes die with this one: on an interrupt, an error or a kill.
    Raises RunFailed with the error of the process that failed first.
    """
    config = config.model_copy(update={"run_id": new_run_id(config)})
    folder = runs_dir() / config.run_id
    folder.mkdir(parents=True, exist_ok=True)
    say, picture = say or _Progress(config), Picture(config.total_steps)
    with tempfile.TemporaryDirectory() as private, open(folder / "train.log", "a+") as log:
        (Path(private) / "config.yaml").write_text(config.to_yaml())
        words, env = ["-m", "savelib", "train", "--config", f"{private}/config.yaml"], dict(os.environ)
        if needs_torchrun(config):
            # they meet by files: a rendezvous by TCP would listen on all of the machine's network interfaces
            files = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint={private}/rendezvous"]
            torchrun = [*files, "--local-addr=127.0.0.1", f"--nproc-per-node={config.num_processes}"]
            words = ["-m", "torch.distributed.run", *torchrun, f"--log-dir={private}", *words]
            env |= ALONE | {MEETING: f"file://{private}/processes"}
        begin, watched, parent = log.seek(0, os.SEEK_END), _Watched(folder, config), os.getpid()
        process = subprocess.Popen(
            [sys.executable, "-u", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=env,
            preexec_fn=lambda: die_with_parent(parent),  # a killed notebook kernel included
        )
        try:
            while process.poll() is None:
                say(line := watched.line())
                picture(watched.rows, line)
                time.sleep(0.5)
            say(watched.line())
        finally:
            _stop(process)
            picture(watched.rows, watched.line(), last=True)
        status = read_manifest(folder)["status"] if (folder / "config.yaml").is_file() else "missing"
        if process.returncode or status != "done":
            said = _Said(folder / "train.log", begin, Path(private))
            failure = said.failure()  # torchrun asks all ranks to stop when one has failed: "stopped" alone says little
            if status == "stopped" and watched.begun() and not failure:
                how = f"resume=auto resumes {folder}"
                raise RunFailed(f"the training process was asked to stop, not by this one; {how}")
            reason = failure or said.last_words(process.returncode)
            if watched.begun():  # else the folder holds another run's files, or none
                mark_failed(folder, reason)
            raise RunFailed(reason)
    return folder


def key_of(config: Config) -> str:
    """What tells a run from every other: its whole configuration but for its name, and the code."""
    key = code_digest() + config.model_dump_json(exclude={"run_id", "resume"})
    return hashlib.sha256(key.encode()).hexdigest()


def run_once(config: Config, prefix: str) -> Path:
    """The folder of a finished run of this very config, under a name made of it; launched only if there is none yet."""
    run_id = once_id(config, prefix)
    folder = runs_dir() / run_id
    if (folder / "manifest.json").is_file() and read_manifest(folder)["status"] == "done":
        return folder
    return launch(config.model_copy(update={"run_id": run_id, "resume": "auto"}))


def once_id(config: Config, prefix: str) -> str:
    """The id under which `run_once` keeps a run of this very config."""
    return f"{prefix}-{config.profile}-{config.rule}-{config.algo}-s{config.seed}-{key_of(config)[:6]}"


def _stop(process: subprocess.Popen) -> None:
    """End the process and all of its own; a second interrupt does not keep it from being killed."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class _Lines:
    """The whole lines of a file, each given once; after it was replaced, from its start."""

    def __init__(self, path: Path, begin: int = 0):
        self.path, self.offset, self.inode = path, begin, path.stat().st_ino if path.exists() else 0

    def __call__(self) -> list[str]:
        try:
            with open(self.path, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                self.offset, self.inode = (self.offset if inode == self.inode else 0), inode
                file.seek(self.offset)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole.decode(errors="replace").replace("\r", "\n").splitlines()


class _Watched:
    """Where a run is, from what its folder got since now. What an earlier attempt wrote there is passed over."""

    def __init__(self, folder: Path, config: Config):
        self.metrics, self.log = _Lines(folder / "metrics.jsonl"), _Lines(folder / "train.log")
        self.log.offset = (folder / "train.log").stat().st_size
        self.before, self.total_steps = self.metrics.inode, config.total_steps
        earlier = read_jsonl(folder / "metrics.jsonl")
        if config.resume not in ("never", "auto"):
            earlier += read_jsonl(Path(resolve(config.resume)).parent.parent / "metrics.jsonl")
        self.earlier = {(row["step"], row["seconds"]) for row in earlier}
        self.rows, self.said = [], "starting"

    def begun(self) -> bool:
        """Whether the process has opened the run's files: it replaces metrics.jsonl, and nothing else does."""
        self.metrics()
        return self.metrics.inode != self.before

    def line(self) -> str:
        """The last step's figures and the time left; before the first step, the last that savelib said itself."""
        rows = map(json.loads, self.metrics())
        self.rows += [row for row in rows if (row["step"], row["seconds"]) not in self.earlier]
        self.said = ([self.said] + [line.strip() for line in self.log() if OWN_LINE.match(line)])[-1]
        return step_line(self.rows, self.total_steps) if self.rows else self.said


class _Progress:
    """Prints a line each tenth of the steps."""

    def __init__(self, config: Config):
        self.total, self.every = config.total_steps, max(1, config.total_steps // 10)
        self.shown, self.printed = "", -1

    def __call__(self, line: str) -> None:
        if line == self.shown:
            return
        self.shown = line
        step = int(line.split()[1].split("/")[0]) if line.startswith("step ") else None
        if step is None or step == self.total or step // self.every != self.printed:
            self.printed = self.printed if step is None else step // self.every
            print(line, flush=True)


class _Said:
    """What the processes of one attempt said as they ended: the log from `begin` on, and torchrun's error files."""

    def __init__(self, path: Path, begin: int, private: Path):
        self.where, self.recorded = f"the whole log is {path}", _recorded(private)
        with open(path, errors="replace") as file:
            file.seek(begin)
            self.text = file.read().strip()

    def failure(self) -> str | None:
        """The words of the rank that failed first, of itself: its one-sentence error, else its traceback or its signal.

        None if every rank was asked to stop, or lost its partner.
        """
        for gone, _, rank, message, traceback in self.recorded:
            if not gone:
                kind, _, sentence = message.partition(":")
                failed = f"rank {rank} failed; {self.where}\n{_own_frames(traceback)}"
                return sentence.strip() if kind in SENTENCES else failed
        for rank, exitcode in _silent(self.text):
            return f"rank {rank} {_ended(exitcode)}; {self.where}{_stack(self.text)}"
        return None

    def last_words(self, code: int) -> str:
        """Where no rank failed of itself: a lost partner, the process's own words, how it ended."""
        for _, _, rank, _, traceback in self.recorded:
            return f"rank {rank} lost its partner; {self.where}\n{_own_frames(traceback)}"
        text = self.text
        sentences = re.findall(r"^error: (.*)$", text, re.MULTILINE)
        if code == 2 and sentences:
            return sentences[-1]
        at = text.rfind("\nTraceback (most recent call last)")
        said = _own_frames(text[at + 1 :]) if "Traceback (most" in text else "\n".join(text.splitlines()[-20:])
        if code == 0:
            return f"training ended without an error, but wrote no manifest; {self.where}\n{said}"
        return f"training {_ended(code)}; {self.where}" + (_stack(text) or f"\n{said}")


def _recorded(private: Path) -> list[tuple[bool, float, int, str, str]]:
    """torchrun's error files: (the partner was gone, time, rank, message, traceback), the likeliest reason first."""
    errors = []
    for file in private.rglob("error.json"):
        with contextlib.suppress(ValueError):  # half written
            said = json.loads(file.read_text())["message"]
            gone = bool(PARTNER_GONE.search(said["message"]))
            extra = said["extraInfo"]
            errors.append(
                (gone, float(extra["timestamp"]), int(file.parent.name), said["message"], extra["py_callstack"])
            )
    return sorted(errors)


def _silent(text: str) -> list[tuple[int, int]]:
    """(rank, exit code) of the processes that ended without a word, from torchrun's report, its root cause first.

    Those that were asked to stop, by SIGTERM, are left out: the main process ends with 130 then.
    """
    pattern = r"rank +: (\d+) .*\n +exitcode +: (-?\d+) .*\n +error_file: <N/A>"
    others, _, root = text.rpartition("Root Cause (first observed failure):")
    found = [(int(rank), int(code)) for part in (root, others) for rank, code in re.findall(pattern, part)]
    return [(rank, code) for rank, code in found if code not in (-signal.SIGTERM, 130)]


def _ended(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    hint = ", often for want of memory" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.Signals(-code).name}{hint})"


def _stack(text: str) -> str:
    """Where a process was when it crashed, as Python's fault handler wrote it; empty if nothing did."""
    found = re.findall(r"^Fatal Python error: (.*)|^Current thread .*\n((?:  File .*\n?)+)", text, re.MULTILINE)
    said, frames = "".join(f[0] for f in found[:1]), "".join(f[1] for f in found[1:2])
    frames = re.sub(r"(savelib/runs/train\.py.*\n)(?:.*\n?)*", r"\1", frames)
    return f"\nTraceback (most recent call first):\n{frames}{said}" if found else ""


def _own_frames(traceback: str) -> str:
    """The traceback from `train` on, without the command line's frames."""
    return re.sub(r"\A(Traceback .*\n)(?:  .*\n)*?(?=  File .*savelib/runs/train\.py)", r"\1", traceback).strip()
