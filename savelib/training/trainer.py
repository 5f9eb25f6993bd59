"""The data, models and engines of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_model
from torch import nn

from savelib.config import Config
from savelib.data.pairs_and_prompts import (
    Preference,
    Prompt,
    guard_preferences,
    train_and_heldout_preferences,
    train_and_heldout_prompts,
)
from savelib.method import ALGORITHMS, RULES
from savelib.models.compute import seed_everything
from savelib.models.loading import load_policy, policy_source, share_frozen
from savelib.models.reward_model import Encoded
from savelib.models.rollout import Rollout, shared_sample
from savelib.processes import main_first
from savelib.training import r2m
from savelib.training.engine import adam, new_engine, whole_engine
from savelib.training.reward_side import Data, RewardSide
from savelib.training.scoring import GroupScores

EXTRA_LR = {
    "policy_feedback": "reward_head_lr",
    "process_reward": "policy_lr",
}  # config field of an extra module's rate


def load_data(config: Config, given: list[Prompt] | None = None) -> Data:
    """Everything that a run reads, before any model is loaded: a bad row should not cost the time of stages 1 and 2.

    given: training prompts in place of those that the config names.
    """
    prompts = main_first(train_and_heldout_prompts, config) if given is None else (given, [])
    pairs, heldout = main_first(train_and_heldout_preferences, config)
    guard: list[Preference] = []
    if RULES[config.rule].checked:
        pairs, guard = main_first(guard_preferences, config, pairs)
    return Data(pairs, heldout, *prompts, guard[: config.guard_pairs], guard[config.guard_pairs :])


def extras_of(config: Config) -> list[str]:
    """Names of the modules that the rule and the algorithm train beside the policy and the reward model."""
    return [name for name in (RULES[config.rule].extra, ALGORITHMS[config.algo].extra) if name]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Trainer(RewardSide):
    """The data, models and engines (optimizers) of a run, after stages 1 and 2.

    reward_model: stage 1's folder or hub id; value_head: stage 2's folder, or None. checkpoint: the folder to take
    policy, reward model and value head from instead. others: an ensemble's other members. extras: what the rule or the
    algorithm trains besides, by name.
    """

    def __init__(
        self, config: Config, data: Data, reward_model: str, value_head: str | None, checkpoint: Path | None = None,
        others: Sequence[str] = (),
    ):  # fmt: skip
        super().__init__(config, data, reward_model, checkpoint / "reward_model" if checkpoint else value_head, others)
        self.sources = {"policy": main_first(policy_source, config), "reward_model": reward_model}
        self.policy, self.tokenizer = load_policy(
            self.sources["policy"], self.device, config, checkpoint / "policy" if checkpoint else None
        )
        # with adapters, the reference is the policy without them
        self.reference = None if config.lora_rank else self.initial_policy().requires_grad_(False)
        if self.reference and config.policy_layers:
            share_frozen(self.reference, self.policy)
        optimizer = adam([{"params": _trained(self.policy), "lr": config.policy_lr}], config)
        self.engines["policy"] = new_engine("policy", self.policy, optimizer, config)
        self.extras: dict[str, nn.Module] = {}
        for name in extras_of(config):
            seed_everything(name, config.seed)
            module = self.extras[name] = self._new_extra(name).to(self.device)
            if checkpoint:
                load_model(module, checkpoint / f"{name}.safetensors")
            self.engines[name] = whole_engine(name, module, getattr(config, EXTRA_LR[name]), config)

    def _new_extra(self, name: str) -> nn.Module:
        if name == "process_reward":
            return self.initial_policy()
        return r2m.new_policy_feedback(self.reward_model, self.policy, self.config)

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

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The initial policy: a model of its own, or the policy with its adapters off."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.policy.disable_adapter():
                yield self.policy

    def sample(self, step: int) -> Rollout:
        """G responses to each of this process's prompts of the step."""
        batch = self.batch(self.data.prompts, step)
        return shared_sample(self.policy, self.tokenizer, batch, self.config.group_size, self.config, self.lockstep)

    def references(self, step: int) -> Rollout:
        """PAR's M responses of the initial policy to each of this process's prompts of the step.

        They are drawn when a prompt has its turn: once, as PAR has it, unless a run takes more than one pass.
        """
        seed_everything("references", self.config.seed, step)
        batch, count = self.batch(self.data.prompts, step), self.config.par_references
        with self.as_reference() as initial:
            return shared_sample(initial, self.tokenizer, batch, count, self.config, self.lockstep)

    def score(self, groups: list[Encoded], responses: Rollout, rows: slice, step: int) -> GroupScores:
        """R as the rule has it: R2M's head reads the policy's hidden states too."""
        if self.rule.extra is None:
            return super().score(groups, responses, rows, step)
        attention = self.extras[self.rule.extra]
        rewards = r2m.mixed_rewards(
            attention, self.reward_model, self.policy, groups[rows], responses, rows, step, self.config
        )
        return GroupScores(rewards, rewards.new_zeros(len(rewards), 0))  # such a rule has no value head
