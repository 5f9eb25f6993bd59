"""Losses of the baselines (HL-BT, SER, R2M) and a form of ours, beside the paper's own in `equations`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from savelib.method.equations import Partition, bradley_terry_loss, save_loss

SER_HIGH, SER_LOW, SER_APART = 0.55, 0.45, 0.3  # of SER's filter
R2M_ENTROPY_WEIGHT = 0.3  # alpha of R2M's eq. 7
R2M_LEAST_WEIGHT = 0.6  # Omega of R2M's eq. 4


def mirrored_save_loss(rewards: Tensor, values: Tensor, partition: Partition) -> Tensor:
    """Ours, not the paper's: `save_loss` with the signs of R and V turned and the sides exchanged.

    rewards [B, G], values [B] (under stop-gradient) -> scalar. It pulls the negatives together and below V, and pushes
    the positives up for as long as they are kept, so that the group as a whole is pushed up where eq. 20 pushes down.
    """
    exchanged = Partition(partition.negative, partition.positive, partition.valid)
    return save_loss(-rewards, -values, exchanged)


def hl_bt_loss(rewards: Tensor, eligible: Tensor | None = None) -> Tensor:
    """Baseline HL-BT (table 1): Bradley-Terry on the highest and the lowest reward of each group.

    rewards [B, G], eligible [B, G] bool -> scalar: the mean over groups with at least 2 eligible responses, a 0 that
    still has a graph when there is none.
    Pitfall: it tears two near-equal good responses apart, where `save_loss` pulls them together (table 7).
    """
    eligible = torch.ones_like(rewards, dtype=torch.bool) if eligible is None else eligible.bool()
    usable = eligible.sum(1) >= 2  # [B]
    if not usable.any():
        return (rewards * 0).sum()
    highest = rewards.masked_fill(~eligible, -math.inf).amax(1)  # [B]
    lowest = rewards.masked_fill(~eligible, math.inf).amin(1)  # [B]
    return bradley_terry_loss(highest[usable], lowest[usable])


def skewness(rewards: Tensor) -> Tensor:
    """Skewness of the rewards [..., B, G] about their group's mean, all groups together, [...]; 0 where all are equal.

    Below 0 where most responses of a group are alike and a few are worse: a sign, without gold, of a good policy.
    """
    away = rewards - rewards.mean(-1, keepdim=True)
    cubes, squares = (away.pow(power).mean((-2, -1)) for power in (3, 2))
    return cubes / squares.pow(1.5).clamp(min=1e-12)


def feature_geometry(features: Tensor) -> tuple[float, float]:
    """(norm of the mean feature over the spread within a group, that spread) of features [B, G, H].

    Spread: root of the mean squared distance to the group's mean. If the ratio is large, a push on one group's rewards
    moves those of all.
    """
    spread = (features - features.mean(1, keepdim=True)).square().sum(-1).mean().sqrt().item()
    return features.mean((0, 1)).norm().item() / spread, spread


def own_weight(step: int, total_steps: int) -> float:
    """R2M eq. 4: w(t) = max(cos(pi t/T)/2 + 1/2, .6), the weight of the embedding itself; the answer has 1 - w(t)."""
    return max(math.cos(math.pi * step / total_steps) / 2 + 0.5, R2M_LEAST_WEIGHT)


def group_reward_entropy(rewards: Tensor, eligible: Tensor) -> Tensor:
    """R2M eq. 6: the entropy of softmax((r - mean) / std) over each group's eligible responses.

    rewards, eligible [B, G], at least 2 eligible in each group -> [B]; log n where all n are equal. std: unbiased.
    Pitfall: it is minimised: the rewards of a group are to be unequal.
    """
    count = eligible.sum(1, keepdim=True)  # [B, 1]
    mean = rewards.masked_fill(~eligible, 0.0).sum(1, keepdim=True) / count
    centred = (rewards - mean).masked_fill(~eligible, 0.0)
    variance = centred.square().sum(1, keepdim=True) / (count - 1)
    standard = centred / variance.where(variance > 0, 1.0).sqrt()  # the root of 0 has no gradient
    log_p = standard.masked_fill(~eligible, -math.inf).log_softmax(1).masked_fill(~eligible, 0.0)  # [B, G]
    return -(log_p.exp() * log_p).sum(1)


def r2m_loss(rewards: Tensor, eligible: Tensor) -> Tensor:
    """R2M eq. 7: .7 Bradley-Terry on the best against the worst + .3 group reward entropy (eq. 5, 6).

    rewards, eligible [B, G] -> scalar: the mean over groups with at least 2 eligible responses, a 0 that still has a
    graph when there is none.
    """
    usable = eligible.sum(1) >= 2  # [B]
    rewards, eligible = rewards[usable], eligible[usable]
    entropy = group_reward_entropy(rewards, eligible).sum() / max(len(rewards), 1)
    return (1 - R2M_ENTROPY_WEIGHT) * hl_bt_loss(rewards, eligible) + R2M_ENTROPY_WEIGHT * entropy


def self_labelled(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """SER's labels and filter: (higher rewards [n], lower rewards [n]) of the pairs that the model is sure of.

    first, second [N]: rewards of a pair's two responses, in any order. Kept: one score above .55 and the other below
    .45 after the sigmoid, or scores that differ by more than .3.
    Pitfall: the sigmoid of one reward alone: rewards far from 0 are all near 0 or 1, and no pair is kept.
    """
    a, b = first.detach().sigmoid(), second.detach().sigmoid()  # [N]
    swap = b > a
    high, low = a.maximum(b), a.minimum(b)
    sure = ((high > SER_HIGH) & (low < SER_LOW)) | (high - low > SER_APART)
    return second.where(swap, first)[sure], first.where(swap, second)[sure]
