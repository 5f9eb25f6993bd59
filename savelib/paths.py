"""Cache and run folders; atomic writes; digests."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Folder of everything built once and reused: `$SAVE_CACHE`, else `~/.cache/savelib`. Not created here."""
    return Path(os.environ.get("SAVE_CACHE") or "~/.cache/savelib").expanduser()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it to `target` on success, remove it on any error.

    Builders may race: the first rename wins, the others drop their copy.
    Pitfall: a non-empty folder that is already at `target` stays, and what was written here is dropped.
    """
    folder = temporary_folder(target)
    try:
        yield folder
        publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_folder(target: Path) -> Path:
    """A new, empty folder beside `target`, its name beginning with a dot and ending with `.part`."""
    target = Path(target)
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    folder.mkdir(parents=True)
    return folder


def publish(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target`, its files being on the disk first; a non-empty `target` stays."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    try:
        os.replace(folder, target)
    except OSError:
        if not target.is_dir():
            raise
    sync(target.parent)


def drop(folder: Path) -> None:
    """Remove a folder, so that no part of it is ever seen under its name."""
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    folder.rename(part)
    shutil.rmtree(part, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file atomically."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    part.replace(path)


def sync(path: Path) -> None:
    """fsync: after a power failure a file is as long as it was, and a folder has the names it had."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def code_digest() -> str:
    """Hash of the source that can change numbers: results of other code are not taken from a cache."""
    root = Path(__file__).parent
    parts = [root / "config.py", root / "processes.py"]
    parts += [f for name in ("method", "data", "models", "training") for f in (root / name).rglob("*.py")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(parts))).hexdigest()


def project_root() -> Path:
    """The checkout that holds savelib, or the working directory where savelib is installed without one."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def runs_dir() -> Path:
    """Folder of all runs: `$SAVE_RUNS`, else `runs/` of the checkout. Not created here."""
    return Path(os.environ.get("SAVE_RUNS") or project_root() / "runs").expanduser()


def resolve(source: str) -> str:
    """A file or folder as given, else as seen from the checkout, so that notebooks run from anywhere; else a hub id."""
    given = os.path.expanduser(source)  # unlike Path's, it takes every text: too long, of an unknown user, ...
    for path in (given, os.path.join(project_root(), given)):
        if os.path.exists(path):
            return str(Path(path))
    return source
