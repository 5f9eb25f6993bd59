"""What all reward-model benchmarks share: rows to be scored, their files, and figures made of strata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from savelib.benchmarks.statistics import Result
from savelib.config import ConfigError
from savelib.data.chat import Messages
from savelib.data.files import FORMATS, checked, label, number, source_rows, text
from savelib.paths import resolve

Scores = dict[str, list[float]]  # row id -> one score a response


@dataclass(frozen=True)
class Row:
    """One prompt with the responses that a reward model scores. facts: what the aggregate needs besides the scores.

    group: the part of the benchmark, which tells apart rows whose ids are the same in the file.
    counts: False where no figure rests on the row (a tied vote): it is not scored, and its scores may be missing.
    """

    id: str
    prompt: Messages
    responses: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    counts: bool = True


@dataclass(frozen=True)
class Benchmark:
    """One benchmark in two halves: `rows` reads a hub id, file or folder; `aggregate` makes figures of scores."""

    name: str
    source: str  # hub id, of which `rows` knows the split
    size: int  # rows of the published benchmark
    files: tuple[str, ...]  # patterns of its own file names, which a data folder is searched for
    rows: Callable[[str], list[Row]]
    aggregate: Callable[[list[Row], Scores], Result]
    id_field: str = "id"  # of a score file's lines
    score_fields: tuple[str, ...] = ("scores",)  # of the same length, one after the other

    def read_scores(self, line: dict[str, Any]) -> tuple[str, list[float]]:
        """One line of a score file -> (id, scores). Raises ConfigError for a missing field or what is no number."""
        for name in (self.id_field, *self.score_fields):
            if name not in line:
                raise ConfigError(f"no field {name!r}; it has {', '.join(map(repr, line)) or 'none'}")
        parts = [line[name] for name in self.score_fields]
        if not all(isinstance(part, list) for part in parts) or len({len(part) for part in parts}) > 1:
            raise ConfigError(f"{' and '.join(self.score_fields)} must be {self._lists}, not {str(parts)[:60]}")
        for name in self.score_fields:
            for i, score in enumerate(line[name]):
                number(score, f"'{name}[{i}]'")
        return label(line, self.id_field), sum(parts, [])

    def write_scores(self, row_id: str, scores: list[float]) -> dict[str, Any]:
        """What read_scores reads."""
        each = len(scores) // len(self.score_fields)
        parts = {name: scores[i * each : (i + 1) * each] for i, name in enumerate(self.score_fields)}
        return {self.id_field: row_id} | parts

    @property
    def _lists(self) -> str:
        return "a list" if len(self.score_fields) == 1 else "lists of the same length"


# scores


def check_scores(rows: list[Row], scores: Scores) -> None:
    """Raise ConfigError unless there is one score for each response of each row, and none for others."""
    expected = {row.id: len(row.responses) for row in rows}
    problems = {
        "missing": [row.id for row in rows if row.counts and row.id not in scores],
        "not in the benchmark": [i for i in scores if i not in expected],
        "with another number of scores": [i for i in expected if i in scores and len(scores[i]) != expected[i]],
    }
    said = [f"{len(ids)} {what}, the first {ids[0]!r}" for what, ids in problems.items() if ids]
    if said:
        raise ConfigError(f"scores do not fit the benchmark's {len(rows)} rows: {'; '.join(said)}; no total is given")


# files -> rows


def read_rows(
    source: str, field: str, split: str, convert: Callable[[dict[str, Any], str], Row], files: Iterable[str] = ()
) -> list[Row]:
    """All rows of a file, a folder's files of the first pattern that is there, or a hub dataset's split, in order.

    convert(row, where) makes a Row, and raises ConfigError naming the column of a bad one; `where` names file and row.
    Raises ConfigError naming the file, the number of bad rows, the first of them and its column.
    """
    path = Path(resolve(source))
    if path.is_dir():
        found = next((f for f in (matching(path, [pattern]) for pattern in files) if f), None)
        if not found:
            raise ConfigError(f"{field} = {source!r}: the folder has no file named {' or '.join(files)}")
        raw = chain.from_iterable(source_rows(str(file), field, ()) for file in found)
    else:
        raw = source_rows(source, field, (split,))
    return distinct(checked(raw, convert, f"{field} = {source!r}"), f"{field} = {source!r}")


def matching(folder: Path, files: Iterable[str]) -> list[Path]:
    """The files of a folder, at any depth, whose names have one of these patterns and a readable format."""
    found = {f for pattern in files for f in folder.rglob(pattern) if f.is_file()}
    return sorted(f for f in found if f.name.endswith(FORMATS))


def distinct(rows: list[Row], field: str) -> list[Row]:
    """The rows, with `group:` before ids that the file has more than once. Raises ConfigError where that is no help."""
    doubled = {i for i, n in Counter(row.id for row in rows).items() if n > 1}
    rows = [replace(row, id=f"{row.group}:{row.id}") if row.id in doubled else row for row in rows]
    doubled = [i for i, n in Counter(row.id for row in rows).items() if n > 1]
    if doubled:
        raise ConfigError(f"{field}: {len(doubled)} ids are there more than once, the first {doubled[0]!r}")
    return rows


def prompt(row: dict[str, Any], name: str = "prompt") -> Messages:
    """The column as one user turn."""
    return [{"role": "user", "content": text(row, name)}]


# scores -> figures


def scored(rows: list[Row], scores: Scores) -> list[tuple[Row, list[float]]]:
    """(row, its scores) of the rows that count, after check_scores."""
    check_scores(rows, scores)
    found = [(row, scores[row.id]) for row in rows if row.counts]
    if not found:
        raise ConfigError(f"none of the {len(rows)} rows counts")
    return found


def grouped(found: list[tuple[Row, list[float]]]) -> dict[str, list[tuple[Row, list[float]]]]:
    """group -> its (row, scores)."""
    groups: dict[str, list[tuple[Row, list[float]]]] = {}
    for row, values in found:
        groups.setdefault(row.group, []).append((row, values))
    return groups


def percent(value: float) -> float:
    return 100 * float(value)
