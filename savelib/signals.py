"""A process that ends when the one that started it is gone, even if that was killed."""

import ctypes
import os
import signal
import sys

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(parent: int | None = None) -> None:
    """Ask the system for SIGKILL when the parent is gone. parent: its id, if known; it may be gone before this call."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        gone = os.getppid() == 1 if parent is None else os.getppid() != parent
        if gone:
            os._exit(1)
