"""SAVE from start to end: stages 1 and 2, then one step of algorithms 1 and 2. The equations are in `savelib.method`.

A step runs the reward model twice: once with gradients (R, V, the filter, the loss) and once without, after its
update (input of the value head, rewards of the policy). Groups without contrast get no backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from savelib.config import Config
from savelib.method import metarm_difference, value_loss
from savelib.models.compute import seed_everything
from savelib.models.reward_model import Encoded
from savelib.models.rollout import Responses
from savelib.processes import gathered, share, summed
from savelib.training.finite import names_step, require_finite
from savelib.training.metrics import Clock, describe, sample_rows
from savelib.training.policy_update import improve_policy
from savelib.training.reward_side import RewardSide
from savelib.training.scoring import (
    Feedback,
    GroupScores,
    check_finite,
    embed_groups,
    encode_groups,
    encode_pairs,
    micro_batches,
    pairs_at_once,
    score_micro_batch,
)
from savelib.training.stages import anchor_stage, bradley_terry_step, preference_stage
from savelib.training.trainer import Trainer, load_data


def prepare(config: Config, checkpoint: Path | None = None) -> Trainer:
    """Stages 1 and 2, computed or read from the cache, then the models of the loop.

    checkpoint: the folder that policy, reward model and value head are taken from instead.
    """
    data = load_data(config)
    reward_model = preference_stage(config, data.pairs)  # eq. 2, 11
    others = [preference_stage(member, data.pairs) for member in config.members]  # of an ensemble
    value_head = None if checkpoint else anchor_stage(config, reward_model, data.prompts)  # eq. 12
    return Trainer(config, data, reward_model, value_head, checkpoint, others)


@names_step
def save_step(t: Trainer, step: int, clock: Clock | None = None) -> tuple[dict[str, float], list[dict]]:
    """Step `step` (from 1) of algorithms 1 and 2: (metrics of all processes, logged samples).

    B prompts are shared over the processes; this process has b of them, with G responses each.
    """
    c, clock = t.config, clock or Clock()
    seed_everything("step", c.seed, step)

    # 1. Adaptive feedback filtering: threshold mu(t) and G responses per prompt; R and V are in block 2's first forward
    threshold = t.threshold(step)  # eq. 14
    with clock.phase("rollout"):
        rollout = t.sample(step)

    # 2. Reward model: contrastive loss on the valid prompts, then the value head on all prompts
    before, after, rm_metrics = update_reward_model(t, rollout, threshold, step, clock)  # eq. 4, 15-21

    # 3. Policy: the same responses with the updated R, V and filter
    with clock.phase("policy forward/backward"):
        policy_metrics = improve_policy(t, rollout, after, step, clock)  # eq. 5

    metrics = {"threshold": threshold} | rm_metrics | policy_metrics | describe(before, after, rollout)
    tokens = int(gathered(rollout.completion_lengths).sum())
    return metrics | clock.metrics(tokens), sample_rows(rollout, before, step)


@names_step
def update_reward_model(
    t: RewardSide, responses: Responses, threshold: float, step: int, clock: Clock
) -> tuple[Feedback, Feedback, dict[str, float]]:
    """Block 2, and the filter of block 3: (feedback before the update, after it, metrics). It needs no policy.

    The feedback before is that of the reward model of step t-1; the policy is trained on the one after.
    """
    c = t.config
    with clock.phase("reward scoring"):
        groups = encode_groups(t.reward_model, responses)
        if not t.rule.extra:
            groups = embed_groups(t.reward_model, groups, c)
    with clock.phase("RM update"):
        before, metrics = improve_reward_model(t, groups, responses, threshold, step)  # eq. 4, 15-20
    with clock.phase("reward scoring"):
        scores = t.scores(groups, responses, step)  # of the updated reward model
        check_finite(scores.rewards, responses)
    with clock.phase("value update"):
        metrics |= improve_value_head(t, scores)  # eq. 21
    if t.guard:  # rule save_checked: a block that did not improve the guard pairs is undone
        undone, guard_metrics = t.guard.check(step)
        scores = t.scores(groups, responses, step) if undone else scores
        metrics |= guard_metrics
    eligible = responses.finished if c.length_filter == "both" else torch.ones_like(responses.finished)
    after = t.feedback(scores, threshold, eligible, responses.gold().to(t.device))
    return before or after, after, metrics


def improve_reward_model(
    t: RewardSide, groups: list[Encoded], responses: Responses, threshold: float, step: int
) -> tuple[Feedback | None, dict[str, float]]:
    """Block 2, omega and phi: (feedback of the reward model of step t-1, metrics).

    Losses of micro-batches are sums over groups; the gradient is divided once by the number of groups of all
    processes, so the result does not depend on how the batch is cut. With rm_steps > 1 the filter stays the first one.
    No feedback for rules that ignore the responses (frozen, offline_bt, ser).
    """
    c, rule, engine = t.config, t.rule, t.engines["reward_model"]
    if rule.pairs:
        for i in range(c.rm_steps):
            pairs = encode_pairs(t.reward_model, t.batch(t.data.pairs, (step - 1) * c.rm_steps + i + 1))
            away = look_ahead(t, groups, responses, step) if rule.lookahead else nullcontext({})
            metrics = bradley_terry_step(t.reward_model, pairs, engine, c, rule.pairs, away)
        return None, metrics
    if rule.loss is None:
        return None, {}
    mirrored = t.turned_round
    loss_of = rule.otherwise if mirrored else rule.loss
    resting = t.guard is not None and t.guard.resting
    gold, filtered = responses.gold().to(t.device), []  # feedback by micro-batch
    for i in range(c.rm_steps):
        total, count, force = 0.0, 0, 0.0
        for j, rows in enumerate(micro_batches(len(groups), c.micro_batch_groups)):
            eligible = responses.finished[rows]  # [m, G]
            scores = t.score(groups, responses, rows, step)
            if i == 0:
                check_finite(scores.rewards, responses, rows)
                filtered.append(t.feedback(scores, threshold, eligible, gold[rows]))
            part = filtered[j]
            n = 0 if resting else int(rule.groups(part.partition, eligible).sum())
            if engine.needed(n):
                loss = loss_of(scores.rewards, part.anchors, part.partition, eligible) * n
                require_finite("the loss of the reward model", loss.detach(), "reward_model", responses.prompts[rows])
                if rule.centred:
                    force += torch.autograd.grad(loss, scores.rewards, retain_graph=True)[0].sum().item()
                engine.backward(loss)
                total, count = total + loss.item(), count + n
        total, count = summed(total, count)
        if count:
            if rule.centred:
                hold_level(t, force, step)
            norm = engine.step(divisor=count)
            if rule.extra:
                t.engines[rule.extra].step(divisor=count)
    metrics = {"rm/loss": total / count, "rm/grad_norm": norm} if count else {}
    if rule.otherwise:
        metrics["rm/mirrored"] = float(mirrored)
    return Feedback.joined(filtered), metrics | {"rm/groups": int(count)}


@contextmanager
def look_ahead(t: RewardSide, groups: list[Encoded], responses: Responses, step: int) -> Iterator[dict[str, float]]:
    """MetaRM: inside, the weights are theta' = theta + meta_lr grad J; afterwards theta again, with its gradients."""
    engine, total = t.engines["reward_model"], 0.0
    for rows in micro_batches(len(groups), t.config.micro_batch_groups):
        objective = metarm_difference(t.score(groups, responses, rows, step).rewards, responses.finished[rows])
        objective = objective * len(groups[rows])  # a sum over groups
        engine.backward(objective)
        total += objective.item()
    with engine.moved(t.config.meta_lr / t.config.batch_size):
        yield {"rm/difference": summed(total)[0] / t.config.batch_size}


def hold_level(t: RewardSide, force: float, step: int) -> None:
    """Add the gradient of -F m: m the mean reward of a batch of preference pairs, F the sum of dL/dR over responses.

    So the loss's gradient is that of R - (m - stopgrad m) in the place of R: it cannot shift all rewards together.
    """
    (force,) = summed(force)
    encoded = encode_pairs(t.reward_model, share(t.batch(t.data.pairs, step)))
    for rows in micro_batches(len(encoded), pairs_at_once(t.config)):
        rewards = score_micro_batch(t.reward_model, encoded[rows], t.config).rewards  # [n, 2]
        t.engines["reward_model"].backward(rewards.sum() * (-force / (2 * t.config.batch_size)))


def improve_value_head(t: RewardSide, scores: GroupScores) -> dict[str, float]:
    """Block 2, psi: lambda_V L_V (eq. 21) on all prompts of all processes and all G responses."""
    if t.rule.anchor != "value":
        return {}
    c, engine = t.config, t.engines["value_head"]
    loss = c.value_loss_weight * value_loss(t.reward_model.values(scores.prompt_hidden), scores.rewards)
    loss = loss * len(scores.rewards)  # a sum over this process's prompts
    require_finite("L_V", loss.detach(), "value_head")
    engine.backward(loss)
    engine.step(divisor=c.batch_size)
    return {"value/loss": summed(loss.item())[0] / c.batch_size}
