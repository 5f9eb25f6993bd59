"""SAVE itself: stage 1 (preference learning), stage 2 (value anchor integration), and the step of the on-policy loop.

Algorithms 1 and 2 are `save_step`. The reward model is run twice a step: once with gradients over the groups, which
gives R, V, the filter and the loss, and once without after its update, which gives the value head its input and the
policy its rewards. Groups without contrast get no backward.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from savelib import prime, world
from savelib.config import Config, ConfigError
from savelib.data import Preference, Prompt, train_and_heldout_preferences, train_and_heldout_prompts
from savelib.distributed import Engine, ZeroEngine, gathered, is_main, largest, rank, share, summed, wait, world_size
from savelib.feedback import (
    Partition,
    bradley_terry_loss,
    curriculum_threshold,
    net_forces,
    partition,
    rm_advantages,
    skewness,
    value_loss,
)
from savelib.models import (
    Encoded,
    RewardModel,
    Scored,
    autocast,
    load_policy,
    load_reward_model,
    pick_device,
    recomputing,
    save_merged,
)
from savelib.paths import atomic_folder, cache_dir, code_digest, resolve
from savelib.policy_loss import (
    KL_IN_LOSS,
    kl_k1,
    kl_penalized_rewards,
    loss_weight,
    policy_advantages,
    policy_loss,
    prime_advantages,
    reinforce_pp_advantages,
)
from savelib.rollout import Rollout, completion_logprobs, sample
from savelib.rules import RULES, Extra, PairLabels, as_labelled, running_mean
from savelib.smollm2 import smollm2_path

T = TypeVar("T")


class NonFiniteError(RuntimeError):
    """A reward or a loss that is not a finite number; the message names the step and the prompts."""


def policy_source(config: Config) -> str:
    """Folder or hub id of the initial policy."""
    if config.policy_model == "embedded":
        return str(world.build_policy(config.world_seed, config.start_share))
    return str(smollm2_path()) if config.policy_model == "smollm2" else config.policy_model


def reward_source(config: Config) -> str:
    """Folder or hub id of what stage 1 starts from."""
    if config.reward_model == "embedded":
        return str(world.build_backbone(config.world_seed))
    return str(smollm2_path()) if config.reward_model == "smollm2" else config.reward_model


def main_first(build: Callable[[Config], T], config: Config) -> T:
    """What `build` returns, the main process being first: the others find in the cache what it downloads or makes."""
    if not is_main():
        wait()
    made = build(config)
    if is_main():
        wait()
    return made


def seed_everything(*parts: int | str) -> None:
    """Seed torch from a few numbers or names; each step has its own seed, so a resumed run draws the same."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7]))


# stage 1: preference learning

STAGE1 = (
    "reward_model", "preferences", "eval_preferences", "bad_rows", "world_seed", "share_of_pairs", "label_noise",
    "seed", "precision", "lora_rank", "load_in_4bit", "optimizer",
    "bt_epochs", "bt_batch_size", "bt_backbone_lr", "bt_head_lr", "max_grad_norm",
)  # fmt: skip
STAGE2 = STAGE1 + (
    "policy_model", "start_share", "prompts", "prompt_selection", "value_position", "value_head", "value_init",
    "anchor_prompts", "anchor_responses", "anchor_lr", "anchor_batch_size", "anchor_epochs", "temperature", "top_p",
    "top_k", "max_new_tokens", "max_prompt_tokens",
)  # fmt: skip


def _stage_folder(stage: str, config: Config, fields: tuple[str, ...]) -> Path:
    """Cache folder of a stage: its name hashes all that the result depends on, local models and data included."""
    key = config.only(*fields) | {"code": code_digest()}
    models = {"policy_model": policy_source, "reward_model": reward_source}
    for field, source in models.items():
        if field in fields:
            files = sorted(Path(resolve(source(config))).glob("*.*"))  # none for a hub id
            key[field] = [source(config), [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]]
    for data in (config.preferences, config.eval_preferences, config.prompts):
        path = Path(resolve(data)) if data else None
        if path and path.is_file():
            key[f"sha256 of {data}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return cache_dir() / f"{stage}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


def preference_stage(config: Config) -> str:
    """Stage 1 (eq. 2, 11): Bradley-Terry on the preference pairs; returns the reward model's folder or hub id.

    The result is cached; with bt_epochs = 0 the given reward model is already trained and returned as it is.
    """
    if not config.bt_epochs:
        return reward_source(config)
    source = main_first(reward_source, config)
    target = _stage_folder("stage1", config, STAGE1)
    if not _exists(target):
        seed_everything("stage 1", config.seed)
        rm = load_reward_model(source, config, pick_device(config.device, config.threads))
        pairs, _ = train_and_heldout_preferences(config)
        say(f"stage 1: Bradley-Terry on {len(pairs)} pairs, {config.bt_epochs} epoch(s)")
        for loss in fit_bradley_terry(rm, pairs, config):
            say(f"  epoch loss {loss:.4f}")
        if is_main():
            with atomic_folder(target) as folder:
                save_merged(rm.model, source, folder)
                rm.tokenizer.save_pretrained(folder)
        wait()
    return str(target)


def _exists(target: Path) -> bool:
    """Whether a stage's result is in the cache; all processes give the same answer."""
    return largest(target.is_dir())[0] > 0


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_main():
        print(line, flush=True)


def fit_bradley_terry(rm: RewardModel, pairs: list[Preference], config: Config) -> Iterator[float]:
    """Train backbone and reward head on eq. 11; yields the mean loss of each epoch."""
    engine = Engine(
        "reward_model", reward_optimizer(rm, config, config.bt_backbone_lr, config.bt_head_lr), config.max_grad_norm
    )
    for _ in range(config.bt_epochs):
        losses = []
        for rows in torch.randperm(len(pairs)).split(config.bt_batch_size):
            batch = [pairs[i] for i in rows]
            losses.append(bradley_terry_step(rm, batch, engine, config)["rm/loss"] * len(batch))
        yield sum(losses) / len(pairs)


def bradley_terry_step(
    rm: RewardModel, pairs: list[Preference], engine: Engine, config: Config, labels: PairLabels = as_labelled
) -> dict[str, float]:
    """One gradient step of eq. 11 on the pairs of a batch that `labels` gives a label, in micro-batches.

    Returns rm/pairs, how many they are, and, if there are any, rm/loss.
    """
    mine = pairs[rank() :: world_size()]
    encoded = encode_pairs(rm, mine)
    size = max(1, config.micro_batch_groups * config.group_size // 2)
    total, count = 0.0, 0
    for i in range(0, len(mine), size):
        part = encoded[i : i + size]
        both = Encoded([r for e in part for r in e.ids], [r for e in part for r in e.prompt_ends])
        rewards = _scored(rm, both, config).rewards.view(-1, 2)  # [n, 2]
        better, worse = labels(rewards[:, 0], rewards[:, 1])
        n = len(better)
        if engine.needed(n):
            loss = bradley_terry_loss(better, worse) * n if n else rewards.sum() * 0.0
            engine.backward(loss)
            total, count = total + loss.item(), count + n
    total, count = summed(total, count)
    if not math.isfinite(total):
        raise NonFiniteError(f"Bradley-Terry loss is {total}; first prompt: {pairs[0].prompt[-1]['content'][:60]!r}")
    if not count:
        return {"rm/pairs": 0}
    engine.step(divisor=count)
    return {"rm/loss": total / count, "rm/pairs": int(count)}


def reward_optimizer(rm: RewardModel, config: Config, backbone_lr: float, head_lr: float) -> torch.optim.Optimizer:
    """Adam over omega and phi with a learning rate each; a backbone at 0 takes no gradient at all."""
    backbone, head = rm.backbone_parameters(), rm.reward_head_parameters()
    for p in backbone:
        p.requires_grad_(backbone_lr > 0)
    groups = [{"params": head, "lr": head_lr}] + [{"params": backbone, "lr": backbone_lr}] * (backbone_lr > 0)
    return adam(groups, config)


def adam(groups: list[dict], config: Config) -> torch.optim.Optimizer:
    """AdamW without weight decay, as the config's optimizer and backend have it."""
    if config.optimizer != "adamw":
        import bitsandbytes

        kind = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}[config.optimizer]
        return getattr(bitsandbytes.optim, kind)(groups, weight_decay=0.0)
    if config.backend == "deepspeed_zero2_offload":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, weight_decay=0.0, adamw_mode=True)
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


# stage 2: value anchor integration


def anchor_stage(config: Config) -> str | None:
    """Stage 2 (eq. 12): fit the value head to the mean frozen-RM reward; returns a folder with the value head.

    Cached like stage 1. None for a rule without a value head (frozen, hl_bt, ...).
    """
    source = preference_stage(config)
    if RULES[config.rule].anchor != "value":
        return None
    policy_folder = main_first(policy_source, config)
    target = _stage_folder("stage2", config, STAGE2)
    if not _exists(target):
        device = pick_device(config.device, config.threads)
        seed_everything("value head init", config.seed)
        rm = load_reward_model(source, config, device)
        policy, tokenizer = load_policy(policy_folder, device, config)
        prompts, _ = train_and_heldout_prompts(config)
        hidden, rewards = anchor_targets(rm, policy, tokenizer, prompts, config)
        for i, loss in enumerate(fit_value_head(rm, hidden, rewards, config), 1):
            if i in (1, config.anchor_epochs):
                say(f"  epoch {i}: L_V {loss:.4f}")
        if is_main():
            with atomic_folder(target) as folder:
                rm.save_value_head(folder)
        wait()
    return str(target)


def anchor_targets(
    rm: RewardModel, policy: nn.Module, tokenizer, prompts: list[Prompt], config: Config
) -> tuple[Tensor, Tensor]:
    """Sample K responses to each prompt and score them: (hidden states for V [M, H], rewards [M, K]), no graph."""
    seed_everything("stage 2", config.seed)
    count = min(config.anchor_prompts or len(prompts), len(prompts))
    chosen = [prompts[i] for i in torch.randperm(len(prompts))[:count]]
    say(f"stage 2: value head on {count} prompts x K {config.anchor_responses}")
    hidden, rewards = [], []
    for i in range(0, count, config.anchor_batch_size):
        batch = chosen[i : i + config.anchor_batch_size]
        rollout = shared_sample(policy, tokenizer, batch, config.anchor_responses, config)
        scored = score_groups(rm, encode_groups(rm, rollout), config)
        rewards.append(gathered(scored.rewards, len(batch)))
        hidden.append(gathered(scored.prompt_hidden, len(batch)))
    return torch.cat(hidden), torch.cat(rewards)


def shared_sample(
    policy: nn.Module, tokenizer, batch: list[Prompt], count: int, config: Config, lockstep: bool = False
) -> Rollout:
    """This process's share of `count` responses to each prompt, from random numbers drawn for the whole batch."""
    numbers = torch.rand(len(batch), count, config.max_new_tokens)
    mine = torch.stack(share(list(numbers))).flatten(0, 1)  # [N, T]
    return sample(policy, tokenizer, share(batch), count, config, mine, lockstep)


def fit_value_head(rm: RewardModel, hidden: Tensor, rewards: Tensor, config: Config) -> Iterator[float]:
    """Train psi on eq. 12 with hidden states [M, H] and rewards [M, K]; yields the mean loss of each epoch."""
    seed_everything("value head", config.seed)
    out = rm.value_head[-1]
    if config.value_init == "mean_reward":
        nn.init.zeros_(out.weight)
        nn.init.constant_(out.bias, float(rewards[: config.anchor_batch_size].mean()))
    optimizer = torch.optim.AdamW(rm.value_head.parameters(), lr=config.anchor_lr, weight_decay=0.0)
    for _ in range(config.anchor_epochs):
        total = 0.0
        for rows in torch.randperm(len(hidden)).split(config.anchor_batch_size):
            loss = value_loss(rm.values(hidden[rows]), rewards[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(rm.value_head.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(rows)
        yield total / len(hidden)


# scoring groups


@dataclass(frozen=True)
class GroupScores:
    """Rewards [B, G] and the hidden states that V reads [B, H], on the reward model's device."""

    rewards: Tensor
    prompt_hidden: Tensor


def encode_groups(rm: RewardModel, rollout: Rollout) -> list[Encoded]:
    """The B groups of a rollout, re-rendered by the reward model's own chat template."""
    return [
        rm.encode([(p.messages, t) for t in texts]) for p, texts in zip(rollout.prompts, rollout.texts, strict=True)
    ]


def encode_pairs(rm: RewardModel, pairs: list[Preference]) -> list[Encoded]:
    """Each pair as a group of two, the chosen response first."""
    return [rm.encode([(p.prompt, p.chosen), (p.prompt, p.rejected)]) for p in pairs]


def _score_some(rm: RewardModel, groups: list[Encoded], config: Config) -> GroupScores:
    """One forward over a micro-batch of groups; the groups' rows share their prompt, so V reads the first row's."""
    flat = Encoded([r for g in groups for r in g.ids], [e for g in groups for e in g.prompt_ends])
    scored = _scored(rm, flat, config)
    return GroupScores(scored.rewards.view(len(groups), -1), scored.prompt_hidden[:: len(groups[0])])


def _scored(rm: RewardModel, batch: Encoded, config: Config) -> Scored:
    with autocast(rm.device, config.precision), recomputing(rm.model, config.gradient_checkpointing):
        return rm.score(batch)


def _micro_batches(count: int, config: Config) -> Iterator[slice]:
    for i in range(0, count, config.micro_batch_groups):
        yield slice(i, min(i + config.micro_batch_groups, count))


def score_groups(rm: RewardModel, groups: list[Encoded], config: Config) -> GroupScores:
    """Score all groups without gradients, micro_batch_groups at a time."""
    return _all_scores(lambda rows: _score_some(rm, groups[rows], config), len(groups), config)


@torch.no_grad()
def _all_scores(score: Callable[[slice], GroupScores], count: int, config: Config) -> GroupScores:
    parts = [score(rows) for rows in _micro_batches(count, config)]
    return GroupScores(torch.cat([p.rewards for p in parts]), torch.cat([p.prompt_hidden for p in parts]))


# the on-policy loop


@dataclass(frozen=True)
class Feedback:
    """What the reward model says of a batch: R, what it is measured against (None: nothing), and who is kept."""

    rewards: Tensor  # [B, G]
    anchors: Tensor | None  # [B]
    partition: Partition

    @property
    def kept(self) -> Tensor:
        return self.partition.kept  # [B, G]


@lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` rows in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def extras_of(config: Config) -> list[Extra]:
    """What the rule and the policy algorithm train beside the policy and the reward model."""
    return [extra for extra in (RULES[config.rule].extra, prime.EXTRA if config.algo == "prime" else None) if extra]


class Trainer:
    """The models, optimizers and data of a run. Stages 1 and 2 are done (or found in the cache) when it is made.

    checkpoint: the folder to take policy and reward model from; default the initial policy and stage 2's result.
    """

    def __init__(self, config: Config, checkpoint: Path | None = None):
        self.config, self.rule = config, RULES[config.rule]
        self.lead: float | None = None  # running mean of the steps' reward/lead, part of a checkpoint
        self.device = pick_device(config.device, config.threads)
        # data first: a bad row should not cost the time of stages 1 and 2
        self.prompts, self.heldout_prompts = main_first(train_and_heldout_prompts, config)
        self.pairs, self.heldout_pairs = main_first(train_and_heldout_preferences, config)
        self.sources = {"policy": main_first(policy_source, config), "reward_model": preference_stage(config)}
        reward = str(checkpoint / "reward_model") if checkpoint else anchor_stage(config)
        seed_everything("value head init", config.seed)  # without stage 2, nothing else gives it its weights
        self.reward_model = load_reward_model(self.sources["reward_model"], config, self.device, reward)
        self.policy, self.tokenizer = load_policy(
            self.sources["policy"], self.device, config, checkpoint / "policy" if checkpoint else None
        )
        # with adapters, the reference is the policy without them
        self.reference = None if config.lora_rank else self.initial_policy().requires_grad_(False)
        rm, backbone_lr = self.reward_model, config.backbone_lr if self.rule.backbone else 0.0
        by_model = {
            "policy": (self.policy, adam([{"params": _trained(self.policy), "lr": config.policy_lr}], config)),
            "reward_model": (rm.scorer, reward_optimizer(rm, config, backbone_lr, config.reward_head_lr)),
        }
        self.engines = {
            name: Engine(name, optimizer, config.max_grad_norm)
            if config.backend == "ddp"
            else ZeroEngine(name, model, optimizer, config.max_grad_norm)
            for name, (model, optimizer) in by_model.items()
        }
        head = torch.optim.AdamW(rm.value_head.parameters(), lr=config.value_head_lr, weight_decay=0.0)
        self.engines["value_head"] = Engine("value_head", head, config.max_grad_norm)  # small: whole everywhere
        self.extras: dict[str, nn.Module] = {}
        for extra in extras_of(config):
            seed_everything(extra.name, config.seed)
            module = self.extras[extra.name] = extra.build(self).to(self.device)
            if checkpoint:
                load_model(module, checkpoint / f"{extra.name}.safetensors")
            optimizer = torch.optim.AdamW(module.parameters(), lr=getattr(config, extra.lr), weight_decay=0.0)
            self.engines[extra.name] = Engine(extra.name, optimizer, config.max_grad_norm)

    def initial_policy(self) -> nn.Module:
        """A new copy of the initial policy."""
        return load_policy(self.sources["policy"], self.device)[0]

    @property
    def lockstep(self) -> bool:
        return self.engines["policy"].lockstep

    @property
    def kl_in_loss(self) -> bool:
        c = self.config
        return KL_IN_LOSS[c.algo] if c.kl == "algorithm" else c.kl == "loss"

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The initial policy: a model of its own, or the policy with its adapters off."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.policy.disable_adapter():
                yield self.policy

    def batch(self, rows: list, step: int, size: int) -> list:
        """The step's rows (steps from 1), from epochs of seeded permutations: the step's number tells its data."""
        if not rows:
            raise ConfigError("no training data")
        picked = []
        for i in range((step - 1) * size, step * size):
            epoch, at = divmod(i, len(rows))
            picked.append(rows[_epoch_order(len(rows), self.config.seed, epoch)[at]])
        return picked

    def threshold(self, step: int) -> float:
        """mu(t) of eq. 14, or the curriculum option's."""
        c = self.config
        if c.curriculum == "none":
            return 0.5
        return curriculum_threshold(1 if c.curriculum == "fixed" else step, c.total_steps, c.initial_margin)

    def scores(self, groups: list[Encoded], rollout: Rollout, rows: slice, step: int) -> GroupScores:
        """One forward over the groups `rows` of the batch: R, as the rule has it, and what V reads."""
        if self.rule.score is None:
            return _score_some(self.reward_model, groups[rows], self.config)
        rewards = self.rule.score(self, groups[rows], rollout, rows, step)
        return GroupScores(rewards, rewards.new_zeros(len(rewards), 0))  # such a rule has no value head

    def feedback(self, scores: GroupScores, threshold: float, eligible: Tensor) -> Feedback:
        """Eq. 4 and 15-17 with the rule's anchor; without one every eligible response is kept, on no side."""
        rewards = scores.rewards.detach()
        if self.rule.anchor is None:
            nothing = torch.zeros_like(eligible)
            return Feedback(rewards, None, Partition(eligible, nothing, nothing.any(1)))
        if self.rule.anchor == "value":
            anchors = self.reward_model.values(scores.prompt_hidden).detach()  # [B]
        else:
            anchors = (rewards * eligible).sum(1) / eligible.sum(1).clamp(min=1)  # [B]
        return Feedback(rewards, anchors, partition(rm_advantages(rewards, anchors), threshold, eligible))


def save_step(t: Trainer, step: int) -> tuple[dict[str, float], list[dict]]:
    """One step of algorithms 1 and 2 (steps from 1): (metrics of all processes, the samples and what became of them).

    B prompts are shared over the processes; shapes [b, G] below are one process's.
    """
    c = t.config
    seed_everything("step", c.seed, step)
    clock = [time.perf_counter()]

    # 1. Adaptive feedback filtering: sample; the filter is drawn with the scores of the next block's first forward
    threshold = t.threshold(step)
    batch = t.batch(t.prompts, step, c.batch_size)
    rollout = shared_sample(t.policy, t.tokenizer, batch, c.group_size, c, t.lockstep)
    groups = encode_groups(t.reward_model, rollout)
    clock.append(time.perf_counter())

    # 2. Reward-model improvement: the contrastive loss on valid prompts, then the value head on all of them
    before, rm_metrics = improve_reward_model(t, groups, rollout, threshold, step)
    scores = _all_scores(lambda rows: t.scores(groups, rollout, rows, step), len(groups), c)
    check_finite(scores.rewards, rollout, step)
    value_metrics = improve_value_head(t, scores) | measure_lead(t, scores, step)
    clock.append(time.perf_counter())

    # 3. Policy optimization: R, V and the filter of the updated reward model on the same responses
    everyone = torch.ones_like(rollout.finished)
    after = t.feedback(scores, threshold, everyone if c.length_filter == "reward_model" else rollout.finished)
    policy_metrics = improve_policy(t, rollout, after, step)
    clock.append(time.perf_counter())

    seconds = dict(zip(("time/rollout", "time/reward_model", "time/policy"), np.diff(clock).tolist(), strict=True))
    gold = rollout.gold().to(t.device)  # [b, G]
    samples = sample_rows(rollout, before or after, gold, step)
    metrics = {"threshold": threshold} | rm_metrics | value_metrics | policy_metrics
    whole = [gathered(x) for x in (gold, rollout.completion_lengths, rollout.finished)]  # [B, G] each
    metrics |= describe(_whole(before or after), _whole(after), *whole) | seconds
    metrics["time/tokens_per_second"] = int(whole[1].sum()) / (clock[-1] - clock[0])
    return metrics, samples


def improve_reward_model(
    t: Trainer, groups: list[Encoded], rollout: Rollout, threshold: float, step: int
) -> tuple[Feedback | None, dict[str, float]]:
    """Block 2 of the step, omega and phi: (R, V and filter of the reward model of step t-1, metrics).

    Each micro-batch runs forward once; its loss is a sum over groups, and the gradients are divided by the number of
    groups at the end, so that the mean is over the whole batch however it is cut, over processes too. A rule's extra
    module is trained on the same loss. No feedback for rules that do not look at the responses (frozen, offline_bt,
    ser).
    """
    c, rule, engine = t.config, t.rule, t.engines["reward_model"]
    if rule.pairs:
        for i in range(c.rm_steps):
            pairs = t.batch(t.pairs, (step - 1) * c.rm_steps + i + 1, c.batch_size)
            metrics = bradley_terry_step(t.reward_model, pairs, engine, c, rule.pairs)
        return None, metrics
    if rule.loss is None:
        return None, {}
    mirrored = rule.otherwise is not None and t.lead is not None and t.lead > 0
    loss_of = rule.otherwise if mirrored else rule.loss
    filtered: list[Feedback] = []  # by micro-batch, from the first pass
    for i in range(c.rm_steps):
        total, count = 0.0, 0
        for j, rows in enumerate(_micro_batches(len(groups), c)):
            eligible = rollout.finished[rows]  # [m, G]
            scores = t.scores(groups, rollout, rows, step)
            if i == 0:
                check_finite(scores.rewards, rollout, step, rows)
                filtered.append(t.feedback(scores, threshold, eligible))
            part = filtered[j]
            n = int(rule.groups(part.partition, eligible).sum())
            if engine.needed(n):
                loss = loss_of(scores.rewards, part.anchors, part.partition, eligible) * n
                engine.backward(loss)
                total, count = total + loss.item(), count + n
        total, count = summed(total, count)
        if count:
            norm = engine.step(divisor=count)
            if rule.extra:
                t.engines[rule.extra.name].step(divisor=count)
    metrics = {"rm/loss": total / count, "rm/grad_norm": norm} if count else {}
    if rule.otherwise:
        metrics["rm/mirrored"] = float(mirrored)
    return _joined(filtered), metrics | {"rm/groups": int(count)}


def improve_value_head(t: Trainer, scores: GroupScores) -> dict[str, float]:
    """Block 2 of the step, psi: lambda_V * L_V (eq. 21) on all prompts of all processes and all G responses."""
    if t.rule.anchor != "value":
        return {}
    c, engine = t.config, t.engines["value_head"]
    loss = c.value_loss_weight * value_loss(t.reward_model.values(scores.prompt_hidden), scores.rewards)
    loss = loss * len(scores.rewards)  # a sum over this process's prompts
    engine.backward(loss)
    engine.step(divisor=c.batch_size)
    return {"value/loss": summed(loss.item())[0] / c.batch_size}


def measure_lead(t: Trainer, scores: GroupScores, step: int) -> dict[str, float]:
    """For a rule with two losses, how far the batch's mean reward is above that of a batch of preference pairs; ours.

    Half of the pairs' responses are the better ones. So above 0 more than half of the batch looks right, as far as the
    reward model can tell, and without gold. `Trainer.lead` is the running mean.
    """
    if not t.rule.otherwise:
        return {}
    rm, mine = t.reward_model, share(t.batch(t.pairs, step, t.config.batch_size))
    pairs = score_groups(rm, encode_pairs(rm, mine), t.config)
    of_batch, of_pairs, processes = summed(scores.rewards.mean().item(), pairs.rewards.mean().item(), 1)
    now = (of_batch - of_pairs) / processes  # all processes have as many
    t.lead = running_mean(t.lead, now)
    return {"reward/lead": now}


def improve_policy(t: Trainer, rollout: Rollout, feedback: Feedback, step: int) -> dict[str, float]:
    """Block 3 of the step: one policy gradient step on the kept responses of the groups that keep at least two."""
    c, engine = t.config, t.engines["policy"]
    used = feedback.kept & (feedback.kept.sum(1) >= 2)[:, None]  # [b, G]
    if c.policy_groups == "both_signs":
        used = used & feedback.partition.valid[:, None]
    (responses,) = summed(int(used.sum()))
    if c.freeze_policy or not responses:
        return {"policy/responses": 0}
    rows = used.flatten().nonzero().squeeze(1)  # [n], flat indices of the responses that are learnt from
    by_length = rollout.completion_lengths.flatten()[rows].argsort(stable=True)
    rows = rows[by_length][(rows[by_length] // c.group_size).argsort(stable=True)]  # alike ones of a group together
    size = c.micro_batch_responses
    mask = rollout.completion_mask.flatten(0, 1)  # [N, T]

    def logprobs_of(model: nn.Module, chosen: Tensor) -> Tensor:  # [n, T]
        parts = [completion_logprobs(model, rollout, part, c) for part in _rounds(t, chosen, size)]
        parts = parts or [torch.zeros(0, 0, device=mask.device)]
        return _pad_columns(parts, mask.shape[1])[: len(chosen)]

    rewards = feedback.rewards
    in_reward = bool(c.beta) and not t.kl_in_loss
    with torch.no_grad():
        with t.as_reference() as reference:
            ref_logprobs = logprobs_of(reference, rows)
        if in_reward:
            # statistics over all G need the penalised reward of every response of a used group
            scored = (
                rows
                if c.advantages_over == "kept"
                else used.any(1).repeat_interleave(c.group_size).nonzero().squeeze(1)
            )
            logprobs, references = logprobs_of(t.policy, scored), ref_logprobs
            if scored is not rows:
                with t.as_reference() as reference:
                    references = logprobs_of(reference, scored)
    process_metrics: dict[str, float] = {}
    if c.algo == "reinforce_pp":
        lp = logprobs if in_reward else ref_logprobs
        lp, ref, there = (_of_all(x, rows, mask) for x in (lp, ref_logprobs, mask[rows]))
        of_all = reinforce_pp_advantages(gathered(rewards.flatten()), lp, ref, there, c.beta if in_reward else 0.0)
        advantages = _mine(of_all, rows, mask)  # [n, T]
    elif c.algo == "prime":
        outcomes = prime.outcomes(rewards, used)  # [b, G]
        process_metrics = prime.improve(t, rollout, rows, outcomes.flatten()[rows], ref_logprobs)
        with torch.no_grad():
            process = prime.process_rewards(logprobs_of(t.extras[prime.EXTRA.name], rows), ref_logprobs)  # [n, T]
        if in_reward:
            process = process - c.beta * kl_k1(logprobs, references)
        of_all = prime_advantages(
            _of_all(process, rows, mask), gathered(outcomes), gathered(used), _of_all(mask[rows], rows, mask)
        )
        advantages = _mine(of_all, rows, mask)  # [n, T]
    else:
        if in_reward:
            penalised = kl_penalized_rewards(rewards.flatten()[scored], logprobs, references, mask[scored], c.beta)
            rewards = rewards.flatten().index_copy(0, scored, penalised).view_as(rewards)
        advantages = policy_advantages(c.algo, rewards, used, c.advantages_over).flatten()[rows]  # [n]

    weight_all, tokens = summed(loss_weight(c.algo, mask[rows]), int(mask[rows].sum()))
    total, kl = 0.0, 0.0
    for i, part in enumerate(_rounds(t, torch.arange(len(rows), device=rows.device), size)):
        here = i * size < len(rows)  # else another process has more rows, and this one keeps it company
        chosen = rows[part] if here else part
        logprobs = completion_logprobs(t.policy, rollout, chosen, c)  # [m, T']
        if not here:
            engine.backward(logprobs.sum() * 0.0)
            continue
        steps = logprobs.shape[1]
        inside = mask[chosen, :steps]
        references = ref_logprobs[part, :steps]
        given = advantages[part, :steps] if advantages.dim() == 2 else advantages[part]
        loss = policy_loss(
            c.algo, logprobs, logprobs.detach(), references, given, inside, beta=c.beta, kl_in_loss=t.kl_in_loss
        ) * loss_weight(c.algo, inside)  # a sum over rows, or tokens
        if not torch.isfinite(loss):
            raise NonFiniteError(f"step {step}: the policy loss is {loss.item()}; prompts: {_ids(rollout.prompts)}")
        engine.backward(loss)
        total += loss.item()
        kl += float(((logprobs.detach() - references) * inside).sum())
    norm = engine.step(divisor=weight_all)
    total, kl = summed(total, kl)
    return {
        "policy/loss": total / weight_all,
        "policy/kl": kl / tokens,
        "policy/grad_norm": norm,
        "policy/responses": int(responses),
        **process_metrics,
    }


def _rounds(t: Trainer, rows: Tensor, size: int) -> list[Tensor]:
    """The rows, `size` at a time; in lockstep as often as the process with the most, the others with row 0 again."""
    parts = list(rows.split(size)) if len(rows) else []
    if t.lockstep:
        parts += [rows.new_zeros(1)] * (int(largest(len(parts))[0]) - len(parts))
    return parts


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


def _whole(feedback: Feedback) -> Feedback:
    """The feedback of all processes' prompts."""
    part = feedback.partition
    anchors = None if feedback.anchors is None else gathered(feedback.anchors)
    return Feedback(
        gathered(feedback.rewards),
        anchors,
        Partition(gathered(part.positive), gathered(part.negative), gathered(part.valid)),
    )


def _pad_columns(parts: list[Tensor], width: int) -> Tensor:
    return torch.cat([nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])


def _joined(parts: list[Feedback]) -> Feedback:
    """The feedback of micro-batches as that of the batch."""
    anchors = None if parts[0].anchors is None else torch.cat([p.anchors for p in parts])
    sides = (torch.cat([getattr(p.partition, f) for p in parts]) for f in ("positive", "negative", "valid"))
    return Feedback(torch.cat([p.rewards for p in parts]), anchors, Partition(*sides))


def _ids(prompts: list[Prompt]) -> str:
    return ", ".join(p.id for p in prompts[:4]) + (", ..." if len(prompts) > 4 else "")


def check_finite(rewards: Tensor, rollout: Rollout, step: int, rows: slice = slice(None)) -> None:
    """Raise NonFiniteError, naming step and prompts, before anything is updated with a reward that is no number."""
    bad = (~torch.isfinite(rewards)).any(1).tolist()
    if any(bad):
        prompts = [p for p, b in zip(rollout.prompts[rows], bad, strict=True) if b]
        raise NonFiniteError(
            f"step {step}: the reward model gives a reward that is not finite; prompts: {_ids(prompts)}; "
            "lower its learning rates (backbone_lr, reward_head_lr) and go on from the last checkpoint"
        )


# what a step tells


def describe(before: Feedback, after: Feedback, gold: Tensor, lengths: Tensor, finished: Tensor) -> dict[str, float]:
    """The metrics of a step, all means over the batch. `before`: with the reward model of step t-1; gold may be nan.

    gold, lengths, finished: [B, G].
    """
    part = before.partition
    out = {
        "reward/mean": after.rewards.mean().item(),
        "reward/std_in_group": after.rewards.std(1).mean().item(),
        "reward/skew_in_group": skewness(after.rewards).item(),
        "response/tokens": lengths.float().mean().item(),
        "response/unfinished": (~finished).float().mean().item(),
        "policy/kept": after.kept.float().mean().item(),
    }
    known = ~torch.isnan(gold)
    if known.any():
        out["gold/success_rate"] = gold[known].mean().item()
    if before.anchors is None:
        return out
    pull, push = net_forces(before.rewards, before.anchors, part)
    out |= {
        "filter/kept": before.kept.float().mean().item(),
        "filter/positive": part.positive.float().mean().item(),
        "filter/negative": part.negative.float().mean().item(),
        "filter/valid_prompts": part.valid.float().mean().item(),
        "value/mean": before.anchors.mean().item(),
        "value/error": (before.anchors - before.rewards.mean(1)).abs().mean().item(),
    }
    if part.valid.any():
        out |= {"force/pull": pull[part.valid].mean().item(), "force/push": push[part.valid].mean().item()}
    judged = before.kept & known
    if judged.any():
        out["gold/pseudo_label_accuracy"] = (part.positive == (gold > 0.5))[judged].float().mean().item()
    return out


def sample_rows(rollout: Rollout, feedback: Feedback, gold: Tensor, step: int, groups: int = 2) -> list[dict]:
    """The first groups' responses with R, V, a and their side, for samples.jsonl."""
    rows = []
    for b, prompt in enumerate(rollout.prompts[:groups]):
        anchor = None if feedback.anchors is None else feedback.anchors[b].item()
        for g, text in enumerate(rollout.texts[b]):
            reward = feedback.rewards[b, g].item()
            positive, kept = feedback.partition.positive[b, g].item(), feedback.kept[b, g].item()
            side = "positive" if positive else "negative" if kept else "left out"
            known = gold[b, g].item()
            rows.append(
                {
                    "step": step, "prompt_id": prompt.id, "prompt": prompt.text, "response": text, "reward": reward,
                    "value": anchor, "rm_advantage": None if anchor is None else reward - anchor,
                    "side": side if anchor is not None else "kept" if kept else "left out",
                    "gold": None if math.isnan(known) else known,
                }
            )  # fmt: skip
    return rows
