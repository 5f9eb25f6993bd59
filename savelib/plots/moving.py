"""Figures that move: a group under the filter and the losses, rewards over a run, a run in the phase diagram."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML

from savelib.method import contrastive_terms, partition
from savelib.show.colours import COLOURS
from savelib.show.moving import moving
from savelib.show.svg import Chart, beside

ROW = 24  # pixels of a response
MOST = 30  # frames of a figure over steps: with more steps than that some are passed over


def filter_by_threshold(rewards: list[float], value: float, names: list[str]) -> HTML:
    """One group under a threshold mu from 0.5 to 0.95: who is kept, on which side, and where the losses push it."""
    reach = 0.3 * (max(rewards) - min(rewards))
    axis = (min(rewards) - reach, max(rewards) + reach)
    rows = pd.DataFrame({"reward": rewards, "response": names, "gold": math.nan})
    frames = []
    for percent in range(50, 96):
        title = f"Who teaches at mu = {percent / 100:.2f}, and where L+ and L- push"
        frames.append((f"mu = {percent / 100:.2f}", _group(rows, value, percent / 100, axis, title)))
    return moving(frames, "One group of responses on the reward axis, under a slider for the threshold", start=20)


def filter_over_run(samples: pd.DataFrame, metrics: pd.DataFrame) -> HTML:
    """The first logged group of each step of a recorded run; a rule with an anchor and a threshold."""
    first = samples[samples["prompt_id"] == samples.groupby("step")["prompt_id"].transform("first")]
    axis = (first["reward"].min() - 0.5, first["reward"].max() + 0.5)
    mu, frames = metrics.set_index("step")["threshold"], []
    for step in _some(first.loc[first["value"].notna(), "step"]):
        rows = first[first["step"] == step]
        rows = rows.drop_duplicates("response").sort_values("reward", ascending=False)
        title = f"Step {step}, mu = {mu[step]:.2f}: a group of responses to '{rows['prompt'].iloc[0]}'"
        frames.append((f"step {step}", _group(rows, rows["value"].iloc[0], mu[step], axis, title)))
    return moving(frames, "A group of each step on the reward axis, under a slider for the step")


def _group(rows: pd.DataFrame, value: float, mu: float, axis: tuple[float, float], title: str) -> str:
    """Responses on the reward axis, one row each: V, the ignored band, the arrows of L+ and L-."""
    rewards, anchor = torch.tensor([rows["reward"].tolist()], dtype=torch.float64), torch.tensor([value]).double()
    sides = partition(rewards - anchor[:, None], mu)
    push, band = _pushes(rewards, anchor, sides), math.log(mu / (1 - mu))
    count = max(len(rows), 4)
    chart = Chart(860, count * ROW + 78, axis, (count - 0.4, -0.7), (262, 16, 28, 38))
    xlabel = "reward R (further right is better); bar: V, grey: left out; arrows: the force, drawn twice as long"
    chart.axes(title, xlabel, y_ticks=False)
    chart.bar((value - band, value + band), chart.y_range, COLOURS["left out"], 0.3)
    chart.line([(value, end) for end in chart.y_range], "#333333", 1.5)
    for i, row in enumerate(rows.to_dict("records")):
        side = "positive" if sides.positive[0, i] else "negative" if sides.negative[0, i] else "left out"
        colour = COLOURS[side] if side != "left out" else "#777777"
        if abs(push[i]) > 1e-3:
            chart.arrow(row["reward"], row["reward"] + 2 * push[i], i, colour)
            ahead, end = (4, "start") if push[i] > 0 else (-4, "end")
            chart.text(row["reward"] + 2 * push[i], i, f"{push[i]:+.2f}", (ahead, 4), anchor=end, size=11)
        chart.dot(row["reward"], i, colour, 4, cross=row["gold"] <= 0.5)
        gold = "" if pd.isna(row["gold"]) else "right: " if row["gold"] > 0.5 else "wrong: "
        chart.write(254, chart.y(i) + 4, _short(gold + row["response"], 38), anchor="end", colour=colour)
    return chart.svg()


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "\u2026"


def _pushes(rewards: torch.Tensor, values: torch.Tensor, sides: object) -> list[float]:
    """Minus the gradient of L+ + L- by each reward of one group [1, G], by autograd."""
    free = rewards.clone().requires_grad_()
    up, down = contrastive_terms(free, values, sides)
    return (-torch.autograd.grad((up + down).sum(), free, allow_unused=True)[0][0]).tolist()


def reward_histograms(runs: dict[str, pd.DataFrame], around: int = 2, bins: int = 24) -> HTML:
    """Rewards of right (green) and wrong (red) responses over the steps, for runs side by side.

    runs: name -> samples with gold. A frame has the logged responses of its step and `around` steps on either side.
    """
    rewards = pd.concat([samples["reward"] for samples in runs.values()])
    edges = np.linspace(rewards.min(), rewards.max() + 1e-6, bins + 1)
    shares = {}  # step -> run -> kind -> its rewards, and the share of the responses in each bin
    for step in _some(pd.concat([samples["step"] for samples in runs.values()])):
        near = {name: of[of["step"].between(step - around, step + around)] for name, of in runs.items()}
        shares[step] = {name: _by_gold(of, edges) for name, of in near.items()}
    most = max(share.max() for of in shares.values() for kinds in of.values() for _, share in kinds.values())
    frames = []
    for step, of in shares.items():
        charts = (_histogram(name, kinds, edges, 1.1 * most) for name, kinds in of.items())
        frames.append((f"step {step}", beside(*charts).svg()))
    return moving(frames, "Rewards of right and of wrong responses, under a slider for the step", start=-1)


KINDS = {"right": "positive", "wrong": "negative", "gold unknown": "left out"}  # and their colours


def _by_gold(samples: pd.DataFrame, edges: np.ndarray) -> dict[str, tuple[pd.Series, np.ndarray]]:
    gold = samples["gold"].astype(float)
    kinds = np.select([gold > 0.5, gold.notna()], ["right", "wrong"], "gold unknown")
    found = {kind: samples.loc[kinds == kind, "reward"] for kind in KINDS}
    return {k: (rows, np.histogram(rows, edges)[0] / len(samples)) for k, rows in found.items() if len(rows)}


def _histogram(name: str, kinds: dict[str, tuple[pd.Series, np.ndarray]], edges: np.ndarray, most: float) -> Chart:
    chart = Chart(430, 272, (edges[0], edges[-1]), (0, most), (50, 12, 20 + 15 * len(KINDS), 36))
    chart.axes(f"{name}: one run", "reward R", "share of the responses")
    count = sum(len(rows) for rows, _ in kinds.values())
    for i, (kind, (rows, shares)) in enumerate(kinds.items()):
        colour, mean = COLOURS[KINDS[kind]], rows.mean()
        for left, right, share in zip(edges, edges[1:], shares, strict=False):
            if share:
                chart.bar((left, right), (0, share), colour, 0.55)
        said = f"{kind}: {len(rows)} of {count}, mean R {mean:+.2f} (dashed)"
        chart.write(chart.left, 31 + 14 * i, said, anchor="start", colour=colour)
        chart.line([(mean, 0), (mean, most)], colour, 1.5, "4 3")
    return chart


def run_in_phase_diagram(cells: pd.DataFrame, metrics: pd.DataFrame) -> HTML:
    """The simulation's diagram of reward scale over success rate, with the point of a run moving in it.

    cells: change of accuracy in points, reward scales in the index, success rates in the columns, both ascending. The
    run is placed by its share of right responses and the spread of its rewards within a group; places between the
    diagram's values are interpolated, the scale in logarithms.
    """
    scales, rates = [math.log2(v) for v in cells.index], list(cells.columns)
    edges_x, edges_y = _edges(rates), _edges(scales)
    path = metrics.reindex(columns=["step", "gold/success_rate", "reward/std_in_group"]).dropna()
    points = [(x, math.log2(max(y, 1e-3))) for x, y in path.to_numpy()[:, 1:]]
    points = [(min(max(x, 0), 1), min(max(y, edges_y[0]), edges_y[-1])) for x, y in points]
    accuracy = metrics.set_index("step")["eval/rm_accuracy"].dropna()
    steps, frames = path["step"].astype(int).tolist(), []
    for step in _some(path["step"].astype(int)):
        i = steps.index(step)
        chart = Chart(640, 330, (edges_x[0], edges_x[-1]), (edges_y[0], edges_y[-1]), (56, 16, 46, 40))
        _diagram(chart, cells, edges_x, edges_y)
        moved = 100 * (accuracy[accuracy.index <= step].iloc[-1] - accuracy.iloc[0])
        said = f"step {step}: accuracy on fixed pairs {moved:+.1f} points since the start; one run"
        chart.write(chart.left, 34, said, anchor="start")
        chart.line(points[: i + 1], "#111111", 1.5).dot(*points[i], "#111111", 7)
        frames.append((f"step {step}", chart.svg()))
    return moving(
        frames, "The phase diagram of the simulation with a run's point, under a slider for the step", start=-1
    )


def _diagram(chart: Chart, cells: pd.DataFrame, edges_x: list[float], edges_y: list[float]) -> None:
    chart.write(
        chart.left,
        17,
        "What the simulation expects: change of accuracy in points",
        anchor="start",
        size=13,
        weight="bold",
    )
    for j, scale in enumerate(cells.index):
        for k, rate in enumerate(cells.columns):
            change = cells.loc[scale, rate]
            colour = COLOURS["save"] if change > 0 else COLOURS["mean_reward"]
            chart.bar(edges_x[k : k + 2], edges_y[j : j + 2], colour, min(abs(change) / 50, 1) * 0.8)
            chart.text(rate, (edges_y[j] + edges_y[j + 1]) / 2, f"{change:+.0f}", (0, 4))
        chart.write(chart.left - 6, chart.y(math.log2(scale)) + 4, f"{scale:g}", anchor="end")
    base = chart.height - chart.bottom
    for rate in cells.columns:
        chart.write(chart.x(rate), base + 14, f"{rate:g}")
    chart.write((chart.left + chart.width) / 2, base + 32, "share of right responses")
    middle = (chart.top + base) / 2
    chart.write(14, middle, "spread of R in a group", more=f'transform="rotate(-90 14 {middle:.0f})"')


def _some(steps: pd.Series) -> list[int]:
    """At most MOST of the steps, evenly spread, the first and the last among them."""
    known = sorted(set(steps))
    every = max(1, math.ceil((len(known) - 1) / (MOST - 1)))
    return sorted({*known[::every], *known[-1:]})


def _edges(centres: list[float]) -> list[float]:
    """Borders halfway between the centres, the outer ones as far outside."""
    between = [(a + b) / 2 for a, b in zip(centres, centres[1:], strict=False)]
    return [2 * centres[0] - between[0], *between, 2 * centres[-1] - between[-1]]
