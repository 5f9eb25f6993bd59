"""How one step updates the reward model: each rule is an anchor, the groups that have a loss, and the loss.

A new rule is one function and one line in RULES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from savelib.feedback import Partition, hl_bt_loss, save_loss, zero_net_force

GroupLoss = Callable[[Tensor, Tensor | None, Partition, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """One way to improve the reward model on a batch.

    anchor: what responses are measured against: V(x) of the value head, the group's mean reward, or nothing (then
        nothing is filtered, and no value head is trained).
    loss: (rewards [B,G], anchors [B] or None, partition, eligible [B,G]) -> mean over the groups that `groups` names.
    groups: (partition, eligible [B,G]) -> bool [B], the groups that have a loss; the others get no backward.
    pairs: Bradley-Terry on the offline preference pairs instead of the responses.
    """

    description: str
    anchor: Literal["value", "group_mean"] | None = None
    loss: GroupLoss | None = None
    groups: Callable[[Partition, Tensor], Tensor] | None = None
    pairs: bool = False


def _valid(partition: Partition, eligible: Tensor) -> Tensor:
    return partition.valid


def _two_eligible(partition: Partition, eligible: Tensor) -> Tensor:
    return eligible.sum(-1) >= 2


def _save(rewards: Tensor, anchors: Tensor, partition: Partition, eligible: Tensor) -> Tensor:
    return save_loss(rewards, anchors, partition)


def _save_zero_net_force(rewards: Tensor, anchors: Tensor, partition: Partition, eligible: Tensor) -> Tensor:
    return save_loss(zero_net_force(rewards, eligible), anchors, partition)


def _hl_bt(rewards: Tensor, anchors: None, partition: Partition, eligible: Tensor) -> Tensor:
    return hl_bt_loss(rewards, eligible)


RULES: dict[str, Rule] = {
    "save": Rule("the paper's SAVE: eq. 18-21 around the value head's V(x)", "value", _save, _valid),
    "save_zero_net_force": Rule(
        "ours: SAVE with the gradient's mean over each group removed", "value", _save_zero_net_force, _valid
    ),
    "mean_reward": Rule("SAVE with the group's mean reward in the place of V(x)", "group_mean", _save, _valid),
    "hl_bt": Rule("Bradley-Terry on the highest and the lowest reward of each group", None, _hl_bt, _two_eligible),
    "offline_bt": Rule("continual offline training: Bradley-Terry on the preference pairs", pairs=True),
    "frozen": Rule("the reward model never moves: plain RL"),
}
