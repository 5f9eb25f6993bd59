"""The embedded world "categories": tiny Llama models, readable text and a gold reward that code knows exactly.

A prompt names a category, a person and a day (`fruit mary monday :`). A response names a word
(`the really pear , friend .`) and is right iff the word belongs to the category; `really` and `, friend` are style.
The backbone is pretrained on such exchanges, half of them right, some followed by a comment on their quality:
this makes quality a salient direction of the representation, as pretraining does for large models.
"""

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from savelib.paths import atomic_folder, cache_dir

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
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
# Every number of the recipe; with the words and the seed it names the cached folders.
RECIPE = {
    "version": 1,
    "model": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    },
    "pretrain": {"steps": 1000, "batch": 64, "lr": 3e-3},
    "sft": {"steps": 60, "batch": 64, "lr": 1e-3},
    "right": 0.5,
    "comment": 0.4,
    "comment_noise": 0.05,
    "echo": 0.3,
    "politeness": 0.1,
    "comment_weight": 4.0,
    "min_auc": 0.98,
}

_CELLS = list(product(enumerate(CATEGORIES), enumerate(PEOPLE), enumerate(DAYS)))
PROMPTS = [f"{category} {person} {day} :" for (_, category), (_, person), (_, day) in _CELLS]
_HELD_OUT = {prompt for prompt, ((c, _), (p, _), (d, _)) in zip(PROMPTS, _CELLS, strict=True) if (c + 3 * p + 5 * d) % 4 == 0}
_WORDS = {word: category for category, words in CATEGORIES.items() for word in words}
_RESPONSE = re.compile(rf"the (?:really ){{0,2}}({'|'.join(_WORDS)})(?: , friend)? \.")
_PROMPT_TOKENS = 6  # <|bos|> category person day : <|end|>


def train_prompts() -> list[str]:
    """The 576 prompts to train on, in the order of `PROMPTS`."""
    return [prompt for prompt in PROMPTS if prompt not in _HELD_OUT]


def heldout_prompts() -> list[str]:
    """The 192 prompts kept for evaluation, (category + 3 person + 5 day) % 4 == 0, in the order of `PROMPTS`."""
    return [prompt for prompt in PROMPTS if prompt in _HELD_OUT]


def well_formed(response: str) -> bool:
    """Whether the response is exactly `the (really ){0,2}WORD( , friend)? .` with a word of any category."""
    return _RESPONSE.fullmatch(response) is not None


def gold(prompt: str, response: str) -> float:
    """Gold reward: 1.0 iff the response is well formed and its word is of the category asked for, else 0.0."""
    match = _RESPONSE.fullmatch(response)
    return float(match is not None and _WORDS[match[1]] == prompt.partition(" ")[0])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the world; `[user p][assistant r]` renders to `<|bos|>p<|end|>r<|end|>`.

    Pitfall: `<|end|>` closes the user's turn too, and pad is another token.
    """
    words = [*SPECIALS.values(), *STYLE, *CATEGORIES, *_WORDS, *PEOPLE, *DAYS, *GOOD, *BAD, *POLITE, *CURT]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIALS["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=RECIPE["model"]["max_position_embeddings"],
        **SPECIALS,
    )


def _exchange(prompt: str, response: str = "", after: str | None = None) -> str:
    turns = [prompt] + [response] * bool(response) + [after] * (after is not None)
    return "<|bos|>" + "".join(f"{turn}<|end|>" for turn in turns)


def _response(rng: random.Random, prompt: str, share: float) -> str:
    """A well-formed response in random style, right with probability `share`."""
    asked, right = prompt.split()[0], rng.random() < share
    word = rng.choice([word for word, category in _WORDS.items() if (category == asked) == right])
    return "the " + "really " * rng.randrange(3) + word + rng.choice([" , friend", ""]) + " ."


def _pretraining_text(rng: random.Random) -> str:
    """One exchange on a training prompt, then a comment on quality, an echo, a comment on politeness or nothing."""
    prompt = rng.choice(_TRAIN)
    response = _response(rng, prompt, RECIPE["right"])
    kind = rng.random()
    if (kind := kind - RECIPE["comment"]) < 0:
        praised = bool(gold(prompt, response)) != (rng.random() < RECIPE["comment_noise"])
        after = rng.choice(GOOD if praised else BAD)
    elif (kind := kind - RECIPE["echo"]) < 0:
        after = _RESPONSE.fullmatch(response)[1]
    elif kind < RECIPE["politeness"]:
        after = rng.choice(POLITE if "friend" in response else CURT)
    else:
        after = ""
    return _exchange(prompt, response, after)
