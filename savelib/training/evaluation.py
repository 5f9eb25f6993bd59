"""What a run is judged by: held-out pairs, and the current policy's responses to held-out prompts."""

from __future__ import annotations

import torch

from savelib.models.compute import seed_everything
from savelib.models.rollout import shared_sample
from savelib.processes import gathered
from savelib.training.finite import require_finite
from savelib.training.scoring import check_finite, encode_groups, score_groups
from savelib.training.trainer import Trainer

RESPONSES = 4  # per held-out prompt


def ranking_accuracy(rewards: torch.Tensor, gold: torch.Tensor) -> float:
    """Share of (right, wrong) pairs within a group that the rewards order rightly; nan without such a pair.

    rewards [B, G], gold [B, G] with 1 right, 0 wrong, nan unknown. A tie counts half.
    """
    right, wrong = gold > 0.5, gold <= 0.5
    both = right[:, :, None] & wrong[:, None, :]  # [B, G, G]
    difference = (rewards[:, :, None] - rewards[:, None, :])[both]
    return ((difference > 0) + 0.5 * (difference == 0)).mean().item()


def evaluate(t: Trainer) -> dict[str, float]:
    """Metrics `eval/...` of the trainer's models; the same prompts and the same random numbers each time.

    rm_accuracy: on the fixed held-out pairs; rm_accuracy_current: on right and wrong responses of the current policy
    to one prompt (gold needed); gold: of those responses; value_correlation: V against the group's mean reward;
    value_gold_correlation: V against its mean gold; pseudo_label_accuracy: how often the sign of R - V is gold's.
    """
    c = t.config
    out = {}
    if t.data.heldout_pairs:
        out["eval/rm_accuracy"] = (t.heldout_pairs.margins() > 0).float().mean().item()
    seed_everything("evaluation", c.seed)
    prompts = t.data.heldout_prompts[:: max(1, len(t.data.heldout_prompts) // c.eval_prompts)][: c.eval_prompts]
    rewards, hidden, gold = [], [], []
    for i in range(0, len(prompts), c.batch_size):
        batch = prompts[i : i + c.batch_size]
        rollout = shared_sample(t.policy, t.tokenizer, batch, RESPONSES, c, t.lockstep)
        scores = score_groups(t.reward_model, encode_groups(t.reward_model, rollout), c)
        check_finite(scores.rewards, rollout)
        rewards.append(gathered(scores.rewards, len(batch)))
        hidden.append(gathered(scores.prompt_hidden, len(batch)))
        gold.append(gathered(rollout.gold().to(t.device), len(batch)))
    rewards, gold = torch.cat(rewards).cpu(), torch.cat(gold).cpu()
    out["eval/reward"] = rewards.mean().item()
    known = ~torch.isnan(gold)
    if t.rule.anchor == "value":
        with torch.no_grad():
            values = t.reward_model.values(torch.cat(hidden)).cpu()
        require_finite("V of a held-out prompt", values, "value_head")
        out["eval/value_error"] = (values - rewards.mean(1)).abs().mean().item()
        out |= _correlation("eval/value_correlation", values, rewards.mean(1))
        out |= _correlation("eval/value_gold_correlation", values[known.all(1)], gold[known.all(1)].mean(1))
        if known.any():
            agree = (rewards > values[:, None]) == (gold > 0.5)
            out["eval/pseudo_label_accuracy"] = agree[known].float().mean().item()
    if known.any():
        out["eval/gold"] = gold.nanmean().item()
        accuracy = ranking_accuracy(rewards, gold)
        if accuracy == accuracy:
            out["eval/rm_accuracy_current"] = accuracy
    return out


def _correlation(name: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Pearson's correlation of two vectors under a name; nothing for fewer than three points or equal ones."""
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return {}
    return {name: torch.corrcoef(torch.stack([x, y]))[0, 1].item()}
