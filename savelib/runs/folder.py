"""A run is a folder: config.yaml first, metrics.jsonl and samples.jsonl as it goes, manifest.json last."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections import deque
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from savelib import __version__
from savelib.config import Config, ConfigError, make_config
from savelib.errors import SavelibError
from savelib.paths import lock, project_root, runs_dir, strict_json, write_atomically
from savelib.processes import world_size
from savelib.progress import progress_line

PACE = 20  # steps that the time left is reckoned from
LOCK = ".lock"  # held while a process trains the run
LOGS = ("metrics.jsonl", "samples.jsonl")
RESTORE = "restore it, or start a new run under another run_id"


class CheckpointError(SavelibError):
    """A file of a run that could not be written; the message names it, the cause and the checkpoint that is left."""

    def __init__(self, what: str, error: Exception, run: Path):
        left = checkpoints(run)
        super().__init__(
            f"{what}: {error}. The last good checkpoint is {left[-1] if left else 'none'}. Make room, then resume with "
            "resume=auto"
        )


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, good or damaged, the oldest first."""
    found = [f for f in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", f.name)]
    return sorted(found, key=lambda f: int(f.name.removeprefix("step_")))


def new_run_id(config: Config) -> str:
    """The config's run_id, or a new one made of profile, rule, algorithm, seed and the time in UTC."""
    made = f"{config.profile}-{config.rule}-{config.algo}-s{config.seed}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = [made, *(f"{made}-{i}" for i in range(2, 100))]  # the clock may have been set back
    return config.run_id or next(name for name in names if not (runs_dir() / name).exists())


def refuse_existing(run_id: str) -> None:
    """Raise ConfigError when the folder of run_id already holds a run."""
    folder = runs_dir() / run_id
    if (folder / "config.yaml").exists():
        raise ConfigError(
            f"run_id = {run_id!r}: {folder} already holds a run; choose another run_id, or resume it with resume=auto"
        ) from None


class RunLog:
    """Writes a run's files. `with RunLog.create(config) as log:` writes the manifest at the end, whatever happened.

    While it is open, the run's folder is locked: two processes never write to one run, and `read_manifest` sees
    who lives. It writes nothing before `begin`.
    """

    def __init__(self, config: Config):
        self.config, self.folder, self.started = config, runs_dir() / config.run_id, time.monotonic()
        self.recent: deque[dict[str, Any]] = deque(maxlen=PACE)
        self.begun = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / LOCK, "w")  # noqa: SIM115, it is held until the run ends
        if not lock(self.lock):
            self.lock.close()
            raise ConfigError(f"run_id = {config.run_id!r}: another process is training it at this moment")

    @classmethod
    def create(cls, config: Config) -> RunLog:
        """Lock and begin a new run."""
        log = cls(config)
        log.begin()
        return log

    def begin(self, resuming: bool = False, source: Path | None = None, step: int = -1) -> None:
        """Start the run's files, with the lines up to `step` of the run folder `source` (default: its own).

        Raises ConfigError when it is not resuming and the folder holds a run; nothing is overwritten.
        """
        source = source or self.folder
        if not resuming:
            refuse_existing(self.folder.name)
        kept = {name: [row for row in read_jsonl(source / name) if row["step"] <= step] for name in LOGS}
        if [row["step"] for row in kept["metrics.jsonl"]] != list(range(step + 1)):
            raise ConfigError(f"{source / 'metrics.jsonl'} has not one line for each step from 0 to {step}; {RESTORE}")
        self.started -= kept["metrics.jsonl"][-1]["seconds"] if step >= 0 else 0
        try:
            if not resuming:
                write_atomically(self.folder / "config.yaml", self.config.to_yaml())
            (self.folder / "manifest.json").unlink(missing_ok=True)
            clean(self.folder)
            for name in LOGS:
                write_atomically(self.folder / name, _as_lines(kept[name]))
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written", error, self.folder) from None
        self.begun = True

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one line: the step, seconds since the start, and every value."""
        row = {"step": step, "seconds": round(time.monotonic() - self.started, 3)} | values
        self._append("metrics.jsonl", [row])
        self.recent.append(row)

    def progress(self) -> str:
        return step_line(list(self.recent), self.config.total_steps)

    def samples(self, rows: list[dict[str, Any]]) -> None:
        self._append("samples.jsonl", rows)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(_as_lines(rows))
        except OSError as error:
            raise CheckpointError(f"{self.folder / name} could not be written", error, self.folder) from None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if self.begun:
            self._write_manifest(kind, error)
        elif os.listdir(self.folder) == [LOCK]:  # nothing came of it
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.close()

    def _write_manifest(self, kind: type | None, error: BaseException | None) -> None:
        status = "done" if kind is None else "stopped" if issubclass(kind, KeyboardInterrupt) else "failed"
        manifest = {
            "status": status,
            "error": None if error is None else f"{kind.__name__}: {error}",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.started, 1),
            "savelib": __version__,
            "commit": _commit(),
            "python": platform.python_version(),
            "packages": {
                p: _version(p) for p in ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets")
            },
            "device": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"cpu, {torch.get_num_threads()} threads",
            "num_processes": world_size(),
        }
        try:
            write_atomically(self.folder / "manifest.json", strict_json(manifest, indent=2) + "\n")
        except OSError as full:  # must not hide the error that ended the run
            print(f"no manifest could be written to {self.folder}: {full}", flush=True)


def mark_failed(folder: Path, reason: str) -> None:
    """Put the reason into the manifest of a run whose main process did not know it, or did not live to write one."""
    path = folder / "manifest.json"
    if (folder / "config.yaml").is_file():
        manifest = json.loads(path.read_text()) if path.is_file() else {}
        write_atomically(path, strict_json(manifest | {"status": "failed", "error": reason}, indent=2) + "\n")


def step_line(rows: list[dict[str, Any]], total_steps: int) -> str:
    """One line on where a run is, from the last rows of its metrics: the last step's figures, speed and time left."""
    last, steps = rows[-1], [r for r in rows[-PACE:] if r["step"] > 0]
    figures = {
        "gold": last.get("gold/success_rate"),
        "reward": last.get("reward/mean"),
        "kept": last.get("filter/kept"),
        "KL": last.get("policy/kl"),
    }
    said = [f"{k} {v:.3f}" for k, v in figures.items() if v is not None]
    if last.get("time/tokens_per_second") is not None:
        said.append(f"{last['time/tokens_per_second']:.0f} tokens/s")
    return progress_line("step", last["step"], total_steps, [(r["step"], r["seconds"]) for r in steps], said)


def _as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(strict_json(row, ensure_ascii=False) + "\n" for row in rows)


def clean(folder: Path) -> None:
    """Remove what writers of a run's folder that were killed left unfinished."""
    for part in [*folder.glob(".*.part"), *(folder / "checkpoints").glob(".*.part")]:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with `+` behind it where tracked files were changed; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=project_root(), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# reading


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's JSONL file; a last line that a killed writer left unfinished is passed over.

    Raises ConfigError that names the first line that is damaged.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0
        except (ValueError, TypeError, LookupError, RecursionError):
            raise ConfigError(f"{path}, line {number} is damaged; {RESTORE}") from None
    return rows


def run_folder(run: str | Path) -> Path:
    """The folder of a run given by id or path. Raises ConfigError naming the runs that there are."""
    for folder in (Path(run), runs_dir() / run):
        if (folder / "config.yaml").is_file():
            return folder
    known = [f.parent.name for f in sorted(runs_dir().glob("*/config.yaml"))]
    raise ConfigError(f"run {str(run)!r} not found in {runs_dir()}; there are: {', '.join(known) or 'none yet'}")


def read_config(run: str | Path) -> Config:
    """Raises ConfigError where config.yaml is damaged, or of another version of savelib."""
    file = run_folder(run) / "config.yaml"
    try:
        config = make_config(file)
    except ConfigError as error:
        raise ConfigError(f"{file} is damaged, or of another version of savelib ({error}); {RESTORE}") from None
    if not config.run_id:
        raise ConfigError(f"{file} is damaged: it names no run_id; {RESTORE}")
    return config


def read_metrics(run: str | Path) -> pd.DataFrame:
    """metrics.jsonl, one row a step; step 0 is the evaluation before training. null is nan."""
    rows = pd.DataFrame(read_jsonl(run_folder(run) / "metrics.jsonl"))
    return rows.astype({name: float for name in rows if rows[name].dtype == object})  # nothing but null


def read_samples(run: str | Path) -> pd.DataFrame:
    return pd.DataFrame(read_jsonl(run_folder(run) / "samples.jsonl"))


def read_manifest(run: str | Path) -> dict[str, Any]:
    """manifest.json; where it is not written, only status: `running`, or `killed` if no process trains the run."""
    folder = run_folder(run)
    path = folder / "manifest.json"
    if path.is_file():
        try:
            manifest = json.loads(path.read_text())
            return manifest | {"status": str(manifest["status"])}
        except (ValueError, TypeError, LookupError):
            raise ConfigError(
                f"{path} is damaged; delete it: then the run counts as killed, and resume=auto continues it"
            ) from None
    return {"status": "running" if _locked(folder) else "killed"}


def _locked(folder: Path) -> bool:
    if not (folder / LOCK).is_file():
        return False
    with open(folder / LOCK) as file:
        return not lock(file, shared=True)
