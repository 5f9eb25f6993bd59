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
from typing import Any

import pandas as pd
import torch

from savelib.config import Config, ConfigError
from savelib.method import RULES
from savelib.paths import project_root
from savelib.runs.sizes import Sizes

GIB = 2**30
USABLE = 0.9  # share of the memory that a peak may take
PROMPT_TOKENS = 512

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
    layer, copies = layer_bytes(m, seq, half, rank) * tokens, copy_bytes(m, half, rank)
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
    return copy_bytes(m, half, rank) + max(first, last + sampling)


def _forward_bytes(m: Sizes, half: bool, rank: int) -> int:
    """What a forward needs for a moment inside a block, per token: for the MLP, or to rotate the queries."""
    return 16 * m.hidden + max((4 if rank else 3) * (2 if half else 4) * m.inner, 20 * m.queries)


def copy_bytes(m: Sizes, half: bool, rank: int) -> int:
    """Autocast's copies: it keeps those of trained weights, and a frozen base is bfloat16 itself."""
    return 2 * (sum(m.adapters(rank)) if rank else m.copied) if half else 0


def training_bytes(m: Sizes, c: Config, gpus: int) -> dict[str, float]:
    """Bytes of one model. kept: gradients never freed; buffers: while it is updated; step: for a moment in the step."""
    tensors = m.adapters(c.lora_rank) if c.lora_rank else m.tensors
    trained = sum(tensors)
    out = {"weights": 4 * m.total, "gradients": 4 * trained, "kept": 0, "buffers": 0, "gathered": 0, "cpu": 0}
    out |= {"optimizer": adamw_bytes(tensors), "step": 4 * trained}  # AdamW takes all roots of second moments at once
    if c.lora_rank:
        width = 4 if c.precision == "float32" else 2
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


def guard_bytes(m: Sizes, c: Config, gpus: int) -> float:
    """Rule save_checked: copies of the trained weights with their Adam moments, in the CPU's memory of each process."""
    if not RULES[c.rule].checked:
        return 0
    tensors = m.adapters(c.lora_rank) if c.lora_rank else m.tensors
    share = 1 if c.backend == "ddp" else gpus  # DeepSpeed: a process's shard
    copies = 2 if c.certificate_pairs else 1  # the last confirmed state, and the certified one
    return copies * (4 * sum(tensors) + adamw_bytes(tensors, eight_bit=c.optimizer != "adamw")) / share


# the plan


def memory_plan(
    config: Config, models: tuple[Sizes, Sizes], gpus: int | None = None, memory_gb: float | None = None
) -> pd.DataFrame:
    """GiB per GPU of every part, one row per setting, and whether the peak over the phases fits.

    models: policy and reward model; gpus: default config.num_processes; memory_gb: default this machine's GPU, else 80.
    CPU memory is per process. `gradients` (with DeepSpeed's buckets) and `activations` are the larger of the two
    updates'; `peak in` names the phase that needs most.
    """
    gpus, memory_gb = machine(config, gpus, memory_gb)
    rows = [
        {"setting": name} | _row(config.model_copy(update=fields_of(config, name, again)), *models, gpus)
        for name in SETTINGS
        for again in (False, True)
    ]
    frame = pd.DataFrame(rows)
    frame["fits"] = frame["peak"] <= USABLE * memory_gb
    return frame


def machine(config: Config, gpus: int | None, memory_gb: float | None) -> tuple[int, float]:
    """The number of GPUs and the GiB of each, with their defaults. ConfigError where they cannot be."""
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


def fields_of(config: Config, setting: str, checkpointing: bool) -> dict[str, Any]:
    """The config fields that choose a setting."""
    return {"lora_rank": config.lora_rank or 64} | SETTINGS[setting] | {"gradient_checkpointing": checkpointing}


def _row(c: Config, policy: Sizes, reward: Sizes, gpus: int) -> dict[str, Any]:
    half, rank, mine = c.precision != "float32", c.lora_rank, c.batch_size // gpus * c.group_size
    prompt, new = min(c.max_prompt_tokens, PROMPT_TOKENS), c.max_new_tokens
    sampled = min(c.rollout_rows, mine)
    shape = (prompt, new, half, rank, c.gradient_checkpointing)
    p, r = training_bytes(policy, c, gpus), training_bytes(reward, c, gpus)
    reference = 0 if rank else 4 * policy.total
    members = (c.backbones - 1) * 4 * reward.total  # whole in every process
    always = p["weights"] + reference + r["weights"] + members + sum(x["optimizer"] + x["kept"] for x in (p, r))
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
        "reward weights": r["weights"] + members,
        "gradients": p["kept"] + r["kept"] + max(x["gradients"] + x["buffers"] for x in (p, r)),
        "optimizer": p["optimizer"] + r["optimizer"],
        "activations": max(of_policy, of_reward),
        "KV cache": cache_bytes(policy, sampled, prompt + new, half, rank),
        "peak": max(phases.values()),
        "CPU memory": p["cpu"] + r["cpu"] + guard_bytes(reward, c, gpus),
    }
    in_gib = {name: value / GIB for name, value in parts.items()}
    return {"checkpointing": c.gradient_checkpointing} | in_gib | {"peak in": max(phases, key=phases.get)}
