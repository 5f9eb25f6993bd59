"""The cost benchmark's results: read, summarised, compared with their bars, and as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from savelib.experiments.cost_sizes import GROWTH, PHASES, SIZES, SYSTEMS

OVERHEAD = "step time, SAVE / our GRPO"
BARS = (  # what, column, system, against, at most, at the sizes; `naive`: tokens of three padded passes
    ("step time, SAVE / TRL's GRPO", "seconds", "save", "trl", 1.0, ("quick", "a", "b", "c")),
    (OVERHEAD, "seconds", "save", "grpo", 1.25, ("quick", "a")),
    (OVERHEAD, "seconds", "save", "grpo", 1.15, ("a256",)),
    ("step time, TRL + SAVE / TRL's GRPO", "seconds", "trl_save", "trl", 1.3, ("a",)),
    ("peak memory, SAVE / TRL's GRPO", "peak_gb", "save", "trl", 1.0, ("quick", "b", "c")),
    ("RM tokens, SAVE / three padded passes", "rm_tokens", "save", "naive", 0.5, ("quick", "b")),
)


def load(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """(results.json, steps.csv with a row per size, system and repeat)."""
    return json.loads((Path(folder) / "results.json").read_text()), pd.read_csv(Path(folder) / "steps.csv")


def medians(steps: pd.DataFrame, size: str, column: str = "seconds") -> pd.Series:
    """The column's median over the repeats, one value a system."""
    return steps[steps["size"] == size].groupby("system", sort=False)[column].median()


def phases(steps: pd.DataFrame, size: str) -> pd.DataFrame:
    """Median seconds of each phase (rows) for each system (columns), and of the step."""
    here = steps[steps["size"] == size].groupby("system", sort=False)
    return here[[*PHASES, "seconds"]].median().T.rename(index={"seconds": "step"})


def paired(steps: pd.DataFrame, size: str, column: str, system: str, against: str) -> np.ndarray:
    """The column's ratio of two systems in each round [repeats]; against `naive`: three padded passes' tokens."""
    here = steps[steps["size"] == size].set_index("repeat")
    first = here[here["system"] == system]
    second = first["naive_rm_tokens"] if against == "naive" else here[here["system"] == against][column]
    return (first[column] / second).dropna().to_numpy()


def bars(steps: pd.DataFrame, rollout_gb: dict[str, float]) -> list[dict[str, Any]]:
    """Each bar that these steps can judge: its ratio (median, lowest and highest round), its limit, whether reached."""
    judged = [
        (what, size, limit, paired(steps, size, column, system, against))
        for what, column, system, against, limit, sizes in BARS
        for size in sizes
    ]
    peak = steps[steps["system"] == "save"].groupby("size")["peak_gb"].median()
    if {"B=8", "B=32"} <= set(peak.index):
        judged.append(("peak memory, B 32 / B 8", "a", 1.05, np.array([peak["B=32"] / peak["B=8"]])))
    if {"G=4", "G=32"} <= set(peak.index):
        growth = (peak["G=32"] - peak["G=4"]) / (rollout_gb["G=32"] - rollout_gb["G=4"])
        judged.append(("growth of peak memory from G 4 to 32 / that of the rollout", "a", 1.0, np.array([growth])))
    return [
        {"bar": what, "size": size, "ratio": float(np.median(r)), "low": float(r.min()), "high": float(r.max()),
         "at most": limit, "reached": bool(np.median(r) <= limit), "rounds": len(r)}
        for what, size, limit, r in judged if len(r)
    ]  # fmt: skip


def report(folder: Path) -> str:
    """The tables as text: seconds by phase beside the floor, memory, tokens, growth, and the bars with their marks."""
    results, steps = load(folder)
    form = {"float_format": "{:.3f}".format, "na_rep": "-"}
    m = results["machine"]
    lines = [f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, load {m['load_before']:.1f} at the start"]
    lines += [f"{d}: {r['flops_per_second'] / 1e9:,.0f} GFLOP/s, {r['bytes_per_second'] / 1e9:,.0f} GB/s"
              for d, r in results["rates"].items()]  # fmt: skip
    for name in [s for s in results["sizes"] if s in SIZES]:
        s = results["sizes"][name]
        lines += [
            "",
            f"size {name}: {s['shape']}, B {s['batch']}, G {s['group']}, prompt {s['prompt']}, {s['new']} new",
        ]
        table = phases(steps, name)
        for system in ("grpo", "save"):
            below = pd.Series(results["floors"][name][system])
            table[f"floor {system}"] = pd.concat([below, pd.Series({"step": below.sum()})])
        for column in ("cpu_seconds", "peak_gb", "base_gb", "rm_tokens", "groups"):
            table.loc[column] = medians(steps, name, column)
        tokens = medians(steps, name, "tokens") * s["batch"] * s["group"]
        table.loc["rollout tokens/s"] = tokens / medians(steps, name, "rollout")
        lines.append(table.rename(columns=SYSTEMS).to_string(**form))
    grown = steps[steps["size"].isin(GROWTH)].set_index("size")
    if len(grown):
        columns = ["seconds", "rollout", "RM update", "reward scoring", "policy forward/backward", "peak_gb"]
        lines += ["", "SAVE around size a", grown[columns].to_string(**form)]
    lines += ["", f"bars: median of the rounds' ratios, lowest and highest ({results['repeats']} rounds)"]
    for b in results["bars"]:
        mark = "reached" if b["reached"] else "NOT reached"
        spread = f"[{b['low']:.3f}, {b['high']:.3f}]"
        if b["bar"] == OVERHEAD:
            floors = [sum(results["floors"][b["size"]][system].values()) for system in ("save", "grpo")]
            mark += f"; the floors' own ratio is {floors[0] / floors[1]:.2f}"
        lines.append(f"  {b['bar']:60}{b['size']:>6}{b['ratio']:8.3f} {spread:16} <= {b['at most']:.2f}  {mark}")
    return "\n".join(lines)
