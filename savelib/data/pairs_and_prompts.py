"""Preference pairs and prompts: the embedded world, local JSONL or Parquet files, hub datasets.

One internal form whatever the source: a prompt is a list of chat messages that ends with the user's turn.
Accepted columns
- pairs: `prompt, chosen, rejected` as texts, or as message lists (HuggingFaceH4/ultrafeedback_binarized), or only
  `chosen, rejected` as "Human: ... Assistant: ..." transcripts (Anthropic/hh-rlhf)
- prompts: `prompt` (or `instruction`, as in openbmb/UltraFeedback) as text or messages; optional `checks`
  (savelib.data.instructions) makes the gold reward known; optional `completions` serve prompt_selection
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from savelib.config import Config, ConfigError, shown
from savelib.data import instructions, world, world_models
from savelib.data.chat import Messages, load_tokenizer
from savelib.data.files import ANY_SPLIT, Record, as_text, column, converted, source_rows
from savelib.data.smollm2 import smollm2_path

T = TypeVar("T")
SPLITS = {  # of a hub dataset: the first that it has
    "preferences": ("train_prefs", "train", ANY_SPLIT),
    "eval_preferences": ("test_prefs", "test", ANY_SPLIT),
    "guard_preferences": ("test_prefs", "test", ANY_SPLIT),
    "prompts": ("train", ANY_SPLIT),
    "eval_prompts_source": ("test", ANY_SPLIT),
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
        pairs = world_models.preference_pairs(
            world_seed=config.world_seed,
            n_pairs=config.world_pairs,
            label_noise=config.label_noise,
            seed=config.seed,
            start_share=config.share_of_pairs,
            label_bias=config.label_bias,
        )
        return [Preference(_messages(p["prompt"]), p["chosen"], p["rejected"]) for p in pairs]
    return _loaded(source, field, _preference, config)


def load_prompts(source: str, config: Config, field: str = "prompts") -> list[Prompt]:
    """All prompts of a source, in its order, after prompt_selection. Raises ConfigError as load_preferences."""
    if source == "embedded":
        return [Prompt(p, _messages(p), embedded=True) for p in world.train_prompts()]
    found = _loaded(source, field, lambda row, where: _prompt(row, where) if _selected(row, config) else None, config)
    prompts = [prompt for prompt in found if prompt]
    if not prompts:
        raise ConfigError(f"{field} = {source!r}: none left by prompt_selection = {config.prompt_selection!r}")
    return prompts


def split_heldout(rows: list[Any], field: str) -> tuple[list[Any], list[Any]]:
    """(the others, every tenth row; at least one row each): a file may be ordered by source.

    Raises ConfigError naming the field for fewer than two rows.
    """
    if len(rows) < 2:
        own = "eval_preferences" if field == "preferences" else "eval_prompts_source"
        raise ConfigError(
            f"{field}: {len(rows)} row cannot be split into training and held-out data; give 2 or more, or {own}"
        )
    every = min(10, len(rows))
    heldout = rows[every - 1 :: every]
    return [row for i, row in enumerate(rows, 1) if i % every], heldout


def train_and_heldout_preferences(config: Config) -> tuple[list[Preference], list[Preference]]:
    """Training pairs and held-out pairs (with gold labels in the embedded world); none where preferences is empty."""
    pairs = load_preferences(config.preferences, config) if config.preferences else []
    if config.eval_preferences:
        return pairs, load_preferences(config.eval_preferences, config, "eval_preferences")
    if config.preferences == "embedded":
        heldout = world_models.heldout_pairs(world_seed=config.world_seed, start_share=config.share_of_pairs)
        return pairs, [Preference(_messages(p["prompt"]), p["chosen"], p["rejected"]) for p in heldout]
    return split_heldout(pairs, "preferences") if pairs else ([], [])


def guard_preferences(config: Config, pairs: list[Preference]) -> tuple[list[Preference], list[Preference]]:
    """For rule save_checked: (pairs of stage 1, guard_pairs + certificate_pairs others).

    The embedded world draws new ones, as noisy as stage 1's (and as biased, unless guard_unbiased); else they come from
    guard_preferences, or evenly out of `pairs`. Raises ConfigError where there are too few.
    """
    count = config.guard_pairs + config.certificate_pairs
    if config.preferences == "embedded" and not config.guard_preferences:
        drawn = world_models.preference_pairs(
            world_seed=config.world_seed,
            n_pairs=count,
            label_noise=config.label_noise,
            seed=f"{config.seed} guard",
            start_share=config.share_of_pairs,
            label_bias=0.0 if config.guard_unbiased else config.label_bias,
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
    return split_heldout(prompts, "prompts")


# rows -> the internal form


def _loaded(source: str, field: str, convert: Callable[[Record, str], T], config: Config) -> list[T]:
    """Every row converted; a row with bad content is an error, or under bad_rows=skip left out and counted aloud."""
    good, bad = converted(source_rows(source, field, SPLITS[field]), convert)
    said = f"{len(bad)} of {len(good) + len(bad)} rows"
    if bad and config.bad_rows == "error":
        raise ConfigError(
            f"{field} = {source!r}: {said} are bad, the first: {bad[0]}; correct them, or set bad_rows=skip"
        )
    if bad:
        print(f"left out {said}, the first: {bad[0]}", flush=True)
    return good


def _messages(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def _prompt_messages(value: Any) -> Messages:
    """A text, a transcript or a message list -> messages that end with the user's turn."""
    if isinstance(value, str):
        value = _transcript(value) if _TURN.match(value) else _messages(value)
    messages = _checked(value, "the prompt")
    if messages[-1]["role"] != "user":
        raise ConfigError(f"the prompt ends with a turn of {messages[-1]['role']!r}, not of 'user'")
    as_text(messages[-1]["content"], "the prompt's last message")
    return messages


def _checked(value: Any, what: str) -> Messages:
    """A list of messages, each with role and content as texts."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{what} must be a text or a list of {{role, content}}, not {shown(value)}")
    for number, message in enumerate(value, 1):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise ConfigError(f"{what}: message {number} must have {name} as a text, not {shown(message)}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _transcript(text: str) -> Messages:
    """'\\n\\nHuman: ... \\n\\nAssistant: ...' -> messages."""
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[::2], parts[1::2], strict=True)]


def _preference(row: Record, _: str) -> Preference:
    chosen, rejected = column(row, "chosen"), column(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and _TURN.match(chosen) and _TURN.match(rejected):
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[:-1] != rejected[:-1]:
        raise ConfigError("'chosen' and 'rejected' do not answer the same prompt")
    alone = "prompt" not in row and isinstance(chosen, list)  # the transcript has the prompt
    prompt = _prompt_messages(chosen[:-1] if alone else column(row, "prompt"))
    return Preference(prompt, _response(chosen, "chosen"), _response(rejected, "rejected"))


def _response(value: Any, name: str) -> str:
    what = f"column {name!r}"
    if isinstance(value, list):
        last = _checked(value, what)[-1]
        if last["role"] != "assistant":
            raise ConfigError(f"{what} does not end with an assistant turn")
        value = last["content"]
    return as_text(value, what)


def _prompt(row: Record, where: str) -> Prompt:
    messages = _prompt_messages(column(row, "prompt", "instruction"))
    checks = row.get("checks")
    if checks is not None:
        try:
            instructions.gold(checks, "probe")
        except ValueError as error:
            raise ConfigError(f"column 'checks': {error}") from None
    return Prompt(str(row.get("id") or where), messages, checks)


@cache
def _policy_tokenizer(source: str):
    if source == "embedded":
        return world.make_tokenizer()
    return load_tokenizer(str(smollm2_path()) if source == "smollm2" else source, "policy_model")


def _selected(row: Record, config: Config) -> bool:
    """prompt_selection on the dataset's own responses, in the policy's tokens. Rows without any are kept."""
    completions = row.get("completions")
    if config.prompt_selection == "all" or not completions:
        return True
    listed = completions if isinstance(completions, list) else [None]
    texts = [c.get("response") if isinstance(c, dict) else c for c in listed]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"column 'completions' must be a list of texts or of {{response}}, not {shown(completions)}")
    tokenizer = _policy_tokenizer(config.policy_model)
    fits = all(len(ids) <= config.max_new_tokens for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    return fits if config.prompt_selection == "responses_fit" else not fits
