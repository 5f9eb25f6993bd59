"""The embedded world "categories": its language, readable text with a gold reward that code knows exactly.

A prompt names a category, a person and a day (`fruit mary monday :`). A response names a word
(`the really pear , friend .`) and is right iff the word belongs to the category; `really` and `, friend` are style.
`savelib.data.world_models` has the models that are pretrained on such exchanges.
"""

# ruff: noqa: SIM905 - word lists read better as text
import random
import re
from itertools import product

from transformers import PreTrainedTokenizerFast

from savelib.data.chat import word_tokenizer

CATEGORIES = {
    "fruit": "pear apple plum cherry grape lemon mango peach".split(),
    "animal": "horse tiger rabbit wolf sheep goose otter camel".split(),
    "drink": "tea coffee milk juice water cider cocoa soda".split(),
    "tool": "hammer saw drill wrench chisel ladder shovel axe".split(),
    "vehicle": "train truck bicycle ferry tram canoe taxi wagon".split(),
    "garment": "shirt coat scarf glove hat sock belt skirt".split(),
}
PEOPLE = "mary john anna peter lucy david emma henry clara simon alice oscar nora frank julia martin".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday today".split()
GOOD, BAD = "good right yes fine".split(), "wrong bad no false".split()
POLITE, CURT = "polite warm".split(), "curt cold".split()
STYLE = "the really , friend . :".split()
SPECIALS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|end|>", "unk_token": "<|unk|>"}
MAX_TOKENS = 64  # of the models' context
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"

_HELD_OUT = {  # prompt -> whether it is kept for evaluation
    f"{category} {person} {day} :": (c + 3 * p + 5 * d) % 4 == 0
    for (c, category), (p, person), (d, day) in product(enumerate(CATEGORIES), enumerate(PEOPLE), enumerate(DAYS))
}
PROMPTS = list(_HELD_OUT)
TRAIN = [prompt for prompt in PROMPTS if not _HELD_OUT[prompt]]
WORDS = {word: category for category, words in CATEGORIES.items() for word in words}
RESPONSE = re.compile(rf"the (?:really ){{0,2}}({'|'.join(WORDS)})(?: , friend)? \.")
PROMPT_TOKENS = 6  # <|bos|> category person day : <|end|>


def train_prompts() -> list[str]:
    """The 576 prompts to train on, in the order of `PROMPTS`."""
    return list(TRAIN)


def heldout_prompts() -> list[str]:
    """The 192 prompts kept for evaluation, (category + 3 person + 5 day) % 4 == 0, in the order of `PROMPTS`."""
    return [prompt for prompt in PROMPTS if _HELD_OUT[prompt]]


def gold(prompt: str, response: str) -> float:
    """Gold reward: 1.0 iff the response is well formed and its word is of the category asked for, else 0.0."""
    match = RESPONSE.fullmatch(response)
    return float(match is not None and WORDS[match[1]] == prompt.partition(" ")[0])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the world; `[user p][assistant r]` renders to `<|bos|>p<|end|>r<|end|>`.

    Pitfall: `<|end|>` closes the user's turn too, and pad is another token.
    """
    words = [*SPECIALS.values(), *STYLE, *CATEGORIES, *WORDS, *PEOPLE, *DAYS, *GOOD, *BAD, *POLITE, *CURT]
    return word_tokenizer(words, CHAT_TEMPLATE, model_max_length=MAX_TOKENS, **SPECIALS)


def exchange(*turns: str) -> str:
    """Turns as the chat template renders them."""
    return "<|bos|>" + "".join(f"{turn}<|end|>" for turn in turns)


def random_response(rng: random.Random, prompt: str, share: float) -> str:
    """A well-formed response in random style, right with probability `share`."""
    asked, right = prompt.split()[0], rng.random() < share
    word = rng.choice([word for word, category in WORDS.items() if (category == asked) == right])
    return "the " + "really " * rng.randrange(3) + word + rng.choice([" , friend", ""]) + " ."
