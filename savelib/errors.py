"""Errors whose message is one sentence, and that sentence for errors of the system."""

from __future__ import annotations

import errno

ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EACCES: "choose a place that you may use",
    errno.EPERM: "choose a place that you may use",
    errno.EROFS: "choose a place that can be written",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "a part of the path is a file: give another path",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "give a shorter name",
}


class SavelibError(Exception):
    """The message says all: what is wrong, where, and what to do. The command line shows it without a traceback."""


class ConfigError(SavelibError, ValueError):
    """Bad configuration, data or model: the message names the field, the value and what to do."""


def sentence(error: BaseException) -> str | None:
    """What a user is told of an error: ours, the system's (with its path), a missing package. None: it is a bug."""
    if isinstance(error, SavelibError):
        return str(error)
    if isinstance(error, OSError):
        said = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*where[-1:], said]) + (f"; {ADVICE[error.errno]}" if error.errno in ADVICE else "")
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("savelib"):
        return f"{error}; install it, or run `make env`" if error.name else str(error)
    return None
