"""The plan of a run as text, before it starts."""

from __future__ import annotations

import textwrap

import pandas as pd

from savelib.config import Config
from savelib.runs.memory import GIB, PROMPT_TOKENS, USABLE, fields_of, machine, memory_plan
from savelib.runs.sizes import models_of


def describe_plan(config: Config, gpus: int | None = None, memory_gb: float | None = None) -> str:
    """The plan as text: models, assumptions, table, and the first setting that fits with the flags that choose it."""
    gpus, memory_gb = machine(config, gpus, memory_gb)
    models = models_of(config)
    frame = memory_plan(config, models, gpus, memory_gb)
    rows, rank = config.micro_batch_responses, config.lora_rank or 64
    lines = [f"profile {config.profile} on {gpus} GPU{'s' * (gpus > 1)} of {memory_gb:g} GiB"]
    for field, m in zip(("policy_model", "reward_model"), models, strict=True):
        said = f"{field} {m.name}: {m.total / 1e6:,.1f} M parameters, LoRA of rank {rank} trains "
        lines.append(said + f"{sum(m.adapters(rank)) / 1e6:.1f} M")
        lines += ["  (the hub is out of reach: the sizes are those published)"] * m.published
    vocab = models[0].vocab
    lines += [
        f"prompts of {min(config.max_prompt_tokens, PROMPT_TOKENS)} tokens, responses of {config.max_new_tokens}, "
        f"{config.rollout_rows} sampled at a time",
        f"micro-batches: reward model {config.micro_batch_groups} x {config.group_size} responses; policy {rows}, "
        f"whose log-probabilities take {12 * rows * config.max_new_tokens * vocab / GIB:.1f} GiB",
        f"GiB per GPU; `fits`: the peak is within {USABLE:.0%} of the memory, the rest is for CUDA and fragments",
        "",
    ]
    short = {
        "checkpointing": "ckpt", "policy weights": "policy", "reference": "ref.", "reward weights": "reward",
        "gradients": "grads", "optimizer": "optim.", "activations": "activ.", "CPU memory": "CPU",
    }  # fmt: skip
    words = {"fits": {True: "fits", False: "no"}, "ckpt": {True: "yes", False: "no"}}
    shown = frame.rename(columns=short)
    shown = shown.assign(**{column: shown[column].map(said) for column, said in words.items()})
    lines += [shown.to_string(index=False, float_format="{:.1f}".format), ""]
    return "\n".join(lines + [textwrap.fill(_advice(config, frame, gpus), 110, break_on_hyphens=False)])


def _advice(config: Config, frame: pd.DataFrame, gpus: int) -> str:
    """One sentence: the first setting that fits with its flags, or what would help."""
    if not frame["fits"].any():
        least = frame.loc[frame["peak"].idxmin()]
        tokens = f"max_new_tokens = {config.max_new_tokens}"
        helps = {
            "policy": f"micro_batch_responses = {config.micro_batch_responses} or {tokens}",
            "reward": f"group_size = {config.group_size} or {tokens}",
            "step": "the models' size",
        }
        lower = helps.get(least["peak in"], f"rollout_rows = {config.rollout_rows}")
        return (
            f"Nothing fits: {least['setting']} needs least, {least['peak']:.1f} GiB in phase {least['peak in']!r}; "
            f"lower {lower}, or take GPUs with more memory."
        )
    best = frame[frame["fits"]].iloc[0]
    wanted = fields_of(config, best["setting"], bool(best["checkpointing"])) | {"num_processes": gpus}
    flags = [f"--set {k}={str(v).lower()}" for k, v in wanted.items() if v != getattr(config, k)]
    said = f"First that fits, the most faithful to the paper first: {best['setting']}, with "
    said += " ".join(flags) or f"profile {config.profile} as it is"
    new_to_lora = wanted["lora_rank"] and not config.lora_rank
    return said + (" (learning rates for LoRA: --profile single_gpu)" if new_to_lora else "")
