"""Memory of a run, from the models' configs alone: what each setting needs per GPU, and which of them fit.

What the numbers assume; tests/test_plan.py holds the parts against what PyTorch allocates:

- All weights trained: float32. Autocast adds bfloat16 copies of the linear layers' weights for as long as autograd
  keeps them, and for a whole rollout, which is one autocast block. The reference is a second policy, never sharded.
- LoRA: a bfloat16 base, float32 adapters, no reference copy. QLoRA: the backbone's linear layers in nf4 with double
  quantisation; embeddings, norms and output layer stay 16 bit.
- ZeRO-2 (deepspeed 0.19): whole weights, 1/N of gradients, moments and a flat master copy; reduce buckets in a
  backward. Offload puts these three in the CPU's memory (24 bytes a weight: moments, master, flat and accumulated
  gradients, a copy for the transfer), and the GPU keeps a buffer of the largest weight.
- ZeRO-3: 1/N of weights, gradients (never freed) and moments, no second master; a bucket for each model; up to 1e9
  weights gathered while a model runs.
- One micro-batch is alive at a time, each row as long as prompt and max_new_tokens, with a padding mask, for which
  keys and values are repeated to all heads. Prompts have min(max_prompt_tokens, 512) tokens.
- Left out: CUDA's context, the allocator's fragments, NCCL. So a peak within 90% of the memory `fits`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from savelib.config import Config, ConfigError
from savelib.method import RULES
from savelib.models.loading import policy_source, reward_source
from savelib.paths import project_root, resolve

GIB = 2**30
USABLE = 0.9  # share of the memory that a peak may take
PROMPT_TOKENS = 512

# the sizes that the paper's models publish, for where the hub is out of reach; call one for its config
PAPER_MODELS: dict[str, Callable[..., PreTrainedConfig]] = {
    "Skywork/Skywork-Reward-V2-Llama-3.2-3B": partial(
        LlamaConfig, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True, num_labels=1,
        max_position_embeddings=131072,
    ),
    "Qwen/Qwen2.5-3B-Instruct": partial(
        Qwen2Config, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
    ),
    "Qwen/Qwen3-4B-Instruct-2507": partial(
        Qwen3Config, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
        max_position_embeddings=262144,
    ),
}  # fmt: skip

_FULL = {"lora_rank": 0, "load_in_4bit": False, "optimizer": "adamw"}
_LORA = {"backend": "ddp", "load_in_4bit": False, "optimizer": "adamw"}
SETTINGS: dict[str, dict[str, Any]] = {  # most faithful to the paper first, the faster of equals first
    "ddp": _FULL | {"backend": "ddp"},
    "deepspeed_zero2": _FULL | {"backend": "deepspeed_zero2"},
    "deepspeed_zero2_offload": _FULL | {"backend": "deepspeed_zero2_offload"},
    "deepspeed_zero3": _FULL | {"backend": "deepspeed_zero3"},
    "LoRA": _LORA,
    "LoRA, 8-bit AdamW": _LORA | {"optimizer": "adamw_8bit"},
    "QLoRA, 8-bit AdamW": _LORA | {"optimizer": "adamw_8bit", "load_in_4bit": True},
}


@dataclass(frozen=True)
class Sizes:
    """What memory depends on, counted on a model without storage."""

    name: str
    published: bool  # taken from PAPER_MODELS
    tensors: list[int]  # parameters of each weight
    copied: int  # parameters of all linear layers, which autocast copies
    linear: list[tuple[int, int]]  # (out, in) of the backbone's linear layers, which LoRA adapts
    layers: int
    hidden: int
    inner: int  # width of the MLP
    heads: int
    queries: int  # heads * head_dim
    keys: int  # kv_heads * head_dim
    vocab: int
    qk_norm: bool  # Qwen3 normalises queries and keys

    @property
    def total(self) -> int:
        return sum(self.tensors)

    def adapters(self, rank: int) -> list[int]:
        """Parameters of each tensor that LoRA trains: A [r, in] and B [out, r] of each linear layer."""
        return [rank * width for shape in self.linear for width in shape]

    def nf4(self, width: int = 2) -> float:
        """Bytes of QLoRA's base: 4 bits, a byte of scale per block of 64, a float32 per 256 of these; two code books.

        width: bytes of a parameter that stays as it is.
        """
        counts = [out * into for out, into in self.linear]
        scales = sum(-(-n // 64) + 4 * -(-n // (64 * 256)) + 4 * (256 + 16 + 1) for n in counts)
        return sum(counts) / 2 + scales + width * (self.total - sum(counts))


def model_sizes(source: str, field: str) -> Sizes:
    """Sizes of a folder or hub id. field: policy_model, or reward_model for a classifier with one label."""
    reward = field == "reward_model"
    kind, more = (AutoModelForSequenceClassification, {"num_labels": 1}) if reward else (AutoModelForCausalLM, {})
    try:
        found, published = AutoConfig.from_pretrained(resolve(source), **more), False
    except (OSError, ValueError) as error:
        if source not in PAPER_MODELS:
            raise ConfigError(
                f"{field} = {source!r}: its config cannot be loaded; give a folder with a config.json, or a hub id and "
                f"a connection to the hub: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            ) from None
        found, published = PAPER_MODELS[source](**more), True
    with torch.device("meta"):
        model = kind.from_config(found)
    c, names = model.config.get_text_config(), [name for name, _ in model.named_modules()]
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Sizes(
        name=source,
        published=published,
        tensors=[p.numel() for p in model.parameters()],
        copied=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
        linear=[tuple(m.weight.shape) for m in model.base_model.modules() if isinstance(m, nn.Linear)],
        layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        inner=getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
        heads=c.num_attention_heads,
        queries=c.num_attention_heads * head_dim,
        keys=(getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * head_dim,
        vocab=c.vocab_size,
        qk_norm=any(name.endswith("q_norm") for name in names),
    )


# bytes of the parts. half: autocast to bfloat16; rank: of LoRA, 0 without


def adamw_bytes(tensors: list[int], eight_bit: bool = False) -> int:
    """Adam's two moments; in 8 bits with a float32 scale per block of 256, tensors below 4096 elements in float32."""
    return sum(2 * n + 8 * -(-n // 256) if eight_bit and n >= 4096 else 8 * n for n in tensors)


def cache_bytes(m: Sizes, rows: int, seq: int, half: bool, rank: int = 0) -> int:
    """Keys and values of all layers: of the residual stream's type, since keys are rotated in it and values follow."""
    return 2 * rows * seq * m.layers * m.keys * (2 if half and rank else 4)


def layer_bytes(m: Sizes, seq: int, half: bool, rank: int = 0) -> int:
    """What autograd keeps of one Llama-like block, per token of rows of `seq` tokens; weights' copies left out."""
    b = 2 if half else 4
    norms = (8 if rank else 16) * m.hidden + 8  # float32: input, and normalised where the norm's weight is trained
    inputs = (5 * 2 if half else 2 * 4) * m.hidden  # of q, k, v, gate, up: autocast casts for each
    attention = (5 if half and rank else 4) * b * m.queries + 4 * m.heads  # q, k, v, output; log-sum-exp
    mlp = 4 * b * m.inner  # gate, up, activation, product
    qk_norm = (4 + (0 if rank else b)) * (m.queries + m.keys) if m.qk_norm else 0
    return norms + inputs + attention + mlp + qk_norm + b * seq + 7 * b * rank  # the mask, the adapters' inner states


def activation_bytes(
    m: Sizes,
    rows: int,
    prompt: int,
    new: int,
    half: bool,
    rank: int = 0,
    checkpointing: bool = False,
    logits: bool = False,
) -> float:
    """Peak of a forward and backward of `rows` responses of `new` tokens to one prompt, beside weights and gradients.

    logits: whether those of the responses are made [rows, new, vocab]; not for a reward model. Without checkpointing
    the prompt is computed once.
    """
    b, lora, seq = 2 if half else 4, half and rank, prompt + new
    apart = rows > 1 and not checkpointing
    tokens = prompt + rows * new if apart else rows * seq
    stream = (2 if lora else 4) * m.hidden * tokens  # the residual stream
    layer, copies = layer_bytes(m, seq, half, rank) * tokens, _copies(m, half, rank)
    layer += apart * 2 * b * m.queries * rows * prompt  # each response has the prompt's keys and values
    backward = (8 * m.hidden + (10 if lora else 2 * b) * m.inner) * tokens  # gradients inside a block
    soft = (
        12 * rows * new * m.vocab * logits + 3 * stream
    )  # log_softmax in float32: output, gradients of output and input
    if not checkpointing:
        return m.layers * layer + copies + max(backward, soft)
    forward = copies + max(_forward_bytes(m, half, rank) * tokens, b * rows * new * m.vocab * logits)
    output_layer = 2 * m.vocab * m.hidden if half and not rank and logits else 0
    return m.layers * stream + max(forward, output_layer + soft, layer + copies / m.layers + backward)


def rollout_bytes(
    m: Sizes,
    prompts: int,
    rows: int,
    prompt: int,
    new: int,
    half: bool,
    rank: int = 0,
    cut: tuple[bool, bool] = (True, True),
) -> float:
    """Peak of sampling `rows` responses to `prompts` prompts beside the weights: at the prompts' forward, or later.

    cut: whether top-k and top-p are on.
    """
    first = cache_bytes(m, prompts, prompt, half, rank) + _forward_bytes(m, half, rank) * prompts * prompt
    last = cache_bytes(m, rows, prompt + new, half, rank)
    # the logits; without top-k also sorted and with their places, and probabilities in float64
    sampling = (9 if cut[0] else 32 if cut[1] else 26) * rows * m.vocab
    return _copies(m, half, rank) + max(first, last + sampling)


def _forward_bytes(m: Sizes, half: bool, rank: int) -> int:
    """What a forward needs for a moment inside a block, per token: for the MLP, or to rotate the queries."""
    return 16 * m.hidden + max((4 if rank else 3) * (2 if half else 4) * m.inner, 20 * m.queries)


def _copies(m: Sizes, half: bool, rank: int) -> int:
    """Autocast's copies: it keeps those of trained weights, and a frozen base is bfloat16 itself."""
    return 2 * (sum(m.adapters(rank)) if rank else m.copied) if half else 0


def _training_bytes(m: Sizes, c: Config, gpus: int) -> dict[str, float]:
    """Bytes of one model. kept: gradients never freed; buffers: while it is updated; step: for a moment in the step."""
    tensors = m.adapters(c.lora_rank) if c.lora_rank else m.tensors
    trained = sum(tensors)
    out = {"weights": 4 * m.total, "gradients": 4 * trained, "kept": 0, "buffers": 0, "gathered": 0, "cpu": 0}
    out |= {"optimizer": adamw_bytes(tensors), "step": 4 * trained}  # AdamW takes all roots of second moments at once
    if c.lora_rank:
        width = 2 if c.precision == "bfloat16" else 4
        out["weights"] = (m.nf4(width) if c.load_in_4bit else width * m.total) + 4 * trained
    if c.optimizer != "adamw":
        out |= {"optimizer": adamw_bytes(tensors, eight_bit=True), "step": 0}
    if c.backend == "ddp":
        return out
    stage = c.backend.removeprefix("deepspeed_")
    zero = json.loads((project_root() / "env" / "deepspeed" / f"{stage}.json").read_text())["zero_optimization"]
    bucket, share = 4 * zero.get("reduce_bucket_size", 5e8), 4 * trained / gpus
    if stage == "zero3":
        gathered = 4 * min(zero.get("stage3_max_live_parameters", 1e9), m.total)
        return out | {
            "weights": share, "gradients": 0, "kept": share + bucket, "gathered": gathered, "optimizer": 2 * share,
            "step": share,
        }  # fmt: skip
    out["buffers"] = bucket * (1 + zero.get("overlap_comm", False))
    if stage == "zero2":
        return out | {"gradients": share, "optimizer": 3 * share, "step": share}
    largest = 4 * max(tensors)
    return out | {"gradients": largest, "kept": largest, "optimizer": 0, "step": 0, "cpu": 6 * share}


# the plan


def memory_plan(config: Config, gpus: int | None = None, memory_gb: float | None = None) -> pd.DataFrame:
    """GiB per GPU of every part, one row a setting, and whether the peak over the phases fits.

    gpus: default config.num_processes; memory_gb: default this machine's GPU, else 80. CPU memory is per process.
    `gradients` (with DeepSpeed's buckets) and `activations` are the larger of the two updates'; `peak in` names the
    phase that needs most. The models' Sizes lie in `attrs`.
    """
    gpus, memory_gb = _machine(config, gpus, memory_gb)
    models = model_sizes(policy_source(config), "policy_model"), model_sizes(reward_source(config), "reward_model")
    rows = [
        {"setting": name} | _row(config.model_copy(update=_fields(config, name, again)), *models, gpus)
        for name in SETTINGS
        for again in (False, True)
    ]
    frame = pd.DataFrame(rows)
    frame["fits"] = frame["peak"] <= USABLE * memory_gb
    frame.attrs["models"] = models
    return frame


def _machine(config: Config, gpus: int | None, memory_gb: float | None) -> tuple[int, float]:
    gpus = config.num_processes if gpus is None else gpus
    if memory_gb is None:
        memory_gb = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 80.0
    if gpus < 1:
        raise ConfigError(f"gpus = {gpus}: give at least 1")
    if not memory_gb > 0:
        raise ConfigError(f"memory_gb = {memory_gb}: give the memory of one GPU in GiB, such as 80")
    if config.batch_size % gpus:
        raise ConfigError(
            f"batch_size = {config.batch_size} must be a multiple of gpus = {gpus}: every process takes as many "
            "prompts; change one of them"
        )
    return gpus, memory_gb


def _fields(config: Config, setting: str, checkpointing: bool) -> dict[str, Any]:
    return {"lora_rank": config.lora_rank or 64} | SETTINGS[setting] | {"gradient_checkpointing": checkpointing}


def _row(c: Config, policy: Sizes, reward: Sizes, gpus: int) -> dict[str, Any]:
    half, rank, mine = c.precision == "bfloat16", c.lora_rank, c.batch_size // gpus * c.group_size
    prompt, new = min(c.max_prompt_tokens, PROMPT_TOKENS), c.max_new_tokens
    sampled = min(c.rollout_rows, mine)
    shape = (prompt, new, half, rank, c.gradient_checkpointing)
    p, r = _training_bytes(policy, c, gpus), _training_bytes(reward, c, gpus)
    reference = 0 if rank else 4 * policy.total
    always = p["weights"] + reference + r["weights"] + sum(x["optimizer"] + x["kept"] for x in (p, r))
    of_policy = activation_bytes(policy, min(c.micro_batch_responses, mine), *shape, logits=True)
    together = min(c.micro_batch_groups, c.batch_size // gpus)
    of_reward = together * activation_bytes(reward, c.group_size, *shape)
    sampling = rollout_bytes(
        policy, -(-sampled // c.group_size), sampled, prompt, new, half, rank, (c.top_k > 0, c.top_p < 1)
    )
    whole = p["weights"] + r["weights"] if rank else 4 * (policy.total + reward.total)  # no engine shards them yet
    phases = {
        "stage 2": whole + sampling if RULES[c.rule].anchor == "value" else 0,
        "rollout": always + p["gathered"] + sampling,
        "reward": always + r["gradients"] + r["buffers"] + r["gathered"] + of_reward,
        "policy": always + p["gradients"] + p["buffers"] + p["gathered"] + of_policy,
        "step": always + max(x["gradients"] + x["step"] for x in (p, r)),
    }
    parts = {
        "policy weights": p["weights"],
        "reference": reference,
        "reward weights": r["weights"],
        "gradients": p["kept"] + r["kept"] + max(x["gradients"] + x["buffers"] for x in (p, r)),
        "optimizer": p["optimizer"] + r["optimizer"],
        "activations": max(of_policy, of_reward),
        "KV cache": cache_bytes(policy, sampled, prompt + new, half, rank),
        "peak": max(phases.values()),
        "CPU memory": p["cpu"] + r["cpu"],
    }
    in_gib = {name: value / GIB for name, value in parts.items()}
    return {"checkpointing": c.gradient_checkpointing} | in_gib | {"peak in": max(phases, key=phases.get)}


def describe_plan(config: Config, gpus: int | None = None, memory_gb: float | None = None) -> str:
    """The plan as text: models, assumptions, table, and the first setting that fits with the flags that choose it."""
    gpus, memory_gb = _machine(config, gpus, memory_gb)
    frame = memory_plan(config, gpus, memory_gb)
    rows, rank = config.micro_batch_responses, config.lora_rank or 64
    lines = [f"profile {config.profile} on {gpus} GPU{'s' * (gpus > 1)} of {memory_gb:g} GiB"]
    for field, m in zip(("policy_model", "reward_model"), frame.attrs["models"], strict=True):
        said = f"{field} {m.name}: {m.total / 1e6:,.1f} M parameters, LoRA of rank {rank} trains "
        lines.append(said + f"{sum(m.adapters(rank)) / 1e6:.1f} M")
        lines += ["  (the hub is out of reach: the sizes are those published)"] * m.published
    vocab = frame.attrs["models"][0].vocab
    lines += [
        f"prompts of {min(config.max_prompt_tokens, PROMPT_TOKENS)} tokens, responses of {config.max_new_tokens}, "
        f"{config.rollout_rows} sampled at a time",
        f"micro-batches: reward model {config.micro_batch_groups} x {config.group_size} responses; policy {rows}, "
        f"whose log-probabilities take {12 * rows * config.max_new_tokens * vocab / GIB:.1f} GiB",
        f"GiB per GPU; `fits`: the peak is within {USABLE:.0%} of the memory, the rest is for CUDA and fragments",
        "",
    ]
    short = {
        "checkpointing": "ckpt", "policy weights": "policy", "reference": "ref.", "reward weights": "reward",
        "gradients": "grads", "optimizer": "optim.", "activations": "activ.", "CPU memory": "CPU",
    }  # fmt: skip
    words = {"fits": {True: "fits", False: "no"}, "ckpt": {True: "yes", False: "no"}}
    shown = frame.rename(columns=short)
    shown = shown.assign(**{column: shown[column].map(said) for column, said in words.items()})
    lines += [shown.to_string(index=False, float_format="{:.1f}".format), ""]
    return "\n".join(lines + [textwrap.fill(_advice(config, frame, gpus), 110, break_on_hyphens=False)])


def _advice(config: Config, frame: pd.DataFrame, gpus: int) -> str:
    """One sentence: the first setting that fits with its flags, or what would help."""
    if not frame["fits"].any():
        least = frame.loc[frame["peak"].idxmin()]
        tokens = f"max_new_tokens = {config.max_new_tokens}"
        helps = {
            "policy": f"micro_batch_responses = {config.micro_batch_responses} or {tokens}",
            "reward": f"group_size = {config.group_size} or {tokens}",
            "step": "the models' size",
        }
        lower = helps.get(least["peak in"], f"rollout_rows = {config.rollout_rows}")
        return (
            f"Nothing fits: {least['setting']} needs least, {least['peak']:.1f} GiB in phase {least['peak in']!r}; "
            f"lower {lower}, or take GPUs with more memory."
        )
    best = frame[frame["fits"]].iloc[0]
    wanted = _fields(config, best["setting"], bool(best["checkpointing"])) | {"num_processes": gpus}
    flags = [f"--set {k}={str(v).lower()}" for k, v in wanted.items() if v != getattr(config, k)]
    said = f"First that fits, the most faithful to the paper first: {best['setting']}, with "
    said += " ".join(flags) or f"profile {config.profile} as it is"
    new_to_lora = wanted["lora_rank"] and not config.lora_rank
    return said + (" (learning rates for LoRA: --profile single_gpu)" if new_to_lora else "")
