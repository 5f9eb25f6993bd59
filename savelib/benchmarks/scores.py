"""Score files: scores made anywhere, read and checked, and the figures that a benchmark makes of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from savelib.benchmarks import BENCHMARKS
from savelib.benchmarks.rows import Benchmark, Scores
from savelib.benchmarks.statistics import Result, interval
from savelib.config import ConfigError
from savelib.data.files import at, converted, file_rows
from savelib.paths import resolve


def score_file(name: str, data: str, scores: str) -> dict[str, Any]:
    """The figures of a JSONL file of scores, with a 95% interval of `overall`; percent, unrounded.

    data: a hub id, file or folder of benchmark `name`. Keys: overall, parts, n, ci95 [low, high], counts, what else the
    benchmark has (JudgeBench: macro; RM-Bench: matrix), and `note` where the data are not the whole benchmark.
    Raises ConfigError, with how many and the first, for missing, doubled and extra ids, for scores that are no finite
    number or not one per response, and for lines that cannot be read.
    """
    benchmark = named(name)
    rows, found = benchmark.rows(data), read_scores(benchmark, scores)
    with at(f"scores = {scores!r}"):
        return as_json(benchmark, benchmark.aggregate(rows, found))


def read_scores(benchmark: Benchmark, file: str) -> Scores:
    """id -> scores of a score file, in its order. Raises ConfigError as score_file; ids are not compared to rows."""
    found, bad = converted(file_rows(resolve(file), "scores"), lambda line, _: benchmark.read_scores(line))
    doubled = [row_id for row_id, count in Counter(row_id for row_id, _ in found).items() if count > 1]
    said = [f"{len(bad)} of {len(found) + len(bad)} rows are bad, the first: {bad[0]}"] if bad else []
    said += [f"{len(doubled)} ids are there more than once, the first {doubled[0]!r}"] if doubled else []
    said += [] if found or bad else ["it has no scores"]
    if said:
        raise ConfigError(f"scores = {file!r}: {'; '.join(said)}; no total is given")
    return dict(found)


def as_json(benchmark: Benchmark, result: Result) -> dict[str, Any]:
    """What score_file returns."""
    figures = {"benchmark": benchmark.name, "overall": result.overall, "parts": result.parts, "n": result.n}
    out = figures | {"ci95": list(interval(result)), "counts": result.counts} | result.more
    note = partial_note(benchmark, result)
    return out | ({"note": note} if note else {})


def partial_note(benchmark: Benchmark, result: Result) -> str:
    """Where data lack parts of the benchmark: what `overall` is then; else empty."""
    if not result.missing:
        return ""
    return (
        f"overall is of {result.n} rows, not of {benchmark.name} ({benchmark.size} rows): the data lack "
        f"{', '.join(result.missing)}"
    )


def named(name: str) -> Benchmark:
    """The benchmark of that name. Raises ConfigError with the names of all."""
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark = {name!r}: choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
