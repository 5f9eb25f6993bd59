"""One line on how far a piece of work is: what is done of what, its figures, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

EVERY = 10.0  # seconds between two lines
Mark = tuple[float, float]  # (what is done, seconds)


def progress_line(what: str, done: int, total: int, marks: Sequence[Mark] = (), figures: Sequence[str] = ()) -> str:
    """'step 3/40  gold 0.412  0:01:20 left'.

    what: the unit that is counted. marks: when how much was done, the oldest first; the time left is reckoned from
    the speed between the first and the last, and left out where fewer than two tell of any work. figures: put between.
    """
    said = [f"{what} {done}/{total}", *figures]
    if len(marks) > 1 and (did := marks[-1][0] - marks[0][0]) > 0:
        pace = (marks[-1][1] - marks[0][1]) / did  # seconds for one
        said.append(f"{timedelta(seconds=round(pace * (total - done)))} left")
    return "  ".join(said)


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Says a line every few seconds while work is done, and one at the end of work that took longer.

        progress = Progress("games", total=500, before=20)
        progress.add(1)                        # games 21/500  0:08:00 left
        progress.add(8, "1200 tokens/s")       # games 29/500  1200 tokens/s  0:07:52 left

    before: what an earlier call did, which tells nothing of the speed. every: seconds between lines; 0 says each.
    Work that ends within `every` seconds says nothing.
    """

    def __init__(
        self, what: str, total: int, before: int = 0, say: Callable[[str], None] = say_on_stderr, every: float = EVERY
    ):
        self.what, self.total, self.done, self.say, self.every = what, total, before, say, every
        self.start: Mark = (before, time.monotonic())
        self.said = self.start[1]

    @property
    def seconds(self) -> float:
        """Since the start; never 0."""
        return max(time.monotonic() - self.start[1], 1e-9)

    def add(self, more: int = 1, *figures: str) -> None:
        self.done, now = self.done + more, time.monotonic()
        told = self.said > self.start[1]  # a line was said
        if now - self.said >= self.every or (told and self.done == self.total):
            self.said = now
            self.say(progress_line(self.what, self.done, self.total, [self.start, (self.done, now)], figures))
