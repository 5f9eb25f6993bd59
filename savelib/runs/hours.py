"""Time of a step by phase, before a run starts: the work of each phase over a machine's rates.

No GPU has confirmed these numbers: tests hold the work against the CPU's measured steps alone. What they assume:

- A phase computes at a share of the datasheet's dense rate (`EFFICIENCY`), or reads and writes memory at one, whichever
  takes longer. The shares are those that Hugging Face models without compilation usually reach; none is measured here.
- Every response has max_new_tokens tokens, every group has contrast, and prompts have min(max_prompt_tokens, 512)
  tokens. So a run is shorter by as much as its responses are.
- A prompt is computed once for its responses, except in a backward with gradient checkpointing, which also takes one
  forward more. A backward is two forwards, under LoRA one.
- Sampling reads the weights for each token of each chunk of rollout_rows. Keys and values are read, and where several
  heads share them, repeated in memory for all heads. A layer takes at least `latency` seconds to be started.
- Several GPUs: gradients are summed once a step (ddp) or reduced at each backward (ZeRO). ZeRO-2 with offload also
  moves them to the CPU, which takes the optimizer's step. ZeRO-3 gathers weights for each forward, in sampling too.
- Left out: stages 1 and 2, evaluations, checkpoints, and waiting for the slowest GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from savelib.config import Config, ConfigError
from savelib.method import RULES
from savelib.runs.memory import PROMPT_TOKENS, cache_bytes
from savelib.runs.sizes import Sizes

ROLLOUT, SCORING, RM_UPDATE, REFERENCE, POLICY, OPTIMIZER, TRANSFERS = STEP_PHASES = (
    "rollout", "reward scoring", "RM update", "reference log-probs", "policy forward/backward", "optimizer",
    "transfers",
)  # fmt: skip
EFFICIENCY = {
    ROLLOUT: 0.5, SCORING: 0.4, RM_UPDATE: 0.35, REFERENCE: 0.4, POLICY: 0.35, OPTIMIZER: 0.7, TRANSFERS: 0.7,
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Datasheet rates of one GPU, and the share of them that each phase reaches."""

    flops: float  # dense matmul FLOP/s in bfloat16
    flops32: float  # in float32, without TF32
    memory: float  # bytes/s
    link: float = math.inf  # bytes/s to other GPUs, one way
    host: float = math.inf  # bytes/s to the CPU, one way
    cpu_memory: float = math.inf  # bytes/s, of all GPUs' processes together
    latency: float = 0.0  # seconds to start a layer's kernels
    efficiency: Mapping[str, float] = field(default_factory=lambda: EFFICIENCY)


GPUS = {  # SXM boards; NVLink, PCIe 4 or 5; 100 or 200 GB/s of CPU memory and 0.5 ms a layer are our guesses
    "a100": Machine(312e12, 19.5e12, 2.039e12, 300e9, 32e9, 100e9, 0.5e-3),
    "h100": Machine(989e12, 67e12, 3.35e12, 450e9, 64e9, 200e9, 0.5e-3),
    "h200": Machine(989e12, 67e12, 4.8e12, 450e9, 64e9, 200e9, 0.5e-3),
}
PAPER_HOURS = (
    "The paper reports 29 hours for SAVE and 26 for GRPO (figure 3): Qwen3-4B-Instruct-2507 on four A100 of 80 GB with "
    "DeepSpeed ZeRO-2 and CPU offload, 320 steps. Profile paper with that policy is 43 hours here, as every response "
    "has 1024 tokens; it is 29 with 730. The paper names neither the mean length of its responses, nor its sampling "
    "engine, nor its micro-batches, on which most of the time depends."
)


@dataclass(frozen=True)
class Work:
    """What one process computes in a step."""

    prompts: int
    group: int
    prompt: int  # tokens
    new: int
    width: int  # bytes of a number in arithmetic
    rank: int = 0  # of LoRA
    checkpointing: bool = False
    chunks: int = 1  # of sampling
    rm_steps: int = 0  # updates of the reward model
    rm_pairs: int = 0  # preference pairs of one; 0: on the responses
    backbones: int = 1  # of an ensemble of reward models
    policy: bool = True  # whether the policy learns
    stepped: float = 1.0  # share of the trained weights whose optimizer step this process's GPU takes
    repeated: bool = True  # whether keys and values are repeated for the heads that share them

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def passes(self) -> int:
        """Forwards that a forward and backward take."""
        return 1 + (1 if self.rank else 2) + self.checkpointing


def work_of(c: Config, gpus: int) -> Work:
    """The work of each of `gpus` processes that share a step of this config."""
    prompts, rule = c.batch_size // gpus, RULES[c.rule]
    stepped = {"ddp": 1.0, "deepspeed_zero2_offload": 0.0}.get(c.backend, 1 / gpus)
    return Work(
        prompts=prompts, group=c.group_size, prompt=min(c.max_prompt_tokens, PROMPT_TOKENS), new=c.max_new_tokens,
        width=2 if c.precision != "float32" else 4, rank=c.lora_rank, checkpointing=c.gradient_checkpointing,
        chunks=-(-prompts * c.group_size // c.rollout_rows), rm_steps=c.rm_steps if rule.loss or rule.pairs else 0,
        rm_pairs=prompts if rule.pairs else 0, policy=not c.freeze_policy, stepped=stepped,
        backbones=c.backbones,
    )  # fmt: skip


def forward_flops(m: Sizes, w: Work, shared: bool = True, head: bool = False) -> float:
    """FLOPs of a forward of all rows; head: with the responses' logits."""

    def blocks(tokens: float, back: float) -> float:  # linear layers, and attention to `back` tokens
        return tokens * (2 * sum(o * i for o, i in m.linear) + 4 * m.layers * m.queries * back)

    logits = 2 * m.hidden * m.vocab * w.rows * w.new * head
    prompts = w.prompts if shared else w.rows
    return blocks(prompts * w.prompt, w.prompt / 2) + blocks(w.rows * w.new, w.prompt + w.new / 2) + logits


def trained_bytes(m: Sizes, w: Work) -> int:
    """Bytes of the weights that a step moves."""
    return 4 * (sum(m.adapters(w.rank)) if w.rank else m.total)


def optimizer_bytes(m: Sizes, w: Work) -> float:
    """Bytes that a step of Adam reads and writes: weight, gradient and moments; all but the gradient written too."""
    return 7 * trained_bytes(m, w)


def parts(w: Work, policy: Sizes, reward: Sizes) -> Iterator[tuple[str, float, float, float]]:
    """(phase, FLOPs, bytes, layers started) of what a step computes one after the other."""
    shared = not w.checkpointing
    ahead = forward_flops(policy, replace(w, group=1, new=0))
    yield ROLLOUT, ahead, 0, w.chunks * policy.layers
    weights = w.width * (sum(o * i for o, i in policy.linear) + policy.hidden * policy.vocab)
    copies = 1 + 2 * (policy.queries / policy.keys if w.repeated and policy.queries != policy.keys else 0)
    cache = cache_bytes(policy, w.rows, 1, w.width == 2, w.rank) * (w.prompt + w.new / 2) * copies
    decoded = forward_flops(policy, w, head=True) - ahead
    yield ROLLOUT, decoded, w.new * (w.chunks * weights + cache), w.new * w.chunks * policy.layers
    yield SCORING, w.backbones * forward_flops(reward, w), 0, 0
    learned = replace(w, prompts=w.rm_pairs, group=2) if w.rm_pairs else w
    yield RM_UPDATE, w.rm_steps * w.passes * forward_flops(reward, learned, shared), 0, 0
    yield RM_UPDATE, 0, w.rm_steps * w.stepped * optimizer_bytes(reward, w), 0
    if w.policy:
        yield REFERENCE, forward_flops(policy, w, head=True), 0, 0
        yield POLICY, w.passes * forward_flops(policy, w, shared, head=True), 0, 0
        yield OPTIMIZER, 0, w.stepped * optimizer_bytes(policy, w), 0


def step_seconds(w: Work, policy: Sizes, reward: Sizes, machine: Machine) -> dict[str, float]:
    """Seconds of each phase of a step in one process, transfers left out."""
    out, speed = dict.fromkeys(STEP_PHASES, 0.0), machine.flops if w.width == 2 else machine.flops32
    for phase, flops, moved, layers in parts(w, policy, reward):
        share = machine.efficiency[phase]
        out[phase] += max(flops / (speed * share), moved / (machine.memory * share), layers * machine.latency)
    return out


def transfer_seconds(c: Config, w: Work, models: tuple[Sizes, Sizes], machine: Machine, gpus: int) -> dict[str, float]:
    """Seconds that a process talks to others or, with offload, to the CPU, and those of the optimizer there."""
    share, other, out = machine.efficiency[TRANSFERS], (gpus - 1) / gpus, {TRANSFERS: 0.0, OPTIMIZER: 0.0}
    groups = -(-2 * w.rm_pairs // c.group_size) or w.prompts
    backwards = (w.policy * -(-w.rows // c.micro_batch_responses), w.rm_steps * -(-groups // c.micro_batch_groups))
    for m, count, steps, tokens in zip(models, backwards, (w.policy, w.rm_steps), (w.new * w.chunks, 0), strict=True):
        size, link = trained_bytes(m, w), machine.link * share
        if c.backend == "ddp":
            out[TRANSFERS] += 2 * size * other * steps / link
            continue
        gathers = count * (2 + w.checkpointing) + tokens if c.backend == "deepspeed_zero3" else steps
        out[TRANSFERS] += size * other * (count + gathers) / link
        if c.backend == "deepspeed_zero2_offload":
            out[TRANSFERS] += size / gpus * (count + steps) / (machine.host * share)
            out[OPTIMIZER] += optimizer_bytes(m, w) * steps / (machine.cpu_memory * share)
    return out


def hours_plan(config: Config, models: tuple[Sizes, Sizes], gpu: str) -> pd.DataFrame:
    """Seconds a step by phase and hours of the loop, a row for each number of GPUs up to 8 that divides batch_size."""
    if gpu not in GPUS:
        raise ConfigError(f"gpu = {gpu!r}: not one of {', '.join(GPUS)}")
    rows = []
    for gpus in (n for n in range(1, 9) if config.batch_size % n == 0):
        w = work_of(config, gpus)
        seconds = step_seconds(w, *models, GPUS[gpu])
        for phase, more in transfer_seconds(config, w, models, GPUS[gpu], gpus).items():
            seconds[phase] += more
        step = sum(seconds.values())
        rows.append({"GPUs": gpus} | seconds | {"step": step, "hours": step * config.total_steps / 3600})
    return pd.DataFrame(rows)
