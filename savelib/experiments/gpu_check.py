"""What a first GPU has to confirm, in one table that can be pasted into an issue; under 10 minutes on one GPU.

Attention without NaN, steps equal to the CPU's, a resumed step, and steps of models of the paper's size with random
weights under LoRA, whose memory and seconds are held against the plan.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from savelib.config import Config, ConfigError, make_config
from savelib.experiments.cost import time_size
from savelib.experiments.cost_floor import rates
from savelib.experiments.cost_sizes import PHASES, SIZES, Size, bench_config, save_models
from savelib.models.compute import pick_device
from savelib.runs.checkpoint import load_optimizers, save_checkpoint
from savelib.runs.folder import LOGS
from savelib.runs.hours import GPUS, STEP_PHASES, Machine, step_seconds, work_of
from savelib.runs.memory import fields_of, memory_plan
from savelib.runs.sizes import models_of
from savelib.training.algorithm import prepare, save_step

STEPS = 3
TOLERANCE = 0.02  # of a metric, relative where it is above 1: a token may be drawn otherwise
RESUMED = 1e-3
MEMORY = (0.6, 1.1)  # measured over planned: the plan is for the longest prompts, and leaves the allocator's gaps out
SECONDS = (0.5, 2.0)  # the plan's shares of the datasheet's rates are assumed


@dataclass(frozen=True)
class Line:
    """One row of the table; ok: None where there is nothing to hold it against."""

    what: str
    found: str
    wanted: str = ""
    ok: bool | None = None


def check(device: str = "cuda", size: str = "paper512", values: dict[str, Any] | None = None) -> list[Line]:
    """Every check, on `device`: the table's lines. values: config fields of the short run, by default profile tiny's.

    Raises ConfigError without such a device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("gpu-check: PyTorch finds no GPU on this machine; run it where there is one")
    lines, where, values = about(device), pick_device(device), values or {}
    checks: list[Callable[[], list[Line]]] = [
        lambda: [attention(where)], lambda: short_run(device, values), lambda: [resumed(device, values)],
        lambda: full_size(SIZES[size]),
    ]  # fmt: skip
    for one in checks:
        try:
            lines += one()
        except Exception as error:  # the other checks are worth having all the same
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            lines.append(Line("stopped", said, "no error", False))
    return lines


def about(device: str) -> list[Line]:
    """Versions and the device's name."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "peft"))
    if device == "cpu":
        return [Line("device", "cpu"), Line("versions", versions)]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return [
        Line("device", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB"),
        Line("versions", f"{versions}, CUDA {torch.version.cuda}"),
    ]


def attention(device: torch.device) -> Line:
    """Forward and backward with a mask, rows that attend to nothing among them, at lengths of 64 modulo 128."""
    bad = []
    for length in (64, 128, 192, 320):
        q, k, v = (torch.randn(2, 4, length, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(2, 1, -1, -1).clone()
        mask[0, :, :, :40] = False  # padding on the left: its rows attend to nothing
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out[:, :, 40:].float().square().sum().backward()
        if not all(torch.isfinite(t).all() for t in (out, q.grad, k.grad, v.grad)):
            bad.append(length)
    return Line("masked attention in bfloat16", f"NaN at lengths {bad}" if bad else "finite", "finite", not bad)


def short_config(device: str, values: dict[str, Any]) -> Config:
    return make_config(**{"precision": "float32", "total_steps": STEPS} | values | {"device": device})


def short_run(device: str, values: dict[str, Any]) -> list[Line]:
    """Three steps on the device and on the CPU, in float32: the largest difference of a metric at each."""
    here, there = (prepare(short_config(name, values)) for name in ("cpu", device))
    lines = []
    for step in range(1, STEPS + 1):
        name, worst = furthest(save_step(there, step)[0], save_step(here, step)[0])
        found = f"{worst:.1e} ({name})"
        lines.append(Line(f"step {step} against the CPU's", found, f"at most {TOLERANCE}", worst <= TOLERANCE))
    return lines


def resumed(device: str, values: dict[str, Any]) -> Line:
    """A step after a checkpoint against the same step without it."""
    config = short_config(device, values)
    t = prepare(config)
    save_step(t, 1)
    with tempfile.TemporaryDirectory() as folder:
        for log in LOGS:
            (Path(folder) / log).touch()
        checkpoint = save_checkpoint(t, 1, Path(folder))
        again = prepare(config, checkpoint)
        load_optimizers(again, checkpoint)
    name, worst = furthest(save_step(again, 2)[0], save_step(t, 2)[0])
    return Line("resumed step 2", f"{worst:.1e} ({name})", f"at most {RESUMED}", worst <= RESUMED)


def furthest(found: dict[str, float], wanted: dict[str, float]) -> tuple[str, float]:
    """The metric that differs most, and by how much: relative where it is above 1. Times do not count."""
    far = {k: abs(found[k] - v) / max(1.0, abs(v)) for k, v in wanted.items() if not k.startswith("time") and v == v}
    name = max(far, key=far.get)
    return name, far[name]


def full_size(size: Size) -> list[Line]:
    """A warm-up and two steps of SAVE at this size: memory and seconds of each phase against the plan."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        save_models(size.shape, models, size.device)
        config = bench_config(size, models)
        sizes = models_of(config)
        if size.device == "cuda":
            torch.cuda.empty_cache()
        alone = replace(size, systems=("save",))
        rows = time_size("gpu-check", alone, models, 2, models / "log.txt")
    found = {name: min(row[name] for row in rows) for name in (*PHASES, "seconds", "peak_gb")}
    setting = "LoRA" if config.lora_rank else "ddp"
    plan = memory_plan(config.model_copy(update=fields_of(config, setting, False)), sizes, 1, 80.0)
    chosen = (plan["setting"] == setting) & (plan["checkpointing"] == config.gradient_checkpointing)
    seconds = step_seconds(work_of(config, 1), *sizes, machine(size.device))
    lines = [against("peak memory, GiB", found["peak_gb"], plan[chosen]["peak"].iloc[0], MEMORY, size.device)]
    for phase in STEP_PHASES[:-1]:
        lines.append(Line(f"{phase}, s", f"{found[phase]:.2f}", f"plan {seconds[phase]:.2f}"))
    return [*lines, against("a step, s", found["seconds"], sum(seconds.values()), SECONDS, size.device)]


def against(what: str, found: float, planned: float, within: tuple[float, float], device: str) -> Line:
    """A measured number beside the plan's; a verdict on a GPU only: the plan is for those."""
    low, high = within
    ok = low <= found / planned <= high if device == "cuda" else None
    return Line(what, f"{found:.2f}", f"plan {planned:.2f}, {low} to {high} times that", ok)


def machine(device: str) -> Machine:
    """The datasheet's rates of this GPU; the measured ones of one that is in no table, or of the CPU."""
    name = torch.cuda.get_device_name(0).lower() if device == "cuda" else ""
    known = next((gpu for key, gpu in GPUS.items() if key in name), None)
    if known:
        return known
    rate = rates(device)
    return Machine(rate["flops_per_second"], rate["flops_per_second"], rate["bytes_per_second"])


def as_table(lines: list[Line]) -> str:
    """The lines as a Markdown table, and a last one that counts what failed."""
    said = {True: "ok", False: "FAILED", None: ""}
    rows = [(line.what, line.found, line.wanted, said[line.ok]) for line in lines]
    failed = sum(line.ok is False for line in lines)
    held = sum(line.ok is not None for line in lines)
    table = ["| check | found | wanted | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*table, "", f"{held - failed} of {held} checks passed"])
