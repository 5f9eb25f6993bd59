"""Rows of local files and of hub datasets, and their columns. Each error names the file and the row.

Formats: JSONL, a JSON list of rows, either of them compressed by gzip, and Parquet. Text is UTF-8.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from savelib.config import ConfigError, shown
from savelib.data.hub import asked_once, explain
from savelib.paths import resolve

T = TypeVar("T")
Record = dict[str, Any]
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ANY_SPLIT = "*"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # in JSON's escapes; two of them may make one character


# sources -> rows


def source_rows(source: str, field: str, splits: Sequence[str]) -> Iterator[tuple[str, Record]]:
    """(where, row) of a file or a hub dataset; `where` names the row. Raises ConfigError, also where there is no row.

    field: names the source in errors. splits: the first of them that a hub dataset has is read; ANY_SPLIT: its first.
    """
    path, where = Path(resolve(source)), ""
    for where, row in file_rows(path, field) if path.exists() else _hub_rows(source, field, splits):
        yield where, row
    if not where:
        raise ConfigError(f"{field} = {source!r} has no rows")


def file_rows(path: str | Path, field: str) -> Iterator[tuple[str, Record]]:
    """(where, row) of a file, which may have none. Raises ConfigError at what cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{field}: {path} {'is no file' if path.exists() else 'does not exist'}")
    if not path.name.endswith(FORMATS):
        raise ConfigError(f"{field}: {path} must end in {', '.join(FORMATS)}")
    try:
        values = _parquet(path) if path.suffix == ".parquet" else _json(path)
        for number, row in enumerate(values, 1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} holds a {type(row).__name__}, not an object with named columns")
            yield f"{path}, row {number}", row
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{field}: {path} cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{field}: {path}: {error}") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"it is not a readable Parquet file: {error}") from None


def _json(path: Path) -> Iterator[Any]:
    """The values of a JSON list, or of the lines."""
    as_list = ".json" in path.suffixes
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        if as_list and (whole := file.read().removeprefix(b"\xef\xbb\xbf").lstrip()).startswith(b"["):
            yield from parsed(whole, "it")
            return
        for number, line in enumerate(whole.splitlines() if as_list else file, 1):
            yield parsed(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"row {number}")


def parsed(text: bytes, what: str) -> Any:
    """A JSON value. Raises ValueError, where `what` is the subject, for all that strict readers and writers refuse."""
    if not text.strip():
        raise ValueError(f"{what} is empty; remove the line")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half a character, {error.object[error.start]!r}, which is no text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not valid JSON: {error.msg} at column {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not usable JSON: {error}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> Record:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return row


def _hub_rows(source: str, field: str, splits: Sequence[str]) -> Iterator[tuple[str, Record]]:
    if source.endswith((*FORMATS, ".gz")) or source.count("/") != 1:
        raise ConfigError(f"{field} = {source!r}: no such file, and not a hub id (owner/name)")

    import datasets  # slow to import

    try:
        with asked_once(source):
            found = datasets.load_dataset(source)
    except Exception as error:  # whatever the hub client raises: offline, missing, gated, broken files
        raise ConfigError(explain(error, field, source, "dataset")) from None
    split = next((s for s in splits if s in found or s == ANY_SPLIT), None)
    if split is None:
        raise ConfigError(f"{field} = {source!r}: no split {splits[0]!r}; it has {', '.join(map(repr, found))}")
    data = found[next(iter(found)) if split == ANY_SPLIT else split]
    yield from ((f"{source}, row {number}", row) for number, row in enumerate(data, 1))


def converted(rows: Iterable[tuple[str, Record]], convert: Callable[[Record, str], T]) -> tuple[list[T], list[str]]:
    """(convert(row, where) of each row that it takes, what is wrong with each row for which it raises ConfigError)."""
    good, bad = [], []
    for where, row in rows:
        try:
            with at(where):
                good.append(convert(row, where))
        except ConfigError as error:
            bad.append(str(error))
    return good, bad


def checked(rows: Iterable[tuple[str, Record]], convert: Callable[[Record, str], T], what: str) -> list[T]:
    """Every row converted. Raises ConfigError, `what` first, with the number of bad rows and the first of them."""
    good, bad = converted(rows, convert)
    if bad:
        raise ConfigError(f"{what}: {len(bad)} of {len(good) + len(bad)} rows are bad, the first: {bad[0]}")
    return good


# columns


@contextmanager
def at(where: str) -> Iterator[None]:
    """Put `where` before what a ConfigError says."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def column(row: Record, *names: str) -> Any:
    """The first of these columns that is not null. Raises ConfigError where there is none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    if null := [name for name in names if name in row]:
        raise ConfigError(f"column {null[0]!r} is null")
    raise ConfigError(f"no column {' or '.join(map(repr, names))}; it has {', '.join(map(repr, row)) or 'none'}")


def text(row: Record, name: str) -> str:
    """A column that holds a text. Raises ConfigError where it is empty."""
    return as_text(column(row, name), f"column {name!r}")


def as_text(value: Any, what: str) -> str:
    """A value that is a text, of more than white space. Raises ConfigError whose subject is `what`."""
    if not isinstance(value, str):
        raise ConfigError(f"{what} is {shown(value)}, not a text")
    if not value.strip():
        raise ConfigError(f"{what} is empty")
    return value


def label(row: Record, name: str) -> str:
    """A column that names the row: a text, or a whole number as text."""
    value = column(row, name)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(row, name)


def number(value: Any, what: str) -> float:
    """A value that is a finite number. Raises ConfigError whose subject is `what`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{what} is {shown(value)}, not a finite number")
    return value


def texts(row: Record, name: str, count: int | None = None) -> list[str]:
    """A column that holds a list of texts, `count` of them if that is given."""
    values = column(row, name)
    if not isinstance(values, list) or not values or (count and len(values) != count):
        raise ConfigError(f"column {name!r} must be a list of {count or 'one or more'} texts, not {shown(values)}")
    return [as_text(value, f"column '{name}[{i}]'") for i, value in enumerate(values)]


def choice(row: Record, name: str, values: Iterable[str]) -> str:
    """A column that holds one of these values."""
    value = column(row, name)
    if value not in values:
        raise ConfigError(f"column {name!r} = {shown(value)} must be one of {', '.join(values)}")
    return value
