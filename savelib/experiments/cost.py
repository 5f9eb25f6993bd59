"""What a step costs: TRL's GRPO, the same with SAVE, our GRPO (rule frozen) and our SAVE, on the same work.

Each system runs in a process of its own, so that its peak memory is its own. The processes take turns, a step each
(A, B, C, A, B, C, ...), so that a machine that is slow for a while is slow for all; a ratio is taken within a round.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from savelib.config import ConfigError
from savelib.experiments.cost_floor import floor, rates, rollout_gb, this_machine
from savelib.experiments.cost_report import bars, medians
from savelib.experiments.cost_sizes import GROWTH, LEARNING, OF_TRL, SIZES, SYSTEMS, Size, bench_config, save_models
from savelib.paths import project_root, runs_dir, writable_folder, write_atomically
from savelib.runs.sizes import model_sizes


class System:
    """A system in its process. Raises ConfigError with the last line of its log when it stops."""

    def __init__(self, name: str, size: Size, models: Path, steps: int, log: Path):
        self.name, self.log = name, log
        config = bench_config(size, models, "save" if name in LEARNING else "frozen")
        spec = json.dumps({"system": name, "config": config.model_dump(), "steps": steps})
        env = os.environ | {"SAVE_CACHE": str(models / "cache"), "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(project_root()), env.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "savelib.experiments.cost_worker", spec], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log.open("a"), text=True, env=env,
        )  # fmt: skip

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()

    def answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()  # until then its log may lack the last lines
            said = self.log.read_text().strip().splitlines() or ["nothing"]
            raise ConfigError(f"bench: {SYSTEMS[self.name]} stopped: {said[-1]} (its log: {self.log})")
        return json.loads(line)

    def turn(self) -> dict[str, float]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


def time_size(name: str, size: Size, models: Path, repeats: int, log: Path) -> list[dict[str, Any]]:
    """A row per (system, repeat), after one round of warm-up. On a GPU the systems run one after the other: for memory.

    Raises ConfigError where a system did not sample exactly size.new tokens, or did not learn from all responses.
    """
    systems = [s for s in size.systems if s not in OF_TRL or has_trl()]
    rows = []
    for together in [systems] if size.device == "cpu" else [[s] for s in systems]:
        with ExitStack() as stack:
            started = [stack.enter_context(System(s, size, models, repeats + 1, log)) for s in together]
            threads = {s.answer()["threads"] for s in started}  # each says so when it is ready
            if len(threads) > 1:
                raise ConfigError(f"bench: the systems use {sorted(threads)} threads; set OMP_NUM_THREADS")
            for repeat in range(repeats + 1):
                for s in started:
                    made = s.turn()
                    _check(size, s, made)
                    if repeat:
                        rows.append({"size": name, "system": s.name, "repeat": repeat} | made)
    shape = {"batch_size": size.batch, "group_size": size.group, "prompt": size.prompt, "new": size.new}
    return [row | shape | {"naive_rm_tokens": size.naive_rm_tokens} for row in rows]


def _check(size: Size, system: System, made: dict[str, float]) -> None:
    wanted = {"tokens": size.new, "used": size.batch * size.group}
    wrong = {k: made[k] for k, v in wanted.items() if made[k] != v}
    if wrong:
        raise ConfigError(f"bench: {SYSTEMS[system.name]} has {wrong} where {wanted} is asked for: not comparable")


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


def run(sizes: list[str], repeats: int, out: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Measure the sizes (names of SIZES, or growth) into a folder: results.json, steps.csv, log.txt. Returns it."""
    unknown = [s for s in sizes if s not in (*SIZES, "growth")]
    if unknown:
        raise ConfigError(f"sizes = {','.join(unknown)!r}: valid names are {', '.join((*SIZES, 'growth'))}")
    if repeats < 1:
        raise ConfigError(f"repeats = {repeats}: give at least 1, for a verdict 7")
    plan = {name: (size, repeats) for name, size in SIZES.items() if name in sizes}
    plan |= {name: (size, 1) for name, size in GROWTH.items() if "growth" in sizes}
    if any(size.device == "cuda" for size, _ in plan.values()) and not torch.cuda.is_available():
        raise ConfigError(f"sizes = {','.join(sizes)!r}: the paper's shapes need CUDA, which is not here")
    out = writable_folder("out", out or runs_dir() / f"bench-{time.strftime('%Y%m%d-%H%M%S')}", {})
    out.mkdir(parents=True, exist_ok=True)
    results = {"machine": this_machine(), "repeats": repeats, "systems": list(SYSTEMS), "rates": {}, "floors": {}}
    results["sizes"] = {name: asdict(size) for name, (size, _) in plan.items()}
    if not has_trl():
        results["systems"] = [s for s in SYSTEMS if s not in OF_TRL]
        say("trl is not installed: its columns are left out")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, count) in plan.items():
            models = Path(folder) / size.shape
            if not models.exists():
                save_models(size.shape, models, size.device)
            if size.device not in results["rates"]:
                results["rates"][size.device] = rates(size.device)
            rows += time_size(name, size, models, count, out / "log.txt")
            both = [model_sizes(str(models / kind), f"{kind}_model") for kind in ("policy", "reward")]
            rate = results["rates"][size.device]
            results["floors"][name] = {s: floor(size, *both, rate, s) for s in size.systems}
            results.setdefault("rollout_gb", {})[name] = rollout_gb(size, both[0])
            pd.DataFrame(rows).to_csv(out / "steps.csv", index=False)
            say(f"{name}: " + ", ".join(f"{s} {x:.2f} s" for s, x in medians(pd.DataFrame(rows), name).items()))
    results["bars"] = bars(pd.DataFrame(rows), results["rollout_gb"])
    write_atomically(out / "results.json", json.dumps(results, indent=2))
    return out
