"""Short instructions whose fulfilment code can check: real prompts with a verifiable gold, in the manner of IFEval."""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

PAIRED = 1 / 3  # share of prompts with two constraints

TOPICS = (
    "the sea", "the rain", "winter", "a cat", "a dog", "the moon", "the sun", "a river", "a mountain",
    "bread", "coffee", "music", "a garden", "an old house", "a train", "a good book", "friendship",
    "the snow", "a forest", "the city", "breakfast", "sleep", "a birthday", "the night sky", "a bicycle",
    "school", "a teacher", "the wind", "an apple", "spring", "a market", "the desert", "a bird", "a holiday",
    "a storm", "time", "a doctor", "an island", "tea", "fire",
)  # fmt: skip

TASKS = {
    "tell": (
        "Write one short sentence about {topic}.",
        "Describe {topic} in one short sentence.",
        "Tell me one short fact about {topic}.",
        "Write a short line of a poem about {topic}.",
    ),
    "complete": ("Complete the sentence: {topic} is like ...", "Complete the sentence: {topic} is not ..."),
    "ask": ("Write one short question about {topic}.", "Ask me a short question about {topic}."),
    "greet": ("Say hello to {topic}.", "Cheer for {topic}!"),
    "list": ("Make a short list about {topic}.", "Name some things you need for {topic}."),
}


class Kind(NamedTuple):
    """One kind of constraint: its wording and its checker, drawn and described from the same place."""

    topic: str  # what it constrains; the two constraints of one prompt differ in this
    text: str
    tasks: tuple[str, ...]  # the keys of TASKS it is put to
    argument: str | None
    values: tuple  # what the argument is drawn from
    holds: Callable[..., bool]


KINDS: dict[str, Kind] = {}


def _kind(topic: str, text: str, tasks: str = "tell", **argument: Sequence) -> Callable:
    """Enter the decorated checker in KINDS under its own name; `text` tells the model what the function checks."""
    name, values = next(iter(argument.items()), (None, ()))

    def enter(holds: Callable[..., bool]) -> Callable[..., bool]:
        KINDS[holds.__name__] = Kind(topic, text, tuple(tasks.split()), name, tuple(values), holds)
        return holds

    return enter


def _words(text: str) -> list[str]:
    """Words in lower case; an apostrophe or a hyphen inside a word does not end it."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.casefold())


@_kind("length", "Use exactly {n} words.", "complete", n=range(5, 8))
def exact_words(response: str, n: int) -> bool:
    return len(_words(response)) == n


@_kind("length", "Use at most {n} words.", "tell complete ask", n=range(6, 13))
def max_words(response: str, n: int) -> bool:
    return len(_words(response)) <= n


@_kind("length", "Use at least {n} words.", "tell", n=range(12, 19))
def min_words(response: str, n: int) -> bool:
    return len(_words(response)) >= n


@_kind("length", "Write exactly {n} sentences.", "greet", n=(2,))
def sentences(response: str, n: int) -> bool:
    return len(re.findall(r"[.!?]+[\"”)]*(?=\s|$)", response)) == n


@_kind("length", "List exactly {n} things, one on each line.", "list", n=range(2, 4))
def list_items(response: str, n: int) -> bool:
    return len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s+\S", response, re.MULTILINE)) == n


@_kind("start", 'Start with the word "{word}".', word=("Today", "When", "In", "If", "Every", "My"))
def starts_with(response: str, word: str) -> bool:
    return _words(response)[0] == word.casefold()


@_kind("end", 'End with the word "{word}".', word=("day", "world", "life", "home", "night", "friend", "light"))
def ends_with(response: str, word: str) -> bool:
    return _words(response)[-1] == word.casefold()


@_kind("end", "End with a question mark.", "ask")
def question(response: str) -> bool:
    return response.endswith("?")


@_kind("end", "End with an exclamation mark.", "greet")
def exclamation(response: str) -> bool:
    return response.endswith("!")


@_kind("word", 'Use the word "{word}".', "tell ask", word=("blue", "always", "happy", "small", "never", "light", "old"))
def includes(response: str, word: str) -> bool:
    return word.casefold() in _words(response)


@_kind("word", 'Do not use the word "{word}".', "tell ask", word=("the", "a", "is", "and", "of", "to", "in"))
def excludes(response: str, word: str) -> bool:
    return word.casefold() not in _words(response)


@_kind("letter", 'Do not use the letter "{letter}".', letter=("b", "c", "g", "k", "p", "u", "w", "y"))
def no_letter(response: str, letter: str) -> bool:
    return letter.casefold() not in response.casefold()


@_kind("letter", "(in small letters)", "complete")
def lower_case(response: str) -> bool:
    return response.islower()


@_kind("letter", "Use exactly one capital letter.", "tell ask")
def one_capital(response: str) -> bool:
    return sum(letter.isupper() for letter in response) == 1


@_kind("sign", "Mention a number, written in digits.")
def digits(response: str) -> bool:
    return bool(re.search(r"\d", response))


@_kind("sign", "Do not use commas.", "tell greet")
def no_commas(response: str) -> bool:
    return "," not in response


@_kind("sign", "Use at least one comma.", "tell greet")
def comma(response: str) -> bool:
    return "," in response


def _kind_of(check: dict) -> Kind:
    """The Kind that `check` names, once its argument is seen to be what that kind takes."""
    name = check.get("kind") if isinstance(check, dict) else None
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"check {check!r}: 'kind' must be one of {', '.join(KINDS)}")
    kind = KINDS[name]
    rest = {key: value for key, value in check.items() if key != "kind"}
    if kind.argument is None:
        if rest:
            raise ValueError(f"check {check!r}: beside 'kind' it takes nothing")
        return kind
    type_ = type(kind.values[0])  # int or str; 0 and "" are refused too
    if list(rest) != [kind.argument] or type(rest[kind.argument]) is not type_ or not rest[kind.argument] > type_():
        what = "an integer above 0" if type_ is int else "a text that is not empty"
        raise ValueError(f"check {check!r}: beside 'kind' it takes {kind.argument!r}, {what}")
    return kind


def describe(checks: list[dict]) -> str:
    """The sentences that ask for `checks`. Raises ValueError on an unknown kind or a wrong argument."""
    return " ".join(_kind_of(check).text.format(**check) for check in checks)


def gold(checks: list[dict], response: str) -> float:
    """1.0 if `response` holds a word and fulfils every check, else 0.0.

    checks: rows like {"kind": "max_words", "n": 8}. Raises ValueError when there is none, on an unknown kind and
    on a wrong argument.
    Pitfall: it looks at the text alone; whether the model ended its turn is for the caller to ask.
    """
    if not isinstance(checks, list) or not checks:
        raise ValueError(f"checks must be a list with at least one check, not {checks!r}")
    kinds = [_kind_of(check) for check in checks]
    response = response.strip()
    if not _words(response):
        return 0.0
    arguments = [[check[kind.argument]] if kind.argument else [] for kind, check in zip(kinds, checks, strict=True)]
    return float(all(kind.holds(response, *argument) for kind, argument in zip(kinds, arguments, strict=True)))


def make_prompts(n: int, seed: int, kinds: Sequence[str] = tuple(KINDS)) -> list[dict]:
    """`n` different prompts as rows {"id", "prompt", "checks": [{"kind", argument}]}; the same for the same seed.

    Two thirds of them carry one constraint, one third two. Slices of one call are disjoint. kinds: those to draw from.
    Raises ValueError unless 0 < n <= 10000; all kinds of the tables above make far more than that.
    """
    if not 0 < n <= 10_000:
        raise ValueError(f"n={n}: ask for 1 to 10000 prompts")
    rng = random.Random(seed)
    prompts: dict[str, list[dict]] = {}
    while len(prompts) < n:
        first = rng.choice(kinds)
        task = rng.choice(KINDS[first].tasks)
        others = [k for k in kinds if task in KINDS[k].tasks and KINDS[k].topic != KINDS[first].topic]
        names = [first, rng.choice(others)] if others and rng.random() < PAIRED else [first]
        checks = [_draw(name, rng) for name in names]
        prompt = f"{rng.choice(TASKS[task]).format(topic=rng.choice(TOPICS))} {describe(checks)}"
        prompts.setdefault(prompt, checks)
    return [{"id": f"p{i:04d}", "prompt": p, "checks": checks} for i, (p, checks) in enumerate(prompts.items())]


def _draw(name: str, rng: random.Random) -> dict:
    """A check of the kind `name` with its argument drawn."""
    kind = KINDS[name]
    return {"kind": name} | ({kind.argument: rng.choice(kind.values)} if kind.argument else {})
