"""Short instructions whose fulfilment code can check: real prompts with a verifiable gold, in the manner of IFEval."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

WORD = re.compile(r"\w+(?:['’-]\w+)*")
LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """One kind of constraint: its wording, the values its argument is drawn from, its checker, what it is about."""

    about: str  # two constraints of one prompt never share this
    text: str
    argument: str | None
    values: tuple
    holds: Callable[..., bool]


KINDS: dict[str, Kind] = {}


def _kind(about: str, text: str, **argument: tuple) -> Callable:
    """Enter the decorated checker in KINDS: `text` says to the model what the function checks."""
    (name, values), *_ = [*argument.items(), (None, ())]

    def enter(holds: Callable[..., bool]) -> Callable[..., bool]:
        KINDS[holds.__name__] = Kind(about, text, name, tuple(values), holds)
        return holds

    return enter


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


@_kind("length", "Use exactly {n} words.", n=range(3, 9))
def exact_words(response: str, n: int) -> bool:
    return len(_words(response)) == n


@_kind("length", "Use at most {n} words.", n=range(5, 16))
def max_words(response: str, n: int) -> bool:
    return len(_words(response)) <= n


@_kind("length", "Use at least {n} words.", n=range(8, 16))
def min_words(response: str, n: int) -> bool:
    return len(_words(response)) >= n


@_kind("length", "Answer with a single word.")
def one_word(response: str) -> bool:
    return len(_words(response)) == 1


@_kind("length", "Write exactly {n} sentences.", n=range(2, 4))
def sentences(response: str, n: int) -> bool:
    return len(re.findall(r"[.!?]+(?=\s|$)", response)) == n


@_kind("length", "Give a list of exactly {n} items, one item per line.", n=range(2, 6))
def list_items(response: str, n: int) -> bool:
    return len(LIST_ITEM.findall(response)) == n


@_kind("length", "Write {n} lines.", n=range(2, 4))
def lines(response: str, n: int) -> bool:
    return len([line for line in response.splitlines() if line.strip()]) == n


@_kind("start", 'Start with the word "{word}".', word=("Today", "Every", "When", "If", "Many", "Sometimes", "My"))
def starts_with(response: str, word: str) -> bool:
    return _words(response)[:1] == [word.casefold()]


@_kind("end", 'End with the word "{word}".', word=("day", "world", "life", "home", "night", "friend", "forever"))
def ends_with(response: str, word: str) -> bool:
    return _words(response)[-1:] == [word.casefold()]


@_kind("end", "End with a question mark.")
def question(response: str) -> bool:
    return response.endswith("?")


@_kind("end", "End with an exclamation mark.")
def exclamation(response: str) -> bool:
    return response.endswith("!")


@_kind("end", "Do not end with a full stop.")
def no_full_stop(response: str) -> bool:
    return not response.endswith(".")


@_kind("word", 'Use the word "{word}".', word=("blue", "always", "happy", "small", "never", "light", "old", "morning"))
def includes(response: str, word: str) -> bool:
    return word.casefold() in _words(response)


@_kind("word", 'Do not use the word "{word}".', word=("the", "a", "is", "and", "of", "to", "in"))
def excludes(response: str, word: str) -> bool:
    return word.casefold() not in _words(response)


@_kind("word", 'Do not use the letter "{letter}".', letter=("z", "k", "y", "u", "b", "w"))
def no_letter(response: str, letter: str) -> bool:
    return letter.casefold() not in response.casefold()


@_kind("word", "Mention a number, written in digits.")
def digits(response: str) -> bool:
    return bool(re.search(r"\d", response))


@_kind("case", "Write in lower case only.")
def lower_case(response: str) -> bool:
    return response == response.lower()


@_kind("case", "Write in capital letters only.")
def upper_case(response: str) -> bool:
    return response == response.upper()


@_kind("sign", "Do not use commas.")
def no_commas(response: str) -> bool:
    return "," not in response


@_kind("sign", "Use at least one comma.")
def comma(response: str) -> bool:
    return "," in response


@_kind("sign", "Put your whole answer in double quotation marks.")
def quoted(response: str) -> bool:
    return len(response) > 2 and response[0] in '"“' and response[-1] in '"”'


@_kind("sign", "Put your answer in parentheses.")
def parentheses(response: str) -> bool:
    return response.startswith("(") and response.rstrip(".").endswith(")")


TOPICS = (
    "the sea", "rain", "winter", "a cat", "a dog", "the moon", "the sun", "a river", "a mountain", "bread", "coffee",
    "music", "a garden", "an old house", "a train", "a good book", "friendship", "snow", "a forest", "the city",
    "breakfast", "sleep", "a birthday", "the night sky", "a bicycle", "school", "a teacher", "the wind", "apples",
    "spring", "a market", "the desert", "a bird", "a holiday", "a storm", "time", "a doctor", "an island", "tea", "fire",
)  # fmt: skip
SENTENCE_TASKS = (
    "Write one short sentence about {topic}.",
    "Describe {topic} in one short sentence.",
    "Say something nice about {topic} in a few words.",
    "Give a short title for a story about {topic}.",
    "Ask a friend a short question about {topic}.",
)
LIST_TASKS = (
    "Name some fruits.",
)


def make(kind, rng):
    k = KINDS[kind]
    check = {"kind": kind}
    if k.argument: check[k.argument] = rng.choice(k.values)
    return check

def text(check):
    return KINDS[check["kind"]].text.format(**check)
