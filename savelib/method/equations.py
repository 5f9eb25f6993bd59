"""Algorithm 1 as formulas: which responses the reward model learns from, and what it learns from them.

Shapes: B prompts with G responses each; rewards, masks and RM advantages [B, G], values [B].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def rm_advantages(rewards: Tensor, values: Tensor) -> Tensor:
    """Eq. 4: how far each response lies above the prompt's anchor, a = R - V.

    rewards [B, G], values [B] -> [B, G]. ValueError if values is not one number a prompt.
    Pitfall: this is the reward model's advantage, not the policy's (see `policy_loss.policy_advantages`).
    """
    if rewards.ndim != 2 or values.shape != rewards.shape[:1]:
        raise ValueError(
            f"values: shape {tuple(values.shape)}, rewards {tuple(rewards.shape)}; give rewards [B, G] and values [B]"
        )
    return rewards - values[:, None]


def curriculum_threshold(step: int, total_steps: int, initial_margin: float) -> float:
    """Eq. 14: mu(t) = (2 - p(t)) / 2 with p(t) = min(1 - m0 + t/T, 1), falling from (1 + m0) / 2 to 0.5.

    ValueError if step is outside 1..total_steps or initial_margin outside [0, 1].
    Pitfall: mu is 0.5 (no filter) from t = m0 * T on, so with m0 = 0.5 the whole second half is unfiltered.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step {step}: count steps from 1 to total_steps, here {total_steps}")
    if not 0 <= initial_margin <= 1:
        raise ValueError(f"initial_margin {initial_margin}: choose a number from 0 to 1 (the paper's is 0.5)")
    return (1 + max(initial_margin - step / total_steps, 0.0)) / 2  # (2 - p) / 2, exactly 0.5 at t = m0 * T


@dataclass(frozen=True)
class Partition:
    """Eq. 16-17: the two sides of each group, and the prompts that have both."""

    positive: Tensor  # [B, G] bool
    negative: Tensor  # [B, G] bool
    valid: Tensor  # [B] bool

    @property
    def kept(self) -> Tensor:
        """The responses that passed the filter, [B, G] bool."""
        return self.positive | self.negative


def partition(rm_advantages: Tensor, threshold: float, eligible: Tensor | None = None) -> Partition:
    """Eq. 15-17: keep a response iff sigmoid(|a|) >= threshold; positive iff a >= 0; valid iff both sides exist.

    rm_advantages [B, G], threshold in [0.5, 1), eligible [B, G] bool: False leaves a response out whatever its
    advantage (one without an end token, for example). ValueError if the threshold is outside its range.
    Pitfall: a NaN advantage is on no side; check that rewards are finite before.
    """
    if not 0.5 <= threshold < 1:
        raise ValueError(f"threshold {threshold}: must be in [0.5, 1), as curriculum_threshold gives it")
    # The same test as on the sigmoid, without its rounding: 0.5 keeps all, 0.75 those with |a| >= ln 3.
    kept = rm_advantages.abs() >= math.log(threshold / (1 - threshold))  # [B, G]
    if eligible is not None:
        kept = kept & eligible.bool()
    positive, negative = kept & (rm_advantages >= 0), kept & (rm_advantages < 0)
    return Partition(positive, negative, valid=positive.any(1) & negative.any(1))


def _log1p_sum_exp(scores: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum of e^score over the mask): scores, mask [B, G] -> [B]; 0 for an empty row, gradients finite."""
    anchor = scores.new_zeros(len(scores), 1)
    return torch.cat([anchor, scores.masked_fill(~mask, -math.inf)], dim=1).logsumexp(1)


def contrastive_terms(rewards: Tensor, values: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
    """Eq. 18 and 19 for each prompt: (L+, L-), each [B], 0 where the prompt is not valid.

    L+ = -(1/|Y+|) sum_{Y+} log(e^R / (e^V + sum_{Y+} e^R)), L- = -log(e^V / (e^V + sum_{Y-} e^R)).
    rewards [B, G], values [B] (no gradient flows into them). Only R - V matters: a common shift changes nothing.
    Pitfall: L+ does not fall below log|Y+|; it pulls the positives together and above V.
    """
    scores = rm_advantages(rewards, values.detach())  # [B, G], log of e^R / e^V
    mean_positive = scores.masked_fill(~partition.positive, 0.0).sum(1) / partition.positive.sum(1).clamp(min=1)  # [B]
    positive_term = _log1p_sum_exp(scores, partition.positive) - mean_positive
    negative_term = _log1p_sum_exp(scores, partition.negative)
    return positive_term.masked_fill(~partition.valid, 0.0), negative_term.masked_fill(~partition.valid, 0.0)


def save_loss(rewards: Tensor, values: Tensor, partition: Partition) -> Tensor:
    """Eq. 20: L_R, the mean of L+ + L- over the valid prompts.

    rewards [B, G], values [B] (under stop-gradient) -> scalar; a 0 that still has a graph when no prompt is valid.
    Pitfall: to combine slices of a batch, weigh each slice's loss by its number of valid prompts.
    """
    positive_term, negative_term = contrastive_terms(rewards, values, partition)
    return (positive_term + negative_term).sum() / partition.valid.sum().clamp(min=1)


def value_loss(values: Tensor, rewards: Tensor) -> Tensor:
    """Eq. 21: L_V, the mean over all prompts of (V - mean of all G rewards)^2.

    values [B], rewards [B, G] (under stop-gradient) -> scalar.
    Pitfall: no filter here, every prompt and every response counts.
    """
    return rm_advantages(rewards.detach(), values).mean(1).square().mean()


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Eq. 11: the mean of -log sigmoid(R_chosen - R_rejected).

    chosen [N], rejected [N], N >= 1 -> scalar. ValueError if the shapes differ or there is no pair.
    """
    if chosen.shape != rejected.shape or chosen.numel() == 0:
        raise ValueError(
            f"chosen {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}: give one reward of each for every pair"
        )
    return -F.logsigmoid(chosen - rejected).mean()


@torch.no_grad()
def net_forces(rewards: Tensor, values: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
    """Diagnostic of eq. 18-19: (pull A, push D), the total force on the positives (up) and on the negatives (down).

    A = e^V / (e^V + sum_{Y+} e^R), D = sum_{Y-} e^R / (e^V + sum_{Y-} e^R), each [B] in [0, 1], 0 where not valid.
    rewards [B, G], values [B]; no graph.
    Pitfall: A fades once the positives are above V, D does not; D > A on average means that rewards drift down.
    """
    scores = rm_advantages(rewards, values)  # [B, G]
    pull = (-_log1p_sum_exp(scores, partition.positive)).exp()
    push = -(-_log1p_sum_exp(scores, partition.negative)).expm1()
    return pull.masked_fill(~partition.valid, 0.0), push.masked_fill(~partition.valid, 0.0)
