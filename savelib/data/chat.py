"""Messages, tokenizers and chat templates."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from savelib.config import ConfigError
from savelib.data.hub import from_pretrained
from savelib.paths import resolve

Messages = list[dict[str, str]]

TEMPLATE_DATE = "26 Jul 2024"  # Llama 3 templates write today's date: a score must not change with the day


def load_tokenizer(source: str, field: str):
    """A fast tokenizer with a chat template. Raises ConfigError naming the config field."""
    if source.startswith(("/", ".", "~")) and not os.path.isdir(resolve(source)):
        raise ConfigError(f"{field} = {source!r}: no such folder")
    tokenizer = from_pretrained(AutoTokenizer, source, field)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ConfigError(f"{field} = {source!r} has no tokenizer: a tokenizer.json must be beside its config.json")
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{field} = {source!r}: its tokenizer has no chat template; put a chat_template.jinja beside it, "
            "or use an instruction-tuned model"
        )
    _try_template(tokenizer, f"{field} = {source!r}")
    return tokenizer


def _try_template(tokenizer, said: str) -> None:
    """Raise ConfigError where the chat template fails, or leaves out what was said: then all texts would be one."""
    asked, answered = "a plain question", "a plain answer"
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    for messages, wanted in ((talk[:1], [asked]), (talk, [asked, answered])):
        try:
            text = render(tokenizer, messages, generation_prompt=len(messages) == 1)
        except ConfigError as error:
            raise ConfigError(f"{said}: {error}") from None
        missing = [part for part in wanted if part not in text]
        if missing:
            what = "prompt" if missing[0] == asked else "response"
            raise ConfigError(
                f"{said}: its chat template leaves out what the {what} says: {missing[0]!r} is not in {text[:60]!r}; "
                "mend its chat_template.jinja"
            )


def render(tokenizer, messages: Messages, *, generation_prompt: bool = False) -> str:
    """The conversation as the tokenizer's chat template writes it, with a fixed date.

    Raises ConfigError for one that the template refuses, such as one with a role that it does not know.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, date_string=TEMPLATE_DATE
        )
    except Exception as error:  # a template is a program
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} refuses the conversation that begins "
            f"{str(messages[0])[:80]!r}: {said}"
        ) from None


def check_ids(ids: list[list[int]], vocabulary: int, field: str) -> None:
    """Raise ConfigError for a token that the model has no embedding of: an index error, on CUDA one without a word."""
    highest = max((max(row) for row in ids if row), default=0)
    if highest >= vocabulary:
        raise ConfigError(
            f"{field}: its tokenizer gives token {highest}, but the model has embeddings of {vocabulary} tokens; put "
            "the tokenizer beside it that it was trained with"
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
