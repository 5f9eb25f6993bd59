"""Figures of runs: curves of one run, comparison of several."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from savelib.analysis import better, in_title
from savelib.plots.style import PAPER, name_ends, nothing_to_show, plain
from savelib.show.colours import COLOURS, LINES


def lines(
    metrics: pd.DataFrame, columns: dict[str, str], ylabel: str, ax: plt.Axes | None = None, title: str = "One run"
) -> plt.Axes:
    """Metrics of one run over its steps. columns: metric -> its name beside the line; those it lacks are left out.

    A metric that is measured every few steps is drawn with a dot at each measurement.
    """
    ax, ends = ax or plt.gca(), []
    there = [c for c in columns if c in metrics and metrics[c].notna().any()]
    for column in there:
        points = metrics[["step", column]].dropna()
        marker = "o" if len(points) < len(metrics) - 1 or len(points) < 4 else ""
        (line,) = ax.plot(points["step"], points[column], marker=marker, markersize=4, color=LINES.get(column))
        ends.append((points[column].iloc[-1], columns[column], line.get_color()))
    ax.set(xlabel="step", ylabel=ylabel, title=title)
    if not there:
        return nothing_to_show(ax)
    ax.xaxis.get_major_locator().set_params(integer=True)
    name_ends(ax, ends)
    return ax


def metric(
    groups: dict[str, list[pd.DataFrame]],
    column: str,
    ax: plt.Axes | None = None,
    *,
    window: int = 1,
    since_start: bool = False,
) -> plt.Axes:
    """One metric of several groups of runs (`analysis.group_runs`): mean over a group's runs, band from low to high.

    The colour is the rule's, the line style tells groups of one rule apart. window: steps of a running mean.
    since_start: each run's change from its own first measurement, so that unequal starts do not widen the band.
    """
    ax, most, ends = ax or plt.gca(), 1, []
    drawn: dict[str, int] = {}
    for label, frames in groups.items():
        measured = [f.set_index("step")[column].dropna() for f in frames if column in f]
        runs = [m.rolling(window, min_periods=1).mean() - since_start * m.iloc[0] for m in measured if len(m)]
        if not runs:
            continue
        table, rule = pd.concat(runs, axis=1).sort_index(), label.split(",")[0]  # [steps, runs]
        style = ("-", (0, (5, 2)), ":", "-.")[drawn.get(rule, 0) % 4]
        drawn[rule] = drawn.get(rule, 0) + 1
        marker = "o" if len(table) < 15 else ""
        mean, most = table.mean(1), max(most, len(runs))
        (line,) = ax.plot(table.index, mean, ls=style, marker=marker, markersize=4, color=COLOURS.get(rule))
        ends.append((mean.iloc[-1], label, line.get_color()))
        if len(runs) > 1:
            ax.fill_between(table.index, table.min(1), table.max(1), color=COLOURS.get(rule), alpha=0.12, linewidth=0)
    of = f"mean of {most} runs, band: lowest to highest" if most > 1 else "one run of each"
    ax.set(
        xlabel="step", ylabel=better(column, "change since the start" * since_start), title=f"{in_title(column)}\n{of}"
    )
    if not drawn:
        return nothing_to_show(ax)
    ax.xaxis.get_major_locator().set_params(integer=True)
    name_ends(ax, ends)
    return ax


def sample_rewards(samples: pd.DataFrame, ax: plt.Axes | None = None) -> plt.Axes:
    """Rewards of the logged responses over the steps, by gold where it is known, with each step's mean prompt value."""
    ax = ax or plt.gca()
    kinds = [("right", samples["gold"] > 0.5, "positive"), ("wrong", samples["gold"] <= 0.5, "negative")]
    for name, rows, colour in [*kinds, ("gold unknown", samples["gold"].isna(), "left out")]:
        if rows.any():
            part = samples[rows]
            shift = 0.15 if name == "right" else -0.15
            style = {"s": 9, "alpha": 0.5, "linewidth": 0, "color": COLOURS[colour], "label": name}
            ax.scatter(part["step"] + shift, part["reward"], **style)
    if samples["value"].notna().any():
        ax.plot(samples.groupby("step")["value"].mean(), color="#333333", linewidth=1, label="V")
    ax.set(xlabel="step", ylabel="reward R (further up is better)")
    ax.set_title("Rewards of the logged responses, right and wrong by gold; one run")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def saying(text: str, samples: dict[str, pd.DataFrame], ax: plt.Axes | None = None, window: int = 10) -> plt.Axes:
    """Share of the logged responses that hold a text, a running mean over `window` steps; samples: rule -> a run's."""
    ax = ax or plt.gca()
    for rule, rows in samples.items():
        share = rows["response"].str.contains(text, regex=False).groupby(rows["step"]).mean()
        ax.plot(share.rolling(window, min_periods=1).mean(), color=COLOURS.get(rule), label=rule)
    ax.set(xlabel="step", ylabel="share of the logged responses\n(neither way is better)")
    ax.set_title(f"How many responses say '{text}'\none run of each, mean of {window} steps")
    ax.legend()
    return ax


def batch_gold_against_kl(
    groups: dict[str, list[pd.DataFrame]], ax: plt.Axes | None = None, window: int = 5
) -> plt.Axes:
    """The batch's gold as the policy moves, means over `window` steps; groups as for `metric`, of one run each."""
    ax = ax or plt.gca()
    for label, (rows,) in groups.items():
        of = rows[["policy/kl_response", "gold/success_rate"]].dropna()
        of = of.rolling(min(window, len(of))).mean().dropna()
        (line,) = ax.plot(*of.to_numpy().T, color=COLOURS.get(label.split(",")[0]), label=label)
        ax.plot(*of.iloc[-1:].to_numpy().T, "o", color=line.get_color())
    ax.set(xlabel="KL to the initial policy, nats a response", ylabel="gold of the batch\n(higher is better)")
    ax.set_title(f"What the policy gains as it moves\none run of each, mean of {window} steps")
    ax.legend()
    return ax


def push_against_success(metrics: pd.DataFrame, ax: plt.Axes | None = None) -> plt.Axes:
    """D - A against the share of right responses, one dot per step; shaded: the push is down on mostly good ones."""
    ax = ax or plt.gca()
    ax.set(xlabel="share of right responses in the batch (gold)", ylabel="D - A\n(above 0: the net push is down)")
    if not {"force/push", "gold/success_rate"} <= set(metrics):
        return nothing_to_show(ax)
    x, y = metrics["gold/success_rate"], metrics["force/push"] - metrics["force/pull"]
    ax.set(xlim=(0, 1), ylim=(-1, 1), title="Where the net push fell, step by step; one run")
    ax.fill_between([0.5, 1], 0, 1, color=COLOURS["negative"], alpha=0.1, linewidth=0)
    dots = ax.scatter(x, y, c=metrics["step"], cmap="viridis", s=16)
    ax.figure.colorbar(dots, ax=ax, label="step")
    return ax


def change_dots(changes: pd.DataFrame, ax: plt.Axes | None = None, paper: pd.Series | None = None) -> plt.Axes:
    """`analysis.changes` in points, one row per group. paper: points of each rule, dashed grey."""
    ax = ax or plt.gca()
    for i, (label, row) in enumerate(changes.iterrows()):
        rule = label.split(",")[0]
        error = 0 if pd.isna(row["standard error"]) else 100 * row["standard error"]
        ax.errorbar(100 * row["change"], i, xerr=error or None, fmt="o", color=COLOURS.get(rule), capsize=3)
        if paper is not None and rule in paper:
            ax.vlines(paper[rule], i - 0.35, i + 0.35, label=None if i else "the paper's, on its benchmarks", **PAPER)
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set(yticks=range(len(changes)), yticklabels=list(changes.index), ylim=(len(changes) - 0.5, -0.5))
    ax.set_xlabel("change of accuracy in points (right is better)")
    ax.set_title("Change of the reward model's accuracy from start to end\nmean over runs, bar: one standard error")
    if paper is not None:
        ax.legend()
    return ax


def intervals(table: pd.DataFrame, xlabel: str, ax: plt.Axes | None = None, title: str = "") -> plt.Axes:
    """Figures with their intervals, one row each. table: by name, with value (written above it), low, high; colour."""
    ax = ax or plt.gca()
    for i, row in enumerate(table.itertuples()):
        colour = getattr(row, "colour", COLOURS["save"])
        ax.plot([row.low, row.high], [i, i], color=colour, linewidth=1.5, solid_capstyle="butt")
        ax.plot(row.value, i, "o", color=colour, markersize=6)
        ax.annotate(
            f"{row.value:.1f}", (row.value, i), (0, 7), textcoords="offset points", ha="center", fontsize="small"
        )
    ax.set(yticks=range(len(table)), yticklabels=plain([str(name) for name in table.index]))
    ax.set(ylim=(len(table) - 0.4, -0.6), xlabel=xlabel, title=title)
    return ax
