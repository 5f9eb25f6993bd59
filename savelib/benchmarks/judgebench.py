"""JudgeBench (ScalerLab/JudgeBench, split gpt): 350 pairs of responses, one of them objectively right.

Decision A>B iff score_A > score_B; equal scores count as B>A. Overall is the share of right decisions over all pairs
(micro), as the benchmark's own script has it; `macro` is the plain mean of the four categories.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from savelib.benchmarks import rows as base
from savelib.benchmarks.rows import Benchmark, Row, Scores
from savelib.benchmarks.statistics import Result, Stratum
from savelib.config import ConfigError
from savelib.data.files import choice, text
from savelib.data.pairs_and_prompts import Preference

CATEGORIES = {  # beginning of `source` -> category
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


def rows(source: str) -> list[Row]:
    """Pairs (pair_id, source, question, response_A, response_B, label)."""
    return base.read_rows(source, "judgebench", "gpt", _row, BENCHMARK.files)


def _row(row: dict[str, Any], _: str) -> Row:
    origin = text(row, "source")
    group = next((name for prefix, name in CATEGORIES.items() if origin.startswith(prefix)), None)
    if group is None:
        raise ConfigError(f"column 'source' = {origin!r} must begin with one of {', '.join(CATEGORIES)}")
    facts = {"label": choice(row, "label", ("A>B", "B>A"))}
    responses = [text(row, "response_A"), text(row, "response_B")]
    return Row(text(row, "pair_id"), base.prompt(row, "question"), responses, facts, group)


def aggregate(rows: list[Row], scores: Scores) -> Result:
    """Accuracy over all pairs and by category; `macro` over the categories."""
    groups = base.grouped(base.scored(rows, scores))
    total, strata = sum(map(len, groups.values())), []
    for name in (name for name in CATEGORIES.values() if name in groups):
        right = [[float((a > b) == (row.facts["label"] == "A>B"))] for row, (a, b) in groups[name]]
        strata.append(Stratum(name, len(right) / total, [row.id for row, _ in groups[name]], np.array(right)))
    parts = {s.name: base.percent(s.value()) for s in strata}
    return Result(
        strata,
        parts,
        {s.name: len(s.ids) for s in strata},
        {"macro": float(np.mean(list(parts.values())))},
        [name for name in CATEGORIES.values() if name not in groups],
    )


def write_pairs(pairs: list[Preference], path: Path) -> Path:
    """Preference pairs as a file of JudgeBench's form, chosen first in every other row: a benchmark of one's own."""
    lines = []
    for i, pair in enumerate(pairs):
        texts, label = [pair.chosen, pair.rejected], "A>B"
        if i % 2:
            texts, label = texts[::-1], "B>A"
        row = {"pair_id": f"pair-{i}", "source": "mmlu-pro-own", "question": pair.prompt[-1]["content"], "label": label}
        lines.append(json.dumps(row | dict(zip(("response_A", "response_B"), texts, strict=True)), ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


BENCHMARK = Benchmark("judgebench", "ScalerLab/JudgeBench", 350, ("gpt*",), rows, aggregate, "pair_id")
