"""What the cost benchmark measures: sizes, and models and prompts whose token counts are exact.

Every response has exactly `new` tokens, by the weights alone: one coordinate of the residual stream holds a constant
that no layer writes to, and it makes the end and pad tokens unlikely beyond any draw. Prompts differ in one word, which
the models cannot tell from another, and curriculum=none keeps every response. So V is near the middle of every group,
and nearly all groups have both signs: SAVE at its most expensive.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedConfig

from savelib.config import Config, make_config
from savelib.data.chat import word_tokenizer
from savelib.data.hub import from_config
from savelib.runs.sizes import PAPER_MODELS

SYSTEMS = {
    "trl": "TRL GRPOTrainer", "trl_save": "TRL + SAVE", "grpo": "our GRPO (frozen)", "save": "our SAVE",
}  # fmt: skip
OF_TRL, LEARNING = ("trl", "trl_save"), ("trl_save", "save")  # the others: ours, with a frozen reward model
PHASES = (
    "rollout", "reward scoring", "RM update", "value update", "reference log-probs", "policy forward/backward",
    "optimizer", "other",
)  # fmt: skip
FIRST_WORDS = slice(320, 448)  # of the prompts: 4 for each of up to 32
PAD, END, WORDS = "<pad>", "<end>", ("user", "assistant")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end>{{ '' if loop.last else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)

# sizes

_llama = partial(LlamaConfig, hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_hidden_layers=4,
                 vocab_size=512)  # fmt: skip
SHAPES: dict[str, tuple[Callable[..., PreTrainedConfig], ...]] = {  # policy, reward model
    "quick": (partial(_llama, hidden_size=64, intermediate_size=128, num_hidden_layers=2),) * 2,
    "llama": (_llama,) * 2,
    "smollm2": (
        partial(LlamaConfig, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    ) * 2,
    "paper": (PAPER_MODELS["Qwen/Qwen3-4B-Instruct-2507"], PAPER_MODELS["Skywork/Skywork-Reward-V2-Llama-3.2-3B"]),
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """One measurement: shapes of the models, B, G, prompt and new tokens; `fields` are config fields of our systems."""

    shape: str
    batch: int
    group: int
    prompt: int
    new: int
    fields: dict[str, Any] = field(default_factory=dict)
    systems: tuple[str, ...] = tuple(SYSTEMS)
    device: str = "cpu"

    @property
    def naive_rm_tokens(self) -> int:
        """Padded tokens of three passes of the reward model over all rows; the template ends a response by a token."""
        return 3 * self.batch * self.group * (self.prompt + self.new + 1)


_cpu = dict(gradient_checkpointing=False, micro_batch_groups=1, micro_batch_responses=16, rollout_rows=64)
_gpu = dict(lora_rank=64, micro_batch_groups=1, micro_batch_responses=8, rollout_rows=64)  # as profile single_gpu
_a = Size("llama", 8, 8, 64, 64, _cpu)
SIZES: dict[str, Size] = {
    "quick": Size("quick", 2, 4, 16, 8, _cpu),
    "a": _a,
    "a256": replace(_a, new=256),
    "b": replace(_a, prompt=256),
    "c": Size("smollm2", 2, 8, 128, 32, _cpu),
    "paper512": Size("paper", 4, 16, 512, 512, _gpu, ("grpo", "save"), "cuda"),
    "paper1024": Size("paper", 4, 16, 512, 1024, _gpu, ("grpo", "save"), "cuda"),
}
GROWTH: dict[str, Size] = {  # around size a, SAVE alone
    **{f"G={g}": replace(_a, group=g, fields=_cpu | {"rollout_rows": 8 * g}) for g in (4, 8, 16, 32)},
    **{f"new={n}": replace(_a, new=n) for n in (64, 128, 256, 512, 1024)},
    **{f"B={b}": replace(_a, batch=b) for b in (8, 16, 32)},
}
GROWTH = {name: replace(size, systems=("save",)) for name, size in GROWTH.items()}
DEFAULT_SIZES = ("a", "a256", "b", "c", "growth")


# models and prompts


def save_models(shape: str, folder: Path, device: str = "cpu") -> None:
    """Write folder/policy and folder/reward with random weights, each with a tokenizer of one token a word."""
    policy, reward = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        models = {
            "policy": from_config(AutoModelForCausalLM, policy(pad_token_id=0, eos_token_id=1, bos_token_id=None)),
            "reward": from_config(
                AutoModelForSequenceClassification,
                reward(pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1),
            ),
        }
    for model in models.values():
        model.get_input_embeddings().weight.data[FIRST_WORDS] = 0
    never_end(models["policy"])
    for name, model in models.items():
        model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder / name)
        words = [PAD, END, *WORDS, *(f"w{i}" for i in range(4, model.config.vocab_size))]
        word_tokenizer(words, TEMPLATE, pad_token=PAD, eos_token=END).save_pretrained(folder / name)


@torch.no_grad()
def never_end(model: nn.Module) -> None:
    """Make the pad and end tokens (ids 0, 1) impossible.

    Coordinate 0 of the residual stream is 1 for every word, and no layer writes to it. In the output layer it counts
    for the words and against the two.
    """
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):  # one, if they are tied
        weight[:, 0] = 1
        weight[:2, 0] = -1


def prompts_of(size: Size) -> list[str]:
    """Prompts that the chat template makes `size.prompt` tokens long: three are its own. They differ in one word."""
    rest = " ".join(f"w{4 + i % 300}" for i in range(size.prompt - 4))
    return [f"w{i} {rest}" for i in range(FIRST_WORDS.start, FIRST_WORDS.start + 4 * size.batch)]


def bench_config(size: Size, folder: Path, rule: str = "save") -> Config:
    """The configuration of all systems: table 8's sampling and KL; float32 on the CPU.

    Learning rates cost nothing. These are so small that the rewards stay where V was fitted, and all steps are alike.
    """
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts_of(size)))
    return make_config(
        profile="paper", num_processes=1, backend="ddp", device=size.device, rule=rule, curriculum="none",
        policy_model=str(folder / "policy"), reward_model=str(folder / "reward"), prompts=str(path),
        preferences="", prompt_selection="all", anchor_prompts=8, anchor_responses=4, anchor_epochs=1,
        precision="float32" if size.device == "cpu" else "bfloat16", batch_size=size.batch, group_size=size.group,
        max_new_tokens=size.new, anchor_lr=1e-7, value_head_lr=1e-7, backbone_lr=1e-8, reward_head_lr=1e-8,
        policy_lr=1e-7, **size.fields,
    )  # fmt: skip
