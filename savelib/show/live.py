"""The picture of a run as it goes, drawn again in place every few seconds where a person watches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from savelib.show.colours import COLOURS, LINES
from savelib.show.svg import Chart, beside, image
from savelib.show.text import escaped

EVERY = 2.0  # seconds between two drawings
SHARES = {
    "eval/rm_accuracy": "accuracy, fixed pairs", "eval/rm_accuracy_current": "accuracy, current", "eval/gold": "gold",
    "filter/kept": "kept share",
}  # fmt: skip
Rows = Sequence[dict[str, Any]]


class Picture:
    """Shows a run's metrics in a notebook's front end; elsewhere, as under papermill, it does nothing.

    What was drawn last stays when the run is stopped or fails.
    """

    def __init__(self, total_steps: int):
        self.total, self.drawn, self.handle, self.watched = total_steps, float("-inf"), None, somebody_watches()

    def __call__(self, rows: Rows, line: str, last: bool = False) -> None:
        """Draw rows of metrics.jsonl above the progress line; not within EVERY seconds, unless it is the last time."""
        if not self.watched or (time.monotonic() - self.drawn < EVERY and not last):
            return
        from IPython.display import display

        self.drawn = time.monotonic()
        picture = image(draw(rows, self.total), f"the run so far: {line}") if rows else ""
        data = {"text/html": f"{picture}<pre>{escaped(line)}</pre>", "text/plain": line}
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)


def somebody_watches() -> bool:
    """Whether this runs in a front end that could ask a person for input; papermill and nbconvert could not."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    kernel = getattr(get_ipython(), "kernel", None)  # a terminal's IPython has none
    return kernel is not None and bool(kernel.get_parent().get("content", {}).get("allow_stdin"))


def draw(rows: Rows, total_steps: int) -> str:
    """SVG: the shares of SHARES on the left, the mean reward of the batch on the right, from step 0 to the last."""
    left = Chart(500, 230, (0, total_steps), (0, 1), (44, 130, 26, 34)).axes("Accuracy, gold, kept", "step", "share")
    ends = []
    for metric, name in SHARES.items():
        if points := _points(rows, metric):
            colour = COLOURS["left out"] if metric == "filter/kept" else LINES[metric]
            left.line(points, colour).dot(*points[-1], colour, 3)
            ends.append((left.y(points[-1][1]) + 4, f"{name} {points[-1][1]:.2f}", colour))
    below = float("-inf")
    for y, name, colour in sorted(ends):
        below = max(y, below + 13)
        left.write(left.width - left.right + 8, below, name, anchor="start", colour=colour)
    points = _points(rows, "reward/mean")
    levels = [y for _, y in points] or [0.0]
    room = 0.1 * (max(levels) - min(levels)) or 0.5
    right = Chart(340, 230, (0, total_steps), (min(levels) - room, max(levels) + room), (52, 12, 26, 34))
    right.axes("Mean reward of the batch", "step", "R").line(points, LINES["reward/mean"])
    return beside(left, right).svg()


def _points(rows: Rows, metric: str) -> list[tuple[float, float]]:
    known = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [(x, y) for x, y in known if y == y]  # without nan
