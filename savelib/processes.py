"""Ranks, shares and sums of a run's processes.

Callers never check the number of processes: with one, share() returns the whole list and summed() its arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
MEETING = "SAVE_MEETING"  # environment variable: the file by which a run's processes find each other, as file://...


def main_first(build: Callable[..., T], *arguments: Any) -> T:
    """Call build(*arguments) on the main process first, then on the others, which find its cache filled."""
    if not is_main():
        wait()
    made = build(*arguments)
    if is_main():
        wait()
    return made


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_main():
        print(line, flush=True)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def launched_by_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def share(rows: list, repeat: bool = True) -> list:
    """This process's part of a list, in order. repeat: all get equally many, the list's last row filling up."""
    each = -(-len(rows) // world_size())
    mine = rows[rank() * each : (rank() + 1) * each]
    return mine + rows[-1:] * (each - len(mine)) if repeat else mine


def gathered(tensor: Tensor, count: int | None = None) -> Tensor:
    """All processes' rows [W * n, ...] of a tensor [n, ...] of one shape everywhere; the first `count`, if given."""
    if world_size() > 1:
        source = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
        parts = [torch.empty_like(source) for _ in range(world_size())]
        dist.all_gather(parts, source.contiguous())
        tensor = torch.cat(parts).to(tensor.dtype)
    return tensor[:count]


def summed(*values: float) -> list[float]:
    """Each number's sum over all processes."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest(*values: float) -> list[float]:
    """Each number's maximum over all processes."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: tuple[float, ...], how: Any) -> list[float]:
    if world_size() == 1:
        return [float(v) for v in values]
    tensor = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, how)
    return tensor.tolist()


def wait() -> None:
    """Wait until every process gets here."""
    if world_size() > 1:
        dist.barrier()


def told(value: Any) -> Any:
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
