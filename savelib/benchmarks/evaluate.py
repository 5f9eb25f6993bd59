"""A reward model evaluated on benchmarks: data, model, scores, and the folder of figures."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

from savelib import __version__
from savelib.benchmarks import BENCHMARKS
from savelib.benchmarks.rows import Benchmark, Row
from savelib.benchmarks.scores import as_json, named
from savelib.benchmarks.scoring import Scorer, Truncation
from savelib.benchmarks.statistics import Result
from savelib.config import Config, ConfigError, make_config
from savelib.data.files import FORMATS
from savelib.models.compute import pick_device
from savelib.models.loading import load_reward_model, value_head_settings
from savelib.models.reward_model import VALUE_HEAD_FILE, RewardModel
from savelib.paths import resolve, strict_json, sync, writable_folder, write_atomically

LONGEST = 16_384  # tokens, Skywork's setting, where the context is longer


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
    scorer = Scorer(
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
            benchmark = named(name)
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
    made = {"lora_rank": 0, "load_in_4bit": False} | (value_head_settings(head) if head.is_file() else {})
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


# files


def _made_by_evaluate(folder: Path) -> bool:
    try:
        return "benchmarks" in json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _line(benchmark: Benchmark, figures: dict[str, Any]) -> str:
    low, high = figures["ci95"]
    said = f"{figures['overall']:.2f} ({low:.2f} to {high:.2f}), n = {figures['n']}"
    return f"{benchmark.name}{' (in part)' if 'note' in figures else ''}: {said}" + (
        f"; {figures['note']}" if "note" in figures else ""
    )


def _write_summary(out: Path, made_by: str) -> None:
    """summary.csv of all `<name>.json` of this model in `out`: one line per figure; an interval for overall."""
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
