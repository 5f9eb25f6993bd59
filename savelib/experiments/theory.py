"""The terms of Lemma 1, measured in the embedded world, where gold is known.

Lemma 1: along the policy gradient d the risk of the reward model rises, if
C1 the expected squared error of the reward model under the policy rises,
C2 the risk is at least c_t > 0 times as sensitive as the squared error, and
C3 the KL term does not outweigh the reward's.

The three conditions and the conclusion are the paper's. This transcription is ours: d is the gradient of
E[R] - beta KL(pi || reference) by the policy's weights, at length 1; C1 is taken along the reward's part of d, C2 and
the conclusion along d, and C3 compares the two parts; the risk is Bradley-Terry's on pairs of a right and a wrong
response of the current policy to one prompt; the gold reward has the scale R* = a gold + b, since gold itself is 0 or
1 and the squared error needs one scale for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

from savelib.config import Config, ConfigError
from savelib.data.pairs_and_prompts import Prompt
from savelib.models.rollout import Rollout, completion_logprobs, sample
from savelib.training.scoring import encode_groups, score_groups
from savelib.training.trainer import Trainer

ROWS = 1024  # responses of one pass through the policy


# ---- derivatives of expectations under the policy


@dataclass(frozen=True)
class Drawn:
    """n responses of the current policy to each of P prompts; everything but the rollout is [P, n]."""

    rollout: Rollout
    rewards: Tensor
    gold: Tensor
    log_ratios: Tensor  # log pi - log reference of the whole response (k1)


@torch.no_grad()
def draw(t: Trainer, prompts: list[Prompt], responses: int) -> Drawn:
    """Sample and score. ConfigError where sampling is cut (top_p, top_k): then it is not the policy that is sampled."""
    c = t.config
    if c.top_p < 1 or c.top_k > 0:
        raise ConfigError(
            f"top_p = {c.top_p}, top_k = {c.top_k}: derivatives need samples of the whole policy; set 1, 0"
        )
    rollout = sample(t.policy, t.tokenizer, prompts, responses, c)
    rewards = score_groups(t.reward_model, encode_groups(t.reward_model, rollout), c).rewards
    chunks = torch.arange(rewards.numel()).split(ROWS)
    with t.as_reference() as reference:
        apart = [
            response_logprobs(t.policy, rollout, rows, c) - response_logprobs(reference, rollout, rows, c)
            for rows in chunks
        ]
    return Drawn(rollout, rewards, rollout.gold().to(rewards), torch.cat(apart).view_as(rewards))


def response_logprobs(model: nn.Module, rollout: Rollout, rows: Tensor, config: Config) -> Tensor:
    """log pi(y | x) of whole responses [n], for flat row indices [n]; differentiable."""
    logprobs = completion_logprobs(model, rollout, rows, config)  # [n, T]
    mask = rollout.completion_mask.flatten(0, 1)[rows, : logprobs.shape[1]]
    return (logprobs * mask).sum(1)


def gradients(t: Trainer, drawn: Drawn) -> tuple[Tensor, Tensor]:
    """(gradient of E[R], gradient of KL(pi || reference)) by the policy's weights, each flat [D].

    Score-function gradients; each response is measured against the others to its prompt. That of KL has no second
    term: the mean of grad log pi is 0.
    """
    parameters = [p for p in t.policy.parameters() if p.requires_grad]
    signals = [_centred(x).flatten() / len(x) for x in (drawn.rewards, drawn.log_ratios)]  # [P * n]
    totals = [torch.zeros(sum(p.numel() for p in parameters)) for _ in signals]
    for rows in torch.arange(len(signals[0])).split(ROWS):
        logprobs = response_logprobs(t.policy, drawn.rollout, rows, t.config)
        for total, signal in zip(totals, signals, strict=True):
            parts = torch.autograd.grad((signal[rows] * logprobs).sum(), parameters, retain_graph=True)
            total += torch.cat([part.flatten() for part in parts])
    return totals[0], totals[1]


def _centred(values: Tensor) -> Tensor:
    """[P, n] -> [P, n], summing whose products with scores over n gives their unbiased covariance."""
    return (values - values.mean(1, keepdim=True)) / (values.shape[1] - 1)


class _LogProbs(nn.Module):
    """`response_logprobs` as a module, so that its model can be called with other weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, rollout: Rollout, rows: Tensor, config: Config) -> Tensor:
        return response_logprobs(self.model, rollout, rows, config)


@torch.no_grad()
def directional_scores(model: nn.Module, rollout: Rollout, direction: Tensor, config: Config) -> Tensor:
    """s(x, y), the derivative of log pi(y | x) along a direction [D] in the model's weights: [P, n].

    Forward-mode differentiation: one pass for all responses, where gradients would take one per response.
    """
    module = _LogProbs(model)
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parts = direction.split([p.numel() for p in weights.values()])
    along = {name: part.view_as(p) for (name, p), part in zip(weights.items(), parts, strict=True)}
    scores = []
    for rows in torch.arange(rollout.completion_lengths.numel()).split(ROWS):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
            of = lambda w, rows=rows: functional_call(module, w, (rollout, rows, config))  # noqa: E731
            scores.append(jvp(of, (weights,), (along,))[1])
    return torch.cat(scores).view_as(rollout.completion_lengths)


def derivative(values: Tensor, scores: Tensor) -> Tensor:
    """D E[f] = E[f s], unbiased for each prompt: f and s [P, n] -> [P].

    The prompt's mean of f is taken off; n - 1 makes up for its being of the same responses.
    """
    return (_centred(values) * scores).sum(1)


def pair_derivative(values: Tensor, scores: Tensor) -> Tensor:
    """D E[h(y, y')] = E[h (s + s')], unbiased for each prompt (a U-statistic): h [P, n, n], s [P, n] -> [P].

    Pitfall: h must be 0 where y and y' are the same response.
    """
    n = scores.shape[1]
    mean = values.sum((1, 2)) / (n * (n - 1))  # [P]
    both = (values * (scores[:, :, None] + scores[:, None, :])).sum((1, 2)) / (n * (n - 1))
    return (both - 2 * mean * scores.mean(1)) * n / (n - 2)


# ---- what is differentiated


def gold_scale(rewards: Tensor, gold: Tensor) -> tuple[float, float]:
    """(a, b) of R* = a gold + b, by least squares of the rewards on gold, both [P, n].

    a is 0 if all responses are equal in gold. Our choice: the lemma's gold reward has a scale, the world's has none.
    """
    away = gold - gold.mean()
    a = ((away * rewards).sum() / away.square().sum().clamp(min=1e-12)).item()
    return a, (rewards.mean() - a * gold.mean()).item()


def single_terms(drawn: Drawn, scale: tuple[float, float]) -> dict[str, Tensor]:
    """Functions of one response, [P, n]. squared_error: with the scale given; squared_error_refit: with today's."""
    terms = {"reward": drawn.rewards, "gold": drawn.gold, "kl": drawn.log_ratios}
    for name, (a, b) in (("squared_error", scale), ("squared_error_refit", gold_scale(drawn.rewards, drawn.gold))):
        terms[name] = (drawn.rewards - a * drawn.gold - b).square()
    return terms


def pair_terms(drawn: Drawn) -> tuple[dict[str, Tensor], Tensor]:
    """Functions of a right and a wrong response, and where there is such a pair: [P, n, n] (right, wrong).

    risk: Bradley-Terry's loss (eq. 11); misranked: the share of pairs in the wrong order, a tie one half.
    """
    right = drawn.gold > 0.5
    there = (right[:, :, None] & ~right[:, None, :]).to(drawn.rewards)
    margins = drawn.rewards[:, :, None] - drawn.rewards[:, None, :]
    wrong = (margins < 0).to(margins) + 0.5 * (margins == 0)
    return {"risk": softplus(-margins) * there, "misranked": wrong * there}, there


def measure(t: Trainer, scale: tuple[float, float], prompts: int = 192, responses: int = 48) -> pd.DataFrame:
    """Lemma 1's terms for the trainer's policy and reward model: columns quantity, along, value, standard_error.

    The direction is estimated on training prompts, the derivatives on as many held-out prompts with samples of their
    own. along: `reward` and `kl` are the two parts of d = (g_R - beta g_KL) / length, `both` is d itself, `level` no
    derivative but the mean. Standard errors are over prompts, for the given direction.
    sensitivity: D risk / D squared error along d (C2's c_t), its error as if the two were independent (that is wide).
    kl_margin: |reward's part| - |KL's part| of D squared error (C3).
    """
    beta = t.config.beta
    g_reward, g_kl = gradients(t, draw(t, spaced(t.data.prompts, prompts), responses))
    length = (g_reward - beta * g_kl).norm()
    drawn = draw(t, spaced(t.data.heldout_prompts, prompts), responses)
    scores = {
        name: directional_scores(t.policy, drawn.rollout, part / length, t.config)
        for name, part in (("reward", g_reward), ("kl", beta * g_kl))
    }
    scores["both"] = scores["reward"] - scores["kl"]
    singles, (pairs, there) = single_terms(drawn, scale), pair_terms(drawn)
    n, share = drawn.gold.shape[1], there.sum() / (there.numel() - drawn.gold.numel())
    found = {("gradient", "reward"): (g_reward.norm().item(), 0.0), ("gradient", "both"): (length.item(), 0.0)}
    changes = {}  # per prompt, [P]
    for name, values in singles.items():
        found[name, "level"] = _mean_and_error(values.mean(1))
        changes |= {(name, along): derivative(values, s) for along, s in scores.items()}
    for name, values in pairs.items():
        level = values.sum() / there.sum()  # over pairs, so the share of such pairs must not count as a change
        by_prompt = (values - level * there).sum((1, 2)) / (n * (n - 1) * share)
        found[name, "level"] = (level.item(), _mean_and_error(by_prompt)[1])
        for along, s in scores.items():
            changes[name, along] = (pair_derivative(values, s) - level * pair_derivative(there, s)) / share
    found |= {key: _mean_and_error(change) for key, change in changes.items()}
    for error in ("squared_error", "squared_error_refit"):
        suffix = error.removeprefix("squared_error")
        (top, top_error), (below, below_error) = found["risk", "both"], found[error, "both"]
        ratio = top / below if below else float("nan")
        spread = abs(ratio) * float(np.hypot(top_error / (top or np.nan), below_error / (below or np.nan)))
        found["sensitivity" + suffix, "both"] = (ratio, spread)
        parts = [np.sign(found[error, along][0]) * changes[error, along] for along in ("reward", "kl")]
        found["kl_margin" + suffix, "both"] = _mean_and_error(parts[0] - parts[1])
    rows = [(*key, *value) for key, value in found.items()]
    return pd.DataFrame(rows, columns=["quantity", "along", "value", "standard_error"])


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def spaced(rows: list[Prompt], count: int) -> list[Prompt]:
    """At most `count` rows, evenly spaced."""
    return rows[:: max(1, len(rows) // count)][:count]
