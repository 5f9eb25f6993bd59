"""RewardBench (allenai/reward-bench, split filtered): 2,985 pairs in 23 subsets and 4 sections.

Right iff score_chosen > score_rejected. A section is the weighted mean of its subsets' accuracies, overall the plain
mean of the four sections; the prior sets of the leaderboard's first version are not in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from savelib.benchmarks import rows as base
from savelib.benchmarks.rows import Benchmark, Row, Scores
from savelib.benchmarks.statistics import Result, Stratum
from savelib.data.files import choice, label, text

SECTIONS = {  # section -> subset -> weight: its number of rows, but for math-prm, which has 447
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
SUBSETS = [subset for subsets in SECTIONS.values() for subset in subsets]


def rows(source: str) -> list[Row]:
    """Pairs (id, prompt, chosen, rejected, subset)."""
    return base.read_rows(source, "rewardbench", "filtered", _row, BENCHMARK.files)


def _row(row: dict[str, Any], _: str) -> Row:
    responses = [text(row, "chosen"), text(row, "rejected")]
    return Row(label(row, "id"), base.prompt(row), responses, group=choice(row, "subset", SUBSETS))


def aggregate(rows: list[Row], scores: Scores) -> Result:
    """Accuracy of each section and subset. A section's weights are those of the subsets that the data have."""
    groups = base.grouped(base.scored(rows, scores))
    present = {s: {k: w for k, w in subsets.items() if k in groups} for s, subsets in SECTIONS.items()}
    present = {section: subsets for section, subsets in present.items() if subsets}
    strata, parts, counts = [], {}, {}
    for section, subsets in present.items():
        found = []
        for name, weight in subsets.items():
            credit = np.array([[float(chosen > rejected)] for _, (chosen, rejected) in groups[name]])
            share = weight / sum(subsets.values()) / len(present)
            found.append(Stratum(f"{section}/{name}", share, [row.id for row, _ in groups[name]], credit))
        parts[section] = base.percent(sum(s.weight * s.value() for s in found) * len(present))
        counts[section] = sum(len(s.ids) for s in found)
        strata += found
    parts |= {s.name.split("/")[1]: base.percent(s.value()) for s in strata}
    counts |= {s.name.split("/")[1]: len(s.ids) for s in strata}
    return Result(strata, parts, counts, missing=[name for name in SUBSETS if name not in groups])


BENCHMARK = Benchmark("rewardbench", "allenai/reward-bench", 2985, ("filtered*",), rows, aggregate)
