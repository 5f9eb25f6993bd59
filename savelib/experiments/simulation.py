"""SAVE without models: a linear reward head on clustered features, seconds a setting; which rule helps, and when.

A response has features z = mu_x + separation * y * u + nuisance * e * v + noise in R^64: y = +-1 is its quality (right
with probability `success`), e = +-1 a style that gold ignores. The reward is w . z, the prompt value exact. The losses
and the rules are those of real runs.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from savelib.method import (
    RULES,
    GroupLoss,
    Partition,
    Rule,
    bradley_terry_loss,
    contrastive_terms,
    curriculum_threshold,
    net_forces,
    partition,
    rm_advantages,
    running_mean,
    save_loss,
    spread_loss,
    zero_net_force,
)
from savelib.paths import resolve

DIMENSION = 64
MEASURED = ("accuracy", "spread", "mean_reward", "pull", "push", "kept")  # of each step


class Setting(BaseModel):
    """One simulated world and one way to train in it; the defaults are the middle of every figure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    success: float = Field(0.5, ge=0, le=1, description="share of right responses at the first step")
    success_end: float | None = Field(None, ge=0, le=1, description="the same at the last step; None: as at the first")
    separation: float = Field(2.0, ge=0, description="distance of right and wrong from their mean, in noise sd")
    nuisance: float = Field(0.0, ge=0, description="the same of a style that gold ignores")
    reward_scale: float = Field(1.0, gt=0, description="sd of the rewards in a half-right group at the start")
    label_noise: float = Field(0.3, ge=0, lt=0.5, description="share of flipped labels among the pairs")
    lr: float = Field(3e-3, gt=0, description="Adam's learning rate of the reward head")
    offline_weight: float = Field(0.0, ge=0, description="weight of eq. 11 on the pairs, beside the rule's loss")
    pairs: int = Field(40, ge=1, description="preference pairs that the initial reward head is fitted on")
    total_steps: int = Field(60, ge=1, description="T")
    batch_size: int = Field(16, ge=1, description="B")
    group_size: int = Field(12, ge=2, description="G")
    initial_margin: float = Field(0.5, ge=0, le=1, description="m0 of eq. 14")


SHARED = ("pairs", "total_steps", "batch_size", "group_size", "initial_margin")  # by the settings of one call


class Worlds:
    """W worlds at once: every setting with every seed, settings first. All settings of a seed see the same draws.

    ValueError if the settings differ in what is in `SHARED`. A seed's result does not depend on its company.
    """

    def __init__(self, settings: Sequence[Setting], seeds: Iterable[int]):
        self.settings, self.seeds, self.shape = list(settings), list(seeds), settings[0]
        for name in SHARED:
            if len({getattr(s, name) for s in settings}) > 1:
                raise ValueError(f"{name}: must be the same in all settings of a call; simulate them one by one")
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        axes = torch.linalg.qr(self._normal(DIMENSION, 2)).Q  # [W, D, 2]
        self.quality, self.style = axes[..., 0], axes[..., 1]  # u, v [W, D], unit, at right angles

    def each(self, name: str) -> Tensor:
        """A field of the settings, [W]."""
        return torch.tensor([float(getattr(s, name)) for s in self.settings]).repeat_interleave(len(self.seeds))

    def _normal(self, *shape: int) -> Tensor:
        drawn = torch.stack([torch.randn(shape, generator=g) for g in self.generators])
        return drawn.repeat(len(self.settings), *[1] * len(shape))

    def success(self, step: int) -> Tensor:
        """The share of right responses at a step (from 1), [W]: a straight line from first to last."""
        ends = torch.tensor([s.success if s.success_end is None else s.success_end for s in self.settings])
        start, done = self.each("success"), (step - 1) / max(1, self.shape.total_steps - 1)
        return start + (ends.repeat_interleave(len(self.seeds)) - start) * done

    def features(self, right: Tensor) -> Tensor:
        """right [W, n, m] (+1 or -1) -> z without mu_x, [W, n, m, D]."""
        z = self._normal(*right.shape[1:], DIMENSION)
        z += (self.each("separation")[:, None] * self.quality)[:, None, None] * right[..., None]
        style = self._normal(*right.shape[1:]).sign()  # [W, n, m]
        if self.each("nuisance").any():
            z += (self.each("nuisance")[:, None] * self.style)[:, None, None] * style[..., None]
        return z

    def groups(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch of a step: z [W, B, G, D], its mean for each prompt [W, B, D], right [W, B, G]."""
        success = self.success(step)[:, None, None]
        uniform = torch.special.ndtr(self._normal(self.shape.batch_size, self.shape.group_size))
        right = torch.where(uniform < success, 1.0, -1.0)  # [W, B, G]
        prompts = self._normal(self.shape.batch_size, DIMENSION)  # mu_x
        mean = prompts + self.each("separation")[:, None, None] * (2 * success - 1) * self.quality[:, None]
        return self.features(right) + prompts[:, :, None], mean, right

    def preferences(self) -> Tensor:
        """z(chosen) - z(rejected) of the noisy pairs, [W, N, D]; `middle` [W, D]: their mean, prompts left out."""
        z = self.features(torch.tensor([1.0, -1.0]).expand(len(self.quality), self.shape.pairs, 2))
        self.middle = z.mean((1, 2))
        uniform = torch.special.ndtr(self._normal(self.shape.pairs))
        flipped = torch.where(uniform < self.each("label_noise")[:, None], -1.0, 1.0)  # [W, N]
        return (z[:, :, 0] - z[:, :, 1]) * flipped[..., None]

    def accuracy(self, heads: Tensor) -> Tensor:
        """heads w [W, D] -> [W], the probability that a fresh right response beats a wrong one of its prompt."""
        gap = 2 * self.each("separation") * (heads * self.quality).sum(1)
        style = 2 * self.each("nuisance") * (heads * self.style).sum(1)
        sd = math.sqrt(2) * heads.norm(dim=1)
        below, same, above = (torch.special.ndtr((gap + sign * style) / sd) for sign in (-1, 0, 1))
        return (below + 2 * same + above) / 4

    def spread(self, heads: Tensor) -> Tensor:
        """heads [W, D] -> [W], sd of the rewards in a half-right group."""
        quality = self.each("separation") * (heads * self.quality).sum(1)
        style = self.each("nuisance") * (heads * self.style).sum(1)
        return torch.stack([heads.norm(dim=1), quality, style]).norm(dim=0)


def fit_heads(worlds: Worlds, pairs: Tensor, steps: int = 20, lr: float = 0.03) -> Tensor:
    """Eq. 11 on the pairs [W, N, D] by Adam from 0; the heads [W, D] are scaled to the setting's reward spread."""
    heads = torch.zeros(len(pairs), DIMENSION, requires_grad=True)
    optimizer = torch.optim.Adam([heads], lr=lr)
    for _ in range(steps):
        heads.grad = pair_gradient(heads, pairs)
        optimizer.step()
    heads = heads.detach()
    return heads * (worlds.each("reward_scale") / worlds.spread(heads))[:, None]


def pair_gradient(heads: Tensor, pairs: Tensor) -> Tensor:
    """Gradient [W, D] of eq. 11, each world's own: heads [W, D], pairs [W, N, D]."""
    heads = heads.detach().requires_grad_()
    margins = torch.einsum("wnd,wd->wn", pairs, heads)
    return torch.autograd.grad(bradley_terry_loss(margins, margins * 0) * len(pairs), heads)[0]


def head_gradient(
    rule: Rule, heads: Tensor, z: Tensor, mean: Tensor, threshold: float, mostly_right: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient [W, D] of a rule's loss, each world's own, and what its batch showed, [W] each.

    heads [W, D], z [W, B, G, D], mean [W, B, D] (the prompts' expected features, so that V is exact), mostly_right [W]
    bool: where the rule's other loss holds, if it has one.
    """
    worlds, prompts = z.shape[:2]
    rewards = torch.einsum("wbgd,wd->wbg", z, heads).flatten(0, 1).requires_grad_()  # [W * B, G]
    exact = torch.einsum("wbd,wd->wb", mean, heads).flatten()  # [W * B]
    anchors = (exact if rule.anchor == "value" else rewards.detach().mean(1)).requires_grad_()
    sides = partition(rm_advantages(rewards.detach(), anchors.detach()), threshold)
    eligible = torch.ones_like(sides.positive)
    used = rule.groups(sides, eligible)  # [W * B]

    def forces(loss_of: GroupLoss) -> list[Tensor]:  # by reward [W, B, G] and by anchor [W, B, 1]
        loss = loss_of(rewards, anchors, sides, eligible) * used.sum()  # a sum over groups: worlds do not mix
        both = torch.autograd.grad(loss, (rewards, anchors), allow_unused=True, materialize_grads=True)
        return [force.view(worlds, prompts, -1) for force in both]

    by_reward, by_anchor = forces(rule.loss)
    if rule.otherwise and mostly_right is not None:
        pairs = zip(forces(rule.otherwise), (by_reward, by_anchor), strict=True)
        by_reward, by_anchor = (torch.where(mostly_right[:, None, None], a, b) for a, b in pairs)
    gradient = torch.einsum("wbg,wbgd->wd", by_reward, z) + (by_anchor * mean).sum(1)
    pull, push = net_forces(rewards, anchors, sides)
    seen = {"mean_reward": rewards.detach(), "pull": pull, "push": push, "kept": sides.kept.float()}
    seen = {name: values.reshape(worlds, -1).mean(1) for name, values in seen.items()}
    return gradient / used.view(worlds, prompts).sum(1, keepdim=True).clamp(min=1), seen


def trajectory(form: str | Rule, settings: Sequence[Setting], seeds: Iterable[int]) -> pd.DataFrame:
    """Train a head in each world: a row a setting (by its place), seed and step (0: before), columns `MEASURED`.

    form: a name in `FORMS`, or a Rule. Adam, gradients clipped to norm 1, as in real runs; accuracy is a share.
    """
    rule = FORMS[form] if isinstance(form, str) else form
    worlds = Worlds(settings, seeds)
    shape, pairs = worlds.shape, worlds.preferences()
    start = fit_heads(worlds, pairs)
    nan = torch.full((len(start),), math.nan)
    measured = [dict.fromkeys(MEASURED, nan) | {"accuracy": worlds.accuracy(start), "spread": worlds.spread(start)}]
    moved = torch.zeros_like(start)  # heads = start + lr * moved, so that each world has its own rate
    optimizer = torch.optim.Adam([moved], lr=1.0)
    lead = None
    heads, offline = start, worlds.each("offline_weight")[:, None] + float(bool(rule.pairs))
    for step in range(1, shape.total_steps + 1):
        gradient, seen = torch.zeros_like(heads), {}
        if rule.loss is not None:
            z, mean, _ = worlds.groups(step)
            threshold = curriculum_threshold(step, shape.total_steps, shape.initial_margin)
            gradient, seen = head_gradient(rule, heads, z, mean, threshold, None if lead is None else lead > 0)
            lead = running_mean(lead, seen["mean_reward"] - (heads * worlds.middle).sum(1))
        if offline.any():
            some = torch.arange(step * shape.batch_size, (step + 1) * shape.batch_size) % shape.pairs
            gradient = gradient + offline * pair_gradient(heads, pairs[:, some])
        moved.grad = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1)
        optimizer.step()
        heads = start + worlds.each("lr")[:, None] * moved
        seen |= {"accuracy": worlds.accuracy(heads), "spread": worlds.spread(heads)}
        measured.append(measured[0] | seen)
    columns = {name: torch.stack([m[name] for m in measured], 1).flatten().tolist() for name in MEASURED}
    place = [range(len(worlds.settings)), worlds.seeds, range(shape.total_steps + 1)]
    return pd.DataFrame(columns, pd.MultiIndex.from_product(place, names=["setting", "seed", "step"])).reset_index()


def simulate(form: str | Rule, settings: Sequence[Setting], seeds: Iterable[int]) -> pd.DataFrame:
    """A row a setting and seed: accuracy before, after and its change (percent, points), drift of the mean reward
    from the first batch to the last, net force A - D (mean over steps), and the setting's fields.
    """
    steps = trajectory(form, settings, seeds).groupby(["setting", "seed"])
    rows = pd.DataFrame({"initial": 100 * steps["accuracy"].first(), "final": 100 * steps["accuracy"].last()})
    rows["change"] = rows["final"] - rows["initial"]
    rows["drift"] = steps["mean_reward"].last() - steps["mean_reward"].first()
    rows["net_force"] = steps["pull"].mean() - steps["push"].mean()
    fields = pd.DataFrame([setting.model_dump() for setting in settings]).rename_axis("setting")
    return rows.reset_index().join(fields, on="setting")


# ---- forms: the rules of real runs, and ours


def _spread_about(rewards: Tensor, centre: Tensor, eligible: Tensor) -> Tensor:
    """Mean square distance of the eligible rewards from centre [B], [B]."""
    squares = (rewards - centre[:, None]).square() * eligible
    return squares.sum(1) / eligible.sum(1).clamp(min=1)


def _mean(rewards: Tensor, side: Tensor) -> Tensor:
    """Mean reward of a side of each group, [B]."""
    return (rewards * side).sum(1) / side.sum(1).clamp(min=1)


def two_clusters(rewards: Tensor) -> Tensor:
    """The upper part [B, G] of the split of each group that leaves the least variance within (Otsu, 2-means)."""
    ordered = rewards.sort(1).values
    size = torch.arange(1, rewards.shape[1])
    low = ordered.cumsum(1)[:, :-1] / size  # [B, G-1], mean of the lowest k
    high = ordered.flip(1).cumsum(1).flip(1)[:, 1:] / size.flip(0)
    best = ((high - low).square() * size * size.flip(0)).argmax(1, keepdim=True)
    return rewards > ordered.gather(1, best)


def _by(loss: GroupLoss, description: str, groups: str = "save", anchor: str | None = "value") -> Rule:
    return Rule(description, anchor, loss, RULES[groups].groups)


def _over_valid(terms: Tensor, sides: Partition) -> Tensor:
    return (terms * sides.valid).sum() / sides.valid.sum().clamp(min=1)


def _logistic(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    wrong_way = rm_advantages(rewards, anchors.detach()) * torch.where(sides.positive, -1.0, 1.0)
    return _over_valid(_mean(torch.nn.functional.softplus(wrong_way), sides.kept), sides)


def _anchor_gradient(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    return save_loss(rm_advantages(rewards, anchors), anchors * 0, sides)


def _unit_forces(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    positive, negative = contrastive_terms(rewards, anchors, sides)
    pull, push = (force.clamp(min=0.05) for force in net_forces(rewards, anchors, sides))
    return _over_valid(positive / pull + negative / push, sides)


def _by_class_size(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    positive, negative = contrastive_terms(zero_net_force(rewards), anchors, sides)
    share = sides.positive.sum(1) / sides.kept.sum(1).clamp(min=1)
    return _over_valid(2 * (share * positive + (1 - share) * negative), sides)


def _mirrored(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    centred = zero_net_force(rewards)
    positive, _ = contrastive_terms(centred, anchors, sides)
    negative, _ = contrastive_terms(-centred, -anchors, Partition(sides.negative, sides.positive, sides.valid))
    return _over_valid(positive + negative, sides)


def _fixed_filter(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    strict = partition(rm_advantages(rewards.detach(), anchors.detach()), 0.75)
    return save_loss(zero_net_force(rewards), anchors, strict)


def _clusters(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    upper = two_clusters(rewards.detach())
    between = (_mean(rewards, upper) + _mean(rewards, ~upper)) / 2
    return save_loss(zero_net_force(rewards), between, Partition(upper, ~upper, torch.ones_like(sides.valid)))


def _fisher(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    upper = two_clusters(rewards.detach())
    centre = torch.where(upper, _mean(rewards, upper)[:, None], _mean(rewards, ~upper)[:, None])
    within = (rewards - centre).square().mean(1)
    return 0.5 * (within / _spread_about(rewards, rewards.mean(1), eligible)).log().mean()


def _fisher_and_spread(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    return 0.5 * _fisher(rewards, anchors, sides, eligible) + spread_loss(rewards, eligible)


def _gap_of_clusters(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    upper = two_clusters(rewards.detach())
    return -(_mean(rewards, upper) - _mean(rewards, ~upper)).log1p().mean()


def _gap_of_halves(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    upper = rewards > rewards.median(1, keepdim=True).values
    return -(_mean(rewards, upper) - _mean(rewards, ~upper)).log1p().mean()


def _gap_of_kept(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    return -_over_valid((_mean(rewards, sides.positive) - _mean(rewards, sides.negative)).clamp(min=0).log1p(), sides)


def _halves_bt(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    upper = rewards > rewards.median(1, keepdim=True).values
    return bradley_terry_loss(_mean(rewards, upper), _mean(rewards, ~upper))


def _thirds_bt(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    ordered, third = rewards.sort(1).values, rewards.shape[1] // 3
    return bradley_terry_loss(ordered[:, -third:].mean(1), ordered[:, :third].mean(1))


def _fourth_moment(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    return -0.25 * (rewards - rewards.mean(1, keepdim=True)).pow(4).mean(1).log1p().mean()


def _around_v(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    return -0.5 * _spread_about(rewards, anchors.detach(), eligible).log1p().mean()


FORMS: dict[str, Rule] = {
    **{name: RULES[name] for name in ("save", "mean_reward", "hl_bt", "save_zero_net_force", "offline_bt")},
    "save_either_way": RULES["save_either_way"],
    "logistic": _by(_logistic, "logistic loss around V on the kept responses"),
    "anchor_gradient": _by(_anchor_gradient, "SAVE with the gradient flowing into V"),
    "unit_forces": _by(_unit_forces, "L+ / A + L- / D: each side's forces add up to one"),
    "by_class_size": _by(_by_class_size, "zero net force, L+ and L- weighted by |Y+| and |Y-|"),
    "mirrored": _by(_mirrored, "zero net force, L+ and its mirror image on the negatives"),
    "fixed_filter": _by(_fixed_filter, "zero net force, mu = 0.75 throughout: the filter never opens", "hl_bt"),
    "clusters": _by(_clusters, "zero net force around the two-cluster split of each group", "hl_bt"),
    "fisher": _by(_fisher, "log of the variance within two clusters / the variance of the group", "hl_bt"),
    "fisher_and_spread": _by(_fisher_and_spread, "half of fisher, and spread", "hl_bt"),
    "gap_of_clusters": _by(_gap_of_clusters, "-log(1 + distance of the two clusters' means)", "hl_bt"),
    "gap_of_halves": _by(_gap_of_halves, "-log(1 + distance of the means above and below the median)", "hl_bt"),
    "gap_of_kept": _by(_gap_of_kept, "-log(1 + distance of the means of Y+ and Y-)"),
    "halves_bt": _by(_halves_bt, "Bradley-Terry on the means above and below the median", "hl_bt"),
    "thirds_bt": _by(_thirds_bt, "Bradley-Terry on the means of the top and the bottom third", "hl_bt"),
    "fourth_moment": _by(_fourth_moment, "-1/4 log(1 + fourth central moment of the group)", "hl_bt"),
    "spread_around_v": _by(_around_v, "-1/2 log(1 + mean square distance from V)", "hl_bt"),
    "spread": _by(lambda r, v, p, e: spread_loss(r, e), "-1/2 log(1 + variance of the group)", "hl_bt", None),
}

# ---- the tables that notebook 09 draws

COMPARED = ("save", "mean_reward", "hl_bt", "save_zero_net_force", "spread")
LONG = (  # also at T 240
    *COMPARED, "save_either_way", "logistic", "fixed_filter", "gap_of_kept", "fourth_moment", "spread_around_v",
)  # fmt: skip
AXES = {
    "separation": (1.0, 1.5, 2.0, 3.0), "nuisance": (0.0, 1.0, 2.0, 3.0),
    "reward_scale": (0.5, 1.0, 2.0, 4.0), "label_noise": (0.0, 0.15, 0.3, 0.4),
}  # fmt: skip
SUCCESS = (0.1, 0.3, 0.5, 0.7, 0.9)
PATHS = ((0.2, None), (0.4, None), (0.6, None), (0.8, None), (0.35, 0.9))  # success rates that forms are judged at
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING, FRESH = range(8), range(100, 124)  # seeds


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """`simulate`'s rows as a row a setting: means over the seeds, and the standard error of the change."""
    settings = rows.groupby("setting")
    means = settings[["initial", "change", "drift", "net_force"]].mean()
    return means.assign(standard_error=settings["change"].sem(), seeds=settings.size())


def phase_diagram(forms: Iterable[str] = ("save", "hl_bt", "spread"), seeds: Iterable[int] = FRESH) -> pd.DataFrame:
    """Change of accuracy over success rate and each of `AXES`, the others at their defaults; a row a form and cell."""
    table = []
    for form, (axis, values) in itertools.product(forms, AXES.items()):
        for value in values:
            cells = over_seeds(simulate(form, [Setting(success=p, **{axis: value}) for p in SUCCESS], seeds))
            table.append(cells.assign(form=form, axis=axis, value=value, success=SUCCESS))
    return pd.concat(table, ignore_index=True)


def forms_table(total_steps: int, forms: Iterable[str]) -> pd.DataFrame:
    """Every form at every rate of `RATES` on the seeds `TUNING`, then at its best rate on `FRESH`; a row a cell.

    The best rate has the highest mean change over `PATHS`: one rate a form and T, as one would have to choose it.
    """
    table = []
    for form in forms:
        mean_of = {}
        for stage, seeds in (("tuning", TUNING), ("fresh", FRESH)):
            for lr in RATES if stage == "tuning" else [max(mean_of, key=mean_of.get)]:
                settings = [Setting(success=a, success_end=b, total_steps=total_steps, lr=lr) for a, b in PATHS]
                cells = over_seeds(simulate(form, settings, seeds))
                mean_of[lr] = cells["change"].mean()
                cells[["success", "success_end"]] = PATHS
                table.append(cells.assign(stage=stage, form=form, total_steps=total_steps, lr=lr))
    return pd.concat(table, ignore_index=True).assign(description=lambda t: [FORMS[f].description for f in t["form"]])


def courses(forms: Iterable[str] = COMPARED, seeds: Iterable[int] = FRESH) -> pd.DataFrame:
    """Means over seeds of every step's measurements, a row a form, success rate and step."""
    table = []
    for form in forms:
        shares = (0.1, 0.5, 0.9)
        steps = trajectory(form, [Setting(success=p) for p in shares], seeds)
        means = steps.groupby(["setting", "step"])[list(MEASURED)].mean().reset_index()
        table.append(means.assign(form=form, success=[shares[i] for i in means.pop("setting")]))
    return pd.concat(table, ignore_index=True)


def with_pairs(forms: Iterable[str] = ("save", "spread"), seeds: Iterable[int] = FRESH) -> pd.DataFrame:
    """Forms with the offline pairs mixed in, over the nuisance: does it keep a head from turning to style?"""
    table = []
    for form, nuisance in itertools.product(forms, AXES["nuisance"]):
        cells = list(itertools.product((0.0, 0.1, 0.3, 1.0), (0.2, 0.5, 0.8)))
        settings = [Setting(success=p, offline_weight=w, nuisance=nuisance, lr=1e-2) for w, p in cells]
        rows = over_seeds(simulate(form, settings, seeds)).assign(form=form, nuisance=nuisance)
        rows[["offline_weight", "success"]] = cells
        table.append(rows)
    return pd.concat(table, ignore_index=True)


TABLES: dict[str, Callable[[], pd.DataFrame]] = {
    "courses": courses,
    "phase": phase_diagram,
    "with_pairs": with_pairs,
    "forms": lambda: pd.concat([forms_table(60, FORMS), forms_table(240, LONG)], ignore_index=True),
}


def table(name: str, again: bool = False) -> pd.DataFrame:
    """One of `TABLES`, from data/results; again: computed anew (minutes)."""
    return TABLES[name]() if again else pd.read_csv(resolve(f"data/results/simulation_{name}.csv"))


def main() -> None:
    """Compute the tables of notebook 09, simulation_*.csv (minutes)."""
    parser = argparse.ArgumentParser(prog="python -m savelib.experiments.simulation", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(resolve("data/results")), help="folder to write to")
    out = parser.parse_args().out
    for name in TABLES:
        table(name, again=True).to_csv(out / f"simulation_{name}.csv", index=False, float_format="%.4g")
        print(f"wrote {out / f'simulation_{name}.csv'}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
