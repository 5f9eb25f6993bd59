"""The seconds below which no program on this machine comes, and what the figures depend on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from savelib.experiments.cost_sizes import LEARNING, PHASES, Size
from savelib.runs.hours import STEP_PHASES, Machine, Work, step_seconds
from savelib.runs.memory import GIB, cache_bytes
from savelib.runs.sizes import Sizes
from savelib.training.metrics import Clock


def this_machine() -> dict[str, Any]:
    """What the figures depend on: cores, threads, memory, versions, and the two rates of the floor."""
    packages = ("torch", "transformers", "trl", "accelerate", "numpy")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": model or platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, "gpu": gpu,
        "load_before": os.getloadavg()[0], "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


def rates(device: str) -> dict[str, float]:
    """Best of several: FLOP/s of a square matmul (float32; bfloat16 on CUDA), bytes/s of a copy, read and written."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    source = torch.ones(2**27, device=device)  # 512 MiB, beyond any cache
    target, clock = torch.empty_like(source), Clock(torch.device(device))

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(7):
            start = clock.now()
            work()
            seconds.append(clock.now() - start)
        return min(seconds)

    return {
        "flops_per_second": 2 * n**3 / best(lambda: a @ b),
        "bytes_per_second": 2 * 4 * source.numel() / best(lambda: target.copy_(source)),
    }


def floor(size: Size, policy: Sizes, reward: Sizes, rate: dict[str, float], system: str) -> dict[str, float]:
    """Seconds by phase below which no program on this machine comes: each token once, a prompt once a group.

    FLOPs over the matmul's rate; decoding: that, or weights and keys and values read once a token over the bandwidth.
    """
    work = Work(
        size.batch, size.group, size.prompt, size.new, width=4 if size.device == "cpu" else 2, repeated=False,
        rank=size.fields.get("lora_rank", 0), rm_steps=int(system in LEARNING),
    )  # fmt: skip
    speed, whole = rate["flops_per_second"], dict.fromkeys(STEP_PHASES, 1.0)
    seconds = step_seconds(work, policy, reward, Machine(speed, speed, rate["bytes_per_second"], efficiency=whole))
    return {phase: seconds.get(phase, 0.0) for phase in PHASES}


def rollout_gb(size: Size, policy: Sizes) -> float:
    """What sampling has to hold at once: keys and values."""
    at_once = min(size.batch * size.group, size.fields["rollout_rows"])
    return cache_bytes(policy, at_once, size.prompt + size.new, size.device == "cuda") / GIB
