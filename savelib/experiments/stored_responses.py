"""Rules on a real language model without a policy that moves: a reward head on hidden states of stored responses.

The responses are SmolLM2's to the RL prompts of profile `smol`, sampled once. The losses are those of real runs. The
states are those of the plain backbone or of one that was trained on the pairs, as they are or less their mean.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor, nn

from savelib.benchmarks.statistics import interval_of_mean
from savelib.config import Config
from savelib.method import (
    RULES,
    bradley_terry_loss,
    curriculum_threshold,
    metarm_difference,
    partition,
    rm_advantages,
    value_loss,
)
from savelib.models.compute import pick_device, seed_everything
from savelib.models.loading import load_policy, load_reward_model, policy_source, reward_source
from savelib.models.reward_model import Encoded
from savelib.models.rollout import sample
from savelib.training.scoring import embed_groups, encode_groups, encode_pairs, micro_batches
from savelib.training.stages import preference_stage
from savelib.training.trainer import load_data

PROMPTS, SPLITS, STEPS = 150, 20, 30
RATES = (1e-4, 5e-4, 2e-3)  # of the reward head, for every rule: a fifth of profile smol's, that, four times it
FINE_TUNED = dict(bt_backbone_lr=2e-5, bt_epochs=3)  # stage 1 that trains the backbone too
PAIRS_KEPT = 0.8  # share of the pairs that a split trains on


@dataclass(frozen=True)
class Way:
    """A rule, as it is or with something changed that could brake it."""

    rule: str  # "gold": Bradley-Terry on right against wrong
    value_rate: float = 1.0  # times the value head's learning rate
    lags: bool = False  # anchors are those of the first reward head


FAST, LAGGING = "save, V 10 times as fast", "mean_reward, anchors of the first head"
WAYS = {
    "save": Way("save"), FAST: Way("save", value_rate=10.0), "mean_reward": Way("mean_reward"),
    LAGGING: Way("mean_reward", lags=True), "hl_bt": Way("hl_bt"), "offline_bt": Way("offline_bt"),
    "metarm": Way("metarm"), "gold": Way("gold"),
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Last hidden states of the reward model's backbone."""

    pairs: Tensor  # [M, 2, H], the chosen response first
    heldout: Tensor  # [K, 2, H]
    groups: Tensor  # [P, G, H]
    prompts: Tensor  # [P, H], what V reads
    gold: Tensor  # [P, G]
    finished: Tensor  # [P, G] bool

    def centred(self) -> Stored:
        """All states minus the mean of the pairs', so that rewards have no common level to move."""
        mean = self.pairs.mean((0, 1))
        names = ("pairs", "heldout", "groups", "prompts")
        return replace(self, **{name: getattr(self, name) - mean for name in names})

    @property
    def offset(self) -> float:
        """Norm of the mean state over the spread within a group."""
        within = self.groups - self.groups.mean(1, keepdim=True)
        return float(self.groups.mean((0, 1)).norm() / within.square().sum(-1).mean().sqrt())


@torch.no_grad()
def collect(config: Config, prompts: int = PROMPTS) -> Stored:
    """Sample the responses and compute all hidden states: several minutes on one core."""
    device, data = pick_device(config.device, config.threads), load_data(config)
    rm = load_reward_model(reward_source(config), config, device)
    rm.requires_grad_(False)
    policy, tokenizer = load_policy(policy_source(config), device)
    seed_everything("stored responses", config.seed)
    groups, golds, finished = [], [], []
    for rows in micro_batches(prompts, 16):
        rollout = sample(
            policy, tokenizer, data.prompts[rows.start : min(rows.stop, prompts)], config.group_size, config
        )
        groups += encode_groups(rm, rollout)
        golds.append(rollout.gold())
        finished.append(rollout.finished)

    def states(encoded: list[Encoded]) -> tuple[Tensor, Tensor]:  # [P, G, H], [P, H]
        last, hidden = zip(*(group.states for group in embed_groups(rm, encoded, config)), strict=True)
        return torch.stack(last).float(), torch.stack([h[0] for h in hidden]).float()

    said, asked = states(groups)
    pairs, heldout = states(encode_pairs(rm, data.pairs))[0], states(encode_pairs(rm, data.heldout_pairs))[0]
    return Stored(pairs, heldout, said, asked, torch.cat(golds), torch.cat(finished))


def fine_tuned(config: Config) -> Config:
    """The configuration with the reward model of a preference stage that trains the backbone, computed once."""
    folder = preference_stage(config.model_copy(update=FINE_TUNED), load_data(config).pairs)
    return config.model_copy(update={"reward_model": folder})


def start(stored: Stored, config: Config, split: int) -> tuple[Tensor, nn.Linear]:
    """Stages 1 and 2 on a split's share of the pairs: the reward head [H] and the value head."""
    seed_everything("split", split)
    head = nn.Parameter(torch.zeros(stored.pairs.shape[-1]))
    pairs = stored.pairs[torch.randperm(len(stored.pairs))[: int(PAIRS_KEPT * len(stored.pairs))]]
    optimizer = torch.optim.AdamW([head], lr=config.bt_head_lr, weight_decay=0.0)
    for _ in range(config.bt_epochs):
        for rows in torch.randperm(len(pairs)).split(config.bt_batch_size):
            rewards = pairs[rows] @ head
            _step(optimizer, bradley_terry_loss(rewards[:, 0], rewards[:, 1]))
    value, rewards = nn.Linear(len(head), 1), (stored.groups @ head).detach()
    nn.init.zeros_(value.weight)
    nn.init.constant_(value.bias, float(rewards.mean()))
    optimizer = torch.optim.AdamW(value.parameters(), lr=config.anchor_lr, weight_decay=0.0)
    for _ in range(config.anchor_epochs):
        for rows in torch.randperm(len(rewards))[: config.anchor_prompts].split(config.anchor_batch_size):
            _step(optimizer, value_loss(value(stored.prompts[rows]).squeeze(-1), rewards[rows]))
    return head.detach(), value


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step with the gradient clipped to norm 1, as in a run."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def improve(
    stored: Stored, head: Tensor, value: nn.Linear, way: Way, lr: float, config: Config, split: int
) -> dict[str, float]:
    """STEPS steps from these heads: accuracies at the end, what the filter did on average."""
    seed_everything("order", split)
    first, head, value, seen = head, nn.Parameter(head.clone()), copy.deepcopy(value), []
    of_head = torch.optim.AdamW([head], lr=lr, weight_decay=0.0)
    of_value = torch.optim.AdamW(value.parameters(), lr=config.value_head_lr * way.value_rate, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        rows = torch.randperm(len(stored.groups))[: config.batch_size]
        rewards, finished = stored.groups[rows] @ head, stored.finished[rows]  # [B, G]
        values = value(stored.prompts[rows]).squeeze(-1)
        means = (stored.groups[rows] @ first if way.lags else rewards).mean(1)
        anchors = (values if way.rule == "save" else means).detach()
        threshold = curriculum_threshold(step, STEPS, config.initial_margin)
        sides = partition(rm_advantages(rewards.detach(), anchors), threshold, finished)
        lag = (anchors - rewards.detach().mean(1)).mean() / rewards.detach().std(1).mean()
        seen.append({"valid groups": float(sides.valid.float().mean()), "lag": float(lag)})
        if way.rule in ("offline_bt", "metarm", "gold"):
            ahead = head
            if way.rule == "metarm":
                ahead = head + config.meta_lr * torch.autograd.grad(metarm_difference(rewards, finished), head)[0]
            pairs = stored.pairs[torch.randperm(len(stored.pairs))[: config.batch_size]] @ ahead
            better, worse = _ordered(rewards, stored.gold[rows]) if way.rule == "gold" else pairs.T
            loss = bradley_terry_loss(better, worse) if len(better) else None
        else:
            of = RULES[way.rule]
            loss = of.loss(rewards, anchors, sides, finished) if of.groups(sides, finished).any() else None
        if loss is not None:
            _step(of_head, loss)
        _step(of_value, value_loss(values, (stored.groups[rows] @ head).detach()))
    return accuracies(stored, head.detach()) | pd.DataFrame(seen).mean().to_dict()


def _ordered(rewards: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards [n] of the right and of the wrong response of each pair of them in a group."""
    both = (gold > 0.5)[:, :, None] & (gold <= 0.5)[:, None, :]  # [B, G, G]
    right, wrong = rewards[:, :, None].expand(both.shape), rewards[:, None, :].expand(both.shape)
    return right[both], wrong[both]


def accuracies(stored: Stored, head: Tensor) -> dict[str, float]:
    """Percent of held-out pairs, and of right and wrong stored responses to one prompt, in the right order."""
    right, wrong = _ordered(stored.groups @ head, stored.gold)
    pairs = stored.heldout @ head
    return {
        "held-out pairs": 100 * float((pairs[:, 0] > pairs[:, 1]).float().mean()),
        "stored responses": 100 * float((right > wrong).float().mean()),
    }


def changes(of: dict[str, Stored], config: Config) -> pd.DataFrame:
    """One row per backbone, features, rule and rate: start, mean change on held-out pairs, 95% interval over splits.

    of: the states of each backbone by its name.
    """
    parts = []
    for backbone, stored in of.items():
        for features, states in (("raw", stored), ("centred", stored.centred())):
            parts.append(_changes(states, config).assign(backbone=backbone, features=features))
    rows = pd.concat(parts, ignore_index=True)
    return rows[["backbone", "features", *rows.columns[:-2]]]


def _changes(of: Stored, config: Config) -> pd.DataFrame:
    starts = [start(of, config, split) for split in range(SPLITS)]
    before, rows = pd.DataFrame([accuracies(of, head) for head, _ in starts]), []
    for rule, way in WAYS.items():
        for lr in RATES:
            after = pd.DataFrame(
                [improve(of, head, value, way, lr, config, split) for split, (head, value) in enumerate(starts)]
            )
            moved = after[list(before)] - before
            low, high = interval_of_mean(moved["held-out pairs"])
            rows.append(
                {"offset": of.offset, "rule": rule, "reward_head_lr": lr,
                 "start": before["held-out pairs"].mean(), "change": moved["held-out pairs"].mean(),
                 "low": low, "high": high, "change_stored": moved["stored responses"].mean(),
                 "valid_groups": after["valid groups"].mean(), "lag": after["lag"].mean(), "splits": SPLITS}
            )  # fmt: skip
    return pd.DataFrame(rows)
