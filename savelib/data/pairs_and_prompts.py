"""Preference pairs and prompts: the embedded world, local JSONL or Parquet files, hub datasets.

One internal form whatever the source: a prompt is a list of chat messages that ends with the user's turn.
Accepted columns
- pairs: `prompt, chosen, rejected` as texts, or as message lists (HuggingFaceH4/ultrafeedback_binarized), or only
  `chosen, rejected` as "Human: ... Assistant: ..." transcripts (Anthropic/hh-rlhf)
- prompts: `prompt` (or `instruction`, as in openbmb/UltraFeedback) as text or messages; optional `checks`
  (savelib.data.instructions) makes the gold reward known; optional `completions` serve prompt_selection
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from savelib.config import Config, ConfigError
from savelib.data import instructions, world
from savelib.data.chat import Messages, load_tokenizer
from savelib.data.hub import explain
from savelib.paths import resolve

T = TypeVar("T")
SPLITS = {  # of a hub dataset: the first that it has, else its first
    "preferences": ("train_prefs", "train"),
    "eval_preferences": ("test_prefs", "test"),
    "guard_preferences": ("test_prefs", "test"),
    "prompts": ("train",),
    "eval_prompts_source": ("test",),
}
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class Preference:
    """One pair: chosen is preferred to rejected."""

    prompt: Messages
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Prompt:
    """One RL prompt. `gold` is known for the embedded world and for prompts with checks."""

    id: str
    messages: Messages
    checks: list[dict[str, Any]] | None = None
    embedded: bool = False

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]

    @property
    def has_gold(self) -> bool:
        return self.embedded or self.checks is not None

    def gold(self, response: str) -> float:
        """1.0 for a right response, 0.0 for a wrong one, nan where nobody can tell."""
        if self.embedded:
            return world.gold(self.text, response)
        return float("nan") if self.checks is None else instructions.gold(self.checks, response)


def ids_of(prompts: list[Prompt]) -> str:
    """The ids of the first prompts, for errors."""
    return ", ".join(p.id for p in prompts[:4]) + (", ..." if len(prompts) > 4 else "")


# sources -> rows


def load_preferences(source: str, config: Config, field: str = "preferences") -> list[Preference]:
    """All pairs of a source, in its order. Raises ConfigError naming file, line and column of a bad row.

    field: preferences or eval_preferences, for the hub's split and for errors.
    """
    if source == "embedded":
        pairs = world.preference_pairs(
            world_seed=config.world_seed,
            label_noise=config.label_noise,
            seed=config.seed,
            start_share=config.share_of_pairs,
            label_bias=config.label_bias,
        )
        return [Preference(_messages(p["prompt"]), p["chosen"], p["rejected"]) for p in pairs]
    return _converted(_rows(source, field), _preference, config)


def load_prompts(source: str, config: Config, field: str = "prompts") -> list[Prompt]:
    """All prompts of a source, in its order, after prompt_selection. Raises ConfigError as load_preferences."""
    if source == "embedded":
        return [Prompt(p, _messages(p), embedded=True) for p in world.train_prompts()]
    rows = (r for r in _rows(source, field) if _selected(r[1], config))
    prompts = _converted(rows, _prompt, config)
    if not prompts:
        raise ConfigError(f"{field} = {source!r}: none left by prompt_selection = {config.prompt_selection!r}")
    return prompts


def split_heldout(rows: list[Any]) -> tuple[list[Any], list[Any]]:
    """(the others, every tenth row; at least one row each): a file may be ordered by source.

    Raises ConfigError for fewer than two rows.
    """
    if len(rows) < 2:
        raise ConfigError(f"{len(rows)} row(s) cannot be split into training and held-out data; give at least 2")
    every = min(10, len(rows))
    heldout = rows[every - 1 :: every]
    return [row for i, row in enumerate(rows, 1) if i % every], heldout


def train_and_heldout_preferences(config: Config) -> tuple[list[Preference], list[Preference]]:
    """Training pairs and held-out pairs (with gold labels in the embedded world); none where preferences is empty."""
    pairs = load_preferences(config.preferences, config) if config.preferences else []
    if config.eval_preferences:
        return pairs, load_preferences(config.eval_preferences, config, "eval_preferences")
    if config.preferences == "embedded":
        heldout = world.heldout_pairs(world_seed=config.world_seed, start_share=config.share_of_pairs)
        return pairs, [Preference(_messages(p["prompt"]), p["chosen"], p["rejected"]) for p in heldout]
    return split_heldout(pairs) if pairs else ([], [])


def guard_preferences(config: Config, pairs: list[Preference]) -> tuple[list[Preference], list[Preference]]:
    """For rule save_checked: (pairs of stage 1, guard_pairs + certificate_pairs others).

    The embedded world draws new ones, as noisy as stage 1's; else they come from guard_preferences, or evenly out of
    `pairs`. Raises ConfigError where there are too few.
    """
    count = config.guard_pairs + config.certificate_pairs
    if config.preferences == "embedded" and not config.guard_preferences:
        drawn = world.preference_pairs(
            world_seed=config.world_seed,
            n_pairs=count,
            label_noise=config.label_noise,
            seed=f"{config.seed} guard",
            start_share=config.share_of_pairs,
            label_bias=config.label_bias,
        )
        return pairs, [Preference(_messages(p["prompt"]), p["chosen"], p["rejected"]) for p in drawn]
    source = "guard_preferences" if config.guard_preferences else "preferences"
    found = load_preferences(config.guard_preferences, config, source) if config.guard_preferences else pairs
    enough = count if config.guard_preferences else count + max(config.bt_batch_size, 2)
    if len(found) < enough:
        raise ConfigError(
            f"{source} = {getattr(config, source)!r} has {len(found)} pairs; guard_pairs = {config.guard_pairs} and "
            f"certificate_pairs = {config.certificate_pairs} need {enough}: lower them, or give guard_preferences"
        )
    if config.guard_preferences:
        return pairs, found[:count]
    taken = {i * len(found) // count for i in range(count)}
    return [p for i, p in enumerate(found) if i not in taken], [found[i] for i in sorted(taken)]


def train_and_heldout_prompts(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """RL prompts and held-out prompts."""
    prompts = load_prompts(config.prompts, config)
    if config.eval_prompts_source:
        return prompts, load_prompts(config.eval_prompts_source, config, "eval_prompts_source")
    if config.prompts == "embedded":
        return prompts, [Prompt(p, _messages(p), embedded=True) for p in world.heldout_prompts()]
    return split_heldout(prompts)


def _rows(source: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a local file or a hub dataset; `where` names the row in errors."""
    path = Path(resolve(source))
    count = 0
    for where, row in _file_rows(path, field) if path.is_file() else _hub_rows(source, field):
        count += 1
        yield where, row
    if not count:
        raise ConfigError(f"{field} = {source!r} has no rows")


def _file_rows(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{field}: {path} is not a readable Parquet file: {error}") from None
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(table.to_pylist(), 1))
    elif name.endswith((".jsonl", ".json")):
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
                for i, line in enumerate(lines, 1):
                    yield f"{path}, line {i}", _json_row(line, f"{field}: {path}, line {i}")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ConfigError(f"{field}: {path} cannot be read: {error}") from None
    else:
        raise ConfigError(f"{field}: {path} must end in .jsonl, .jsonl.gz or .parquet")


def _json_row(line: str, where: str) -> dict[str, Any]:
    if not line.strip():
        raise ConfigError(f"{where} is empty; remove the line")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where} holds a {type(row).__name__}, not an object with named columns")
    return row


def _hub_rows(source: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    looks_local = source.endswith((".jsonl", ".json", ".gz", ".parquet")) or source.count("/") != 1
    if looks_local:
        raise ConfigError(f"{field} = {source!r}: no such file, and not a hub id (owner/name) nor 'embedded'")

    import datasets  # slow to import

    try:
        splits = datasets.load_dataset(source)
    except Exception as error:  # whatever the hub client raises: offline, missing, gated, broken files
        raise ConfigError(explain(error, field, source)) from None
    data = splits[next((name for name in SPLITS[field] if name in splits), next(iter(splits)))]
    yield from ((f"{source}, row {i}", row) for i, row in enumerate(data))


# rows -> the internal form


def _converted(
    rows: Iterable[tuple[str, dict[str, Any]]], convert: Callable[[dict, str], T], config: Config
) -> list[T]:
    """Every row converted; a row with bad content is an error, or under bad_rows=skip left out and counted aloud."""
    good, bad = [], []
    for where, row in rows:
        try:
            good.append(convert(row, where))
        except ConfigError as error:
            if config.bad_rows == "error":
                raise ConfigError(f"{error}; mend the row, or set bad_rows=skip to leave such rows out") from None
            bad.append(str(error))
    if bad:
        print(f"left out {len(bad)} of {len(good) + len(bad)} rows, the first: {bad[0]}", flush=True)
    return good


def _messages(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def _column(row: dict[str, Any], names: Iterable[str], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    wanted = " or ".join(repr(n) for n in names)
    raise ConfigError(f"{where}: no column {wanted}; it has {', '.join(map(repr, row)) or 'none'}")


def _prompt_messages(value: Any, where: str) -> Messages:
    """A text, a transcript or a message list -> messages that end with the user's turn."""
    if isinstance(value, str):
        value = _transcript(value) if _TURN.match(value) else _messages(value)
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise ConfigError(f"{where}: a prompt must be a text or a list of {{role, content}}, not {str(value)[:60]!r}")
    value = [{"role": m["role"], "content": m["content"]} for m in value]
    if not value or value[-1]["role"] != "user" or not str(value[-1]["content"] or "").strip():
        raise ConfigError(f"{where}: the prompt is empty, or does not end with a user turn")
    return value


def _transcript(text: str) -> Messages:
    """'\\n\\nHuman: ... \\n\\nAssistant: ...' -> messages."""
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[::2], parts[1::2], strict=True)]


def _preference(row: dict[str, Any], where: str) -> Preference:
    chosen, rejected = _column(row, ["chosen"], where), _column(row, ["rejected"], where)
    if isinstance(chosen, str) and isinstance(rejected, str) and _TURN.match(chosen) and _TURN.match(rejected):
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[:-1] != rejected[:-1]:
        raise ConfigError(f"{where}: 'chosen' and 'rejected' do not answer the same prompt")
    prompt = row.get("prompt")
    if prompt is None and isinstance(chosen, list):
        prompt = chosen[:-1]
    prompt = _prompt_messages(_column({"prompt": prompt} | row if prompt else row, ["prompt"], where), where)
    return Preference(prompt, _response(chosen, "chosen", where), _response(rejected, "rejected", where))


def _response(value: Any, column: str, where: str) -> str:
    if isinstance(value, list):
        last = value[-1] if value else {}
        if not isinstance(last, dict) or last.get("role") != "assistant":
            raise ConfigError(f"{where}: column {column!r} does not end with an assistant turn")
        value = last.get("content")
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: column {column!r} is empty or no text: {str(value)[:60]!r}")
    return value


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    messages = _prompt_messages(_column(row, ["prompt", "instruction"], where), where)
    checks = row.get("checks")
    if checks is not None:
        try:
            instructions.gold(checks, "probe")
        except ValueError as error:
            raise ConfigError(f"{where}: column 'checks': {error}") from None
    return Prompt(str(row.get("id") or where), messages, checks)


@cache
def _policy_tokenizer(source: str):
    return load_tokenizer(source, "policy_model")


def _selected(row: dict[str, Any], config: Config) -> bool:
    """prompt_selection on the dataset's own responses, in the policy's tokens. Rows without any are kept."""
    completions = row.get("completions")
    if config.prompt_selection == "all" or not completions:
        return True
    texts = [c.get("response", "") if isinstance(c, dict) else str(c) for c in completions]
    tokenizer = _policy_tokenizer(config.policy_model)
    fits = all(len(ids) <= config.max_new_tokens for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    return fits if config.prompt_selection == "responses_fit" else not fits
