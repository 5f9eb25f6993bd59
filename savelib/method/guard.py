"""Checked SAVE (ours): is the reward model better on guard pairs than it was? A test per block, and a certificate.

Guard pairs are preference pairs that the reward model is not trained on. Margins are R(chosen) - R(rejected), [n].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

REST = 4  # blocks without an update after two blocks in a row were undone; doubled each time
BETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # shares of the largest allowed bet that `e_value` averages over


def normalized_margins(margins: Tensor) -> Tensor:
    """Margins over their root mean square, so that a change of the rewards' scale alone is no change. [n] -> [n]."""
    return margins / margins.square().mean().sqrt().clamp(min=1e-12)


def improvement_z(now: Tensor, before: Tensor) -> float:
    """z of the mean change of the normalized margins: mean(d) / (sd(d) / sqrt n); 0 where nothing changed.

    now, before: margins [n] of the same pairs, n >= 2. Sd unbiased.
    """
    change = (normalized_margins(now) - normalized_margins(before)).double()
    error = change.std() / math.sqrt(len(change))
    return float(change.mean() / error) if error > 0 else 0.0


@dataclass(frozen=True)
class GuardState:
    """Where checked SAVE stands between two blocks.

    form: which of the rule's forms the next block runs; failures: blocks undone in a row; resting: blocks left without
    an update of the reward model; rest: length of the next rest.
    """

    form: int = 0
    failures: int = 0
    resting: int = 0
    rest: int = REST

    def after(self, accepted: bool, forms: int) -> GuardState:
        """The state after a block that ran a form: kept, or undone (then the next form's turn, or a rest)."""
        if accepted:
            return GuardState(self.form)
        other, failures = (self.form + 1) % forms, self.failures + 1
        if failures % forms:
            return GuardState(other, failures, 0, self.rest)
        return GuardState(other, failures, self.rest, 2 * self.rest)

    def rested(self) -> GuardState:
        """The state after a block of rest."""
        return GuardState(self.form, self.failures, self.resting - 1, self.rest)


def correct_change(now: Tensor, start: Tensor) -> Tensor:
    """Change of each pair's verdict: 1 newly right, -1 newly wrong, 0 as before; a tie is half right. [n] -> [n]."""
    return (_verdict(now) - _verdict(start)).double()


def _verdict(margins: Tensor) -> Tensor:
    return (margins.sign() + 1) / 2


def e_value(change: Tensor, delta: float) -> float:
    """Evidence against "accuracy fell by more than delta": expected value at most 1 where that is so.

    change [n] in [-1, 1] (`correct_change`), delta in [0, 1). The mean over BETS of prod_i (1 + bet * (change_i +
    delta) / (1 - delta)): the wealth of bettors who stake a share of it on each pair (Waudby-Smith and Ramdas 2024).
    By Markov's inequality it is 1 / alpha or more with probability at most alpha under the null. The order of the pairs
    does not matter.
    """
    if not 0 <= delta < 1:
        raise ValueError(f"delta {delta}: choose an allowed loss of accuracy from 0 to below 1, such as 0.02")
    stakes = torch.tensor(BETS, dtype=torch.float64) / (1 - delta)
    wealth = (1 + stakes[:, None] * (change.double() + delta)[None]).log().sum(1)  # [bets], log
    return float((wealth.logsumexp(0) - math.log(len(BETS))).exp())


def certified(now: Tensor, start: Tensor, look: int, alpha: float, delta: float) -> bool:
    """Whether a look at certificate pairs proves that accuracy did not fall by more than delta.

    now, start: margins [n] of the candidate and of the reward model at the start; look: 1, 2, ...: its own level is
    alpha / (look (look + 1)), and these sum to alpha over all looks. So the chance that any certified candidate of a
    run is worse than the start by more than delta is at most alpha, whenever the run is stopped, as long as the pairs
    are used for nothing else: certification chooses what is returned, never how training proceeds.
    """
    return e_value(correct_change(now, start), delta) >= look * (look + 1) / alpha
