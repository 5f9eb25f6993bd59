"""The embedded world's models: tiny Llamas, built on the spot and cached, and the preference pairs of their responses.

The backbone is pretrained on exchanges of the world, half of them right, some followed by a comment on their quality:
this makes quality a salient direction of the representation, as pretraining does for large models.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from savelib.config import ConfigError
from savelib.data.hub import from_pretrained
from savelib.data.world import (
    BAD,
    CATEGORIES,
    CHAT_TEMPLATE,
    CURT,
    GOOD,
    MAX_TOKENS,
    POLITE,
    PROMPT_TOKENS,
    RESPONSE,
    TRAIN,
    exchange,
    gold,
    heldout_prompts,
    make_tokenizer,
    random_response,
)
from savelib.method import feature_geometry
from savelib.paths import atomic_folder, cache_dir, digest

# Every number of the recipe; with the words and the seed it names the cached folders.
RECIPE = {
    "version": 2,
    "model": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": MAX_TOKENS,
        "initializer_range": 0.1,
    },
    "pretrain": {"steps": 1000, "batch": 64, "lr": 3e-3},
    "warmup": 0.05,  # shares of the steps; linear
    "decay": 0.2,
    "sft": {"steps": 60, "batch": 64, "lr": 1e-3},
    "right": 0.5,
    "comment": 0.4,
    "comment_noise": 0.05,
    "echo": 0.3,
    "politeness": 0.1,
    "comment_weight": 4.0,
    "min_auc": 0.98,
}


def _pretraining_text(rng: random.Random) -> str:
    """One exchange on a training prompt, then a comment on quality, an echo, a comment on politeness or nothing."""
    prompt = rng.choice(TRAIN)
    response = random_response(rng, prompt, RECIPE["right"])
    kind = rng.random()
    if (kind := kind - RECIPE["comment"]) < 0:
        praised = bool(gold(prompt, response)) != (rng.random() < RECIPE["comment_noise"])
        after = rng.choice(GOOD if praised else BAD)
    elif (kind := kind - RECIPE["echo"]) < 0:
        after = RESPONSE.fullmatch(response)[1]
    elif kind < RECIPE["politeness"]:
        after = rng.choice(POLITE if "friend" in response else CURT)
    else:
        after = ""
    return exchange(prompt, response, after)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread inside, so that the same seed gives the same numbers whatever OMP_NUM_THREADS says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(model: LlamaForCausalLM, texts: Callable[[], str], steps: int, batch: int, lr: float) -> LlamaForCausalLM:
    """AdamW on what follows the prompt in each text; comment tokens weigh `comment_weight`."""
    tokenizer = make_tokenizer()
    token_weight = torch.ones(len(tokenizer))
    token_weight[tokenizer.convert_tokens_to_ids([*GOOD, *BAD, *POLITE, *CURT])] = RECIPE["comment_weight"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    warmup, decay = RECIPE["warmup"] * steps, RECIPE["decay"] * steps  # without warm-up some seeds fail the probe
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warmup, (steps - i) / decay))
    model.train()
    for _ in range(steps):
        encoded = tokenizer([texts() for _ in range(batch)], padding=True, return_tensors="pt")
        ids, mask = encoded.input_ids, encoded.attention_mask  # [N, L]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, PROMPT_TOKENS - 1 : -1]
        targets = ids[:, PROMPT_TOKENS:]
        weights = token_weight[targets] * mask[:, PROMPT_TOKENS:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # [N, L - 6]
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@_one_thread()
def pretrain(seed: int, steps: int | None = None) -> LlamaForCausalLM:
    """The backbone: a Llama of about 0.1 M parameters, pretrained on right and wrong exchanges with comments."""
    tokenizer, rng = make_tokenizer(), random.Random(f"pretrain {seed}")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ids, **RECIPE["model"]))
    recipe = RECIPE["pretrain"]
    return _fit(model, lambda: _pretraining_text(rng), **(recipe if steps is None else recipe | {"steps": steps}))


@_one_thread()
def sft_policy(model: LlamaForCausalLM, start_share: float = 0.4, seed: int = 0) -> LlamaForCausalLM:
    """Fine-tune `model` in place on responses of which `start_share` are right: the policy before RL."""
    rng = random.Random(f"sft {seed} {start_share}")

    def text() -> str:
        prompt = rng.choice(TRAIN)
        return exchange(prompt, random_response(rng, prompt, start_share))

    return _fit(model, text, **RECIPE["sft"])


@_one_thread()
@torch.no_grad()
def sample_responses(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    n: int,
    temperature: float = 1.0,
    max_new_tokens: int = 12,
    seed: int = 0,
) -> list[list[str]]:
    """`n` responses to each prompt of the world, from a generator of its own: the global RNG is not touched."""
    generator = torch.Generator(model.device).manual_seed(seed)
    start = tokenizer([exchange(prompt) for prompt in prompts], return_tensors="pt").input_ids.to(model.device)
    ids, end = start.repeat_interleave(n, 0), tokenizer.eos_token_id  # [N * n, 6]
    for _ in range(max_new_tokens):
        probabilities = (model(input_ids=ids).logits[:, -1] / temperature).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
        if (ids[:, PROMPT_TOKENS:] == end).any(1).all():
            break
    rows = [row[: row.index(end)] if end in row else row for row in ids[:, PROMPT_TOKENS:].tolist()]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [texts[i : i + n] for i in range(0, len(texts), n)]


@_one_thread()
@torch.no_grad()
def probe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> float:
    """What the last response token knows about quality, on held-out prompts with one right and one wrong response.

    The share of (right, wrong) pairs that the comment's log-odds order correctly (AUC), ties counted half.
    """
    rng = random.Random(f"probe {seed}")
    pairs = [(prompt, random_response(rng, prompt, share)) for prompt in heldout_prompts() for share in (1.0, 0.0)]
    encoded = tokenizer([exchange(*pair) for pair in pairs], padding=True, return_tensors="pt")
    logits = model(**encoded).logits[torch.arange(len(pairs)), encoded.attention_mask.sum(1) - 1]  # [N, vocabulary]
    good, bad = (tokenizer.convert_tokens_to_ids(words) for words in (GOOD, BAD))
    scores = logits[:, good].logsumexp(1) - logits[:, bad].logsumexp(1)
    right = torch.tensor([gold(*pair) == 1.0 for pair in pairs])
    gap = scores[right][:, None] - scores[~right][None]  # [right, wrong]
    return ((gap > 0).double() + (gap == 0).double() / 2).mean().item()


def _build(name: str, make: Callable[[], LlamaForCausalLM]) -> Path:
    """Hugging Face folder of `make()` and the tokenizer in the cache, built once; `name` and the recipe are its key."""
    facts = [name, RECIPE, make_tokenizer().get_vocab(), CATEGORIES, CHAT_TEMPLATE]
    target = cache_dir() / f"world-{digest(facts)[:12]}"
    if not target.is_dir():
        start = time.perf_counter()
        with atomic_folder(target) as folder:
            make().save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        print(f"built the {name} of the embedded world in {time.perf_counter() - start:.0f} s: {target}", flush=True)
    return target


def _model(folder: Path) -> LlamaForCausalLM:
    """What `_build` has saved."""
    return from_pretrained(AutoModelForCausalLM, str(folder), "the embedded world")


@torch.no_grad()
@torch.no_grad()
def last_states(model: LlamaForCausalLM) -> torch.Tensor:
    """States before the final norm [P, 8, d] at the last token of 8 responses to each held-out prompt, half right."""
    rng, states = random.Random("geometry"), []
    texts = [exchange(prompt, random_response(rng, prompt, 0.5)) for prompt in heldout_prompts() for _ in range(8)]
    encoded = make_tokenizer()(texts, padding=True, return_tensors="pt")
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model.model(**encoded)
    hook.remove()
    last = (torch.arange(len(texts)), encoded.attention_mask.sum(1) - 1)
    return states[0][last].unflatten(0, (-1, 8))


@_one_thread()
@torch.no_grad()
def with_offset(model: LlamaForCausalLM, offset: float, seed: int) -> LlamaForCausalLM:
    """A copy whose features have a mean of `offset` times their spread within a group, as a real model's have.

    The last layer's MLP gets a bias in a random direction, as large as it takes, and the final norm is scaled so that
    the spread is what it was. (SmolLM2-135M: 5 to 7 at every layer; this world without it: about .85.)
    Errors: ConfigError for an offset that the features have already.
    """
    settings = model.config.to_dict() | {"mlp_bias": True}
    copy = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    copy.load_state_dict(model.state_dict(), strict=False)  # what it lacks are the biases, 0 at the start
    generator = torch.Generator().manual_seed(seed)
    direction = F.normalize(torch.randn(model.config.hidden_size, generator=generator), dim=0)
    states, norm = last_states(model), copy.model.norm
    plain, spread = feature_geometry(norm(states))
    if offset <= plain:
        raise ConfigError(f"feature_offset = {offset}: this world's features have {plain:.2f} already; give more, or 0")
    low, high = 0.0, 1e4
    for _ in range(50):
        middle = (low + high) / 2
        less = feature_geometry(norm(states + middle * direction))[0] < offset
        low, high = (middle, high) if less else (low, middle)
    copy.model.layers[-1].mlp.down_proj.bias.copy_(low * direction)
    norm.weight.mul_(spread / feature_geometry(norm(states + low * direction))[1])
    return copy


def build_backbone(world_seed: int = 0, feature_offset: float = 0.0) -> Path:
    """Folder of the pretrained backbone (model and tokenizer), built in about 20 s unless it is in the cache.

    feature_offset: of its features (`with_offset`); 0: as pretrained.
    Errors: ConfigError where the probe shows that quality was not learnt, and for an offset that is too small.
    """
    if feature_offset:
        plain = build_backbone(world_seed)

        def shifted() -> LlamaForCausalLM:
            return with_offset(_model(plain), feature_offset, world_seed)

        return _build(f"backbone {world_seed} offset {feature_offset}", shifted)

    def make() -> LlamaForCausalLM:
        model = pretrain(world_seed)
        auc = probe(model, make_tokenizer())
        if not auc >= RECIPE["min_auc"]:
            raise ConfigError(
                f"world_seed = {world_seed}: the pretrained backbone does not tell right from wrong "
                f"(probe AUC {auc:.3f}, needs {RECIPE['min_auc']}); take another world_seed"
            )
        return model

    return _build(f"backbone {world_seed}", make)


def build_policy(world_seed: int = 0, start_share: float = 0.4) -> Path:
    """Folder of the initial policy (model and tokenizer), about `start_share` right at temperature 1.

    Errors: ValueError for a `start_share` outside (0, 1).
    """
    if not 0 < start_share < 1:
        raise ValueError(f"start_share {start_share}: the share of right responses must lie between 0 and 1")
    backbone = build_backbone(world_seed)
    return _build(
        f"policy {world_seed} {start_share}",
        lambda: sft_policy(_model(backbone), start_share, world_seed),
    )


@lru_cache(maxsize=8)
def _pairs(world_seed: int, start_share: float, train: bool, n: int, seed: str) -> list[dict[str, str]]:
    """`n` pairs of two policy samples of the same prompt, chosen right and rejected wrong."""
    if n < 1:
        raise ValueError(f"{n} pairs asked for: take at least 1")
    folder, rng = build_policy(world_seed, start_share), random.Random(seed)
    model, tokenizer = _model(folder), from_pretrained(AutoTokenizer, str(folder), "the embedded world")
    prompts, pairs = TRAIN if train else heldout_prompts(), []
    for _ in range(100):
        if len(pairs) >= n:
            return pairs[:n]
        asked = rng.sample(prompts, min(n, len(prompts)))
        for prompt, (a, b) in zip(
            asked, sample_responses(model, tokenizer, asked, 2, seed=rng.getrandbits(32)), strict=True
        ):
            if gold(prompt, a) != gold(prompt, b):
                chosen, rejected = (a, b) if gold(prompt, a) else (b, a)
                pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    raise ConfigError(f"start_share = {start_share}: {len(pairs)} pairs of {n} found; the policy hardly ever differs")


def preference_pairs(
    world_seed: int = 0,
    n_pairs: int = 40,
    label_noise: float = 0.3,
    seed: int | str = 0,
    start_share: float = 0.4,
    label_bias: float = 0.0,
) -> list[dict[str, str]]:
    """Stage 1's data: `prompt`, `chosen`, `rejected`, two policy samples of a training prompt that differ in gold.

    Each label is flipped with probability `label_noise`. Before that, with probability `label_bias`, it goes to the
    polite response (`, friend`), whatever its quality, where one of the two is: a systematic bias, as for length.
    Errors: ValueError for a probability outside [0, 1].
    """
    if not 0 <= label_noise <= 1:
        raise ValueError(f"label_noise {label_noise}: the share of flipped labels must lie in [0, 1]")
    rng = random.Random(f"labels {world_seed} {seed}")
    pairs = [dict(p) for p in _pairs(world_seed, start_share, True, n_pairs, f"preferences {world_seed} {seed}")]
    biased = random.Random(f"bias {world_seed} {seed}")
    for pair in pairs:
        if biased.random() < label_bias and "friend" in pair["rejected"] and "friend" not in pair["chosen"]:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
        if rng.random() < label_noise:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    return pairs


def heldout_pairs(world_seed: int = 0, n: int = 256, start_share: float = 0.4) -> list[dict[str, str]]:
    """Fixed evaluation pairs on held-out prompts: samples of the initial policy, chosen right by gold."""
    return [dict(pair) for pair in _pairs(world_seed, start_share, False, n, f"heldout {world_seed}")]
