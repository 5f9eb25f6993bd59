"""Losses of the reward model that the simulation compares: the rules of real runs, and ours."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from savelib.method import (
    RULES,
    GroupLoss,
    Partition,
    Rule,
    bradley_terry_loss,
    contrastive_terms,
    net_forces,
    partition,
    rm_advantages,
    save_loss,
)


def zero_net_force(rewards: Tensor, eligible: Tensor | None = None) -> Tensor:
    """R - mean_group(R) + stopgrad(mean_group(R)), to be given to `save_loss` in place of R.

    rewards [B, G] -> [B, G] with the same values; a loss's gradient is centred in each group, so that the group as a
    whole is pushed neither up nor down. eligible [B, G] bool: the mean is over these, so the others are not moved.
    """
    eligible = torch.ones_like(rewards, dtype=torch.bool) if eligible is None else eligible.bool()
    total = rewards.masked_fill(~eligible, 0.0).sum(1, keepdim=True)  # [B, 1]
    mean = total / eligible.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    return rewards - (mean - mean.detach())


def spread_loss(rewards: Tensor, eligible: Tensor | None = None) -> Tensor:
    """-1/2 log(1 + variance of the rewards in the group), the mean over groups with two eligible responses.

    rewards [B, G], eligible [B, G] bool -> scalar, a 0 that still has a graph when there is no such group. No anchor,
    no labels: the gradient on R is in proportion to its distance from the group's mean, so it sums to 0 and does not
    saturate. The variance is the biased one.
    Pitfall: for a linear head this is power iteration: it finds the direction in which responses to a prompt differ
    most, be it quality or style.
    """
    eligible = torch.ones_like(rewards, dtype=torch.bool) if eligible is None else eligible.bool()
    count = eligible.sum(1)  # [B]
    mean = rewards.masked_fill(~eligible, 0.0).sum(1) / count.clamp(min=1)
    squares = (rewards - mean[:, None]).square().masked_fill(~eligible, 0.0)  # [B, G]
    variance = squares.sum(1) / count.clamp(min=1)
    used = count >= 2
    return -0.5 * variance.log1p().masked_fill(~used, 0.0).sum() / used.sum().clamp(min=1)


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


def _save_zero_net_force(rewards: Tensor, anchors: Tensor, sides: Partition, eligible: Tensor) -> Tensor:
    return save_loss(zero_net_force(rewards, eligible), anchors, sides)


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
    **{name: RULES[name] for name in ("save", "mean_reward", "hl_bt")},
    "save_zero_net_force": _by(_save_zero_net_force, "ours: SAVE with the gradient's mean over each group removed"),
    "offline_bt": RULES["offline_bt"],
    "save_either_way": replace(
        RULES["save"],
        description="ours: SAVE, or its mirror image while the responses' mean reward is above the preference pairs'",
        otherwise=RULES["save_checked"].otherwise,
    ),
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
