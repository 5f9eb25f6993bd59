"""R2M, Real-time Aligned Reward Model (arXiv 2601.22664): the reward head reads the policy's hidden states too.

The embedding of the response (what the reward head reads) asks, by cross-attention, the policy's last hidden states of
prompt and response; the answer is mixed into it, the more the later the step. Bradley-Terry on the best against the
worst response of each group trains the attention and the reward head, and the policy is trained with the mixed rewards.
Where R2M leaves it open, or differs from SAVE's step: the reward model is updated before the policy, as in SAVE, with
the states of the policy that sampled; the inner width is the policy's hidden size (2048 for Qwen2.5-3B, as in R2M).
Evaluations, and whoever loads the returned reward model, score without the attention: its head on its own embedding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from savelib.feedback import hl_bt_loss
from savelib.prefix import left_mask

if TYPE_CHECKING:
    from savelib.loop import Trainer
    from savelib.models import Encoded, RewardModel
    from savelib.rollout import Rollout

NAME = "policy_feedback"
ENTROPY_WEIGHT = 0.3  # alpha of R2M's eq. 7
LEAST_WEIGHT = 0.6  # Omega of R2M's eq. 4


class PolicyFeedback(nn.Module):
    """R2M eq. 3: softmax(q k^T / sqrt(d)) v W_o, q from the embedding, k and v from the policy's hidden states."""

    def __init__(self, reward_size: int, policy_size: int):
        super().__init__()
        self.query = nn.Linear(reward_size, policy_size, bias=False)
        self.key = nn.Linear(policy_size, policy_size, bias=False)
        self.value = nn.Linear(policy_size, policy_size, bias=False)
        self.out = nn.Linear(policy_size, reward_size, bias=False)

    def forward(self, embedding: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """embedding [N, H], states [N, S, P], mask [N, S] bool, one True a row at least -> [N, H]."""
        query = self.query(embedding)[:, None]  # [N, 1, d]
        scores = query @ self.key(states).mT / math.sqrt(query.shape[-1])  # [N, 1, S]
        weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
        return self.out(weights @ self.value(states)).squeeze(1)


def own_weight(step: int, total_steps: int) -> float:
    """R2M eq. 4: w(t) = max(cos(pi t/T)/2 + 1/2, .6), the weight of the embedding itself; the answer has 1 - w(t)."""
    return max(math.cos(math.pi * step / total_steps) / 2 + 0.5, LEAST_WEIGHT)


def group_reward_entropy(rewards: Tensor, eligible: Tensor) -> Tensor:
    """R2M eq. 6: the entropy of softmax((r - mean) / std) over each group's eligible responses.

    rewards, eligible [B, G], at least 2 eligible in each group -> [B]; log n where all n are equal. std: unbiased.
    Pitfall: it is minimised: the rewards of a group are to be unequal.
    """
    count = eligible.sum(1, keepdim=True)  # [B, 1]
    mean = rewards.masked_fill(~eligible, 0.0).sum(1, keepdim=True) / count
    centred = (rewards - mean).masked_fill(~eligible, 0.0)
    variance = centred.square().sum(1, keepdim=True) / (count - 1)
    standard = centred / variance.where(variance > 0, 1.0).sqrt()  # the root of 0 has no gradient
    log_p = standard.masked_fill(~eligible, -math.inf).log_softmax(1).masked_fill(~eligible, 0.0)  # [B, G]
    return -(log_p.exp() * log_p).sum(1)


def r2m_loss(rewards: Tensor, eligible: Tensor) -> Tensor:
    """R2M eq. 7: .7 Bradley-Terry on the best against the worst + .3 group reward entropy (eq. 5, 6).

    rewards, eligible [B, G] -> scalar: the mean over groups with at least 2 eligible responses, a 0 that still has a
    graph when there is none.
    """
    usable = eligible.sum(1) >= 2  # [B]
    rewards, eligible = rewards[usable], eligible[usable]
    entropy = group_reward_entropy(rewards, eligible).sum() / max(len(rewards), 1)
    return (1 - ENTROPY_WEIGHT) * hl_bt_loss(rewards, eligible) + ENTROPY_WEIGHT * entropy


def build(t: Trainer) -> PolicyFeedback:
    """A new attention for the trainer's two models, from torch's generator.

    Raises ConfigError for a reward model whose head does not read one token's hidden state.
    """
    from savelib.config import ConfigError  # here: the configuration reads the rules

    if not t.reward_model.scorer.causal:
        raise ConfigError(
            f"rule = 'r2m' needs a causal reward model with a linear head; reward_model = {t.config.reward_model!r} "
            "is none"
        )
    sizes = (m.config.get_text_config().hidden_size for m in (t.reward_model.model, t.policy))
    return PolicyFeedback(*sizes)


def score(t: Trainer, groups: list[Encoded], rollout: Rollout, rows: slice, step: int) -> Tensor:
    """The mixed rewards [m, G] of the groups `rows`; gradients flow into the attention and the reward head alone."""
    from savelib.models import autocast, plain  # here: models reads the configuration, and that the rules

    with autocast(t.device, t.config.precision):
        embedding = _embeddings(t.reward_model, [r for g in groups for r in g.ids])  # [N, H]
        states, mask = _policy_states(t, rollout, rows)
        answer = t.extras[NAME](embedding, states, mask)
        w = own_weight(step, t.config.total_steps)
        rewards = plain(t.reward_model.model).score(w * embedding + (1 - w) * answer)  # [N, 1]
    return rewards.float().view(len(groups), -1)


@torch.no_grad()
def _embeddings(rm: RewardModel, ids: list[list[int]]) -> Tensor:
    """The hidden state of each conversation's last token, which the reward head reads [N, H]."""
    from savelib.models import plain

    padded, lengths = rm.padded(ids)
    mask = torch.arange(padded.shape[1], device=rm.device) < lengths[:, None]  # [N, S]
    hidden = plain(rm.model).base_model(input_ids=padded, attention_mask=mask.long(), use_cache=False)
    return hidden.last_hidden_state[torch.arange(len(ids), device=rm.device), lengths - 1]


@torch.no_grad()
def _policy_states(t: Trainer, rollout: Rollout, rows: slice) -> tuple[Tensor, Tensor]:
    """The policy's last hidden states of prompts and responses [N, S, P] and where they are [N, S]."""
    from savelib.models import plain

    group_size = rollout.completion_ids.shape[1]
    completions = rollout.completion_ids[rows].flatten(0, 1)  # [N, T]
    prompts = rollout.prompt_ids[rows].repeat_interleave(group_size, 0)  # [N, P]
    left = left_mask(rollout.prompt_lengths[rows].repeat_interleave(group_size), prompts.shape[1])
    mask = torch.cat([left, rollout.completion_mask[rows].flatten(0, 1)], 1)  # [N, S]
    ids, positions = torch.cat([prompts, completions], 1), (mask.cumsum(1) - 1).clamp(min=0)
    states = [
        plain(t.policy).base_model(input_ids=i, attention_mask=m.long(), position_ids=p, use_cache=False)
        for i, m, p in zip(*(x.split(t.config.micro_batch_responses) for x in (ids, mask, positions)), strict=True)
    ]
    return torch.cat([s.last_hidden_state for s in states]), mask
