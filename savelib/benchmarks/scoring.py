"""Scores of a reward model on benchmarks, kept in files, and figures of scores made anywhere.

Conversations are rendered by the model's own chat template over [user, assistant], no system prompt, with a fixed date
and no special tokens but the template's. Too long ones lose tokens at the beginning, as in reward-bench: the response's
end, which is scored, stays, and so does the first token where it is BOS.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import safe_open

from savelib import __version__
from savelib.benchmarks import BENCHMARKS
from savelib.benchmarks.rows import Benchmark, Row, Scores
from savelib.benchmarks.statistics import Result
from savelib.config import Config, ConfigError, make_config
from savelib.data.chat import render
from savelib.data.files import FORMATS, at, converted, file_rows
from savelib.models.compute import autocast, in_bfloat16, pick_device
from savelib.models.loading import load_reward_model
from savelib.models.reward_model import VALUE_HEAD_FILE, Encoded, RewardModel
from savelib.paths import resolve, strict_json, sync, writable_folder, write_atomically

Truncation = Literal["left", "right", "refuse"]
LONGEST = 16_384  # tokens, Skywork's setting, where the context is longer
SAY_EVERY = 10  # seconds


# scores made elsewhere


def score_file(name: str, data: str, scores: str) -> dict[str, Any]:
    """The figures of a JSONL file of scores, with a 95% interval of `overall`; percent, unrounded.

    data: a hub id, file or folder of benchmark `name`. Keys: overall, parts, n, ci95 [low, high], counts, what else the
    benchmark has (JudgeBench: macro; RM-Bench: matrix), and `note` where the data are not the whole benchmark.
    Raises ConfigError, with how many and the first, for missing, doubled and extra ids, for scores that are no finite
    number or not one a response, and for lines that cannot be read.
    """
    benchmark = _benchmark(name)
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
    from savelib.benchmarks.statistics import interval  # slow to import

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


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark = {name!r}: choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


# evaluation


def evaluate(
    model: str,
    names: Iterable[str],
    data_dir: str | Path | None,
    out: str | Path,
    *,
    config: Config | None = None,
    max_length: int | None = None,
    truncation: Truncation = "left",
    batch_tokens: int = 16_384,
    batch_rows: int = 64,
    say: Callable[[str], None] = print,
) -> dict[str, Result]:
    """Score benchmarks with a reward model (folder or hub id), and keep scores and figures under `out`.

    data_dir: a folder with `<name>.jsonl` (or another format) or a folder `<name>`; None: the hub.
    config: device, threads and precision. max_length: tokens; None: the model's context, at most LONGEST.
    batch_tokens, batch_rows: at most so many padded tokens and conversations a forward.

    Files: `<name>.scores.jsonl` (a score file; what it has is not scored again, unless model, setting or text changed),
    `<name>.json` (figures and how they were made), summary.csv, manifest.json.
    All data are read before anything is scored: if any is missing or bad, nothing is. A benchmark gets figures only
    when all its rows are scored. Raises ConfigError.
    """
    names, started = list(dict.fromkeys(names)), time.monotonic()
    out = writable_folder("out", out, {"model": model, "data_dir": data_dir}, _made_by_evaluate)
    if truncation not in get_args(Truncation):
        raise ConfigError(f"truncation = {truncation!r}: choose from {', '.join(get_args(Truncation))}")
    data = _all_data(names, data_dir)
    config = config or make_config()
    rm = _load(model, config)
    scorer = _Scorer(
        rm, fingerprint(rm), config.precision, _length(rm, max_length), truncation, batch_tokens, batch_rows
    )
    out.mkdir(parents=True, exist_ok=True)
    for name in names:  # figures of an earlier model must not stay beside these
        (out / f"{name}.json").unlink(missing_ok=True)
    made_with = {"model": model} | scorer.settings()
    manifest = {"status": "running", **made_with, **_versions(), "started": _now(), "benchmarks": {}}
    write_atomically(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")  # a later call knows the folder
    results = {}
    try:
        for name in names:
            source, rows = data[name]
            scores, counts = scorer.scores(BENCHMARKS[name], rows, out / f"{name}.scores.jsonl", say)
            results[name] = BENCHMARKS[name].aggregate(rows, scores)
            figures = as_json(BENCHMARKS[name], results[name])
            about = {"data": source} | counts
            write_atomically(
                out / f"{name}.json", strict_json(figures | {"made_with": made_with | about}, indent=2) + "\n"
            )
            manifest["benchmarks"][name] = about
            say(_line(BENCHMARKS[name], figures))
        manifest["status"] = "done"
    except BaseException as error:
        status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        manifest |= {"status": status, "error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        manifest |= {"finished": _now(), "seconds": round(time.monotonic() - started, 1)}
        write_atomically(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        _write_summary(out, scorer.fingerprint)
    return results


def _all_data(names: list[str], data_dir: str | Path | None) -> dict[str, tuple[str, list[Row]]]:
    """name -> (source, rows). Raises ConfigError that names every benchmark whose data are missing or bad."""
    if not names:
        raise ConfigError(f"benchmarks: none named; choose from {', '.join(BENCHMARKS)}")
    data, wrong = {}, []
    for name in names:
        try:
            benchmark = _benchmark(name)
            source = find_data(benchmark, Path(data_dir)) if data_dir is not None else benchmark.source
            data[name] = source, benchmark.rows(source)
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("; ".join(wrong) + "; nothing was scored")
    return data


def find_data(benchmark: Benchmark, folder: Path) -> str:
    """Where a data folder has a benchmark: `<name>/`, `<name>.<format>`, or a file of the benchmark's own name."""
    for place in [folder / benchmark.name, *(folder / f"{benchmark.name}{end}" for end in FORMATS)]:
        if place.exists():
            return str(place)
    if any(found for pattern in benchmark.files for found in folder.glob(pattern)):
        return str(folder)
    raise ConfigError(
        f"{benchmark.name}: {folder} has no data of it; put {benchmark.name}.jsonl (or {', '.join(FORMATS[1:])}) or a "
        f"folder {benchmark.name}/ there, or leave --data-dir out to take {benchmark.source} from the hub"
    )


def _load(model: str, config: Config) -> RewardModel:
    """The model with a reward head; whatever value head lies beside it."""
    head = Path(resolve(model)) / VALUE_HEAD_FILE
    made: dict[str, Any] = {"lora_rank": 0, "load_in_4bit": False}
    if head.is_file():
        with safe_open(head, "pt") as file:
            made |= json.loads((file.metadata() or {}).get("made_with", "{}"))
    device = pick_device(config.device, config.threads)
    rm = load_reward_model(model, config.model_copy(update=made), device)
    if not any(p.any() for p in rm.reward_head_parameters()):
        raise ConfigError(f"model = {model!r} has no reward head: all scores would be equal; give a reward model")
    return rm


def _length(rm: RewardModel, max_length: int | None) -> int:
    context = getattr(rm.model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    if max_length is not None and not 2 <= max_length <= context:
        raise ConfigError(f"max_length = {max_length}: the model's context is {context} tokens; give 2 to {context}")
    return max_length or min(context, LONGEST)


def fingerprint(rm: RewardModel) -> str:
    """SHA-256 of the classification model: its config, and its weights as they were loaded."""
    ours = {k: v for k, v in rm.model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(ours, sort_keys=True, default=str).encode())
    for name, tensor in sorted(rm.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass
class _Scorer:
    rm: RewardModel
    fingerprint: str
    precision: str
    max_length: int
    truncation: Truncation
    batch_tokens: int
    batch_rows: int

    def settings(self) -> dict[str, Any]:
        """What every figure is recorded with."""
        half = in_bfloat16(self.rm.device, self.precision)
        return {
            "fingerprint": self.fingerprint,
            "dtype": "float32 weights, bfloat16 autocast" if half else "float32",
            "device": torch.cuda.get_device_name(self.rm.device) if self.rm.device.type == "cuda" else "cpu",
            "max_length": self.max_length,
            "truncation": self.truncation,
            "batch_tokens": self.batch_tokens,
            "batch_rows": self.batch_rows,
        }

    def scores(
        self, benchmark: Benchmark, rows: list[Row], file: Path, say: Callable[[str], None]
    ) -> tuple[Scores, dict[str, int]]:
        """(scores of the rows that count, in their order; what was counted). `file` gets each row once it is scored."""
        rows = [row for row in rows if row.counts]
        tokens, counts = self._tokens(rows)
        keys = {row.id: self._key(tokens[row.id]) for row in rows}
        lines = {line["key"]: line for line in _kept(file)}
        done: Scores = {}
        for row in rows:
            with_key = lines.get(keys[row.id])
            if with_key and benchmark.read_scores(with_key)[0] == row.id:
                done[row.id] = benchmark.read_scores(with_key)[1]
        if len(lines) > len(done):
            say(f"{benchmark.name}: {len(lines) - len(done)} scores in {file} are of another model, setting or text")

        cut = f"{counts['truncated']} of {counts['responses']} conversations cut to {self.max_length} tokens"
        say(f"{benchmark.name}: {len(rows)} rows, {cut}, {len(done)} rows scored before")

        def as_line(row: Row) -> str:
            return json.dumps(benchmark.write_scores(row.id, done[row.id]) | {"key": keys[row.id]}) + "\n"

        def write_all() -> None:
            write_atomically(file, "".join(as_line(row) for row in rows if row.id in done))

        write_all()
        counts |= {"rows": len(rows), "scored_before": len(done)}
        progress = _Progress(benchmark.name, len(done), len(rows), say)
        with open(file, "a", encoding="utf-8") as log:
            for part in self._parts([row for row in rows if row.id not in done], tokens):
                flat = self._forward([ids for row in part for ids in tokens[row.id]])
                for row in part:
                    done[row.id] = [next(flat) for _ in row.responses]
                    if not all(map(math.isfinite, done[row.id])):
                        raise ConfigError(
                            f"{benchmark.name}, row {row.id!r}: the model's score is no finite number; try float32"
                        )
                    log.write(as_line(row))
                log.flush()
                progress.add(len(part), sum(len(ids) for row in part for ids in tokens[row.id]))
        write_all()  # in the rows' order
        return {row.id: done[row.id] for row in rows}, counts

    def _tokens(self, rows: list[Row]) -> tuple[dict[str, list[np.ndarray]], dict[str, int]]:
        """(row id -> token ids of each conversation, counts of conversations cut)."""
        tokenizer, limit = self.rm.tokenizer, self.max_length
        counts = {"responses": 0, "tokens": 0, "truncated": 0, "responses_cut": 0}
        tokens: dict[str, list[np.ndarray]] = {}
        for row in rows:
            turns = [[*row.prompt, {"role": "assistant", "content": response}] for response in row.responses]
            rendered = [render(tokenizer, messages) for messages in turns]
            found = tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template wrote the BOS
            long = [ids for ids in found if len(ids) > limit]
            if long and self.truncation == "refuse":
                raise ConfigError(
                    f"row {row.id!r}: a conversation of {len(long[0])} tokens exceeds {limit}; raise max_length, or "
                    "choose truncation=left"
                )
            if long:
                prefix = render(tokenizer, row.prompt, generation_prompt=True)
                start = len(tokenizer(prefix, add_special_tokens=False)["input_ids"])  # of the response
                cut = [self.truncation == "right" or len(ids) - limit > start - self._bos(ids) for ids in long]
                counts["responses_cut"] += sum(cut)
                counts["truncated"] += len(long)
            tokens[row.id] = [np.array(self._cut(ids), np.int32) for ids in found]
            counts["responses"] += len(found)
            counts["tokens"] += sum(map(len, tokens[row.id]))
        return tokens, counts

    def _bos(self, ids: list[int]) -> int:
        """How many tokens at the beginning stay when it is cut off."""
        return int(ids[0] == self.rm.tokenizer.bos_token_id)

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_length or self.truncation == "right":
            return ids[: self.max_length]
        kept = self._bos(ids)
        return ids[:kept] + ids[len(ids) - self.max_length + kept :]

    def _key(self, tokens: list[np.ndarray]) -> str:
        """Of all that a row's scores depend on."""
        digest = hashlib.sha256(f"{self.fingerprint} {self.settings()['dtype']}".encode())
        for ids in tokens:
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()[:32]

    def _parts(self, rows: list[Row], tokens: dict[str, list[np.ndarray]]) -> Iterator[list[Row]]:
        """Rows in parts of about a batch, the longest first: what is too long for the memory fails at once."""
        part: list[Row] = []
        size = 0
        for row in sorted(rows, key=lambda row: -max(map(len, tokens[row.id]))):
            part.append(row)
            size += sum(map(len, tokens[row.id]))
            if size >= self.batch_tokens:
                yield part
                part, size = [], 0
        if part:
            yield part

    @torch.no_grad()
    def _forward(self, conversations: list[np.ndarray]) -> Iterator[float]:
        """The score of each conversation, in their order; alike lengths share a forward."""
        order = sorted(range(len(conversations)), key=lambda i: -len(conversations[i]))
        scores = [0.0] * len(order)
        while order:
            count = max(1, min(self.batch_rows, self.batch_tokens // len(conversations[order[0]])))
            batch, order = order[:count], order[count:]
            ids = [conversations[i].tolist() for i in batch]
            with autocast(self.rm.device, self.precision):
                rewards = self.rm.score(Encoded(ids, [0] * len(ids))).rewards.tolist()
            for i, reward in zip(batch, rewards, strict=True):
                scores[i] = reward
        return iter(scores)


class _Progress:
    """Says every SAY_EVERY seconds how many rows are scored, how fast, and what time is left."""

    def __init__(self, name: str, done: int, total: int, say: Callable[[str], None]):
        self.name, self.before, self.done, self.total, self.say = name, done, done, total, say
        self.tokens, self.started, self.said = 0, time.monotonic(), time.monotonic()

    def add(self, rows: int, tokens: int) -> None:
        self.done, self.tokens, now = self.done + rows, self.tokens + tokens, time.monotonic()
        if now - self.said < SAY_EVERY and self.done < self.total:
            return
        self.said, seconds = now, max(now - self.started, 1e-9)
        left = timedelta(seconds=round(seconds / (self.done - self.before) * (self.total - self.done)))
        self.say(f"{self.name}: {self.done}/{self.total} rows, {self.tokens / seconds:.0f} tokens/s, {left} left")


# files


def _made_by_evaluate(folder: Path) -> bool:
    try:
        return "benchmarks" in json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _kept(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of scores; one that a killed writer left unfinished is scored again."""
    kept = []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        kept += [value] if isinstance(value, dict) and "key" in value else []
    return kept


def _line(benchmark: Benchmark, figures: dict[str, Any]) -> str:
    low, high = figures["ci95"]
    said = f"{figures['overall']:.2f} ({low:.2f} to {high:.2f}), n = {figures['n']}"
    return f"{benchmark.name}{' (in part)' if 'note' in figures else ''}: {said}" + (
        f"; {figures['note']}" if "note" in figures else ""
    )


def _write_summary(out: Path, made_by: str) -> None:
    """summary.csv of all `<name>.json` of this model in `out`: a line a figure; an interval for overall."""
    part = out / ".summary.csv.part"
    with open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["model", "benchmark", "figure", "percent", "low", "high", "n"])
        for name in BENCHMARKS:
            path = out / f"{name}.json"
            figures = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            if not figures or figures["made_with"]["fingerprint"] != made_by:
                continue
            model = figures["made_with"]["model"]
            overall = "overall of a part" if "note" in figures else "overall"
            table.writerow([model, name, overall, figures["overall"], *figures["ci95"], figures["n"]])
            more = {k: v for k, v in figures.items() if k == "macro"}
            for figure, value in (more | figures["parts"]).items():
                table.writerow([model, name, figure, value, "", "", figures["counts"].get(figure, "")])
    sync(part)
    part.replace(out / "summary.csv")


def _versions() -> dict[str, str]:
    return {"savelib": __version__} | {name: version(name) for name in ("torch", "transformers", "datasets")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
