"""Files of responses in the shapes of AlpacaEval 2 and Arena-Hard v2.0.

Prompts and responses are read from JSON lists or JSONL. AlpacaEval: `instruction`, `output`, `generator`, `dataset`
(of an annotation file, with its `output_1`, too). Arena-Hard: `uid`, `prompt`, `category` of a question; `uid`,
`model`, `messages`, `metadata` of an answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from savelib.config import ConfigError
from savelib.data.files import Record as Row
from savelib.data.files import at, file_rows, text
from savelib.paths import lock, resolve, write_atomically

ID = {"alpaca": "instruction", "arena": "uid"}  # the column that pairs rows; AlpacaEval has no other

WRITTEN = "sha256 of the file written"  # a line of a log

TEXT = {"alpaca": "instruction", "arena": "prompt"}


def count_style(text: str) -> Row:
    """Arena-Hard's counts of Markdown headers, list items and bold spans outside of code blocks."""
    for block in re.findall(r"```([^`]*)```", text):  # removed wherever it occurs, as the benchmark does
        text = text.replace(block, "")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def output(row: Row, benchmark: str) -> str:
    """The response in a row of a benchmark's file of responses."""
    if benchmark == "alpaca":
        return row["output"] if "output" in row else row["output_1"]
    content = row["messages"][-1]["content"]
    return content["answer"] if isinstance(content, dict) else content


def read_rows(source: str | Path, field: str) -> list[Row]:
    """The rows of a JSON list or JSONL file. Raises ConfigError naming the field and the first bad row."""
    rows = [row for _, row in file_rows(resolve(str(source)), field)]
    if not rows:
        raise ConfigError(f"{field} = {str(source)!r} has no rows")
    return rows


def write_rows(path: Path, rows: list[Row], log: Log) -> None:
    """Write a JSON list (`.json`) or JSONL atomically, noted in the log, so that a later call may replace it."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    as_list = path.suffix == ".json"
    log.write(path, "[\n" + ",\n".join(lines) + "\n]\n" if as_list else "".join(f"{line}\n" for line in lines))


def by_id(rows: list[Row], benchmark: str, where: str) -> dict[str, Row]:
    """id -> row, in the file's order. Raises ConfigError for a row without an id, and for one that is there twice."""
    if benchmark not in ID:
        raise ConfigError(f"benchmark = {benchmark!r}: give one of {', '.join(ID)}")
    found: dict[str, Row] = {}
    for n, row in enumerate(rows, 1):
        name = text_of(row, ID[benchmark], f"{where}, row {n}")
        if name in found:
            raise ConfigError(f"{where}, row {n}: {ID[benchmark]} {name[:60]!r} is there twice; remove one")
        found[name] = row
    return found


def text_of(row: Row, column: str, where: str) -> str:
    """The text in a row's column. Raises ConfigError where there is none."""
    with at(where):
        return text(row, column)


def _files(folder: Path) -> list[list[Any]]:
    """What tells whether a folder's files were changed."""
    stats = [(f.name, f.stat()) for f in sorted(folder.glob("*")) if f.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


class Log:
    """`with Log(path) as log`: JSONL that one process appends to, from any thread. `rows`: what was there before.

    A last line that a killed writer left unfinished is dropped. Raises ConfigError when another process has it open,
    and for a file that no Log wrote, which stays as it is.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.writing = open(path, "a+b"), threading.Lock()  # noqa: SIM115, __exit__ closes it
        try:
            if not lock(self.file):
                raise ConfigError(f"{path}: another process is writing it; wait for it")
            self.file.seek(0)
            rows, whole = _logged(path, self.file.read())
            self.file.truncate(whole)
            self.rows = [row for row in rows if "key" in row]
        except ConfigError:
            self.file.close()
            raise

    def append(self, row: Row) -> Row:
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        with self.writing:
            self.file.write(line)
            self.file.flush()
        return row

    def write(self, path: Path, text: str) -> None:
        """Write a file atomically, its digest in the log first: `wrote` knows it again."""
        self.append({WRITTEN: hashlib.sha256(text.encode()).hexdigest()})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def _logged(path: Path, data: bytes) -> tuple[list[Row], int]:
    """(the rows of a Log's file, how many of its bytes are whole lines). Raises ConfigError for another file."""
    whole = data.rfind(b"\n") + 1
    try:
        rows = [json.loads(line) for line in data[:whole].split(b"\n")[:-1]]
        ours = all(isinstance(row, dict) and ("key" in row or WRITTEN in row) for row in rows)
    except ValueError:
        ours = False
    begins = (b'{"key": ', b'{"%s": ' % WRITTEN.encode())
    if not ours or not any(data[whole:][: len(b)] == b[: len(data[whole:])] for b in begins):
        raise ConfigError(f"{path} is no log of this command, or a line is damaged; give another --out, or move it")
    return rows, whole


def wrote(log: Path) -> Callable[[Path], bool]:
    """Whether a file holds what an earlier call with this log wrote."""

    def ours(path: Path) -> bool:
        rows = _logged(log, log.read_bytes())[0] if log.is_file() else []
        return {WRITTEN: hashlib.sha256(path.read_bytes()).hexdigest()} in rows

    return ours
