"""Cache and run folders; atomic writes; what may be written; digests."""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from savelib.errors import ConfigError


def cache_dir() -> Path:
    """Folder of everything built once and reused: `$SAVE_CACHE`, else `~/.cache/savelib`. Not created here."""
    return Path(os.environ.get("SAVE_CACHE") or "~/.cache/savelib").expanduser()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it to `target` on success, remove it on any error.

    Builders may race: the first rename wins, the others drop their copy.
    Pitfall: a non-empty folder that is already at `target` stays, and what was written here is dropped.
    """
    with _named(target):
        folder = temporary_folder(target)
        try:
            yield folder
            publish(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of the system inside names the path, where it does not name one; that of safetensors is one of those."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        raise


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
    with _named(path):
        part.write_text(text, encoding="utf-8")
        sync(part)
        part.replace(path)


def writable_file(
    field: str, path: str | Path, inputs: Mapping[str, Any], ours: Callable[[Path], bool] = lambda path: False
) -> Path:
    """`path`, checked so that writing a file there loses nothing. Call it before any work.

    inputs: field -> what the command reads; a None and a hub id are passed over. ours: whether a file that is there
    was written by an earlier call of this command, which may replace it. Raises ConfigError for one of the inputs
    (by a link or another spelling too), another file that is there, and a folder.
    """
    if Path(path).is_dir() or str(path).endswith(os.sep):
        raise ConfigError(f"{field} = {str(path)!r} is a folder; give a file")
    path = _none_of(field, path, inputs)
    if (path.exists() or path.is_symlink()) and not (path.is_file() and ours(path)):
        raise ConfigError(
            f"{field} = {str(path)!r} exists, and this command did not write it; give another name, or move it"
        )
    return path


def writable_folder(
    field: str, path: str | Path, inputs: Mapping[str, Any], ours: Callable[[Path], bool] = lambda path: False
) -> Path:
    """`path`, checked so that writing files into this folder loses nothing; as `writable_file`. It may be empty."""
    path = _none_of(field, path, inputs)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{field} = {str(path)!r} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not ours(path):
        raise ConfigError(
            f"{field} = {str(path)!r} holds files that this command did not write; give a new or empty folder"
        )
    return path


def _none_of(field: str, path: str | Path, inputs: Mapping[str, Any]) -> Path:
    """`path`, unless it is one of the inputs or no file can be made there. Raises ConfigError."""
    if not str(path).strip():
        raise ConfigError(f"{field} is empty; give a path")
    place = Path(path)
    for name, given in inputs.items():
        if given not in (None, "") and _same(Path(resolve(str(given))), place):
            raise ConfigError(f"{field} = {str(path)!r} is also given as {name}, and would be lost; give another name")
    refuse_unwritable(f"{field} = {str(path)!r}", place.parent)
    return place


def refuse_unwritable(what: str, folder: Path) -> None:
    """Raise ConfigError where `folder`, or the first part of its path that exists, takes no file. It is not made."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ConfigError(f"{what}: {above} is a file, not a folder; give another path")
    try:
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{what}: no file can be written to {above} ({error.strerror}); give another path") from None


def refuse_unwritable_folders() -> None:
    """Raise ConfigError where the folder of runs or the cache takes no file. Call it before any work."""
    refuse_unwritable(f"SAVE_RUNS = {str(runs_dir())!r}", runs_dir())
    refuse_unwritable(f"SAVE_CACHE = {str(cache_dir())!r}", cache_dir())


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file or folder: by another spelling, a symlink or a hard link."""
    return os.path.realpath(a) == os.path.realpath(b) or (a.exists() and b.exists() and os.path.samefile(a, b))


def lock(file: IO, shared: bool = False) -> bool:
    """Lock an open file until it is closed; False where another process holds it. shared: with others that ask so."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync(path: Path) -> None:
    """fsync: after a power failure a file is as long as it was, and a folder has the names it had."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def strict_json(value: Any, **options: Any) -> str:
    """JSON that every reader takes: null for a number that is not finite, at any depth."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(v) for name, v in part.items()}
        if isinstance(part, list | tuple):
            return [finite(v) for v in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), allow_nan=False, **options)


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
