"""PRIME (arXiv 2502.01456): a causal LM psi, trained on outcomes alone, gives a reward to each token.

Its log-ratio to the initial policy, q_t = log pi_psi(y_t) - log pi_ref(y_t), is an implicit process reward, and
sigmoid(.05 sum_t q_t) the probability of a good outcome. psi starts as the initial policy. Each step trains it on the
batch by cross-entropy; then its process rewards .05 q_t and the outcomes give the advantages (`prime_advantages`).

PRIME's outcome is a verifier's verdict on mathematics or code. On open-ended prompts there is none, and the outcome is
OUR choice: 1 for a response whose reward is above the mean of the group's kept ones, else 0. Ours too are the learning
rate of psi (policy_lr), and that the loss has the KL penalty of the other algorithms (PRIME has none: beta=0).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from savelib.config import Config
from savelib.method import outcome_logits, process_rewards
from savelib.models.rollout import Rollout, completion_logprobs
from savelib.processes import summed
from savelib.training.engine import Engine
from savelib.training.finite import require_finite


def improve_process_reward(
    psi: nn.Module, engine: Engine, rollout: Rollout, rows: Tensor, wanted: Tensor, ref_logprobs: Tensor, config: Config
) -> dict[str, float]:
    """One gradient step of psi: cross-entropy of sigmoid(.05 sum_t q_t) against the outcome, mean over responses.

    rows [n]: flat indices of the responses; wanted [n] in {0, 1}; ref_logprobs [n, T].
    process/accuracy: the share of responses that psi, before the step, puts on the outcome's side; .5 at the start.
    """
    mask = rollout.completion_mask.flatten(0, 1)[rows]  # [n, T]
    total, right, size = 0.0, 0.0, config.micro_batch_responses
    for i in range(0, len(rows), size):
        part = slice(i, i + size)
        logprobs = completion_logprobs(psi, rollout, rows[part], config)  # [m, T']
        steps = logprobs.shape[1]
        logits = outcome_logits(process_rewards(logprobs, ref_logprobs[part, :steps]), mask[part, :steps])
        loss = F.binary_cross_entropy_with_logits(logits, wanted[part], reduction="sum")
        require_finite("the loss of PRIME's process reward model", loss.detach(), "process_reward", rollout.prompts)
        engine.backward(loss)
        total += loss.item()
        verdict = (logits > 0).float().masked_fill(logits.abs() < 1e-4, 0.5)  # psi that is still the reference has none
        right += float((1 - (verdict - wanted[part]).abs()).sum())
    total, right, count = summed(total, right, len(rows))
    engine.step(divisor=count)
    return {"process/loss": total / count, "process/accuracy": right / count}
