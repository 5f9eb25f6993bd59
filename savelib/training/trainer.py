"""The data, models and engines of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from savelib.config import Config, ConfigError
from savelib.data.pairs_and_prompts import (
    Preference,
    Prompt,
    guard_preferences,
    train_and_heldout_preferences,
    train_and_heldout_prompts,
)
from savelib.method import ALGORITHMS, RULES, Partition, curriculum_threshold, partition, rm_advantages
from savelib.models.compute import pick_device, seed_everything
from savelib.models.loading import load_policy, load_reward_model, policy_source, share_frozen
from savelib.models.reward_model import Encoded
from savelib.models.rollout import Rollout, shared_sample
from savelib.processes import main_first
from savelib.training import r2m
from savelib.training.engine import Engine, ZeroEngine, adam, reward_optimizer
from savelib.training.guard import Guard
from savelib.training.scoring import Feedback, FixedPairs, GroupScores, micro_batches, score_micro_batch

EXTRA_LR = {
    "policy_feedback": "reward_head_lr",
    "process_reward": "policy_lr",
}  # config field of an extra module's rate


@dataclass(frozen=True)
class Data:
    """Training and held-out rows of a run."""

    pairs: list[Preference]
    heldout_pairs: list[Preference]
    prompts: list[Prompt]
    heldout_prompts: list[Prompt]
    guard_pairs: list[Preference]  # these two for rule save_checked alone
    certificate_pairs: list[Preference]


def load_data(config: Config) -> Data:
    """Everything that a run reads, before any model is loaded: a bad row should not cost the time of stages 1 and 2."""
    prompts = main_first(train_and_heldout_prompts, config)
    pairs, heldout = main_first(train_and_heldout_preferences, config)
    guard: list[Preference] = []
    if RULES[config.rule].checked:
        pairs, guard = main_first(guard_preferences, config, pairs)
    return Data(pairs, heldout, *prompts, guard[: config.guard_pairs], guard[config.guard_pairs :])


def extras_of(config: Config) -> list[str]:
    """Names of the modules that the rule and the algorithm train beside the policy and the reward model."""
    return [name for name in (RULES[config.rule].extra, ALGORITHMS[config.algo].extra) if name]


@lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` rows in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Trainer:
    """The data, models and engines (optimizers) of a run, after stages 1 and 2.

    reward_model: stage 1's folder or hub id; value_head: stage 2's folder, or None. checkpoint: the folder to take
    policy, reward model and value head from instead. state: numbers that a step hands to the next ones, part of a
    checkpoint. extras: what the rule or the algorithm trains besides, by name.
    """

    def __init__(
        self, config: Config, data: Data, reward_model: str, value_head: str | None, checkpoint: Path | None = None
    ):
        self.config, self.data, self.rule = config, data, RULES[config.rule]
        self.state: dict[str, float] = {}
        self.device = pick_device(config.device, config.threads)
        self.sources = {"policy": main_first(policy_source, config), "reward_model": reward_model}
        trained = checkpoint / "reward_model" if checkpoint else value_head
        seed_everything("value head init", config.seed)  # without stage 2, nothing else gives it its weights
        self.reward_model = load_reward_model(reward_model, config, self.device, trained)
        self.policy, self.tokenizer = load_policy(
            self.sources["policy"], self.device, config, checkpoint / "policy" if checkpoint else None
        )
        # with adapters, the reference is the policy without them
        self.reference = None if config.lora_rank else self.initial_policy().requires_grad_(False)
        if self.reference and config.policy_layers:
            share_frozen(self.reference, self.policy)
        self.extras: dict[str, nn.Module] = {}
        for name in extras_of(config):
            seed_everything(name, config.seed)
            self.extras[name] = self._new_extra(name).to(self.device)
            if checkpoint:
                load_model(self.extras[name], checkpoint / f"{name}.safetensors")
        self.engines = self._new_engines()
        self.guard: Guard | None = None
        if self.rule.checked:
            self.guard = Guard(self.reward_model, self.engines, config, data.guard_pairs, data.certificate_pairs)

    def _new_extra(self, name: str) -> nn.Module:
        if name == "process_reward":
            return self.initial_policy()
        return r2m.new_policy_feedback(self.reward_model, self.policy, self.config)

    def _new_engines(self) -> dict[str, Engine]:
        """An engine for each trained model; the value head and extra modules are whole in every process."""
        c, rm, backbone_lr = self.config, self.reward_model, self.config.backbone_lr if self.rule.backbone else 0.0
        models = {
            "policy": (self.policy, adam([{"params": _trained(self.policy), "lr": c.policy_lr}], c)),
            "reward_model": (rm.scorer, reward_optimizer(rm, c, backbone_lr, c.reward_head_lr)),
        }
        engines = {
            name: Engine(name, optimizer, c.max_grad_norm)
            if c.backend == "ddp"
            else ZeroEngine(name, model, optimizer, c.max_grad_norm)
            for name, (model, optimizer) in models.items()
        }
        whole = {"value_head": (rm.value_head, c.value_head_lr)}
        whole |= {name: (module, getattr(c, EXTRA_LR[name])) for name, module in self.extras.items()}
        for name, (module, lr) in whole.items():
            optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
            engines[name] = Engine(name, optimizer, c.max_grad_norm)
        return engines

    @cached_property
    def heldout_pairs(self) -> FixedPairs:
        return FixedPairs(self.reward_model, self.data.heldout_pairs, self.config)

    def initial_policy(self) -> nn.Module:
        """A new copy of the initial policy."""
        return load_policy(self.sources["policy"], self.device)[0]

    @property
    def lockstep(self) -> bool:
        return self.engines["policy"].lockstep

    @property
    def kl_in_loss(self) -> bool:
        c = self.config
        return ALGORITHMS[c.algo].kl_in_loss if c.kl == "algorithm" else c.kl == "loss"

    @property
    def turned_round(self) -> bool:
        """Whether a rule with two losses takes the other one now."""
        if self.guard:
            return self.guard.state.form == 1
        return self.rule.otherwise is not None and self.state.get("lead", 0.0) > 0

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The initial policy: a model of its own, or the policy with its adapters off."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.policy.disable_adapter():
                yield self.policy

    def batch(self, rows: list, step: int) -> list:
        """The batch_size rows of a step (from 1), from epochs of seeded permutations."""
        size = self.config.batch_size
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

    def sample(self, step: int) -> Rollout:
        """G responses to each of this process's prompts of the step."""
        batch = self.batch(self.data.prompts, step)
        return shared_sample(self.policy, self.tokenizer, batch, self.config.group_size, self.config, self.lockstep)

    def score(self, groups: list[Encoded], rollout: Rollout, rows: slice, step: int) -> GroupScores:
        """One forward over the groups `rows` of the batch: R, as the rule has it, and what V reads."""
        if self.rule.extra is None:
            return score_micro_batch(self.reward_model, groups[rows], self.config)
        attention = self.extras[self.rule.extra]
        rewards = r2m.mixed_rewards(
            attention, self.reward_model, self.policy, groups[rows], rollout, rows, step, self.config
        )
        return GroupScores(rewards, rewards.new_zeros(len(rewards), 0))  # such a rule has no value head

    @torch.no_grad()
    def scores(self, groups: list[Encoded], rollout: Rollout, step: int) -> GroupScores:
        """Score the whole batch without gradients, micro_batch_groups at a time."""
        slices = micro_batches(len(groups), self.config.micro_batch_groups)
        return GroupScores.joined([self.score(groups, rollout, rows, step) for rows in slices])

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
