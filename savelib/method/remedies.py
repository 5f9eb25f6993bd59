"""Other remedies for a reward model that the policy outgrows: PAR, ensembles, MetaRM; true labels as the ceiling."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from savelib.method.equations import bradley_terry_loss

Combination = Literal["mean", "wco", "uwo"]
UWO_WEIGHT = 0.5  # lambda of UWO


def par_rewards(rewards: Tensor, reference_rewards: Tensor) -> Tensor:
    """PAR, preference as reward (arXiv 2502.18770), k = 1: the mean over m of sigmoid(R(x, y) - R(x, y_ref_m)).

    rewards [B, G], reference_rewards [B, M] of the initial policy's responses to the same prompts, by the same reward
    model -> [B, G] in (0, 1).
    """
    return (rewards[:, :, None] - reference_rewards[:, None, :]).sigmoid().mean(-1)


def combined_rewards(rewards: Tensor, how: Combination) -> Tensor:
    """An ensemble's reward (arXiv 2310.02743) from its members' [k, ...] -> [...].

    mean; wco, worst case: the minimum; uwo, uncertainty weighted: mean - .5 variance (unbiased).
    Pitfall: members trained by Bradley-Terry have free offsets, so centre each before min or variance see them.
    """
    if how == "mean":
        return rewards.mean(0)
    if how == "wco":
        return rewards.amin(0)
    if how == "uwo":
        return rewards.mean(0) - UWO_WEIGHT * rewards.var(0)
    raise ValueError(f"how {how!r}: choose one of mean, wco, uwo")


def metarm_difference(rewards: Tensor, eligible: Tensor | None = None) -> Tensor:
    """MetaRM's J (arXiv 2405.00438): 2/k^2 times the sum over i < j of sigmoid(|r_i - r_j|), the mean over groups.

    rewards [B, G] of the current policy's responses, eligible [B, G] bool: k of each group are -> scalar; groups
    without two count as 0. It is ascended before the labelled pairs are learned.
    """
    eligible = torch.ones_like(rewards, dtype=torch.bool) if eligible is None else eligible.bool()
    first, second = torch.triu_indices(rewards.shape[1], rewards.shape[1], offset=1, device=rewards.device)
    apart = (rewards[:, first] - rewards[:, second]).abs().sigmoid()  # [B, G (G - 1) / 2]
    both = eligible[:, first] & eligible[:, second]
    return (apart.masked_fill(~both, 0.0).sum(1) * 2 / eligible.sum(1).clamp(min=1) ** 2).mean()


def oracle_loss(rewards: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Bradley-Terry on the first right and the first wrong response of each group: true labels, the ceiling.

    rewards [B, G]; right, wrong [B, G] bool, by gold -> scalar: the mean over groups that have both, a 0 that still
    has a graph when there is none. Responses of a group are exchangeable, so the first is any.
    """
    usable = right.any(1) & wrong.any(1)  # [B]
    if not usable.any():
        return (rewards * 0).sum()
    picked = [rewards.gather(1, side.int().argmax(1, keepdim=True)).squeeze(1)[usable] for side in (right, wrong)]
    return bradley_terry_loss(*picked)


def best_of_group(rewards: Tensor, kept: Tensor) -> Tensor:
    """RAFT (arXiv 2304.06767): the kept response with the highest reward of each group, the first of equal ones.

    rewards, kept [B, G] -> bool [B, G], one True in each group that keeps any.
    """
    best = rewards.masked_fill(~kept, -torch.inf).argmax(1, keepdim=True)  # [B, 1]
    return torch.zeros_like(kept).scatter(1, best, True) & kept
