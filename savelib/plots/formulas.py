"""Figures of formulas on tensors: preference learning, value anchor, filter, forces."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from torch import Tensor

from savelib.method import Partition, bradley_terry_loss, curriculum_threshold, net_forces
from savelib.plots.style import PAPER, name_ends, nothing_to_show, plain
from savelib.show.colours import COLOURS, LINES


def bt_curve(margins: Tensor, ax: plt.Axes | None = None, noise: tuple[float, ...] = (0.0, 0.3)) -> plt.Axes:
    """Eq. 11's loss over the margin, dots at `margins` [N]; a share `noise` of flipped labels bounds the best one."""
    ax = ax or plt.gca()
    loss = torch.vmap(lambda m: bradley_terry_loss(m, torch.zeros_like(m)))
    x, ends = torch.linspace(-4, 4, 401), []
    for share, colour in zip(noise, (COLOURS["save"], COLOURS["negative"], COLOURS["hl_bt"]), strict=False):
        y = (1 - share) * loss(x) + share * loss(-x)
        ax.plot(x, y, color=colour)
        name = f"{share:.0%} of the labels flipped"
        if share:
            best = math.log((1 - share) / share)
            ax.plot(best, y.min(), "v", color=colour)
            name += f"\nbest margin {best:.2f}"
        ends.append((y[-1].item(), name, colour))
    ax.plot(margins, loss(margins), "o", color="#333333", label="the pairs above")
    ax.set(xlabel="margin R(chosen) - R(rejected)", ylabel="loss\n(lower is better)", xlim=(-4, 4), ylim=(-0.1, None))
    ax.set_title("The Bradley-Terry loss of a pair, by its margin")
    ax.legend()
    name_ends(ax, ends)
    return ax


def epoch_losses(losses: list[float], levels: dict[str, float], ylabel: str, ax: plt.Axes | None = None) -> plt.Axes:
    """Mean loss of each epoch; levels: name -> a loss to compare with, drawn dotted."""
    ax = ax or plt.gca()
    for level, style in zip(levels.values(), (":", "-."), strict=False):
        ax.axhline(level, color="0.3", linewidth=1, linestyle=style)
    ax.plot(range(1, len(losses) + 1), losses, "o-", markersize=4, color=COLOURS["save"])
    ax.set(xlabel="epoch", ylabel=f"{ylabel}\n(lower is better)", title="Loss over the epochs of training")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ends = [(level, f"{name}: {level:.3g}", "0.3") for name, level in levels.items()]
    name_ends(ax, ends + [(loss, f"the last epoch: {loss:.3g}", COLOURS["save"]) for loss in losses[-1:]])
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
    ax.set_title("Margins of held-out pairs: how far apart, and right or wrong")
    ax.legend()
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
    ax.set_title("How sure the reward model is, and how often it is right\nbars: one standard error")
    ax.legend(loc="lower right")
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
    ax.set_title("V against what it should be, one dot per prompt")
    ax.legend()
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
    ax.set_title("How strict the filter is over the run (eq. 14)")
    ax.legend()
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
    ax.legend(handles=handles, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    ax.set(xlabel="step t", ylabel="reward R\n(higher is better)", xlim=(1, total_steps))
    ax.set_title("When each response of one group begins to count", pad=28)
    return ax


ARROW = {"arrowstyle": "-|>,head_width=0.25", "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
FORCES = {"L+": COLOURS["positive"], "L-": COLOURS["negative"], "HL-BT": COLOURS["hl_bt"], "L_R": COLOURS["save"],
          "mirror image": COLOURS["save_checked"]}  # fmt: skip
PUSHES = "Where the loss pushes each response of one group"


def pushes(
    rewards: Tensor, forces: dict[str, Tensor], ax: plt.Axes | None = None,
    value: float | None = None, names: list[str] | None = None, scale: float = 1.0, title: str = PUSHES,
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
            tip, ahead = (reward + scale * push, row), math.copysign(4, push)  # points from the tip to the number
            ax.annotate("", xy=tip, xytext=(reward, row), arrowprops=arrow)
            style = {"ha": "left" if push > 0 else "right", "va": "center", "fontsize": "x-small"}
            ax.annotate(f"{push:+.3f}", tip, (ahead, 0), textcoords="offset points", **style)
    ax.plot(points, range(len(points)), "o", color="#333333", markersize=3.5)
    handles = [plt.Line2D([], [], color=FORCES[name], linewidth=2, label=f"force of {name}") for name in forces]
    ax.legend(handles=handles, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    ax.update_datalim([(end, 0) for end in ends])
    ax.margins(x=0.16)
    ax.autoscale_view(scaley=False)
    ax.set(yticks=range(len(points)), yticklabels=plain(names or [f"response {i + 1}" for i in range(len(points))]))
    ax.set(ylim=(len(points) - 0.4, -1), xlabel="reward R (further right is better)")
    ax.set_title(title, pad=28)
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
    ax.set_title("The pull up and the push down on a group, by how good it is")
    ax.legend()
    return ax


def filtered_groups(
    rewards: Tensor, values: Tensor, sides: Partition, threshold: float, names: list[str],
    ax: plt.Axes | None = None, gold: Tensor | None = None,
) -> plt.Axes:  # fmt: skip
    """Groups on the reward axis [B, G], one row each: V a bar, the ignored band grey, the side a colour.

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
    ax.legend(handles=handles, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    ax.set(yticks=range(len(names)), yticklabels=plain(names), ylim=(len(names) - 0.4, -0.6))
    ax.set_xlabel("reward R (further right is better); bar: V(x), grey: left out")
    ax.set_title("Which responses teach, and in which direction: one row per prompt", pad=28)
    ax.grid(axis="y", visible=False)
    return ax


def by_threshold(
    table: pd.DataFrame, columns: dict[str, str], title: str, ax: plt.Axes | None = None, of: str = ""
) -> plt.Axes:
    """Metrics of `loop.describe` over the `threshold` they were measured at; dashed grey: the paper's at the start.

    columns: metric -> its name beside the line. of: a column of counts, for shares that deserve error bars.
    """
    ax = ax or plt.gca()
    there, ends = [c for c in columns if c in table and table[c].notna().any()], []
    for column in there:
        y, colour = table[column], LINES.get(column, COLOURS["save"])
        error = (y * (1 - y) / table[of]) ** 0.5 if of else None
        ax.errorbar(table["threshold"], y, yerr=error, fmt="o-", markersize=4, capsize=2, color=colour)
        ends.append((y.iloc[-1], columns[column], colour))
    ax.set(xlabel="threshold mu (to the right: fewer are kept)", title=title)
    if not there:
        return nothing_to_show(ax)
    if table["threshold"].max() > 0.75:
        ax.axvline(0.75, **PAPER)
        style = {"textcoords": "offset points", "fontsize": "small", "color": "0.4"}
        ax.annotate("a run with m0 = 0.5 starts here", (0.75, 0.02), (4, 0), ("data", "axes fraction"), **style)
    name_ends(ax, ends)
    return ax
