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

import torch
from torch import Tensor, nn

from savelib.config import Config, ConfigError
from savelib.method import own_weight
from savelib.models.adapters import plain
from savelib.models.compute import autocast
from savelib.models.prefix import left_mask
from savelib.models.reward_model import Encoded, RewardModel
from savelib.models.rollout import Rollout


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


def new_policy_feedback(rm: RewardModel, policy: nn.Module, config: Config) -> PolicyFeedback:
    """A new attention for these two models, from torch's generator.

    Raises ConfigError for a reward model whose head does not read one token's hidden state.
    """
    if not rm.scorer.causal:
        raise ConfigError(
            f"rule = {config.rule!r} needs a causal reward model with a linear head; "
            f"reward_model = {config.reward_model!r} has none"
        )
    sizes = (m.config.get_text_config().hidden_size for m in (rm.model, policy))
    return PolicyFeedback(*sizes)


def mixed_rewards(
    attention: nn.Module, rm: RewardModel, policy: nn.Module, groups: list[Encoded], rollout: Rollout, rows: slice,
    step: int, config: Config,
) -> Tensor:  # fmt: skip
    """Rewards [m, G] of the groups, which are `rows` of the rollout; gradients reach attention and reward head only."""
    with autocast(rm.device, config.precision):
        embedding = _embeddings(rm, [r for g in groups for r in g.ids])  # [N, H]
        states, mask = _policy_states(policy, rollout, rows, config.micro_batch_responses)
        answer = attention(embedding, states, mask)
        w = own_weight(step, config.total_steps)
        rewards = plain(rm.model).score(w * embedding + (1 - w) * answer)  # [N, 1]
    return rewards.float().view(len(groups), -1)


@torch.no_grad()
def _embeddings(rm: RewardModel, ids: list[list[int]]) -> Tensor:
    """The hidden state of each conversation's last token, which the reward head reads [N, H]."""

    padded, lengths = rm.padded(ids)
    mask = torch.arange(padded.shape[1], device=rm.device) < lengths[:, None]  # [N, S]
    hidden = plain(rm.model).base_model(input_ids=padded, attention_mask=mask.long(), use_cache=False)
    return hidden.last_hidden_state[torch.arange(len(ids), device=rm.device), lengths - 1]


@torch.no_grad()
def _policy_states(policy: nn.Module, rollout: Rollout, rows: slice, size: int) -> tuple[Tensor, Tensor]:
    """The policy's last hidden states of prompts and responses [N, S, P] and where they are [N, S]."""

    group_size = rollout.completion_ids.shape[1]
    completions = rollout.completion_ids[rows].flatten(0, 1)  # [N, T]
    prompts = rollout.prompt_ids[rows].repeat_interleave(group_size, 0)  # [N, P]
    left = left_mask(rollout.prompt_lengths[rows].repeat_interleave(group_size), prompts.shape[1])
    mask = torch.cat([left, rollout.completion_mask[rows].flatten(0, 1)], 1)  # [N, S]
    ids, positions = torch.cat([prompts, completions], 1), (mask.cumsum(1) - 1).clamp(min=0)
    states = [
        plain(policy).base_model(input_ids=i, attention_mask=m.long(), position_ids=p, use_cache=False)
        for i, m, p in zip(*(x.split(size) for x in (ids, mask, positions)), strict=True)
    ]
    return torch.cat([s.last_hidden_state for s in states]), mask
