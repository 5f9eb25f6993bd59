"""Figures, drawn from files and tensors. One style, one colour a rule; axes say which way is better.

Every function draws into a given Axes (or makes its own) and returns it.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import seaborn as sns

COLOURS = {
    "save": "#1b6ca8", "save_zero_net_force": "#12908e", "mean_reward": "#d1495b", "hl_bt": "#edae49",
    "offline_bt": "#8d6a9f", "frozen": "#6c757d",
    "positive": "#2a9d4a", "negative": "#c8553d", "left out": "#b8b8b8",
}  # fmt: skip
PAPER = {"color": "0.55", "linestyle": "--", "linewidth": 1}  # how the paper's value is drawn


def use_style() -> None:
    """Set the workbook's look for all following figures."""
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)
    plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "figure.figsize": (6, 3.4)})
