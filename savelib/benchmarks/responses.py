"""Responses of a policy to the prompts of AlpacaEval 2 and Arena-Hard v2.0, in the shapes of the benchmarks' own files.

Prompts and responses are read from JSON lists or JSONL. AlpacaEval: `instruction`, `output`, `generator`, `dataset`
(of an annotation file, with its `output_1`, too). Arena-Hard: `uid`, `prompt`, `category` of a question; `uid`,
`model`, `messages`, `metadata` of an answer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from savelib.benchmarks.base import file_rows
from savelib.config import Config, ConfigError, make_config
from savelib.data import Prompt
from savelib.loop import policy_source
from savelib.models import load_policy, pick_device, render
from savelib.paths import resolve, write_atomically
from savelib.rollout import sample

Row = dict[str, Any]
ID = {"alpaca": "instruction", "arena": "uid"}  # the column that pairs rows; AlpacaEval has no other
TEXT = {"alpaca": "instruction", "arena": "prompt"}
SAMPLING = ("seed", "temperature", "top_p", "top_k", "max_new_tokens", "precision")
TABLE8 = {"profile": "paper", "num_processes": 1, "backend": "ddp", "max_prompt_tokens": 16384}  # in one process
SHOWN_EVERY = 10  # seconds between lines of progress


def generate(
    policy: str,
    benchmark: str,
    prompts: str | Path,
    out: str | Path,
    config: Config | None = None,
    name: str | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> Row:
    """Sample one response to each prompt and write them all to `out`, a JSON list or JSONL by its ending; say how many.

    policy: folder, hub id, smollm2 or embedded; benchmark: alpaca or arena; name: of the policy in the file.
    config: sampling and device, by default table 8's with prompts of up to 16,384 tokens.
    count_tokens: for Arena-Hard's `token_len`, by default the policy's tokenizer. Style control against published
    baselines wants theirs: `lambda text: len(tiktoken.encoding_for_model("gpt-4o").encode(text))`.
    Responses are kept in `<out>.partial.jsonl` as they come, and are not sampled again: interrupt it and call again.
    A response's random numbers depend on its id and config.seed alone. `out` is written when all are there.
    Raises ConfigError for bad prompts.
    """
    config = config or make_config(**TABLE8)
    asked = by_id(read_rows(prompts, "prompts"), benchmark, f"prompts = {str(prompts)!r}")
    texts = {i: text_of(row, TEXT[benchmark], f"prompts: {i[:60]!r}") for i, row in asked.items()}
    source = resolve(policy_source(config.model_copy(update={"policy_model": str(policy)})))
    name = name or Path(policy).name
    made_with = [source, _files(Path(source)), config.only(*SAMPLING)]
    keys = {i: digest(made_with, i, text) for i, text in texts.items()}
    with Log(Path(f"{out}.partial.jsonl")) as log:
        done = {row["key"]: row for row in log.rows}
        todo = [Prompt(i, [{"role": "user", "content": text}]) for i, text in texts.items() if keys[i] not in done]
        if todo:
            model, tokenizer = load_policy(source, pick_device(config.device, config.threads))
            todo.sort(key=lambda p: -len(render(tokenizer, p.messages)))  # the longest first: what fails, fails at once
            count = count_tokens or (lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        progress = Progress("responses", len(texts), len(texts) - len(todo))
        for start in range(0, len(todo), config.rollout_rows):
            batch = todo[start : start + config.rollout_rows]
            uniforms = torch.stack([_uniforms(p.id, config) for p in batch])
            rollout = sample(model, tokenizer, batch, 1, config, uniforms)
            for prompt, [text], finished in zip(batch, rollout.texts, rollout.finished[:, 0].tolist(), strict=True):
                row = {"key": keys[prompt.id], "output": text, "finished": finished, "token_len": count(text)}
                done[row["key"]] = log.append(row)
            progress(len(batch))
    rows = [_shaped(benchmark, asked[i], texts[i], name, done[keys[i]]) for i in texts]
    write_rows(Path(out), rows)
    return {
        "responses": len(rows),
        "unfinished": sum(not row["finished"] for row in rows),
        "empty": sum(not output(row, benchmark).strip() for row in rows),
    }


def _uniforms(name: str, config: Config) -> torch.Tensor:
    """The random numbers of a response's tokens [max_new_tokens]."""
    seed = int(digest("response", config.seed, name)[:15], 16)
    return torch.rand(config.max_new_tokens, generator=torch.Generator().manual_seed(seed))


def _shaped(benchmark: str, asked: Row, prompt: str, name: str, made: Row) -> Row:
    """A response as the benchmark's own files have it; `finished` is ours: whether an end token was sampled."""
    if benchmark == "alpaca":
        row = {"instruction": prompt, "output": made["output"], "generator": name, "dataset": asked.get("dataset", "")}
        return row | {"finished": made["finished"]}
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": made["output"]}}]
    metadata = {"token_len": made["token_len"]} | count_style(made["output"])
    return {"uid": asked["uid"], "model": name, "messages": said, "metadata": metadata, "finished": made["finished"]}


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


# files


def read_rows(source: str | Path, field: str) -> list[Row]:
    """The rows of a JSON list or JSONL file. Raises ConfigError naming the field and the first bad row."""
    rows = [row for _, row in file_rows(Path(resolve(str(source))), field)]
    if not rows:
        raise ConfigError(f"{field} = {str(source)!r} has no rows")
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a JSON list (`.json`) or JSONL, whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    as_list = path.suffix == ".json"
    write(path, "[\n" + ",\n".join(lines) + "\n]\n" if as_list else "".join(f"{line}\n" for line in lines))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


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
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: column {column!r} is empty or no text; it has {', '.join(map(repr, row))}")
    return value


def digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[list[Any]]:
    """What tells whether a folder's files were changed."""
    stats = [(f.name, f.stat()) for f in sorted(folder.glob("*")) if f.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


class Log:
    """`with Log(path) as log`: JSONL that one process appends to, from any thread. `rows`: what was there before.

    A last line that a killed writer left unfinished is dropped. Raises ConfigError when another process has it open.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.writing = open(path, "a+b"), threading.Lock()  # noqa: SIM115, __exit__ closes it
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.file.seek(0)
            data = self.file.read()
            whole = data.rfind(b"\n") + 1
            self.file.truncate(whole)
            self.rows = [json.loads(line) for line in data[:whole].split(b"\n")[:-1]]
        except (BlockingIOError, ValueError) as error:
            self.file.close()
            taken = isinstance(error, BlockingIOError)
            why = "another process is writing it; wait for it" if taken else f"a line is no JSON ({error}); remove it"
            raise ConfigError(f"{path}: {why}") from None

    def append(self, row: Row) -> Row:
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        with self.writing:
            self.file.write(line)
            self.file.flush()
        return row

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


class Progress:
    """`progress(n)` after n more: a line on stderr every few seconds, with the time left."""

    def __init__(self, what: str, total: int, before: int = 0):
        self.what, self.total, self.before, self.done = what, total, before, before
        self.start = self.shown = time.monotonic()

    def __call__(self, more: int = 1) -> None:
        self.done += more
        now = time.monotonic()
        ended = self.done == self.total and self.shown > self.start  # what is done at once needs no line
        if now - self.shown >= SHOWN_EVERY or ended:
            left = (now - self.start) / (self.done - self.before) * (self.total - self.done)
            print(f"{self.done}/{self.total} {self.what}  {left:.0f} s left", file=sys.stderr, flush=True)
            self.shown = now
