"""Messages, tokenizers and chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from savelib.config import ConfigError
from savelib.data.hub import from_pretrained
from savelib.paths import resolve

Messages = list[dict[str, str]]

TEMPLATE_DATE = "26 Jul 2024"  # Llama 3 templates write today's date: a score must not change with the day


def load_tokenizer(source: str, field: str):
    """A fast tokenizer with a chat template. Raises ConfigError naming the config field."""
    if source.startswith(("/", ".", "~")) and not Path(resolve(source)).is_dir():
        raise ConfigError(f"{field} = {source!r}: no such folder")
    tokenizer = from_pretrained(AutoTokenizer, source, field)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ConfigError(f"{field} = {source!r} has no tokenizer: a tokenizer.json must be beside its config.json")
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{field} = {source!r}: its tokenizer has no chat template; put a chat_template.jinja beside it, "
            "or use an instruction-tuned model"
        )
    return tokenizer


def render(tokenizer, messages: Messages, *, generation_prompt: bool = False) -> str:
    """The conversation as the tokenizer's chat template writes it, with a fixed date."""
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt, date_string=TEMPLATE_DATE
    )


def word_tokenizer(words: Sequence[str], chat_template: str, **settings) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words between spaces, ids in their order; settings: the special tokens, and more."""
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token=settings.get("unk_token", words[0])))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=chat_template, clean_up_tokenization_spaces=False, padding_side="right",
        **settings,
    )  # fmt: skip
