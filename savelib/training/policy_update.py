"""Block 3 of the step: rewards -> advantages -> one policy gradient step (eq. 5).

Responses that are learned from are flat row indices [n] into the N = b * G responses of this process.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from savelib.method import (
    ALGORITHMS,
    best_of_group,
    kl_k1,
    kl_penalized_rewards,
    loss_weight,
    outcomes,
    par_rewards,
    policy_advantages,
    policy_loss,
    prime_advantages,
    process_rewards,
    reinforce_pp_advantages,
)
from savelib.models.rollout import Rollout, completion_logprobs
from savelib.processes import gathered, largest, rank, summed
from savelib.training.finite import require_finite
from savelib.training.metrics import Clock
from savelib.training.prime import improve_process_reward
from savelib.training.scoring import Feedback, encode_groups, learned_from, score_groups
from savelib.training.trainer import Trainer


def improve_policy(t: Trainer, rollout: Rollout, feedback: Feedback, step: int, clock: Clock) -> dict[str, float]:
    """One policy gradient step on the kept responses of the groups that keep at least two."""
    used, rewards = learned_from(feedback, t.config), shaped_rewards(t, feedback.rewards, step)  # [b, G]
    if ALGORITHMS[t.config.algo].best_only:
        used = best_of_group(rewards, used)
    (responses,) = summed(int(used.sum()))
    if t.config.freeze_policy or not responses:
        return {"policy/responses": 0}
    rows = _alike_together(used, rollout)  # [n]
    with clock.phase("reference log-probs"):
        ref_logprobs = _reference_logprobs(t, rollout, rows)  # [n, T]
    advantages, metrics = _advantages(t, rollout, rewards, used, rows, ref_logprobs)
    return _gradient_step(t, rollout, rows, ref_logprobs, advantages, step, clock) | {
        "policy/responses": int(responses),
        **metrics,
    }


@torch.no_grad()
def shaped_rewards(t: Trainer, rewards: Tensor, step: int) -> Tensor:
    """What the policy is rewarded with [b, G]: R itself, or PAR's preference over responses of the initial policy."""
    if t.config.reward_shaping == "none":
        return rewards
    references = encode_groups(t.reward_model, t.references(step))
    return par_rewards(rewards, score_groups(t.reward_model, references, t.config).rewards)


def _alike_together(used: Tensor, rollout: Rollout) -> Tensor:
    """Flat indices of the used responses [n], group by group, responses of like length next to each other."""
    group_size = used.shape[1]
    rows = used.flatten().nonzero().squeeze(1)
    by_length = rollout.completion_lengths.flatten()[rows].argsort(stable=True)
    return rows[by_length][(rows[by_length] // group_size).argsort(stable=True)]


# log-probabilities of all rows, without gradients


@torch.no_grad()
def _logprobs(t: Trainer, model: nn.Module, rollout: Rollout, rows: Tensor) -> Tensor:
    """Log-probabilities [n, T] of the rows' tokens, in micro-batches."""
    width = rollout.completion_ids.shape[-1]
    parts = [completion_logprobs(model, rollout, part, t.config) for part in _micro_batches(t, rows)]
    parts = [nn.functional.pad(p, (0, width - p.shape[1])) for p in parts]
    return torch.cat(parts or [torch.zeros(0, width, device=rows.device)])[: len(rows)]


def _reference_logprobs(t: Trainer, rollout: Rollout, rows: Tensor) -> Tensor:
    with t.as_reference() as reference:
        return _logprobs(t, reference, rollout, rows)


def _micro_batches(t: Trainer, rows: Tensor) -> list[Tensor]:
    """Micro-batches of rows. Under ZeRO all processes need the same number, so shorter ones repeat row 0."""
    parts = list(rows.split(t.config.micro_batch_responses)) if len(rows) else []
    if t.lockstep:
        parts += [rows.new_zeros(1)] * (int(largest(len(parts))[0]) - len(parts))
    return parts


# rewards -> advantages


@torch.no_grad()
def _advantages(
    t: Trainer, rollout: Rollout, rewards: Tensor, used: Tensor, rows: Tensor, ref_logprobs: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Advantages of the rows, [n], or [n, T] where each token has its own, with the KL in the reward where it is there.

    rewards, used [b, G]; ref_logprobs [n, T]. Also the metrics of a process reward model, if one is trained.
    """
    by_algorithm = {"reinforce_pp": _reinforce_pp, "prime": _prime}
    return by_algorithm.get(t.config.algo, _of_groups)(t, rollout, rewards, used, rows, ref_logprobs)


def _of_groups(
    t: Trainer, rollout: Rollout, rewards: Tensor, used: Tensor, rows: Tensor, ref_logprobs: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """GRPO, GSPO, RLOO."""
    c = t.config
    if c.beta and not t.kl_in_loss:
        scored = rows
        if c.advantages_over == "all":  # the statistics need the penalised reward of every response of a used group
            scored = used.any(1).repeat_interleave(c.group_size).nonzero().squeeze(1)
            ref_logprobs = _reference_logprobs(t, rollout, scored)
        logprobs, mask = _logprobs(t, t.policy, rollout, scored), rollout.completion_mask.flatten(0, 1)[scored]
        penalised = kl_penalized_rewards(rewards.flatten()[scored], logprobs, ref_logprobs, mask, c.beta)
        rewards = rewards.flatten().index_copy(0, scored, penalised).view_as(rewards)
    return policy_advantages(c.algo, rewards, used, c.advantages_over).flatten()[rows], {}


def _reinforce_pp(
    t: Trainer, rollout: Rollout, rewards: Tensor, used: Tensor, rows: Tensor, ref_logprobs: Tensor
) -> tuple[Tensor, dict[str, float]]:
    mask = rollout.completion_mask.flatten(0, 1)  # [N, T]
    beta = 0.0 if t.kl_in_loss else t.config.beta
    logprobs = _logprobs(t, t.policy, rollout, rows) if beta else ref_logprobs
    logprobs, ref, inside = (_of_all(x, rows, mask) for x in (logprobs, ref_logprobs, mask[rows]))
    return _mine(reinforce_pp_advantages(gathered(rewards.flatten()), logprobs, ref, inside, beta), rows, mask), {}


def _prime(
    t: Trainer, rollout: Rollout, rewards: Tensor, used: Tensor, rows: Tensor, ref_logprobs: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """PRIME: its process reward model takes a step first."""
    c, mask, psi = t.config, rollout.completion_mask.flatten(0, 1), t.extras["process_reward"]
    wanted = outcomes(rewards, used)  # [b, G]
    with torch.enable_grad():
        metrics = improve_process_reward(
            psi, t.engines["process_reward"], rollout, rows, wanted.flatten()[rows], ref_logprobs, c
        )
    process = process_rewards(_logprobs(t, psi, rollout, rows), ref_logprobs)  # [n, T]
    if c.beta and not t.kl_in_loss:
        process = process - c.beta * kl_k1(_logprobs(t, t.policy, rollout, rows), ref_logprobs)
    of_all = prime_advantages(
        _of_all(process, rows, mask), gathered(wanted), gathered(used), _of_all(mask[rows], rows, mask)
    )
    return _mine(of_all, rows, mask), metrics


def _of_all(values: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """All processes' values of all their responses, 0 where one is not among the rows.

    values [n, T] of the rows [n] of this process's N responses, mask [N, T] -> [W * N, longest T].
    """
    full = torch.zeros(len(mask), int(largest(mask.shape[1])[0]), dtype=values.dtype, device=values.device)
    full[rows, : mask.shape[1]] = values
    return gathered(full)


def _mine(of_all: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """The way back from `_of_all`: this process's rows [n, T]."""
    return of_all[rank() * len(mask) :][rows, : mask.shape[1]]


# advantages -> gradient


def _gradient_step(
    t: Trainer, rollout: Rollout, rows: Tensor, ref_logprobs: Tensor, advantages: Tensor, step: int, clock: Clock
) -> dict[str, float]:
    """Forward and backward over the rows in micro-batches, then one optimizer step."""
    c, engine, size = t.config, t.engines["policy"], t.config.micro_batch_responses
    mask, beta = rollout.completion_mask.flatten(0, 1), c.beta if t.kl_in_loss else 0.0
    weight_all, tokens = summed(loss_weight(c.algo, mask[rows]), int(mask[rows].sum()))
    total, kl = 0.0, 0.0
    for i, part in enumerate(_micro_batches(t, torch.arange(len(rows), device=rows.device))):
        if i * size >= len(rows):  # another process has more rows
            engine.backward(completion_logprobs(t.policy, rollout, part, c).sum() * 0.0)
            continue
        logprobs = completion_logprobs(t.policy, rollout, rows[part], c)  # [m, T']
        steps = logprobs.shape[1]
        inside, references = mask[rows[part], :steps], ref_logprobs[part, :steps]
        given = advantages[part, :steps] if advantages.dim() == 2 else advantages[part]
        loss = policy_loss(c.algo, logprobs, logprobs.detach(), references, given, inside, beta=beta)
        loss = loss * loss_weight(c.algo, inside)  # a sum over rows, or tokens
        require_finite("the policy loss", loss.detach(), "policy", rollout.prompts)
        engine.backward(loss)
        total += loss.item()
        kl += float(((logprobs.detach() - references) * inside).sum())
    with clock.phase("optimizer"):
        norm = engine.step(divisor=weight_all)
    total, kl, responses = summed(total, kl, len(rows))
    return {"policy/loss": total / weight_all, "policy/kl": kl / tokens, "policy/kl_response": kl / responses,
            "policy/grad_norm": norm}  # fmt: skip
