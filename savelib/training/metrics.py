"""The metrics of a step, its logged samples, and its clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from savelib.method import net_forces, skewness
from savelib.models.rollout import Responses
from savelib.processes import gathered
from savelib.training.scoring import Feedback

PHASES = {  # of a step -> the metric that counts them
    "rollout": "time/rollout",
    "reward scoring": "time/reward_model",
    "RM update": "time/reward_model",
    "value update": "time/reward_model",
    "reference log-probs": "time/policy",
    "policy forward/backward": "time/policy",
    "optimizer": "time/policy",
}


class Clock:
    """Seconds of a step by phase. Time in a phase inside another one counts for the inner phase alone."""

    def __init__(self, device: torch.device | None = None):
        self.cuda = device is not None and device.type == "cuda"
        self.seconds, self.inner = dict.fromkeys(PHASES, 0.0), [0.0]

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        self.inner.append(0.0)
        try:
            yield
        finally:
            spent = self.now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self.inner.pop()
            self.inner[-1] += spent

    def metrics(self, tokens: int) -> dict[str, float]:
        """time/rollout, time/reward_model, time/policy in seconds, and the tokens sampled per second of the step."""
        out = dict.fromkeys(PHASES.values(), 0.0)
        for phase, seconds in self.seconds.items():
            if phase in PHASES:
                out[PHASES[phase]] += seconds
        return out | {"time/tokens_per_second": tokens / sum(out.values())}


def describe(before: Feedback, after: Feedback, responses: Responses) -> dict[str, float]:
    """The metrics of a step, means over the whole batch. `before`: with the reward model of step t-1.

    All arguments are this process's share; gold may be nan.
    """
    before, after = before.gathered(), after.gathered()
    gold = gathered(responses.gold().to(after.rewards.device))  # [B, G], as what follows
    lengths, finished = gathered(responses.completion_lengths), gathered(responses.finished)
    part = before.partition
    out = {
        "reward/mean": after.rewards.mean().item(),
        "reward/std_in_group": after.rewards.std(1).mean().item(),
        "reward/skew_in_group": skewness(after.rewards).item(),
        "response/tokens": lengths.float().mean().item(),
        "response/unfinished": (~finished).float().mean().item(),
        "policy/kept": after.kept.float().mean().item(),
    }
    known = ~torch.isnan(gold)
    if known.any():
        out["gold/success_rate"] = gold[known].mean().item()
    if before.anchors is None:
        return out
    pull, push = net_forces(before.rewards, before.anchors, part)
    out |= {
        "filter/kept": before.kept.float().mean().item(),
        "filter/positive": part.positive.float().mean().item(),
        "filter/negative": part.negative.float().mean().item(),
        "filter/valid_prompts": part.valid.float().mean().item(),
        "value/mean": before.anchors.mean().item(),
        "value/error": (before.anchors - before.rewards.mean(1)).abs().mean().item(),
        "value/lag": ((before.anchors - before.rewards.mean(1)).mean() / before.rewards.std(1).mean()).item(),
    }
    if part.valid.any():
        out |= {"force/pull": pull[part.valid].mean().item(), "force/push": push[part.valid].mean().item()}
    judged = before.kept & known
    if judged.any():
        out["gold/pseudo_label_accuracy"] = (part.positive == (gold > 0.5))[judged].float().mean().item()
    return out


def sample_rows(responses: Responses, feedback: Feedback, step: int, groups: int = 2) -> list[dict]:
    """The first groups' responses with R, V, a and their side, for samples.jsonl."""
    rows, gold = [], responses.gold()
    for b, prompt in enumerate(responses.prompts[:groups]):
        anchor = None if feedback.anchors is None else feedback.anchors[b].item()
        for g, text in enumerate(responses.texts[b]):
            reward = feedback.rewards[b, g].item()
            rows.append(
                {
                    "step": step, "prompt_id": prompt.id, "prompt": prompt.text, "response": text, "reward": reward,
                    "value": anchor, "rm_advantage": None if anchor is None else reward - anchor,
                    "side": _side(feedback, b, g), "gold": _known(gold[b, g]),
                }
            )  # fmt: skip
    return rows


def _side(feedback: Feedback, b: int, g: int) -> str:
    if not feedback.kept[b, g]:
        return "left out"
    if feedback.anchors is None:
        return "kept"
    return "positive" if feedback.partition.positive[b, g] else "negative"


def _known(gold: Tensor) -> float | None:
    value = gold.item()
    return None if math.isnan(value) else value
