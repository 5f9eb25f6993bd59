"""Table 1's rows: how one step updates the reward model.

Each rule is an anchor, the groups that have a loss, and the loss.
A new rule is one function and one line in RULES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from savelib.method.equations import Partition, save_loss
from savelib.method.remedies import oracle_loss
from savelib.method.variants import hl_bt_loss, mirrored_save_loss, r2m_loss, self_labelled

GroupLoss = Callable[[Tensor, Tensor | None, Partition, Tensor], Tensor]
PairLabels = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rule:
    """One way to improve the reward model on a batch.

    anchor: what responses are measured against: V(x) of the value head, the group's mean reward, or nothing (then
        nothing is filtered, and no value head is trained).
    loss: (rewards [B,G], anchors [B] or None, partition, eligible [B,G]) -> mean over the groups that `groups` names.
    groups: (partition, eligible [B,G]) -> bool [B], the groups that have a loss; the others get no backward.
    checked: blocks of steps stay only if guard pairs say so (`training.guard`).
    otherwise: another loss, which has its turn after a block that did not stay.
    centred: the gradient holds the mean reward of a batch of preference pairs where it is.
    by_gold: sides are those of gold, not of the filter: the positives are right, the negatives wrong.
    lookahead: the gradient on the preference pairs is taken where a step of gradient ascent on MetaRM's J leads
        (rate meta_lr), and applied where the weights were.
    pairs: Bradley-Terry on the offline preference pairs instead of the responses: (rewards of the chosen [N], of the
        rejected [N]) -> those of the better and of the worse responses [n] of the pairs that have a loss.
    extra: name of a module that is trained on the same loss and takes part in scoring (`training.trainer.EXTRA_LR`).
    backbone: whether omega is trained at all.
    """

    description: str
    anchor: Literal["value", "group_mean"] | None = None
    loss: GroupLoss | None = None
    groups: Callable[[Partition, Tensor], Tensor] | None = None
    checked: bool = False
    otherwise: GroupLoss | None = None
    centred: bool = False
    by_gold: bool = False
    lookahead: bool = False
    pairs: PairLabels | None = None
    extra: str | None = None
    backbone: bool = True


def as_labelled(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair as its label has it."""
    return chosen, rejected


def _valid(partition: Partition, eligible: Tensor) -> Tensor:
    return partition.valid


def _two_eligible(partition: Partition, eligible: Tensor) -> Tensor:
    return eligible.sum(-1) >= 2


def _save(rewards: Tensor, anchors: Tensor, partition: Partition, eligible: Tensor) -> Tensor:
    return save_loss(rewards, anchors, partition)


def _save_mirrored(rewards: Tensor, anchors: Tensor, partition: Partition, eligible: Tensor) -> Tensor:
    return mirrored_save_loss(rewards, anchors, partition)


def _hl_bt(rewards: Tensor, anchors: None, partition: Partition, eligible: Tensor) -> Tensor:
    return hl_bt_loss(rewards, eligible)


def _r2m(rewards: Tensor, anchors: None, partition: Partition, eligible: Tensor) -> Tensor:
    return r2m_loss(rewards, eligible)


def _oracle(rewards: Tensor, anchors: None, partition: Partition, eligible: Tensor) -> Tensor:
    return oracle_loss(rewards, partition.positive, partition.negative)


RULES: dict[str, Rule] = {
    "save": Rule("the paper's SAVE: eq. 18-21 around the value head's V(x)", "value", _save, _valid),
    "save_checked": Rule(
        "ours: SAVE or its mirror image without a common shift, undone block by block unless guard pairs improve",
        "value",
        _save,
        _valid,
        checked=True,
        otherwise=_save_mirrored,
        centred=True,
    ),
    "mean_reward": Rule("SAVE with the group's mean reward in the place of V(x)", "group_mean", _save, _valid),
    "hl_bt": Rule("Bradley-Terry on the highest and the lowest reward of each group", None, _hl_bt, _two_eligible),
    "offline_bt": Rule("continual offline training: Bradley-Terry on the preference pairs", pairs=as_labelled),
    "ser": Rule("SER: Bradley-Terry on the preference pairs, labelled by the reward model itself", pairs=self_labelled),
    "r2m": Rule(
        "R2M: the reward head reads the policy's hidden states too, through a cross-attention",
        loss=_r2m,
        groups=_two_eligible,
        extra="policy_feedback",
        backbone=False,
    ),
    "metarm": Rule(
        "MetaRM: Bradley-Terry on the preference pairs, those first that tell the policy's responses apart",
        pairs=as_labelled,
        lookahead=True,
    ),
    "oracle": Rule(
        "the ceiling: Bradley-Terry on a right and a wrong response of each group, by gold",
        loss=_oracle,
        groups=_valid,
        by_gold=True,
    ),
    "frozen": Rule("the reward model never moves: plain RL"),
    "frozen_filtered": Rule(
        "ours: the reward model never moves, but V does, and SAVE's filter chooses who teaches the policy", "value"
    ),
}
