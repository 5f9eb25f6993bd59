"""What many runs of several rules came to, one dot per run."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from savelib.benchmarks.statistics import interval_of_mean
from savelib.plots.style import plain


def changes_by_cell(
    runs: pd.DataFrame, measure: str, colours: dict[str, object], ax: plt.Axes | None = None
) -> plt.Axes:
    """A measure's change in points: one row per cell of `colours`, a dot per run, a bar for mean and 95% interval.

    runs: cell, world and the measure. The interval is Student's over worlds, whose runs are averaged first; with one
    world there is none.
    """
    ax = ax or plt.gca()
    ax.axvline(0, color="0.3", linewidth=0.8)
    for row, (cell, colour) in enumerate(colours.items()):
        of = runs[runs["cell"] == cell]
        ax.plot(of[measure], [row + 0.18] * len(of), "|", color=colour, markersize=8, alpha=0.8)
        worlds = of.groupby("world")[measure].mean()
        ax.plot(
            interval_of_mean(worlds), [row - 0.12] * 2, color=colour, linewidth=4, alpha=0.45, solid_capstyle="butt"
        )
        ax.plot(worlds.mean(), row - 0.12, "o", color=colour, markersize=6)
    ax.set(yticks=range(len(colours)), yticklabels=plain(list(colours)), ylim=(len(colours) - 0.4, -0.6))
    return ax
