"""Rule save_checked: every block of steps must prove itself on guard pairs, or the reward model goes back.

The guard owns a copy of what a block may change (reward model, value head, their optimizers), in the CPU's memory, and
is itself part of a checkpoint. `savelib.method.guard` has the tests and the decisions.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from savelib.config import Config
from savelib.data.pairs_and_prompts import Preference
from savelib.method.guard import GuardState, certified, improvement_z
from savelib.models.reward_model import RewardModel
from savelib.training.engine import Engine
from savelib.training.scoring import FixedPairs

GUARDED = ("reward_model", "value_head")  # engines
ACCEPT = 1.0  # the z above which a block stays


class Guard:
    """Checks blocks of `guard_every` steps; state: where it stands.

    confirmed: weights, optimizer states and guard margins after the last block that stayed. With certificate pairs also
    the weights and margins of the last certified reward model, which is the one that is returned.
    """

    def __init__(
        self,
        rm: RewardModel,
        engines: dict[str, Engine],
        config: Config,
        pairs: list[Preference],
        certificate: list[Preference],
    ):
        self.rm, self.engines, self.config = rm, engines, config
        self.pairs = FixedPairs(rm, pairs, config)
        self.certificate = FixedPairs(rm, certificate, config) if certificate else None
        self.state, self.accepted, self.undone, self.looks, self.certified_at = GuardState(), 0, 0, 0, 0
        self._confirm(self.pairs.margins())
        self.start = self.certificate.margins() if self.certificate else torch.zeros(0)
        self.returned = self._copy() if certificate else {}

    @property
    def resting(self) -> bool:
        return self.state.resting > 0

    def check(self, step: int) -> tuple[bool, dict[str, float]]:
        """After block 2 of a step: (whether the reward model went back, metrics)."""
        c, undone = self.config, False
        metrics = {"guard/resting": float(self.resting), "guard/form": float(self.state.form)}
        if step % c.guard_every == 0 or step == c.total_steps:
            if self.resting:
                self.state = self.state.rested()
            elif torch.equal(now := self.pairs.margins(), self.confirmed["margins"]):
                self._confirm(now)  # the filter kept nothing: V alone has moved
            else:
                metrics["guard/z"] = improvement_z(now, self.confirmed["margins"])
                undone = self._decide(metrics["guard/z"] > ACCEPT, now, step)
        return undone, metrics | {"guard/accepted": float(self.accepted), "guard/undone": float(self.undone)}

    def _decide(self, accepted: bool, now: Tensor, step: int) -> bool:
        self.state = self.state.after(accepted, forms=2)
        if not accepted:
            self.undone += 1
            self._restore(self.confirmed)
            return True
        self.accepted += 1
        self._confirm(now)
        if self.certificate:
            self.looks += 1
            c, after = self.config, self.certificate.margins()
            if certified(after, self.start, self.looks, c.certificate_alpha, c.certificate_delta):
                self.certified_at, self.returned = step, self._copy()
        return False

    def finish(self, step: int) -> str:
        """After the last step: put the reward model in place that the run returns; a sentence about what happened.

        A block that the run's end cut short was not checked, and is undone.
        """
        said = f"guard: {self.accepted} block(s) of {self.config.guard_every} steps kept, {self.undone} undone"
        if step % self.config.guard_every and step < self.config.total_steps and not self.resting:
            self._restore(self.confirmed)
        if not self.certificate:
            return said + ("" if self.accepted else "; the reward model is the one at the start")
        self._restore(self.returned)
        if self.certified_at:
            return f"{said}; the reward model of step {self.certified_at} is certified and returned"
        return f"{said}; no look was conclusive, so the reward model of the start is returned"

    # what a block may change

    def _confirm(self, margins: Tensor) -> None:
        self.confirmed = self._copy() | {"margins": margins}

    def _copy(self) -> dict[str, Tensor]:
        return {f"{name}.{k}": v for name in GUARDED for k, v in self.engines[name].copy().items()}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for name in GUARDED:
            start = f"{name}."
            mine = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            self.engines[name].restore(mine)

    # checkpoints

    def numbers(self) -> dict[str, int]:
        """Everything but the tensors, for checkpoint.json."""
        counts = {name: getattr(self, name) for name in ("accepted", "undone", "looks", "certified_at")}
        return asdict(self.state) | counts

    def tensors(self) -> dict[str, Tensor]:
        """This process's tensors, for a safetensors file."""
        parts = {"confirmed": self.confirmed, "returned": self.returned, "start": {"margins": self.start}}
        return {f"{part}/{k}": v for part, tensors in parts.items() for k, v in tensors.items()}

    def load(self, numbers: dict[str, int], tensors: dict[str, Tensor]) -> None:
        """The way back from `numbers` and `tensors`."""
        self.state = GuardState(**{name: numbers[name] for name in asdict(self.state)})
        for name in ("accepted", "undone", "looks", "certified_at"):
            setattr(self, name, numbers[name])
        parts: dict[str, dict[str, Tensor]] = {"confirmed": {}, "returned": {}, "start": {}}
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = value
        self.confirmed, self.returned, self.start = parts["confirmed"], parts["returned"], parts["start"]["margins"]
