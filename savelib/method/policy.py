"""Policy advantages, KL estimators and losses: GRPO, GSPO, RLOO equal to TRL's, REINFORCE++ OpenRLHF's, PRIME.

Shapes: groups [B, G]; rows N are responses, T their completion tokens. Rows that should not teach are left out before
the loss. Where the KL is not in the loss, it is subtracted from the reward before the advantages.
A new algorithm is one row in ALGORITHMS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from savelib.method.remedies import best_of_group


@dataclass(frozen=True)
class Algorithm:
    """One way to update the policy.

    ratio: w of the clipped loss: of each token, or exp of the mean or the sum of a row's log-ratios.
    by_token: each token has an advantage of its own, the log-ratio is clamped to +-20, and the loss is the mean over
        all tokens; else an advantage belongs to a row, and the loss is the mean over a row's tokens, then over rows
        (with ratio "row sum" a row's KL is a sum too).
    leave_one_out: the baseline of a response is the mean of the others of its group, and nothing divides by the std.
    clip: (low, high), how far w may be below and above 1.
    best_only: the policy learns from the best kept response of each group alone, with advantage 1; as a step starts at
        the policy that sampled, the gradient is that of cross-entropy (the mean over a row's tokens, then over rows).
    kl_in_loss: by default the KL is k3 in the loss; else k1 in the reward.
    extra: name of a model that the algorithm trains (`training.trainer.EXTRA_LR`).
    """

    ratio: Literal["token", "row mean", "row sum"]
    by_token: bool = False
    leave_one_out: bool = False
    best_only: bool = False
    clip: tuple[float, float] = (0.2, 0.2)
    kl_in_loss: bool = True
    extra: str | None = None


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm("token"),
    "gspo": Algorithm("row mean", clip=(3e-4, 4e-4)),
    "rloo": Algorithm("row sum", leave_one_out=True, kl_in_loss=False),
    "reinforce_pp": Algorithm("token", by_token=True, kl_in_loss=False),
    "prime": Algorithm("token", by_token=True, extra="process_reward"),
    "raft": Algorithm("token", best_only=True),
}


def algorithm(algo: str) -> Algorithm:
    """The row of ALGORITHMS. ValueError that names the valid ones."""
    if algo not in ALGORITHMS:
        raise ValueError(f"algo {algo!r}: choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algo]


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL estimator k1 = log pi - log ref for each token; its mean over samples of pi is KL(pi || ref).

    logprobs, ref_logprobs: same shape -> that shape; single tokens may be negative.
    Pitfall: for rewards only. Its gradient has mean zero, so as a loss it restrains nothing.
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL estimator k3 = ref/pi - 1 - log(ref/pi) for each token, never negative; its mean too is KL(pi || ref).

    logprobs, ref_logprobs: same shape -> that shape.
    Pitfall: on samples of pi its gradient is that of KL(ref || pi); times the ratio pi/pi_old it is KL(pi || ref)'s.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


@torch.no_grad()
def policy_advantages(algo: str, rewards: Tensor, kept: Tensor, over: str = "kept") -> Tensor:
    """Group advantages: GRPO, GSPO (r - mean) / (std + 1e-4), unbiased std; RLOO r - mean of the others; RAFT 1 for the
    best kept response and 0 for the others.

    rewards [B, G], kept [B, G] bool -> [B, G], no graph; 0 where not kept and where fewer than 2 are kept.
    over: the statistics are those of the "kept" responses of the group, or of "all" G. ValueError for another value,
    and for reinforce_pp and prime, whose advantages are those of tokens.
    """
    row = algorithm(algo)
    if row.by_token:
        raise ValueError(f"algo {algo!r} has no group advantages: use {algo}_advantages")
    if over not in ("kept", "all"):
        raise ValueError(f"over {over!r}: choose one of kept, all")
    kept = kept.bool()
    if row.best_only:
        return best_of_group(rewards, kept).to(rewards.dtype)
    counted = kept if over == "kept" else torch.ones_like(kept)  # [B, G]
    count = counted.sum(1, keepdim=True)  # [B, 1]
    mean = rewards.masked_fill(~counted, 0.0).sum(1, keepdim=True) / count.clamp(min=1)  # [B, 1]
    centred = rewards - mean  # [B, G]
    if row.leave_one_out:  # r - (sum - r) / (n - 1) = n / (n - 1) * (r - mean)
        advantages = centred * count / (count - 1).clamp(min=1)
    else:
        variance = centred.masked_fill(~counted, 0.0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = centred / (variance.sqrt() + 1e-4)
    return advantages.masked_fill(~kept | (kept.sum(1, keepdim=True) < 2), 0.0)


@torch.no_grad()
def kl_penalized_rewards(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, completion_mask: Tensor, beta: float
) -> Tensor:
    """KL in the reward, as in TRL's RLOO: r - beta * (sum of k1 over the response), before `policy_advantages`.

    rewards [B, G] or [N], row b * G + g of the others being response g of prompt b; logprobs (of the policy that
    sampled), ref_logprobs, completion_mask [N, T] -> shape of rewards, no graph.
    """
    kl = kl_k1(logprobs, ref_logprobs).masked_fill(~completion_mask.bool(), 0.0).sum(1)  # [N]
    return rewards - beta * kl.view_as(rewards)


@torch.no_grad()
def reinforce_pp_advantages(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, completion_mask: Tensor, beta: float
) -> Tensor:
    """REINFORCE++ (OpenRLHF's `reinforce`): -beta * k1 at each token, the reward at the last, reward-to-go, whitened.

    rewards [N]; logprobs (of the policy that sampled), ref_logprobs, completion_mask [N, T] -> [N, T], no graph, 0
    outside the mask. gamma 1; k1 is clamped to +-10; mean and biased variance over all tokens of the mask.
    Pitfall: the whitening is global, so give it the whole batch, not a slice. With the KL in the loss, beta is 0 here.
    """
    mask = completion_mask.bool()  # [N, T]
    kl = kl_k1(logprobs, ref_logprobs).masked_fill(~mask, 0.0).clamp(-10, 10)
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))  # [N, T], one True a row
    token_rewards = torch.where(last, rewards.reshape(-1, 1), 0.0) - beta * kl
    return _whitened(_reward_to_go(token_rewards), mask)


def _reward_to_go(token_rewards: Tensor) -> Tensor:
    return token_rewards.flip(1).cumsum(1).flip(1)  # [N, T]


def _whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and biased variance 1 over all tokens of the mask [N, T], 0 outside it."""
    mean = values[mask].mean()
    variance = (values[mask] - mean).square().mean()
    return ((values - mean) * variance.clamp(min=1e-8).rsqrt()).masked_fill(~mask, 0.0)


@torch.no_grad()
def prime_advantages(process_rewards: Tensor, outcomes: Tensor, kept: Tensor, completion_mask: Tensor) -> Tensor:
    """PRIME's advantages: return of the process rewards plus outcome, each less its leave-one-out mean, whitened.

    process_rewards, completion_mask [N, T], outcomes, kept [B, G], row b * G + g being response g of prompt b ->
    [N, T], no graph, 0 outside the mask and where not kept. A response's part in the others' process baseline is the
    mean over its tokens; gamma is 1. The process rewards are not scaled to the batch's largest return, as verl does.
    Pitfall: the whitening is global, so give it the whole batch, not a slice.
    """
    kept = kept.bool() & (kept.sum(1, keepdim=True) >= 2)  # [B, G]
    mask = completion_mask.bool() & kept.flatten()[:, None]  # [N, T]
    process = process_rewards.masked_fill(~mask, 0.0)
    mean = (process.sum(1) / mask.sum(1).clamp(min=1)).view_as(kept)  # [B, G]
    centred = process - _of_others(mean, kept).flatten()[:, None]
    outcome = outcomes.to(process.dtype)
    outcome = (outcome - _of_others(outcome, kept)).flatten()[:, None]  # [N, 1], at the last token
    return _whitened(_reward_to_go(centred.masked_fill(~mask, 0.0)) + outcome, mask)


def _of_others(values: Tensor, kept: Tensor) -> Tensor:
    """The mean over the group's other kept responses: values, kept [B, G] -> [B, G]."""
    values = values.masked_fill(~kept, 0.0)
    return (values.sum(1, keepdim=True) - values) / (kept.sum(1, keepdim=True) - 1).clamp(min=1)


def policy_loss(
    algo: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Clipped policy loss: mean of -min(w A, clip(w, 1 - low, 1 + high) A) + beta * k3 (see `Algorithm`).

    logprobs, old_logprobs, completion_mask [N, T]; ref_logprobs [N, T], or None where beta is 0; advantages [N], for
    reinforce_pp and prime [N, T] -> scalar.
    Pitfall: where the KL is in the reward, beta is 0 here.
    """
    row = algorithm(algo)
    if len(logprobs) == 0:
        raise ValueError("logprobs: no rows; leave the policy update out when no response is kept")
    shape = logprobs.shape if row.by_token else logprobs.shape[:1]
    if advantages.shape != shape:
        raise ValueError(f"advantages: shape {tuple(advantages.shape)}, but {algo} needs {tuple(shape)} here")

    padding = ~completion_mask.bool()  # [N, T]
    lengths = (~padding).sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(padding, 0.0)  # [N, T]
    if row.ratio != "token":
        log_ratio = log_ratio.sum(1, keepdim=True)  # [N, 1]
        log_ratio = log_ratio / lengths if row.ratio == "row mean" else log_ratio
    elif row.by_token:
        log_ratio = log_ratio.clamp(-20, 20)
    ratio, (low, high) = log_ratio.exp(), row.clip
    advantages = advantages.view(len(advantages), -1)  # [N, 1] or [N, T]
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)  # [N, 1] or [N, T]

    kl = torch.zeros_like(logprobs)  # [N, T]
    if beta:
        kl = beta * kl_k3(logprobs.masked_fill(padding, 0.0), ref_logprobs.masked_fill(padding, 0.0))
    if row.ratio == "row sum":
        return (loss.squeeze(1) + kl.sum(1)).mean()
    loss = (loss + kl).masked_fill(padding, 0.0)  # [N, T]
    if row.by_token:
        return loss.sum() / (~padding).sum().clamp(min=1)
    return (loss.sum(1) / lengths.squeeze(1)).mean()


def loss_weight(algo: str, completion_mask: Tensor) -> float:
    """The weight of a slice's `policy_loss`: sum(weight * loss) / sum(weight) over slices is the loss of all rows.

    completion_mask [n, T] of the slice -> its rows, for reinforce_pp and prime its tokens.
    """
    return float(completion_mask.bool().sum() if algorithm(algo).by_token else len(completion_mask))


# PRIME (arXiv 2502.01456): its process reward model psi

PRIME_BETA = 0.05


def outcomes(rewards: Tensor, kept: Tensor) -> Tensor:
    """Ours: 1 where the reward is above the mean over the group's kept responses, else 0.

    rewards, kept [B, G] -> [B, G]; what is not kept counts for nothing.
    """
    mean = rewards.masked_fill(~kept, 0.0).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    return (rewards > mean).to(rewards.dtype)


def process_rewards(psi_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The implicit process reward of each token, .05 q_t = .05 (log pi_psi - log pi_ref): [N, T] -> [N, T]."""
    return PRIME_BETA * (psi_logprobs - ref_logprobs)


def outcome_logits(process: Tensor, completion_mask: Tensor) -> Tensor:
    """.05 sum_t q_t, whose sigmoid is the probability of a good outcome: process (.05 q_t), mask [N, T] -> [N]."""
    return process.masked_fill(~completion_mask.bool(), 0.0).sum(1)
