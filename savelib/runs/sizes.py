"""What memory and time depend on: the sizes of a model, counted without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
from savelib.data.hub import from_config, from_pretrained
from savelib.models.loading import policy_source, reward_source

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


@dataclass(frozen=True)
class Sizes:
    """Counted on a model without storage."""

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
        found, published = from_pretrained(AutoConfig, source, field, **more), False
    except ConfigError:
        if source not in PAPER_MODELS:
            raise
        found, published = PAPER_MODELS[source](**more), True
    with torch.device("meta"):
        model = from_config(kind, found)
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


def models_of(config: Config) -> tuple[Sizes, Sizes]:
    """Sizes of a run's policy and reward model."""
    return model_sizes(policy_source(config), "policy_model"), model_sizes(reward_source(config), "reward_model")
