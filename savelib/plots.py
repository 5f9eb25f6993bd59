"""Figures, drawn from files and tensors. One style, one colour a rule; axes say which way is better.

Every function draws into a given Axes (or makes its own) and returns it.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from torch import Tensor

from savelib.analysis import axis_label
from savelib.method import Partition, bradley_terry_loss, curriculum_threshold, net_forces

COLOURS = {
    "save": "#1b6ca8", "save_either_way": "#e0592a", "save_zero_net_force": "#12908e", "spread": "#7a5195",
    "mean_reward": "#d1495b", "hl_bt": "#edae49", "offline_bt": "#8d6a9f", "ser": "#a05c3b", "r2m": "#5b8e3e",
    "frozen": "#6c757d",
    "positive": "#2a9d4a", "negative": "#c8553d", "left out": "#b8b8b8",
}  # fmt: skip
PAPER = {"color": "0.55", "linestyle": "--", "linewidth": 1}  # how the paper's value is drawn


def use_style() -> None:
    """Set the workbook's look for all following figures."""
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)
    plt.rcParams.update(
        {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "figure.figsize": (6, 3.4)}
    )


# formulas: preference learning, value anchor, filter and forces, on tensors


def bt_curve(margins: Tensor, ax: plt.Axes | None = None, noise: tuple[float, ...] = (0.0, 0.3)) -> plt.Axes:
    """Eq. 11's loss over the margin, dots at `margins` [N]; a share `noise` of flipped labels bounds the best one."""
    ax = ax or plt.gca()
    loss = torch.vmap(lambda m: bradley_terry_loss(m, torch.zeros_like(m)))
    x = torch.linspace(-4, 4, 401)
    for share, colour in zip(noise, (COLOURS["save"], COLOURS["negative"], COLOURS["hl_bt"]), strict=False):
        y = (1 - share) * loss(x) + share * loss(-x)
        ax.plot(x, y, color=colour, label=f"{share:.0%} of the labels flipped")
        if share:
            best = math.log((1 - share) / share)
            ax.plot(best, y.min(), "v", color=colour, label=f"best margin {best:.2f}")
    ax.plot(margins, loss(margins), "o", color="#333333", label="the pairs above")
    ax.set(xlabel="margin R(chosen) - R(rejected)", ylabel="loss\n(lower is better)", ylim=(0, None))
    ax.legend(frameon=False, fontsize="small")
    return ax


def epoch_losses(losses: list[float], levels: dict[str, float], ylabel: str, ax: plt.Axes | None = None) -> plt.Axes:
    """Mean loss of each epoch; levels: name -> a loss to compare with, drawn dotted."""
    ax = ax or plt.gca()
    for (name, level), style in zip(levels.items(), (":", "-."), strict=False):
        ax.axhline(level, color="0.3", linewidth=1, linestyle=style, label=f"{name}: {level:.3f}")
    ax.plot(range(1, len(losses) + 1), losses, "o-", markersize=4, color=COLOURS["save"], label="loss of the epoch")
    ax.set(xlabel="epoch", ylabel=f"{ylabel}\n(lower is better)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(-0.12, 1))
    return ax


def margin_histogram(margins: Tensor, ax: plt.Axes | None = None, bins: int = 30) -> plt.Axes:
    """Margins R(chosen) - R(rejected) of pairs [M], right verdicts against wrong ones (a tie is wrong)."""
    ax = ax or plt.gca()
    reach = max(margins.abs().max().item(), 1e-3)
    for name, side, part in (("right", "positive", margins[margins > 0]), ("wrong", "negative", margins[margins <= 0])):
        label = f"{name}: {len(part)} of {len(margins)}"
        ax.hist(part, bins=bins, range=(-reach, reach), color=COLOURS[side], label=label)
    ax.axvline(margins.mean(), color="#333333", linewidth=1, label=f"mean {margins.mean():.2f}")
    ax.set(xlabel="margin R(chosen) - R(rejected)\n(further right is better)", ylabel="pairs")
    ax.legend(frameon=False, fontsize="small")
    return ax


def calibration(margins: Tensor, ax: plt.Axes | None = None, bins: int = 6) -> plt.Axes:
    """Eq. 2 taken at its word: P of the verdict, sigmoid(|margin|), against the share of right verdicts.

    margins [M] of pairs whose labels are right; bins of equal size, each with its standard error.
    """
    ax = ax or plt.gca()
    ax.plot([0.5, 1], [0.5, 1], color="0.3", linewidth=1, linestyle=":", label="as sure as it is right")
    for rows in margins.abs().argsort().tensor_split(min(bins, len(margins))):
        sure, right = torch.sigmoid(margins[rows].abs()).mean(), (margins[rows] > 0).float().mean()
        error = (right * (1 - right) / len(rows)).sqrt()
        ax.errorbar(sure, right, yerr=error, fmt="o", color=COLOURS["save"], capsize=3)
    ax.set(xlim=(0.48, 1.02), ylim=(0, 1.05), xlabel="how sure: sigmoid(|margin|)")
    ax.set_ylabel("share of right verdicts\n(below the line: too sure)")
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return ax


def value_against_reward(
    values: Tensor, rewards: Tensor, ax: plt.Axes | None = None, name: str = "V(x)", side: str = "save"
) -> plt.Axes:
    """V [B] against the mean of each group's rewards [B, K]; on the diagonal V is right."""
    ax = ax or plt.gca()
    targets = rewards.mean(1)  # [B]
    low, high = min(targets.min(), values.min()).item(), max(targets.max(), values.max()).item()
    ax.axline((low, low), (high, high), color="0.3", linewidth=1, linestyle=":")
    ax.scatter(targets, values, s=14, alpha=0.7, linewidth=0, color=COLOURS[side], label=name)
    ax.set(xlabel="mean reward of the group", ylabel="V(x)\n(nearer to the diagonal is better)")
    ax.legend(frameon=False, fontsize="small")
    return ax


def thresholds(initial_margins: list[float], total_steps: int, ax: plt.Axes | None = None) -> plt.Axes:
    """Eq. 14: mu(t) for each initial margin; the paper's, 0.5, is dashed grey."""
    ax = ax or plt.gca()
    steps = range(1, total_steps + 1)
    for margin, colour in zip(initial_margins, sns.color_palette("crest", len(initial_margins)), strict=True):
        style = PAPER | {"linewidth": 2} if margin == 0.5 else {"color": colour}
        label = f"m0 = {margin}" + " (the paper's)" * (margin == 0.5)
        ax.plot(steps, [curriculum_threshold(t, total_steps, margin) for t in steps], label=label, **style)
    ax.set(xlabel="step t", ylabel="threshold mu(t)\n(0.5: nothing is left out)", ylim=(0.48, None))
    ax.legend(frameon=False, fontsize="small")
    return ax


def kept_over_time(
    rewards: Tensor, value: float, total_steps: int, initial_margin: float, ax: plt.Axes | None = None
) -> plt.Axes:
    """Eq. 15-16: one group [G] over the run if R and V stood still; grey: too close to V to be kept at step t."""
    ax = ax or plt.gca()
    steps = torch.arange(1, total_steps + 1)
    mu = torch.tensor([curriculum_threshold(int(t), total_steps, initial_margin) for t in steps], dtype=torch.float64)
    ax.fill_between(steps, value - mu.logit(), value + mu.logit(), color=COLOURS["left out"], alpha=0.3, linewidth=0)
    ax.axhline(value, color="#333333", linewidth=1)
    for reward in rewards.tolist():
        side = COLOURS["positive" if reward >= value else "negative"]
        kept = abs(reward - value) >= mu.logit()
        ax.plot(steps, torch.full_like(mu, reward), color=COLOURS["left out"], linewidth=1.5)
        ax.plot(steps[kept], torch.full_like(mu, reward)[kept], color=side, linewidth=3, solid_capstyle="butt")
    named = {"positive": "positive", "negative": "negative", "left out": "left out"}
    handles = [plt.Line2D([], [], color=COLOURS[k], linewidth=3, label=v) for k, v in named.items()]
    handles.append(plt.Line2D([], [], color="#333333", linewidth=1, label="V(x)"))
    ax.legend(handles=handles, frameon=False, fontsize="small", ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    ax.set(xlabel="step t", ylabel="reward R\n(higher is better)", xlim=(1, total_steps))
    return ax


ARROW = {"arrowstyle": "-|>,head_width=0.25", "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
FORCES = {"L+": COLOURS["positive"], "L-": COLOURS["negative"], "HL-BT": COLOURS["hl_bt"], "L_R": COLOURS["save"],
          "zero net force": COLOURS["save_zero_net_force"]}  # fmt: skip


def pushes(
    rewards: Tensor, forces: dict[str, Tensor], ax: plt.Axes | None = None,
    value: float | None = None, names: list[str] | None = None, scale: float = 1.0,
) -> plt.Axes:  # fmt: skip
    """One group on the reward axis, with the force of each loss on each response as an arrow.

    rewards [G]; forces: name in FORCES -> minus the loss's gradient by the rewards [G]; scale: length of force 1.
    """
    ax = ax or plt.gca()
    points = rewards.tolist()
    ends = [r + scale * f for force in forces.values() for r, f in zip(points, force.tolist(), strict=True)]
    if value is not None:
        ax.vlines(value, -0.45, len(points), color="#333333", linewidth=1)
        ax.text(value, -0.72, "V(x)", ha="center", va="center", fontsize="small")
    for row, reward in enumerate(points):
        for name, force in forces.items():
            push = force[row].item()
            if abs(push) < 1e-6:
                continue
            arrow = ARROW | {"color": FORCES[name]}
            ax.annotate("", xy=(reward + scale * push, row), xytext=(reward, row), arrowprops=arrow)
            ax.text(reward + scale * push / 2, row - 0.32, f"{push:+.3f}", ha="center", va="center", fontsize="x-small")
    ax.plot(points, range(len(points)), "o", color="#333333", markersize=3.5)
    handles = [plt.Line2D([], [], color=FORCES[name], linewidth=2, label=f"force of {name}") for name in forces]
    ax.legend(handles=handles, frameon=False, fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    ax.update_datalim([(end, 0) for end in ends])
    ax.margins(x=0.08)
    ax.autoscale_view(scaley=False)
    ax.set(yticks=range(len(points)), yticklabels=_plain(names or [f"response {i + 1}" for i in range(len(points))]))
    ax.set(ylim=(len(points) - 0.4, -1), xlabel="reward R (further right is better)")
    ax.grid(axis="y", visible=False)
    return ax


def forces_by_share(group_size: int, gap: float, ax: plt.Axes | None = None) -> plt.Axes:
    """Net forces A and D on a group of right responses at +gap/2 and wrong ones at -gap/2, V being its mean reward."""
    ax = ax or plt.gca()
    right = torch.arange(1, group_size)  # number of right responses in each group
    positive = torch.arange(group_size) < right[:, None]  # [G-1, G]
    rewards = torch.where(positive, gap / 2, -gap / 2)
    pull, push = net_forces(rewards, rewards.mean(1), Partition(positive, ~positive, positive.any(1)))
    share = right / group_size
    ax.plot(share, pull, "o-", markersize=4, color=COLOURS["positive"], label="A: positives, up")
    ax.plot(share, push, "o-", markersize=4, color=COLOURS["negative"], label="D: negatives, down")
    ax.plot(share, push - pull, "--", color="#333333", label="D - A: the group, down")
    ax.set(xlabel="share of right responses in the group", ylabel="total force", xlim=(0, 1), ylim=(0, 1))
    ax.legend(frameon=False, fontsize="small")
    return ax


def filtered_groups(
    rewards: Tensor, values: Tensor, sides: Partition, threshold: float, names: list[str],
    ax: plt.Axes | None = None, gold: Tensor | None = None,
) -> plt.Axes:  # fmt: skip
    """Groups on the reward axis [B, G], a row each: V a bar, the ignored band grey, the side a colour.

    gold [B, G]: right responses are circles, wrong ones crosses; dots where it is nan or not given.
    """
    ax = ax or plt.gca()
    band = math.log(threshold / (1 - threshold))
    gold = torch.full_like(rewards, math.nan) if gold is None else gold
    for row, value in enumerate(values.tolist()):
        ax.barh(row, 2 * band, 0.62, value - band, color=COLOURS["left out"], alpha=0.3, linewidth=0)
        ax.vlines(value, row - 0.36, row + 0.36, color="#333333", linewidth=1.5)
    height = torch.linspace(-0.24, 0.24, rewards.shape[1]) + torch.arange(len(rewards))[:, None]  # [B, G]
    masks = {"positive": sides.positive, "negative": sides.negative, "left out": ~sides.kept}
    kinds = {"right": ("o", gold > 0.5), "wrong": ("x", gold <= 0.5), "gold unknown": (".", gold.isnan())}
    for side, mask in masks.items():
        colour = COLOURS[side] if side != "left out" else "0.45"
        for marker, of_kind in kinds.values():
            here = mask & of_kind
            ax.scatter(rewards[here], height[here], s=26, marker=marker, color=colour, linewidth=1.4 * (marker == "x"))
    handles = [plt.Line2D([], [], color=COLOURS[s] if s != "left out" else "0.45", linewidth=3, label=s) for s in masks]
    for kind, (marker, of_kind) in kinds.items():
        if of_kind.any():
            handles.append(plt.Line2D([], [], color="#333333", linestyle="", marker=marker, label=kind))
    ax.legend(handles=handles, frameon=False, fontsize="small", ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    ax.set(yticks=range(len(names)), yticklabels=_plain(names), ylim=(len(names) - 0.4, -0.6))
    ax.set_xlabel("reward R (further right is better); bar: V(x), grey: left out")
    ax.grid(axis="y", visible=False)
    return ax


def by_threshold(table: pd.DataFrame, columns: dict[str, str], ax: plt.Axes | None = None, of: str = "") -> plt.Axes:
    """Metrics of `loop.describe` over the `threshold` they were measured at; dashed grey: the paper's at the start.

    columns: metric -> its name in the legend. of: a column of counts, for shares that deserve error bars.
    """
    ax = ax or plt.gca()
    there = [c for c in columns if c in table and table[c].notna().any()]
    for column in there:
        y = table[column]
        error = (y * (1 - y) / table[of]) ** 0.5 if of else None
        style = {"fmt": "o-", "markersize": 4, "capsize": 2, "color": LINES.get(column, COLOURS["save"])}
        ax.errorbar(table["threshold"], y, yerr=error, label=columns[column], **style)
    ax.set(xlabel="threshold mu (to the right: fewer are kept)")
    if not there:
        return _nothing_to_show(ax)
    ax.axvline(0.75, label="mu at the start for m0 = 0.5", **PAPER)
    ax.legend(frameon=False, fontsize="small", ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def _plain(texts: list[str]) -> list[str]:
    """Texts of models as labels: on one line, and no `$` that matplotlib would take for mathematics."""
    return [" ".join(text.split()).replace("$", r"\$") for text in texts]


# runs: curves of one run, comparison of several

LINES = {
    "filter/positive": COLOURS["positive"], "filter/negative": COLOURS["negative"], "filter/kept": "#333333",
    "force/pull": COLOURS["positive"], "force/push": COLOURS["negative"], "threshold": "#1b6ca8",
    "reward/mean": "#1b6ca8", "value/mean": "#edae49", "gold/success_rate": "#333333",
    "eval/rm_accuracy": "#1b6ca8", "eval/rm_accuracy_current": "#12908e", "eval/gold": "#333333",
    "eval/reward": "#12908e",
}  # fmt: skip


def lines(metrics: pd.DataFrame, columns: dict[str, str], ylabel: str, ax: plt.Axes | None = None) -> plt.Axes:
    """Metrics of one run over its steps. columns: metric -> its name in the legend; those it lacks are left out.

    A metric that is measured every few steps is drawn with a dot at each measurement.
    """
    ax = ax or plt.gca()
    there = [c for c in columns if c in metrics and metrics[c].notna().any()]
    for column in there:
        points = metrics[["step", column]].dropna()
        marker = "o" if len(points) < len(metrics) - 1 or len(points) < 4 else ""
        style = {"marker": marker, "markersize": 4, "color": LINES.get(column), "label": columns[column]}
        ax.plot(points["step"], points[column], **style)
    ax.set(xlabel="step", ylabel=ylabel)
    if not there:
        return _nothing_to_show(ax)
    ax.legend(frameon=False, fontsize="small")
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
    ax = ax or plt.gca()
    drawn: dict[str, int] = {}
    for label, frames in groups.items():
        measured = [f.set_index("step")[column].dropna() for f in frames if column in f]
        runs = [m.rolling(window, min_periods=1).mean() - since_start * m.iloc[0] for m in measured if len(m)]
        if not runs:
            continue
        table, rule = pd.concat(runs, axis=1), label.split(",")[0]  # [steps, runs]
        style = ("-", (0, (5, 2)), ":", "-.")[drawn.get(rule, 0) % 4]
        drawn[rule] = drawn.get(rule, 0) + 1
        marker = "o" if len(table) < 15 else ""
        ax.plot(table.index, table.mean(1), ls=style, marker=marker, markersize=4, color=COLOURS.get(rule), label=label)
        if len(runs) > 1:
            ax.fill_between(table.index, table.min(1), table.max(1), color=COLOURS.get(rule), alpha=0.12, linewidth=0)
    ax.set(xlabel="step", ylabel=axis_label(column, "change: " * since_start))
    if not drawn:
        return _nothing_to_show(ax)
    ax.legend(frameon=False, fontsize="small")
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
    ax.set(xlabel="step", ylabel="reward R")
    ax.legend(frameon=False, fontsize="small", ncols=3)
    return ax


def push_against_success(metrics: pd.DataFrame, ax: plt.Axes | None = None) -> plt.Axes:
    """D - A against the share of right responses, a dot a step; shaded: the net push falls on mostly good responses."""
    ax = ax or plt.gca()
    ax.set(xlabel="share of right responses in the batch (gold)", ylabel="D - A\n(above 0: the net push is down)")
    if not {"force/push", "gold/success_rate"} <= set(metrics):
        return _nothing_to_show(ax)
    x, y = metrics["gold/success_rate"], metrics["force/push"] - metrics["force/pull"]
    ax.set(xlim=(0, 1), ylim=(-1, 1))
    ax.fill_between([0.5, 1], 0, 1, color=COLOURS["negative"], alpha=0.1, linewidth=0)
    dots = ax.scatter(x, y, c=metrics["step"], cmap="viridis", s=16)
    ax.figure.colorbar(dots, ax=ax, label="step")
    return ax


def change_dots(changes: pd.DataFrame, ax: plt.Axes | None = None, paper: pd.Series | None = None) -> plt.Axes:
    """`analysis.changes` in points, a row a group with its standard error. paper: points a rule, drawn dashed grey."""
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
    if paper is not None:
        ax.legend(frameon=False, fontsize="small")
    return ax


def _nothing_to_show(ax: plt.Axes) -> plt.Axes:
    ax.text(0.5, 0.5, "not measured in this run", ha="center", va="center", transform=ax.transAxes, color="0.5")
    ax.set(xticks=[], yticks=[])
    return ax


# studies: differences between cells, and their courses


def paired_differences(table: pd.DataFrame, ax: plt.Axes | None = None, colour: object = "#333333") -> plt.Axes:
    """Differences to a reference, a row a cell; filled: resolved, hollow: not.

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
    ax.set(yticks=range(len(table)), yticklabels=_plain(list(table.index)), ylim=(len(table) - 0.4, -0.6))
    return ax


def cell_colours(rules: dict[str, str]) -> dict[str, object]:
    """cell -> colour: its rule's for the first cell of a rule, colours of their own for the others."""
    others, found = iter(sns.color_palette("Dark2")), {}
    for cell, rule in rules.items():
        found[cell] = next(others) if COLOURS[rule] in found.values() else COLOURS[rule]
    return found


def course(
    courses: pd.DataFrame, measure: str, colours: dict[str, object], start: str, ax: plt.Axes | None = None
) -> plt.Axes:
    """A measure over the steps, in points above the world's start: a line a cell of `colours`, band: standard error.

    courses: a row a run and evaluation, with cell, world, step and the measure. The world's start is the first value
    of the cell `start` there. The line is the mean over worlds; seeds of one world are averaged first.
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
    ax.set(xlabel="step", ylabel=axis_label(measure, "points above the start: "))
    return ax if drawn else _nothing_to_show(ax)


# theory: a condition over the steps of many runs

VERDICTS = {"holds": COLOURS["positive"], "fails": COLOURS["negative"], "not resolved": "0.6"}


def verdict_dots(rows: pd.DataFrame, ax: plt.Axes | None = None) -> plt.Axes:
    """`theory.conditions` of one condition: a dot a run and step, coloured by its verdict; line: the median run.

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
    """A measure as it is over the steps, a line a cell of `colours`: mean over the worlds, band: lowest to highest.

    courses: a row a run and evaluation, with cell, world, step and the measure. Seeds of a world are averaged first.
    """
    ax = ax or plt.gca()
    known = courses.dropna(subset=[measure]) if measure in courses else courses.iloc[:0]
    drawn = [cell for cell in colours if (known["cell"] == cell).any()]
    for cell in drawn:
        table = known[known["cell"] == cell].pivot_table(index="step", columns="world", values=measure)
        ax.plot(table.mean(axis=1), color=colours[cell], linewidth=2, label=cell)
        ax.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colours[cell], alpha=0.12, linewidth=0)
    ax.set(xlabel="step", ylabel=axis_label(measure))
    return ax if drawn else _nothing_to_show(ax)
