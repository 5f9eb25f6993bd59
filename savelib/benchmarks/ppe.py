"""PPE (lmarena-ai): human votes (Preference) and responses known to be right or wrong (Correctness).

Not verified against the benchmark's own code, which could not be read:
- Preference: that tied votes are left out, and that equal scores count as wrong.
- Correctness: that pairs are pooled over a set's questions, that pairs named twice count twice, that equal scores count
  as wrong, and that overall is the plain mean of the five sets. Pairs are indices from 0, as other users read them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from savelib.benchmarks import rows as base
from savelib.benchmarks.rows import Benchmark, Row, Scores
from savelib.benchmarks.statistics import Result, Stratum
from savelib.config import ConfigError
from savelib.data.files import column, label, number, text
from savelib.paths import resolve

FLAGS = ("hard_prompt", "easy_prompt", "if_prompt", "math_prompt", "is_code")  # columns of Preference
SETS = ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval")  # 512 questions each, MBPP-Plus 507


def preference_rows(source: str) -> list[Row]:
    """Votes (question_id, prompt, response_1, response_2, winner); those that end in a tie do not count."""
    return base.read_rows(source, "ppe_preference", "test", _vote, PREFERENCE.files)


def _vote(row: dict[str, Any], _: str) -> Row:
    winner = text(row, "winner")
    tied = winner.startswith("tie")
    if winner not in ("model_a", "model_b") and not tied:
        raise ConfigError(f"column 'winner' = {winner!r} must be model_a, model_b or begin with tie")
    facts = {"winner": winner, "flags": [name for name in FLAGS if row.get(name) is True]}
    responses = [text(row, "response_1"), text(row, "response_2")]
    return Row(label(row, "question_id"), base.prompt(row), responses, facts, counts=not tied)


def aggregate_preference(rows: list[Row], scores: Scores) -> Result:
    """Share of the decided votes that the higher score agrees with; parts: the same on prompts with a flag."""
    found = base.scored(rows, scores)
    right = [float(a > b if row.facts["winner"] == "model_a" else b > a) for row, (a, b) in found]
    both = list(zip(found, right, strict=True))
    chosen = {flag: [r for (row, _), r in both if flag in row.facts["flags"]] for flag in FLAGS}
    return Result(
        [Stratum("votes", 1.0, [row.id for row, _ in found], np.array(right)[:, None])],
        {flag: base.percent(np.mean(values)) for flag, values in chosen.items() if values},
        {"decided": len(found), "tied": len(rows) - len(found)} | {f: len(v) for f, v in chosen.items() if v},
    )


def correctness_rows(source: str) -> list[Row]:
    """Questions (question_id, prompt, response_1..K, scores[K], sampled_conflict_pairs) of one set or of all five.

    source: a file or hub id of one set, a folder with files or folders named after the sets, or a hub id with `*` in
    the place of a set's name. Questions without a conflict do not count.
    """
    if "*" in source:
        parts = [source.replace("*", name) for name in SETS]
    elif Path(resolve(source)).is_dir():
        parts = [str(f) for f in base.matching(Path(resolve(source)), ("*",)) if _set(str(f), resolve(source))]
        if not parts:
            raise ConfigError(f"ppe_correctness = {source!r}: the folder has no file named after {' or '.join(SETS)}")
    else:
        parts = [source]
    top = resolve(source) if len(parts) > 1 else ""
    rows = [
        row
        for part in parts
        for row in base.read_rows(part, "ppe_correctness", "train", _question(_set(part, top) or Path(part).stem))
    ]
    return base.distinct(rows, f"ppe_correctness = {source!r}")


def _set(name: str, folder: str = "") -> str | None:
    """The set that the last part of a path or hub id to name one (below the folder) names."""
    for part in reversed(Path(name.removeprefix(folder)).parts):
        words = re.sub("[^a-z]", "", part.lower())
        for found in SETS:
            if re.sub("[^a-z]", "", found.lower()) in words:
                return found
    return None


def _question(name: str):
    def convert(row: dict[str, Any], _: str) -> Row:
        truth, pairs = column(row, "scores"), column(row, "sampled_conflict_pairs")
        for field, values in (("scores", truth), ("sampled_conflict_pairs", pairs)):
            if not isinstance(values, list):
                raise ConfigError(f"column {field!r} must be a list, not {str(values)[:60]!r}")
        responses = [text(row, f"response_{k}") for k in range(1, len(truth) + 1)]
        if f"response_{len(truth) + 1}" in row:
            raise ConfigError(f"column 'scores' has {len(truth)} values, fewer than there are responses")
        for i, score in enumerate(truth):
            number(score, f"column 'scores[{i}]'")
        for pair in pairs:
            known = isinstance(pair, list) and all(type(k) is int and 0 <= k < len(truth) for k in pair)
            if not known or len(pair) != 2 or truth[pair[0]] == truth[pair[1]]:
                raise ConfigError(f"column 'sampled_conflict_pairs': {pair} is no pair of a right and a wrong response")
        ordered = [(i, j) if truth[i] > truth[j] else (j, i) for i, j in pairs]  # the better one first
        question = label(row, "question_id")
        return Row(question, base.prompt(row), responses, {"pairs": ordered}, name, bool(ordered))

    return convert


def aggregate_correctness(rows: list[Row], scores: Scores) -> Result:
    """Share of each set's conflict pairs that the scores order rightly; overall is the plain mean of the sets.

    Data of one set alone give that set's figure.
    """
    groups = base.grouped(base.scored(rows, scores))
    strata = []
    for name, found in groups.items():
        right = [[values[i] > values[j] for i, j in row.facts["pairs"]] for row, values in found]
        credit = np.array([[np.mean(r), sum(r), len(r)] for r in right])  # [questions, 3]
        strata.append(Stratum(name, 1 / len(groups), [row.id for row, _ in found], credit, pooled))
    pairs = {f"{s.name} pairs": int(s.credit[:, 2].sum()) for s in strata}
    return Result(
        strata,
        {s.name: base.percent(s.value()) for s in strata},
        {s.name: len(s.ids) for s in strata} | pairs | {"without a conflict": sum(not row.counts for row in rows)},
        missing=[name for name in SETS if name not in groups],
    )


def pooled(credit: np.ndarray) -> float:
    """Right pairs / pairs, of [questions, (share, right, pairs)]."""
    return float(credit[:, 1].sum() / credit[:, 2].sum())


PREFERENCE = Benchmark(
    "ppe_preference", "lmarena-ai/PPE-Human-Preference-V1", 16038, ("test*",), preference_rows, aggregate_preference,
    "question_id",
)  # fmt: skip
CORRECTNESS = Benchmark(
    "ppe_correctness", "lmarena-ai/PPE-*-Best-of-K", 2555, ("PPE-*-Best-of-K*",), correctness_rows,
    aggregate_correctness, "question_id",
)  # fmt: skip
