"""Lemma 1's conditions during training, and remark 1: the tables of notebook 10."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor

from savelib.config import make_config
from savelib.experiments.tables import Tables
from savelib.experiments.theory import draw, gold_scale, measure, spaced
from savelib.method import rm_advantages
from savelib.models.compute import seed_everything
from savelib.models.rollout import sample
from savelib.training.algorithm import prepare, save_step
from savelib.training.scoring import encode_groups, score_groups
from savelib.training.stages import anchor_targets, fit_value_head

FRESH = range(230, 235)  # worlds of the shipped tables; nothing was tuned on them
START = {"bt_head_lr": 1e-2, "label_bias": 0.0}  # of the shipped tables: unbiased pairs, an overfit head
RESPONSES = (1, 2, 4, 8, 16, 32)  # K of remark 1
CONDITIONS = {  # name -> (quantity, along), which must be above 0
    "C1": ("squared_error", "reward"),
    "C2": ("sensitivity", "both"),
    "C3": ("kl_margin", "both"),
    "risk rises": ("risk", "both"),
}


def verdict(value: float, standard_error: float) -> str:
    """`holds` if the 95% interval is above 0, `fails` if it is below, else `not resolved`."""
    if abs(value) > 1.96 * standard_error:
        return "holds" if value > 0 else "fails"
    return "not resolved"


def conditions(table: pd.DataFrame, refit: bool = False) -> pd.DataFrame:
    """The rows of a table of `measure` that are a condition or the conclusion, with columns condition and verdict.

    refit: the squared error with the gold reward's scale fitted anew at each step.
    """
    parts = []
    for name, (quantity, along) in CONDITIONS.items():
        wanted = quantity + "_refit" * (refit and quantity != "risk")
        rows = table[(table["quantity"] == wanted) & (table["along"] == along)]
        said = [verdict(*pair) for pair in rows[["value", "standard_error"]].to_numpy()]
        parts.append(rows.assign(condition=name, verdict=said))
    return pd.concat(parts, ignore_index=True)


def lemma1(
    rules: Iterable[str] = ("save", "frozen"), worlds: Iterable[int] = FRESH, seeds: Iterable[int] = (0, 1),
    at: Iterable[int] = (0, 20, 40, 60),
) -> pd.DataFrame:  # fmt: skip
    """`measure` during training: one row per rule, world, seed, step and quantity.

    The gold reward's scale is that of the initial models, the same throughout a run.
    """
    table, at = [], set(at)
    for world, seed, rule in ((w, s, r) for w in worlds for s in seeds for r in rules):
        t = prepare(make_config(**START, rule=rule, world_seed=world, seed=seed))
        for step in range(max(at) + 1):
            if step:
                save_step(t, step)
            if step in at:
                seed_everything("theory", seed, step)
                if step == 0:
                    first = draw(t, spaced(t.data.prompts, 192), 48)
                    scale = gold_scale(first.rewards, first.gold)
                place = {"rule": rule, "world": world, "seed": seed, "step": step}
                table.append(pd.DataFrame([place]).merge(measure(t, scale), how="cross"))
    return pd.concat(table, ignore_index=True)


def variance_of_means(rewards: Tensor, count: int) -> Tensor:
    """Variance of the mean of `count` rewards for each prompt, from as many disjoint means as there are: [P, N] -> [P].

    The mean of all N stands for the expectation; one less than their number makes up for that.
    """
    means = rewards[:, : rewards.shape[1] // count * count].unflatten(1, (-1, count)).mean(2)  # [P, N / count]
    return means.var(1)


def remark1(worlds: Iterable[int] = FRESH, seeds: Iterable[int] = (0, 1), responses: int = 256) -> pd.DataFrame:
    """A row a world, seed and K. target_variance: of the value head's target, the mean of K rewards, about its
    expectation, on held-out prompts; predicted: Var(R) / K; value_error: mean square error of the value head that was
    fitted with K responses, about the mean of `responses`; value_variance: of these means over the prompts.
    """
    table = []
    for world, seed in ((w, s) for w in worlds for s in seeds):
        t = prepare(make_config(**START, rule="frozen", world_seed=world, seed=seed, anchor_responses=max(RESPONSES)))
        hidden, fitted_on = anchor_targets(t.reward_model, t.policy, t.tokenizer, t.data.prompts, t.config)
        seed_everything("theory", seed)
        rollout = sample(t.policy, t.tokenizer, spaced(t.data.heldout_prompts, 96), responses, t.config)
        scores = score_groups(t.reward_model, encode_groups(t.reward_model, rollout), t.config)
        expected = scores.rewards.mean(1)  # [P]
        for count in RESPONSES:
            fit_value_head(t.reward_model, hidden, fitted_on[:, :count], t.config)
            with torch.no_grad():
                wrong = rm_advantages(expected[:, None], t.reward_model.values(scores.prompt_hidden)).square().mean()
            row = {"world": world, "seed": seed, "responses": count}
            row["target_variance"] = variance_of_means(scores.rewards, count).mean().item()
            row["predicted"] = scores.rewards.var(1).mean().item() / count
            table.append(row | {"value_error": wrong.item(), "value_variance": expected.var().item()})
    return pd.DataFrame(table)


TABLES = Tables("theory", {"lemma1": lemma1, "remark1": remark1}, "half an hour")

if __name__ == "__main__":
    TABLES.main()
