"""What each metric of a run is, and which way is better."""

from __future__ import annotations

import textwrap

# column of metrics.jsonl -> (what it is, which way is better: "higher", "lower" or "" where neither is)
METRICS: dict[str, tuple[str, str]] = {
    "seconds": ("seconds since the start", ""),
    "eval/rm_accuracy": ("reward model, held-out pairs (accuracy)", "higher"),
    "eval/rm_accuracy_current": ("reward model, current responses (accuracy)", "higher"),
    "eval/gold": ("policy, held-out prompts (gold)", "higher"),
    "eval/reward": ("policy, held-out prompts (reward)", ""),
    "eval/value_error": ("|V - mean R| on held-out prompts", "lower"),
    "eval/value_correlation": ("correlation of V with mean R over held-out prompts", "higher"),
    "eval/value_gold_correlation": ("correlation of V with mean gold over held-out prompts", "higher"),
    "eval/pseudo_label_accuracy": ("signs of R - V that agree with gold, held-out prompts", "higher"),
    "threshold": ("threshold mu(t), eq. 14", ""),
    "reward/mean": ("mean reward R of the batch", ""),
    "reward/std_in_group": ("spread of R within a group (sd)", ""),
    "reward/skew_in_group": ("skewness of R within a group", ""),
    "gold/success_rate": ("share of right responses in the batch (gold)", "higher"),
    "gold/pseudo_label_accuracy": ("pseudo-labels that agree with gold", "higher"),
    "filter/kept": ("share of responses kept, eq. 15", ""),
    "filter/positive": ("share of responses that are positive, eq. 16", ""),
    "filter/negative": ("share of responses that are negative, eq. 16", ""),
    "filter/valid_prompts": ("share of prompts with both sides, eq. 17", ""),
    "value/mean": ("mean prompt value V of the batch", ""),
    "value/error": ("|V - mean R| of the batch", "lower"),
    "value/lag": ("mean of V - mean R of a group, in spreads of R within a group", ""),
    "value/loss": ("lambda_V L_V, eq. 21", "lower"),
    "force/pull": ("A: force on the positives, up", ""),
    "force/push": ("D: force on the negatives, down", ""),
    "rm/loss": ("loss of the reward model (L_R of eq. 20, or the rule's)", ""),
    "rm/grad_norm": ("gradient norm of the reward model", ""),
    "rm/groups": ("groups with a loss", ""),
    "rm/mirrored": ("1 in steps that push up instead of down (save_checked)", ""),
    "guard/z": ("at the end of a block: z of the guard pairs' margins against the last block that stayed", "higher"),
    "guard/accepted": ("blocks that stayed so far (save_checked)", ""),
    "guard/undone": ("blocks that were undone so far (save_checked)", ""),
    "guard/resting": ("1 in steps without an update of the reward model (save_checked)", ""),
    "guard/form": ("which loss the block runs: 0 SAVE, 1 its mirror image (save_checked)", ""),
    "rm/difference": ("MetaRM's J: how far the reward model tells the policy's responses apart", ""),
    "rm/pairs": ("preference pairs with a loss", ""),
    "process/loss": ("loss of PRIME's process reward model", "lower"),
    "process/accuracy": ("responses that PRIME's process reward model puts on the outcome's side", "higher"),
    "policy/loss": ("loss of the policy", ""),
    "policy/kl": ("KL to the initial policy, per token", ""),
    "policy/kl_response": ("KL to the initial policy, nats per response", ""),
    "policy/grad_norm": ("gradient norm of the policy", ""),
    "policy/kept": ("share of responses kept by the updated reward model", ""),
    "policy/responses": ("responses that the policy learnt from", ""),
    "response/tokens": ("tokens per response", ""),
    "response/unfinished": ("share of responses without an end token, left out of the RM update (F.1)", "lower"),
    "time/rollout": ("seconds for sampling", "lower"),
    "time/reward_model": ("seconds for the reward model's update", "lower"),
    "time/policy": ("seconds for the policy's update", "lower"),
    "time/tokens_per_second": ("sampled tokens per second of the whole step, all processes", "higher"),
    "memory/peak_gb": (
        "peak memory in the step, of the process that needs most; on CUDA the allocator's (GiB)",
        "lower",
    ),
}


BEFORE_AFTER = ("eval/rm_accuracy", "eval/rm_accuracy_current", "eval/gold", "eval/reward")


def axis_label(column: str, prefix: str = "") -> str:
    """What a metric is and which way is better, in lines short enough for an axis."""
    name, better = METRICS[column]
    return "\n".join([*textwrap.wrap(prefix + name, 34), *([f"({better} is better)"] if better else [])])


def in_title(column: str, width: int = 60) -> str:
    """What a metric is, as the title of a figure."""
    name = METRICS[column][0]
    return "\n".join(textwrap.wrap(name[0].upper() + name[1:], width))


def better(column: str, of: str = "") -> str:
    """Which way a metric is better, below what is drawn of it, for an axis under such a title."""
    way = METRICS[column][1]
    return "\n".join(line for line in (of, f"({way} is better)" if way else "") if line)
