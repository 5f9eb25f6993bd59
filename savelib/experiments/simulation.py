"""SAVE without models: a linear reward head on clustered features, seconds a setting; which rule helps, and when.

A response has features z = offset + mu_x + separation * y * u + nuisance * e * v + noise in R^64: y = +-1 is its
quality (right with probability `success`), e = +-1 a style that gold ignores. The reward is w . z, the prompt value
exact, or that of a reward model that lags behind. The losses and the rules are those of real runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from savelib.experiments.forms import FORMS
from savelib.method import (
    GroupLoss,
    Rule,
    bradley_terry_loss,
    curriculum_threshold,
    net_forces,
    partition,
    rm_advantages,
)

DIMENSION = 64
MEMORY = 0.9  # of the running lead, from a step to the next
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
    offset: float = Field(0.0, ge=0, description="norm of a constant vector in all features, in spreads within a group")
    anchor_memory: float = Field(
        0.0, ge=0, le=1, description="the anchor is of the heads' running mean; 1: of the first"
    )
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

    quality, style: u, v; pairs: the preference pairs' differences [W, N, D]; middle: the mean of their features [W, D].
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
        self.pairs, self.middle = self._preferences()

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

    def offset(self) -> Tensor:
        """The constant vector [W, D] of all features; the spread is that of a half-right group. It needs no draw."""
        spread = (DIMENSION + self.each("separation") ** 2 + self.each("nuisance") ** 2).sqrt()
        return (self.each("offset") * spread / math.sqrt(DIMENSION))[:, None].expand(-1, DIMENSION)

    def groups(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch of a step: z [W, B, G, D], its mean for each prompt [W, B, D], right [W, B, G]."""
        success = self.success(step)[:, None, None]
        uniform = torch.special.ndtr(self._normal(self.shape.batch_size, self.shape.group_size))
        right = torch.where(uniform < success, 1.0, -1.0)  # [W, B, G]
        prompts = self._normal(self.shape.batch_size, DIMENSION) + self.offset()[:, None]  # mu_x
        mean = prompts + self.each("separation")[:, None, None] * (2 * success - 1) * self.quality[:, None]
        return self.features(right) + prompts[:, :, None], mean, right

    def _preferences(self) -> tuple[Tensor, Tensor]:
        """(z(chosen) - z(rejected) of the noisy pairs [W, N, D], the mean of their features without prompts [W, D])."""
        z = self.features(torch.tensor([1.0, -1.0]).expand(len(self.quality), self.shape.pairs, 2))
        uniform = torch.special.ndtr(self._normal(self.shape.pairs))
        flipped = torch.where(uniform < self.each("label_noise")[:, None], -1.0, 1.0)  # [W, N]
        return (z[:, :, 0] - z[:, :, 1]) * flipped[..., None], z.mean((1, 2)) + self.offset()

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


def fit_heads(worlds: Worlds, steps: int = 20, lr: float = 0.03) -> Tensor:
    """Eq. 11 on the worlds' pairs by Adam from 0; the heads [W, D] are scaled to the setting's reward spread."""
    heads = torch.zeros(len(worlds.pairs), DIMENSION, requires_grad=True)
    optimizer = torch.optim.Adam([heads], lr=lr)
    for _ in range(steps):
        heads.grad = pair_gradient(heads, worlds.pairs)
        optimizer.step()
    heads = heads.detach()
    return heads * (worlds.each("reward_scale") / worlds.spread(heads))[:, None]


def pair_gradient(heads: Tensor, pairs: Tensor) -> Tensor:
    """Gradient [W, D] of eq. 11, each world's own: heads [W, D], pairs [W, N, D]."""
    heads = heads.detach().requires_grad_()
    margins = torch.einsum("wnd,wd->wn", pairs, heads)
    return torch.autograd.grad(bradley_terry_loss(margins, margins * 0) * len(pairs), heads)[0]


def head_gradient(
    rule: Rule, heads: Tensor, z: Tensor, mean: Tensor, threshold: float, mostly_right: Tensor | None = None,
    of_anchors: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Gradient [W, D] of a rule's loss, each world's own, and what its batch showed, [W] each.

    heads [W, D], z [W, B, G, D], mean [W, B, D] (the prompts' expected features, so that V is exact), mostly_right [W]
    bool: where the rule's other loss holds, if it has one. of_anchors [W, D]: the heads that anchors are of, if others.
    """
    worlds, prompts = z.shape[:2]
    rewards = torch.einsum("wbgd,wd->wbg", z, heads).flatten(0, 1).requires_grad_()  # [W * B, G]
    middle = mean if rule.anchor == "value" else z.mean(2)  # of the prompt's distribution, or of the group
    anchors = torch.einsum("wbd,wd->wb", middle, heads if of_anchors is None else of_anchors).flatten()  # [W * B]
    anchors.requires_grad_()
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
    """Train a head in each world: one row per setting (by its place), seed and step (0: before), columns `MEASURED`.

    form: a name in `FORMS`, or a Rule. Adam, gradients clipped to norm 1, as in real runs; accuracy is a share.
    """
    rule = FORMS[form] if isinstance(form, str) else form
    worlds = Worlds(settings, seeds)
    shape, start = worlds.shape, fit_heads(worlds)
    nan = torch.full((len(start),), math.nan)
    measured = [dict.fromkeys(MEASURED, nan) | {"accuracy": worlds.accuracy(start), "spread": worlds.spread(start)}]
    moved = torch.zeros_like(start)  # heads = start + lr * moved, so that each world has its own rate
    optimizer = torch.optim.Adam([moved], lr=1.0)
    lead = None  # running mean of how far the responses' mean reward is above the pairs'
    heads, offline = start, worlds.each("offline_weight")[:, None] + float(bool(rule.pairs))
    of_anchors, memory = start, worlds.each("anchor_memory")[:, None]
    for step in range(1, shape.total_steps + 1):
        gradient, seen = torch.zeros_like(heads), {}
        if rule.loss is not None:
            z, mean, _ = worlds.groups(step)
            threshold = curriculum_threshold(step, shape.total_steps, shape.initial_margin)
            of_anchors = memory * of_anchors + (1 - memory) * heads
            mostly_right = None if lead is None else lead > 0
            gradient, seen = head_gradient(rule, heads, z, mean, threshold, mostly_right, of_anchors)
            now = seen["mean_reward"] - (heads * worlds.middle).sum(1)
            lead = now if lead is None else MEMORY * lead + (1 - MEMORY) * now
        if offline.any():
            some = torch.arange(step * shape.batch_size, (step + 1) * shape.batch_size) % shape.pairs
            gradient = gradient + offline * pair_gradient(heads, worlds.pairs[:, some])
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
