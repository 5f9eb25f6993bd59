"""Device, precision, seeds and memory."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from savelib.config import ConfigError


def reset_peak_memory(device: torch.device) -> None:
    """Let the next reading be the peak from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """GiB since the last reset: the allocator's peak on CUDA, the process's resident peak elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20  # KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def pick_device(name: str, threads: int = 0) -> torch.device:
    """The device of that name, `auto` being CUDA where there is one; from now on `threads` CPU threads (0: torch's).

    On CUDA cuDNN's attention is switched off: with a mask its backward gives NaN at lengths of 64 modulo 128 (PyTorch
    issue 196678, TRL issue 7181), and rows that attend to nothing, such as the padding of shared prefixes, can be NaN
    (unsloth issue 9848). The memory-efficient kernel, which PyTorch takes next, gives 0 for such rows.
    """
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def in_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether linear layers and attention compute in bfloat16: CUDA unless float32, a CPU if asked to and if it can.

    Processors with AMX have AVX512-BF16 too. On an AMD EPYC without AMX a product of [96, 576] and [576, 1536], as in
    SmolLM2, has 160 to 180 GFLOP/s in bfloat16 and 71 to 75 in float32; eight such MLPs forward and backward under
    autocast are 1.9 times faster with 512 tokens, 1.4 with 96, and slower below about 50, where autocast's rounding
    of the weights takes longest (`rounded` takes it out of sampling). Without the instructions it never pays.
    """
    if device.type == "cuda":
        return precision != "float32"
    return precision == "bfloat16_cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bfloat16 arithmetic where `in_bfloat16` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device, precision))


@contextlib.contextmanager
def rounded(model: nn.Module, on: bool) -> Iterator[None]:
    """Inside, the weights are rounded to bfloat16: autocast would round all of them again for each token."""
    whole = [p.data for p in model.parameters()] if on else []
    try:
        for parameter, data in zip(model.parameters(), whole, strict=False):
            parameter.data = data.bfloat16()
        yield
    finally:
        for parameter, data in zip(model.parameters(), whole, strict=False):
            parameter.data = data


@contextlib.contextmanager
def recomputing(model: nn.Module, on: bool) -> Iterator[None]:
    """Gradient checkpointing for the forwards inside. Only the layers' own flag is set, so dropout stays off.

    Nothing random is computed, so the generators' states are not kept for the second forward.
    """
    on = on and torch.is_grad_enabled()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if on else []
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def is_recomputing(model: nn.Module) -> bool:
    return any(
        m.gradient_checkpointing and m.training for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    )


def seed_everything(*parts: int | str) -> None:
    """Seed torch from a few numbers or names; each step has its own seed, so a resumed run draws the same."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7]))
