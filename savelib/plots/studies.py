"""Figures of studies: differences between cells, their courses, a condition over many runs."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from savelib.analysis import better, in_title
from savelib.plots.style import nothing_to_show, plain
from savelib.show.colours import COLOURS


def paired_differences(table: pd.DataFrame, ax: plt.Axes | None = None, colour: object = "#333333") -> plt.Axes:
    """Differences to a reference, one row per cell; filled: resolved, hollow: not.

    table: by cell, difference (nan: nothing is drawn), low and high (nan: no interval), resolved (bool).
    """
    ax = ax or plt.gca()
    ax.axvline(0, color="0.3", linewidth=0.8)
    for row, cell in enumerate(table.itertuples()):
        if math.isnan(cell.difference):
            continue
        if not math.isnan(cell.low):
            ax.plot([cell.low, cell.high], [row, row], color=colour, linewidth=1.5, solid_capstyle="butt")
        face = colour if cell.resolved else "white"
        ax.plot(cell.difference, row, "o", color=colour, markerfacecolor=face, markersize=6, markeredgewidth=1.5)
    ax.locator_params(axis="x", nbins=5)
    ax.set(yticks=range(len(table)), yticklabels=plain(list(table.index)), ylim=(len(table) - 0.4, -0.6))
    return ax


def paired_panels(tables: dict[str, pd.DataFrame], title: str, sharex: bool = False) -> plt.Figure:
    """`paired_differences` side by side, a panel for each of the tables, which have the same rows and are in points.

    sharex: one scale for all, for tables of one measure.
    """
    rows = max(map(len, tables.values()))
    fig, axes = plt.subplots(
        1, len(tables), figsize=(11, 1.2 + 0.3 * rows), layout="constrained", sharex=sharex, sharey=True, squeeze=False
    )
    for ax, (name, table) in zip(axes.flat, tables.items(), strict=True):
        paired_differences(table, ax).set(title=name, xlabel="points (right is better)")
    fig.suptitle(title, x=0.01, ha="left")
    return fig


def cell_colours(rules: dict[str, str]) -> dict[str, object]:
    """cell -> colour: its rule's for the first cell of a rule, colours of their own for the others."""
    others, found = iter(sns.color_palette("Dark2")), {}
    for cell, rule in rules.items():
        found[cell] = next(others) if COLOURS[rule] in found.values() else COLOURS[rule]
    return found


def course(
    courses: pd.DataFrame, measure: str, colours: dict[str, object], start: str, ax: plt.Axes | None = None
) -> plt.Axes:
    """A measure over the steps, in points above the world's start: one line per cell of `colours`, band: std. error.

    courses: one row per run and evaluation, with cell, world, step and the measure. The world's start is the first
    value of the cell `start` there. The line is the mean over worlds; seeds of one world are averaged first.
    """
    ax = ax or plt.gca()
    known = courses.dropna(subset=[measure]) if measure in courses else courses.iloc[:0]
    starts = known[known["cell"] == start].groupby("world")[measure].first() if len(known) else {}
    drawn = [cell for cell in colours if len(starts) and (known["cell"] == cell).any()]
    for cell in drawn:
        of = known[known["cell"] == cell]
        above = 100 * (of[measure] - of["world"].map(starts))
        table = of.assign(above=above).pivot_table(index="step", columns="world", values="above")  # [steps, worlds]
        mean, error = table.mean(axis=1), table.sem(axis=1)
        ax.plot(mean, color=colours[cell], linewidth=2, label=cell)
        ax.fill_between(mean.index, mean - error, mean + error, color=colours[cell], alpha=0.1, linewidth=0)
    ax.set(xlabel="step", ylabel=better(measure, "points above the start"), title=in_title(measure, 30))
    return ax if drawn else nothing_to_show(ax)


VERDICTS = {"holds": COLOURS["positive"], "fails": COLOURS["negative"], "not resolved": "0.6"}


def verdict_dots(rows: pd.DataFrame, ax: plt.Axes | None = None) -> plt.Axes:
    """`theory.conditions` of one condition: one dot per run and step, coloured by its verdict; line: the median run.

    The axis is linear near 0 and logarithmic outside.
    """
    ax = ax or plt.gca()
    shift = rows.groupby(["world", "seed"]).ngroup()
    shift -= shift.mean()
    for name, colour in VERDICTS.items():
        at = rows["verdict"] == name
        place = rows.loc[at, "step"] + 0.9 * shift[at]
        ax.errorbar(place, rows.loc[at, "value"], 1.96 * rows.loc[at, "standard_error"], fmt="o", color=colour,
                    markersize=3, linewidth=0.8, label=name)  # fmt: skip
    ax.plot(rows.groupby("step")["value"].median(), color="#333333", linewidth=1.5)
    ax.axhline(0, color="0.3", linewidth=0.8)
    typical = max(rows["value"].abs().median(), 1e-6)
    ax.set_yscale("symlog", linthresh=10 ** round(math.log10(typical)))
    ax.set(xlabel="step", xticks=sorted(rows["step"].unique()))
    return ax


def over_worlds(
    courses: pd.DataFrame, measure: str, colours: dict[str, object], ax: plt.Axes | None = None
) -> plt.Axes:
    """A measure as it is over the steps, one line per cell of `colours`: mean over the worlds, band: lowest to highest.

    courses: one row per run and evaluation, with cell, world, step, measure. Seeds of a world are averaged first.
    """
    ax = ax or plt.gca()
    known = courses.dropna(subset=[measure]) if measure in courses else courses.iloc[:0]
    drawn = [cell for cell in colours if (known["cell"] == cell).any()]
    for cell in drawn:
        table = known[known["cell"] == cell].pivot_table(index="step", columns="world", values=measure)
        ax.plot(table.mean(axis=1), color=colours[cell], linewidth=2, label=cell)
        ax.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colours[cell], alpha=0.12, linewidth=0)
    ax.set(xlabel="step", ylabel=better(measure), title=in_title(measure, 30))
    return ax if drawn else nothing_to_show(ax)


def gold_against_kl(curves: pd.DataFrame, looks: dict[str, dict[str, object]], ax: plt.Axes | None = None) -> plt.Axes:
    """Gold against KL to the initial policy, one curve per cell from the start to its end (dot), x as the root.

    curves: cell, kl (nats), gold (percent), in the order of the steps. looks: cell -> how its line is drawn.
    """
    ax = ax or plt.gca()
    for cell, look in looks.items():
        of = curves[curves["cell"] == cell]
        ax.plot(of["kl"], of["gold"], **look, label=cell)
        ax.plot(of["kl"].iloc[-1:], of["gold"].iloc[-1:], "o", color=look["color"], markersize=5)
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    most = curves["kl"].max()
    ticks = [t for t in (0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if most / 60 < t < most]
    ax.set(xlim=(0, 1.03 * most), xticks=[0, *ticks], xlabel="KL to the initial policy, nats a response")
    ax.set_xticklabels([f"{t:g}" for t in (0, *ticks)])
    ax.set_ylabel("gold of the batch, %\n(higher is better)")
    return ax


def remedy_looks(remedies: dict[str, str]) -> dict[str, dict[str, object]]:
    """cell -> colour of its remedy, dashed where the reward model stays as it is; a remedy's second cell is paler."""
    looks, seen = {}, set()
    for cell, remedy in remedies.items():
        still = remedy in ("frozen", "par", "raft") or remedy.startswith("ensemble")
        width = 3.2 if remedy == "frozen" else 1.8
        look = {"color": COLOURS[remedy], "linestyle": (0, (4, 1.5)) if still else "-", "linewidth": width}
        looks[cell] = look | {"alpha": 0.5 if remedy in seen else 1.0}
        seen.add(remedy)
    return looks
