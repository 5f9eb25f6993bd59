"""SER, Self-Evolved Reward Learning (arXiv 2411.00418): the reward model labels pairs itself and learns from them.

SER has a few labelled pairs and many whose labels are hidden; the reward model gives those labels of its own, keeps
the pairs it is sure of, is trained on them by Bradley-Terry, and labels again. Here the pairs are the preference data's
(SER's own choice; its responses come with the prompts, not from the policy), the labels of all of them are hidden, and
each step labels and learns from one batch: the model that labels is the model of step t-1.
"""

from torch import Tensor

HIGH, LOW, APART = 0.55, 0.45, 0.3


def self_labelled(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """SER's labels and filter: (higher rewards [n], lower rewards [n]) of the pairs that the model is sure of.

    first, second [N]: rewards of a pair's two responses, in any order. Kept: one score above .55 and the other below
    .45 after the sigmoid, or scores that differ by more than .3.
    Pitfall: the sigmoid of one reward alone: rewards far from 0 are all near 0 or 1, and no pair is kept.
    """
    a, b = first.detach().sigmoid(), second.detach().sigmoid()  # [N]
    swap = b > a
    high, low = a.maximum(b), a.minimum(b)
    sure = ((high > HIGH) & (low < LOW)) | (high - low > APART)
    return second.where(swap, first)[sure], first.where(swap, second)[sure]
