"""The reward model's side of a run: reward model and value head, their optimizers, the filter. It needs no policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from savelib.config import Config, ConfigError
from savelib.data.pairs_and_prompts import Preference, Prompt
from savelib.method import RULES, Partition, curriculum_threshold, partition, rm_advantages
from savelib.models.compute import pick_device, seed_everything
from savelib.models.ensemble import Ensemble, share_backbone
from savelib.models.loading import load_reward_model
from savelib.models.reward_model import Encoded
from savelib.models.rollout import Responses
from savelib.training.engine import Engine, new_engine, reward_optimizer, whole_engine
from savelib.training.finite import require_finite
from savelib.training.guard import Guard
from savelib.training.scoring import Feedback, FixedPairs, GroupScores, micro_batches, score_micro_batch


@dataclass(frozen=True)
class Data:
    """Training and held-out rows of a run."""

    pairs: list[Preference]
    heldout_pairs: list[Preference]
    prompts: list[Prompt]
    heldout_prompts: list[Prompt]
    guard_pairs: list[Preference]  # these two for rule save_checked alone
    certificate_pairs: list[Preference]


@lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` rows in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()


class RewardSide:
    """Reward model, value head, their engines and the filter, after stages 1 and 2: all that block 2 of a step needs.

    reward_model: stage 1's folder or hub id; others: those of an ensemble's other members. trained: the folder of
    stage 2, or of a checkpoint's reward model.
    """

    def __init__(
        self, config: Config, data: Data, reward_model: str, trained: Path | str | None, others: Sequence[str] = ()
    ):
        self.config, self.data, self.rule = config, data, RULES[config.rule]
        if self.rule.by_gold and not any(p.has_gold for p in data.prompts):
            raise ConfigError(
                f"rule = {config.rule!r} needs prompts whose right answers are known, and prompts = {config.prompts!r} "
                "has none: take `embedded`, or rows with `checks`"
            )
        self.device = pick_device(config.device, config.threads)
        seed_everything("value head init", config.seed)  # without stage 2, nothing else gives it its weights
        rm = self.reward_model = load_reward_model(reward_model, config, self.device, trained)
        if others:
            loaded = (load_reward_model(source, config, self.device) for source in others)
            members = [rm, *(share_backbone(m, rm) if config.backbones == 1 else m for m in loaded)]
            centres = [FixedPairs(m, data.pairs, config).rewards().mean().item() for m in members]
            self.reward_model = Ensemble(members, config.ensemble_reward, centres)
        optimizer = reward_optimizer(
            rm, config, config.backbone_lr if self.rule.backbone else 0.0, config.reward_head_lr
        )
        self.engines: dict[str, Engine] = {
            "reward_model": new_engine("reward_model", rm.scorer, optimizer, config),
            "value_head": whole_engine("value_head", rm.value_head, config.value_head_lr, config),
        }
        self.guard: Guard | None = None
        if self.rule.checked:
            self.guard = Guard(rm, self.engines, config, data.guard_pairs, data.certificate_pairs)

    @cached_property
    def heldout_pairs(self) -> FixedPairs:
        return FixedPairs(self.reward_model, self.data.heldout_pairs, self.config)

    @property
    def turned_round(self) -> bool:
        """Whether a rule with two losses takes the other one now."""
        return self.guard is not None and self.guard.state.form == 1

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

    def score(self, groups: list[Encoded], responses: Responses, rows: slice, step: int) -> GroupScores:
        """One forward over the groups `rows` of the batch: R, and what V reads."""
        return score_micro_batch(self.reward_model, groups[rows], self.config)

    @torch.no_grad()
    def scores(self, groups: list[Encoded], responses: Responses, step: int) -> GroupScores:
        """Score the whole batch without gradients, micro_batch_groups at a time."""
        slices = micro_batches(len(groups), self.config.micro_batch_groups)
        return GroupScores.joined([self.score(groups, responses, rows, step) for rows in slices])

    def feedback(self, scores: GroupScores, threshold: float, eligible: Tensor, gold: Tensor | None = None) -> Feedback:
        """Eq. 4 and 15-17 with the rule's anchor; without one every eligible response is kept, on no side.

        eligible [B, G] bool. gold [B, G]: a rule `by_gold` takes its sides from it (unknown: nan, left out).
        """
        rewards = scores.rewards.detach()
        if self.rule.by_gold:
            right, wrong = ((side & eligible) for side in (gold > 0.5, gold <= 0.5))  # [B, G]
            return Feedback(rewards, None, Partition(right, wrong, right.any(1) & wrong.any(1)))
        if self.rule.anchor is None:
            nothing = torch.zeros_like(eligible)
            return Feedback(rewards, None, Partition(eligible, nothing, nothing.any(1)))
        if self.rule.anchor == "value":
            anchors = self.reward_model.values(scores.prompt_hidden).detach()  # [B]
            require_finite("V of a prompt", anchors, "value_head")
        else:
            anchors = (rewards * eligible).sum(1) / eligible.sum(1).clamp(min=1)  # [B]
        return Feedback(rewards, anchors, partition(rm_advantages(rewards, anchors), threshold, eligible))
