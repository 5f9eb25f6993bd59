"""PRIME (arXiv 2502.01456): a causal LM psi, trained on outcomes alone, gives a reward to each token.

Its log-ratio to the initial policy, q_t = log pi_psi(y_t) - log pi_ref(y_t), is an implicit process reward, and
sigmoid(.05 sum_t q_t) the probability of a good outcome. psi starts as the initial policy. Each step trains it on the
batch by cross-entropy; then its process rewards .05 q_t and the outcomes give the advantages (`prime_advantages`).

PRIME's outcome is a verifier's verdict on mathematics or code. On open-ended prompts there is none, and the outcome is
OUR choice: 1 for a response whose reward is above the mean of the group's kept ones, else 0. Ours too are the learning
rate of psi (policy_lr), and that the loss has the KL penalty of the other algorithms (PRIME has none: beta=0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from savelib.distributed import summed
from savelib.rollout import Rollout, completion_logprobs
from savelib.rules import Extra

if TYPE_CHECKING:
    from savelib.loop import Trainer

BETA = 0.05


def outcomes(rewards: Tensor, kept: Tensor) -> Tensor:
    """Ours: 1 where the reward is above the mean over the group's kept responses, else 0.

    rewards, kept [B, G] -> [B, G]; what is not kept counts for nothing.
    """
    mean = rewards.masked_fill(~kept, 0.0).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    return (rewards > mean).to(rewards.dtype)


def process_rewards(psi_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The implicit process reward of each token, .05 q_t = .05 (log pi_psi - log pi_ref): [N, T] -> [N, T]."""
    return BETA * (psi_logprobs - ref_logprobs)


def outcome_logits(process: Tensor, completion_mask: Tensor) -> Tensor:
    """.05 sum_t q_t, whose sigmoid is the probability of a good outcome: process (.05 q_t), mask [N, T] -> [N]."""
    return process.masked_fill(~completion_mask.bool(), 0.0).sum(1)


def improve(t: Trainer, rollout: Rollout, rows: Tensor, wanted: Tensor, ref_logprobs: Tensor) -> dict[str, float]:
    """One gradient step of psi: cross-entropy of sigmoid(.05 sum_t q_t) against the outcome, mean over responses.

    rows [n]: flat indices of the responses; wanted [n] in {0, 1}; ref_logprobs [n, T].
    process/accuracy: the share of responses that psi, before the step, puts on the outcome's side; .5 at the start.
    """
    engine, psi = t.engines[EXTRA.name], t.extras[EXTRA.name]
    mask = rollout.completion_mask.flatten(0, 1)[rows]  # [n, T]
    total, right, size = 0.0, 0.0, t.config.micro_batch_responses
    for i in range(0, len(rows), size):
        part = slice(i, i + size)
        logprobs = completion_logprobs(psi, rollout, rows[part], t.config)  # [m, T']
        steps = logprobs.shape[1]
        logits = outcome_logits(process_rewards(logprobs, ref_logprobs[part, :steps]), mask[part, :steps])
        loss = F.binary_cross_entropy_with_logits(logits, wanted[part], reduction="sum")
        engine.backward(loss)
        total += loss.item()
        verdict = (logits > 0).float().masked_fill(logits.abs() < 1e-4, 0.5)  # psi that is still the reference has none
        right += float((1 - (verdict - wanted[part]).abs()).sum())
    total, right, count = summed(total, right, len(rows))
    engine.step(divisor=count)
    return {"process/loss": total / count, "process/accuracy": right / count}


def _build(t: Trainer) -> nn.Module:
    return t.initial_policy()


EXTRA = Extra("process_reward", _build, "policy_lr")
