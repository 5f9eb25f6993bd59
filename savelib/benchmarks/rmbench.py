"""RM-Bench (THU-KEG/RM-Bench): 1,327 prompts in 4 domains, three right and three wrong responses each.

Both come in three styles: concise, detailed plain, detailed markdown. M[i][j] is the share of prompts whose chosen
response of style i scores higher than the rejected one of style j. hard: i < j, normal: i = j, easy: i > j.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from savelib.benchmarks import rows as base
from savelib.benchmarks.rows import Benchmark, Row, Scores
from savelib.benchmarks.statistics import Result, Stratum
from savelib.config import ConfigError
from savelib.data.files import label, texts

DOMAINS = ("chat", "math", "code", "safety")  # safety-refuse and safety-response are one domain
LEVELS = ("easy", "normal", "hard")


def rows(source: str) -> list[Row]:
    """Prompts (id, prompt, chosen[3], rejected[3], domain). Without the column, the file's name tells the domain.

    The repository's files of one domain use some ids twice; rows of such ids are named `<domain>:<id>`.
    """
    return base.read_rows(source, "rmbench", "train", _row, BENCHMARK.files)


def _row(row: dict[str, Any], where: str) -> Row:
    named = row.get("domain") or Path(where).name
    domain = next((d for d in DOMAINS if str(named).startswith(d)), None)
    if domain is None:
        raise ConfigError(f"no column 'domain' that begins with {', '.join(DOMAINS)}: {row.get('domain')!r}")
    return Row(
        label(row, "id"),
        base.prompt(row),
        texts(row, "chosen", 3) + texts(row, "rejected", 3),
        group=domain,
    )


def aggregate(rows: list[Row], scores: Scores) -> Result:
    """Accuracy of each domain, each level, each level in a domain; `matrix`: domain -> M [3][3] in percent."""
    groups = base.grouped(base.scored(rows, scores))
    names = [name for name in DOMAINS if name in groups]
    strata, levels, matrices = [], {}, {}
    for name in names:
        values = np.array([v for _, v in groups[name]])  # [n, 6]
        wins = values[:, :3, None] > values[:, None, 3:]  # [n, chosen style, rejected style]
        i, j = np.indices((3, 3))
        credit = np.stack([wins.mean((1, 2)), *(wins[:, m].mean(1) for m in (i > j, i == j, i < j))], 1)  # [n, 4]
        strata.append(Stratum(name, 1 / len(names), [row.id for row, _ in groups[name]], credit))
        levels[name] = 100 * credit[:, 1:].mean(0)
        matrices[name] = (100 * wins.mean(0)).tolist()
    parts = {s.name: 100 * s.value() for s in strata}
    parts |= dict(zip(LEVELS, np.mean(list(levels.values()), 0).tolist(), strict=True))
    parts |= {f"{name} {level}": float(v) for name in names for level, v in zip(LEVELS, levels[name], strict=True)}
    counts = {name: len(groups[name]) for name in names}
    return Result(strata, parts, counts, {"matrix": matrices}, [name for name in DOMAINS if name not in groups])


BENCHMARK = Benchmark(
    "rmbench", "THU-KEG/RM-Bench", 1327, ("total_dataset*", "*_filtered.json"), rows, aggregate,
    score_fields=("chosen", "rejected"),
)  # fmt: skip
