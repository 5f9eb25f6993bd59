"""A number that is not finite stops the run: what it is, the step, the prompts, what to lower and where to resume."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from savelib.data.pairs_and_prompts import Prompt, ids_of
from savelib.errors import SavelibError

LOWER = {  # engine -> the fields that have gone too far where its numbers are not finite
    "policy": "policy_lr or beta",
    "reward_model": "backbone_lr and reward_head_lr (in stage 1: bt_backbone_lr and bt_head_lr)",
    "value_head": "value_head_lr, value_loss_weight, anchor_lr or reward_head_lr",
    "policy_feedback": "reward_head_lr",
    "process_reward": "policy_lr",
}


class NonFiniteError(SavelibError):
    """A reward, value, loss, gradient or weight that is no finite number.

    name: the engine whose model it belongs to. step, prompts and checkpoint are filled in by whoever knows them.
    """

    def __init__(self, what: str, name: str, prompts: list[Prompt] | None = None):
        super().__init__(what)
        self.what, self.name, self.prompts = what, name, prompts
        self.step: int | None = None
        self.checkpoint = ""

    def __str__(self) -> str:
        where = "" if self.step is None else f"step {self.step}: "
        prompts = f"; prompts: {ids_of(self.prompts)}" if self.prompts else ""
        again = f"resume the last good checkpoint by resume={self.checkpoint}" if self.checkpoint else "start again"
        return f"{where}{self.what}{prompts}; lower {LOWER[self.name]}, and {again}"


def require_finite(what: str, value: Tensor | float, name: str, prompts: list[Prompt] | None = None) -> None:
    """Raise NonFiniteError unless every number is finite. what: the subject of the sentence; name: as above."""
    if not torch.isfinite(torch.as_tensor(value)).all():
        raise NonFiniteError(f"{what} is not a finite number", name, prompts)


def names_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of t, step and perhaps responses, whose NonFiniteError says which step and which prompts it was."""

    @wraps(function)
    def named(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except NonFiniteError as error:
            given = signature(function).bind(*args, **options).arguments
            t, error.step = given["t"], given["step"]
            if not error.prompts:
                error.prompts = (
                    given["responses"].prompts if "responses" in given else t.batch(t.data.prompts, error.step)
                )
            raise

    return named
