"""An ensemble of reward models as one reward model (Coste et al., arXiv 2310.02743)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from savelib.method import combined_rewards
from savelib.models.adapters import plain
from savelib.models.reward_model import Encoded, RewardModel, Scored


def share_backbone(member: RewardModel, first: RewardModel) -> RewardModel:
    """The member with the first one's backbone, whose weights are the same, in place of its own."""
    model = plain(member.model)
    setattr(model, model.base_model_prefix, plain(first.model).base_model)
    return member


class Ensemble(RewardModel):
    """Reward models with one tokenizer, of which none is trained; the files that are saved are the first one's.

    Where all have the first one's backbone (`share_backbone`), it is run once for all of them.
    centres: each member's mean reward, which is subtracted: Bradley-Terry leaves a reward's level open.
    """

    def __init__(self, members: list[RewardModel], how: str, centres: list[float]):
        first = members[0]
        super().__init__(first.model, first.tokenizer, value_head=first.value_kind, value_position=first.value_position)
        self.members, self.how = nn.ModuleList(members), how
        self.register_buffer("centres", torch.tensor(centres, device=first.device), persistent=False)

    @property
    def fixed(self) -> bool:
        """Whether one backbone, which is not trained, gives all members their hidden states."""
        mine = plain(self.model).base_model
        return super().fixed and all(plain(m.model).base_model is mine for m in self.members)

    def score(self, batch: Encoded) -> Scored:
        batch = batch if batch.states else self.embed(batch)
        scored = [member.score(batch) for member in self.members]
        return Scored(self.combined(torch.stack([s.rewards for s in scored])), scored[0].prompt_hidden)

    def combined(self, rewards: Tensor) -> Tensor:
        """The members' rewards [k, N] as the ensemble's [N]."""
        return combined_rewards(rewards - self.centres[:, None], self.how)
