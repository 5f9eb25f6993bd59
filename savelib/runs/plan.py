"""The plan of a run as text, before it starts: memory and time."""

from __future__ import annotations

import textwrap

import pandas as pd

from savelib.config import Config
from savelib.runs.hours import PAPER_HOURS, hours_plan
from savelib.runs.memory import GIB, PROMPT_TOKENS, USABLE, fields_of, machine, memory_plan
from savelib.runs.sizes import Sizes, models_of


def describe_plan(
    config: Config, gpus: int | None = None, memory_gb: float | None = None, gpu: str | None = None
) -> str:
    """The plan as text: models, assumptions, table, and the first setting that fits with the flags that choose it.

    gpu: one of `hours.GPUS`, for which the time is added.
    """
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
    lines.append(_filled(_advice(config, frame, gpus)))
    return "\n".join(lines + ([_describe_hours(config, models, gpu)] if gpu else []))


def _filled(text: str) -> str:
    return textwrap.fill(text, 110, break_on_hyphens=False)


def _describe_hours(config: Config, models: tuple[Sizes, Sizes], gpu: str) -> str:
    """The table of times, what it assumes, and the paper's hours."""
    short = {
        "reward scoring": "scoring",
        "reference log-probs": "reference",
        "policy forward/backward": "policy update",
    }
    frame = hours_plan(config, models, gpu).rename(columns=short)
    setting = f"LoRA of rank {config.lora_rank}" if config.lora_rank else config.backend
    said = (
        f"{setting}, gradient_checkpointing={str(config.gradient_checkpointing).lower()}, {config.total_steps} steps; "
        "stages 1 and 2 and evaluations left out. No GPU has confirmed these numbers: they are the work of each phase "
        "over datasheet rates, of which a phase reaches a share that is assumed (savelib/runs/hours.py)."
    )
    table = frame.to_string(index=False, float_format="{:.1f}".format)
    title = f"seconds a step of each phase, and hours of the run, on {gpu.upper()} GPUs"
    return "\n".join(["", title, _filled(said), "", table, "", _filled(PAPER_HOURS)])


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
