"""Stages 1 and 2: preference learning (eq. 2, 11) and value anchor integration (eq. 12). Results are cached."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from savelib.config import Config
from savelib.data.pairs_and_prompts import Preference, Prompt
from savelib.method import RULES, PairLabels, as_labelled, bradley_terry_loss, value_loss
from savelib.models.adapters import save_merged
from savelib.models.compute import pick_device, seed_everything
from savelib.models.loading import load_policy, load_reward_model, policy_source, reward_source
from savelib.models.reward_model import Encoded, RewardModel
from savelib.models.rollout import shared_sample
from savelib.paths import atomic_folder, cache_dir, code_digest, digest, resolve
from savelib.processes import gathered, is_main, largest, main_first, say, share, summed, wait
from savelib.training.engine import Engine, reward_optimizer
from savelib.training.finite import require_finite
from savelib.training.scoring import (
    check_finite,
    embed_groups,
    encode_groups,
    encode_pairs,
    micro_batches,
    pairs_at_once,
    score_groups,
    score_micro_batch,
)


def _stage_folder(stage: int, config: Config, rows: list[Preference] | list[Prompt], after: str = "") -> Path:
    """Cache folder of a stage: its name hashes all that the result depends on, rows and local models included.

    after: the folder of the stage before.
    """
    key = config.of_stage(stage) | {
        "code": code_digest(),
        "rows": digest([asdict(r) for r in rows]),
        "after": Path(after).name,
    }
    models = {"policy_model": policy_source, "reward_model": reward_source}
    for field, source in models.items():
        if field in key:
            files = sorted(Path(resolve(source(config))).glob("*.*"))  # none for a hub id
            key[field] = [source(config), [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]]
    return cache_dir() / f"stage{stage}-{digest(key)[:16]}"


def preference_stage(config: Config, pairs: list[Preference]) -> str:
    """Stage 1 (eq. 2, 11): Bradley-Terry on the preference pairs; returns the reward model's folder or hub id.

    The result is cached; with bt_epochs = 0 the given reward model is already trained and returned as it is.
    """
    if not config.bt_epochs:
        return reward_source(config)
    source = main_first(reward_source, config)
    target = _stage_folder(1, config, pairs)
    if not _exists(target):
        seed_everything("stage 1", config.seed)
        rm = load_reward_model(source, config, pick_device(config.device, config.threads))
        if config.ensemble > 1:
            _random_start(rm)
        say(f"stage 1: Bradley-Terry on {len(pairs)} pairs, {config.bt_epochs} epoch(s)")
        fit_bradley_terry(rm, pairs, config)
        if is_main():
            with atomic_folder(target) as folder:
                save_merged(rm.model, source, folder)
                rm.tokenizer.save_pretrained(folder)
        wait()
    return str(target)


def _random_start(rm: RewardModel) -> None:
    """Give a new reward head, which is zero, small random weights: members of an ensemble start apart."""
    head = [p for p in rm.reward_head_parameters() if p.requires_grad]
    if not any(p.any() for p in head):
        for p in head:
            nn.init.normal_(p, std=(p.shape[-1] + 1) ** -0.5)


def _exists(target: Path) -> bool:
    """Whether a stage's result is in the cache; all processes give the same answer."""
    return largest(target.is_dir())[0] > 0


def fit_bradley_terry(rm: RewardModel, pairs: list[Preference], config: Config) -> list[float]:
    """Train backbone and reward head on eq. 11; returns the mean loss of each epoch."""
    optimizer = reward_optimizer(rm, config, config.bt_backbone_lr, config.bt_head_lr)
    engine = Engine("reward_model", optimizer, config.max_grad_norm)
    ready = embed_groups(rm, encode_pairs(rm, pairs), config, pairs_at_once(config)) if rm.fixed else []
    means = []
    for _ in range(config.bt_epochs):
        losses = []
        for rows in torch.randperm(len(pairs)).split(config.bt_batch_size):
            batch = [ready[i] for i in rows] if ready else encode_pairs(rm, [pairs[i] for i in rows])
            losses.append(bradley_terry_step(rm, batch, engine, config)["rm/loss"] * len(batch))
        means.append(sum(losses) / len(pairs))
        say(f"  epoch loss {means[-1]:.4f}")
    return means


def bradley_terry_step(
    rm: RewardModel, pairs: list[Encoded], engine: Engine, config: Config, labels: PairLabels = as_labelled,
    away: AbstractContextManager[dict[str, float]] | None = None,
) -> dict[str, float]:  # fmt: skip
    """One gradient step of eq. 11 on the pairs of a batch that `labels` gives a label, in micro-batches.

    away: where the gradient is taken, and metrics of its own (`algorithm.look_ahead`); default: at the weights.
    Returns rm/pairs, how many they are, and, if there are any, rm/loss.
    """
    encoded = share(pairs, repeat=False)
    total, count = 0.0, 0
    with away or nullcontext({}) as metrics:
        for rows in micro_batches(len(encoded), pairs_at_once(config)):
            rewards = score_micro_batch(rm, encoded[rows], config).rewards  # [n, 2]
            require_finite("a reward of a preference pair", rewards.detach(), "reward_model")
            better, worse = labels(rewards[:, 0], rewards[:, 1])
            n = len(better)
            if engine.needed(n):
                loss = bradley_terry_loss(better, worse) * n if n else rewards.sum() * 0.0
                engine.backward(loss)
                total, count = total + loss.item(), count + n
    total, count = summed(total, count)
    require_finite("the Bradley-Terry loss", total, "reward_model")
    if not count:
        return metrics | {"rm/pairs": 0}
    engine.step(divisor=count)
    return metrics | {"rm/loss": total / count, "rm/pairs": int(count)}


def anchor_stage(config: Config, reward_model: str, prompts: list[Prompt]) -> str | None:
    """Stage 2 (eq. 12): fit the value head to the mean frozen-RM reward; returns a folder with the value head.

    Cached like stage 1. None for a rule without a value head (frozen, hl_bt, ...).
    """
    if RULES[config.rule].anchor != "value":
        return None
    policy_folder = main_first(policy_source, config)
    target = _stage_folder(2, config, prompts, reward_model)
    if not _exists(target):
        device = pick_device(config.device, config.threads)
        seed_everything("value head init", config.seed)
        rm = load_reward_model(reward_model, config, device)
        policy, tokenizer = load_policy(policy_folder, device, config)
        hidden, rewards = anchor_targets(rm, policy, tokenizer, prompts, config)
        losses = fit_value_head(rm, hidden, rewards, config)
        for epoch in sorted({1, config.anchor_epochs}):
            say(f"  epoch {epoch}: L_V {losses[epoch - 1]:.4f}")
        if is_main():
            with atomic_folder(target) as folder:
                rm.save_value_head(folder)
        wait()
    return str(target)


def anchor_targets(
    rm: RewardModel, policy: nn.Module, tokenizer, prompts: list[Prompt], config: Config
) -> tuple[Tensor, Tensor]:
    """Sample K responses to each prompt and score them: (hidden states for V [M, H], rewards [M, K]), no graph."""
    seed_everything("stage 2", config.seed)
    count = min(config.anchor_prompts or len(prompts), len(prompts))
    chosen = [prompts[i] for i in torch.randperm(len(prompts))[:count]]
    say(f"stage 2: value head on {count} prompts x K {config.anchor_responses}")
    hidden, rewards = [], []
    for i in range(0, count, config.anchor_batch_size):
        batch = chosen[i : i + config.anchor_batch_size]
        rollout = shared_sample(policy, tokenizer, batch, config.anchor_responses, config)
        scored = score_groups(rm, encode_groups(rm, rollout), config)
        check_finite(scored.rewards, rollout)
        rewards.append(gathered(scored.rewards, len(batch)))
        hidden.append(gathered(scored.prompt_hidden, len(batch)))
    return torch.cat(hidden), torch.cat(rewards)


def fit_value_head(rm: RewardModel, hidden: Tensor, rewards: Tensor, config: Config) -> list[float]:
    """Train psi on eq. 12 with hidden states [M, H] and rewards [M, K]; returns the mean loss of each epoch."""
    seed_everything("value head", config.seed)
    out = rm.value_head[-1]
    if config.value_init == "mean_reward":
        nn.init.zeros_(out.weight)
        nn.init.constant_(out.bias, float(rewards[: config.anchor_batch_size].mean()))
    optimizer = torch.optim.AdamW(rm.value_head.parameters(), lr=config.anchor_lr, weight_decay=0.0)
    means = []
    for _ in range(config.anchor_epochs):
        total = 0.0
        for rows in torch.randperm(len(hidden)).split(config.anchor_batch_size):
            loss = value_loss(rm.values(hidden[rows]), rewards[rows])
            require_finite("L_V of stage 2", loss.detach(), "value_head")
            loss.backward()
            nn.utils.clip_grad_norm_(rm.value_head.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(rows)
        means.append(total / len(hidden))
    require_finite("V after stage 2", rm.values(hidden).detach(), "value_head")
    return means
