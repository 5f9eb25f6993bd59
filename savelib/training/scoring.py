"""Groups of responses -> rewards, in micro-batches, and what the filter makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from savelib import processes
from savelib.config import Config
from savelib.data.pairs_and_prompts import Preference
from savelib.method import Partition
from savelib.models.compute import autocast, recomputing
from savelib.models.reward_model import Encoded, RewardModel, score_in_batches
from savelib.models.rollout import Responses
from savelib.training.finite import NonFiniteError, require_finite


@dataclass(frozen=True)
class GroupScores:
    """Rewards [B, G] and the hidden states that V reads [B, H], on the reward model's device."""

    rewards: Tensor
    prompt_hidden: Tensor

    @classmethod
    def joined(cls, parts: list[GroupScores]) -> GroupScores:
        """The scores of micro-batches as those of the batch."""
        return cls(torch.cat([p.rewards for p in parts]), torch.cat([p.prompt_hidden for p in parts]))


@dataclass(frozen=True)
class Feedback:
    """R, the anchors that R is measured against (None: nothing), and which responses are kept on which side."""

    rewards: Tensor  # [B, G]
    anchors: Tensor | None  # [B]
    partition: Partition

    @property
    def kept(self) -> Tensor:
        return self.partition.kept  # [B, G]

    @classmethod
    def joined(cls, parts: list[Feedback]) -> Feedback:
        """The feedback of micro-batches as that of the batch."""
        anchors = None if parts[0].anchors is None else torch.cat([p.anchors for p in parts])
        sides = (torch.cat([getattr(p.partition, f) for p in parts]) for f in ("positive", "negative", "valid"))
        return cls(torch.cat([p.rewards for p in parts]), anchors, Partition(*sides))

    def gathered(self) -> Feedback:
        """The feedback of all processes' prompts."""
        part, of_all = self.partition, processes.gathered
        anchors = None if self.anchors is None else of_all(self.anchors)
        sides = Partition(of_all(part.positive), of_all(part.negative), of_all(part.valid))
        return Feedback(of_all(self.rewards), anchors, sides)


def learned_from(feedback: Feedback, config: Config) -> Tensor:
    """The responses [B, G] that the policy learns from: the kept ones of groups that keep at least two."""
    used = feedback.kept & (feedback.kept.sum(1) >= 2)[:, None]
    if config.policy_groups == "both_signs":
        used = used & feedback.partition.valid[:, None]
    return used


def encode_groups(rm: RewardModel, responses: Responses) -> list[Encoded]:
    """The B groups of responses, rendered by the reward model's own chat template."""
    return [
        rm.encode([(p.messages, t) for t in texts]) for p, texts in zip(responses.prompts, responses.texts, strict=True)
    ]


def encode_pairs(rm: RewardModel, pairs: list[Preference]) -> list[Encoded]:
    """Each pair as a group of two, the chosen response first."""
    return [rm.encode([(p.prompt, p.chosen), (p.prompt, p.rejected)]) for p in pairs]


def micro_batches(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `count`."""
    for i in range(0, count, size):
        yield slice(i, min(i + size, count))


def pairs_at_once(config: Config) -> int:
    """Pairs in a micro-batch of as many responses as the groups' micro-batches have."""
    return max(1, config.micro_batch_groups * config.group_size // 2)


def score_micro_batch(rm: RewardModel, groups: list[Encoded], config: Config) -> GroupScores:
    """One forward over groups of equal size, with gradients where they are on; V reads each group's first row."""
    with autocast(rm.device, config.precision), recomputing(rm.model, config.gradient_checkpointing):
        scored = rm.score(Encoded.joined(groups))
    return GroupScores(scored.rewards.view(len(groups), -1), scored.prompt_hidden[:: len(groups[0])])


def embed_groups(rm: RewardModel, groups: list[Encoded], config: Config, size: int | None = None) -> list[Encoded]:
    """Groups of equal size with the hidden states of a fixed backbone, for repeated scoring; unchanged if trained."""
    if not rm.fixed:
        return groups
    out = []
    for rows in micro_batches(len(groups), size or config.micro_batch_groups):
        with autocast(rm.device, config.precision):
            batch, n = rm.embed(Encoded.joined(groups[rows])), len(groups[0])
        out += [batch[at] for at in micro_batches(len(batch), n)]
    return out


@torch.no_grad()
def score_groups(rm: RewardModel, groups: list[Encoded], config: Config, size: int | None = None) -> GroupScores:
    """Score all groups without gradients, `size` at a time (default micro_batch_groups)."""
    batch, n = Encoded.joined(groups), len(groups[0])
    slices = micro_batches(len(groups), size or config.micro_batch_groups)
    rows = (list(range(n * part.start, n * part.stop)) for part in slices)
    scored = score_in_batches(rm, batch, rows, config.precision)
    return GroupScores(scored.rewards.view(-1, n), scored.prompt_hidden[::n])


class FixedPairs:
    """Preference pairs that are scored again and again: encoded once, and embedded once if the backbone is fixed."""

    def __init__(self, rm: RewardModel, pairs: list[Preference], config: Config):
        self.rm, self.config, self.count = rm, config, len(pairs)
        encoded = encode_pairs(rm, processes.share(pairs))
        self.order = sorted(range(len(encoded)), key=lambda i: max(map(len, encoded[i].ids)))  # less padding
        self.encoded = embed_groups(rm, [encoded[i] for i in self.order], config, pairs_at_once(config))

    def rewards(self) -> Tensor:
        """R of the chosen and of the rejected responses [M, 2]."""
        by_length = score_groups(self.rm, self.encoded, self.config, pairs_at_once(self.config)).rewards
        require_finite("a reward of a preference pair", by_length, "reward_model")
        rewards = torch.empty_like(by_length)
        rewards[self.order] = by_length
        return processes.gathered(rewards, self.count).cpu()

    def margins(self) -> Tensor:
        """R(chosen) - R(rejected) of each pair [M]; a positive margin is a right verdict, a tie a wrong one."""
        rewards = self.rewards()
        return rewards[:, 0] - rewards[:, 1]


def pair_margins(rm: RewardModel, pairs: list[Preference], config: Config) -> Tensor:
    """The margins [M] of pairs that are scored once."""
    return FixedPairs(rm, pairs, config).margins()


def check_finite(rewards: Tensor, responses: Responses, rows: slice = slice(None)) -> None:
    """Raise NonFiniteError, naming the prompts, before anything is updated with a reward [B, G] that is not finite."""
    bad = (~torch.isfinite(rewards)).any(1).tolist()
    if any(bad):
        prompts = [p for p, b in zip(responses.prompts[rows], bad, strict=True) if b]
        raise NonFiniteError("a reward is not a finite number", "reward_model", prompts)
