"""Before any training: what SAVE's first step would do to a given reward model, policy and prompts."""

from __future__ import annotations

import pandas as pd
import torch

from savelib.config import Config, ConfigError
from savelib.method import feature_geometry
from savelib.models.reward_model import Encoded
from savelib.models.rollout import Rollout
from savelib.training.algorithm import prepare, update_reward_model
from savelib.training.metrics import Clock, describe
from savelib.training.scoring import encode_groups, micro_batches
from savelib.training.trainer import Trainer

ADVICE = (
    "What to run: rule=save_checked, with 100 or more guard pairs that stage 1 does not see. Each block of steps stays "
    "only if the reward model got better on them. In our development runs it harmed none of 34 reward models, where "
    "rule=save harmed 20 of 35 (data/LOG.md). No figure above was shown to tell beforehand which run would be harmed."
)


def preflight(config: Config, prompts: int = 64, responses: int = 8) -> pd.DataFrame:
    """Stages 1 and 2, then one step of SAVE on a sample; nothing is saved. One row per figure: value, what it means.

    prompts, responses: of the sample. ConfigError for a reward model that is not causal.
    """
    more = dict(rule="save", batch_size=prompts, group_size=responses, num_processes=1, backend="ddp")
    t = prepare(config.model_copy(update=more))
    if not t.reward_model.scorer.causal:
        raise ConfigError(f"reward_model = {config.reward_model!r}: preflight needs a causal reward model")
    rollout = t.sample(1)
    ratio, _ = feature_geometry(_features(t, rollout))
    accuracy = [_accuracy(t)]
    before, after, metrics = update_reward_model(t, rollout, t.threshold(1), 1, Clock())
    accuracy.append(_accuracy(t))
    seen = describe(before, after, rollout) | metrics
    spread = before.rewards.std(1).mean().item()
    shift = (after.rewards - before.rewards).mean().item()
    rows = [
        ("features: norm of the mean / spread in a group", ratio, "SmolLM2: 6; if large, a push on a group moves all"),
        ("rewards: spread within a group (std)", spread, "0: nothing to filter by"),
        ("rewards: skewness within groups", seen["reward/skew_in_group"], "below 0: most are alike, a few are worse"),
        ("responses that finish", 1 - seen["response/unfinished"], "the others teach the reward model nothing"),
        ("responses kept by the filter", seen["filter/kept"], ""),
        ("groups with both sides", seen["filter/valid_prompts"], "only these teach the reward model"),
        ("pull on the positives (A)", seen.get("force/pull"), "below D, the rewards of a group fall"),
        ("push on the negatives (D)", seen.get("force/push"), ""),
        ("one step: shift of all rewards / spread", shift / spread, "if large, V lags"),
        ("held-out pairs: accuracy now", accuracy[0], "" if accuracy[0] is not None else "no pairs were given"),
        ("held-out pairs: accuracy after one step", accuracy[1], ""),
        ("right responses (gold)", seen.get("gold/success_rate"), "below half, SAVE's push has the right sign"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["figure", "value", "reading"]).set_index("figure")


@torch.no_grad()
def _features(t: Trainer, rollout: Rollout) -> torch.Tensor:
    """The hidden states [B, G, H] that the reward head reads."""
    groups = encode_groups(t.reward_model, rollout)
    slices = micro_batches(len(groups), t.config.micro_batch_groups)
    parts = [t.reward_model.hidden(Encoded.joined(groups[rows]))[0] for rows in slices]
    return torch.cat(parts).float().view(len(groups), t.config.group_size, -1)


def _accuracy(t: Trainer) -> float | None:
    return (t.heldout_pairs.margins() > 0).float().mean().item() if t.data.heldout_pairs else None
