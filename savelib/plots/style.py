"""The look of all figures."""

from __future__ import annotations

import warnings

import matplotlib.pyplot as plt
import seaborn as sns

from savelib.show.text import visible

PAPER = {"color": "0.55", "linestyle": "--", "linewidth": 1}  # how the paper's value is drawn


def use_style() -> None:
    """Set the workbook's look for all following figures."""
    # matplotlib warns by the clock: on a busy machine of any legend whose place it looks for itself
    warnings.filterwarnings("ignore", message='Creating legend with loc="best"')
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)
    plt.rcParams.update(
        {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "figure.figsize": (6, 3.4)}
        | {"axes.titlelocation": "left", "axes.titlesize": "medium", "axes.titlepad": 8}
        | {"legend.frameon": True, "legend.facecolor": "white", "legend.edgecolor": "white", "legend.framealpha": 0.85}
        | {"legend.fontsize": "small"}
    )


def name_ends(ax: plt.Axes, ends: list[tuple[float, str, object]]) -> None:
    """Write the name of each line (its last y, name, colour) to the right of the axes, moved apart where they meet."""
    low, high = ax.get_ylim()
    line, last, lines = 0.08 * (high - low), float("-inf"), 0  # height of a line of text; the name below, and its lines
    for y, name, colour in sorted(ends, key=lambda end: end[0]):
        of_name = name.count("\n") + 1
        last, lines = max(y, last + line * (lines + of_name) / 2), of_name
        ax.text(1.01, last, name, color=colour, va="center", fontsize="small", transform=ax.get_yaxis_transform())


def plain(texts: list[str]) -> list[str]:
    """Texts of models as labels: on one line, and no `$` that matplotlib would take for mathematics."""
    return [" ".join(visible(text).split()).replace("$", r"\$") for text in texts]


def nothing_to_show(ax: plt.Axes, why: str = "not measured in this run") -> plt.Axes:
    ax.text(0.5, 0.5, why, ha="center", va="center", transform=ax.transAxes, color="0.5")
    ax.set(xticks=[], yticks=[])
    return ax
