"""Policy, reference and value-anchored reward model: loading, scoring, saving.

Trained weights are always float32 (an update of lr 1e-7 is lost in bfloat16); on CUDA `autocast` computes in bfloat16.
The models stay in eval mode: no dropout, so that the reward that filtered is the reward in the loss.
With lora_rank the weights are a frozen base, and adapters are trained on all its linear layers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from savelib.config import Config, ConfigError
from savelib.hub import explain
from savelib.paths import resolve
from savelib.prefix import forward_prefixes, forward_suffixes, shares_prefixes

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, which accelerate imports, warns that it guessed so
transformers_logging.disable_progress_bar()  # each refresh of a bar would be a line in a log or a notebook
transformers_logging.set_verbosity_error()  # a new reward head is no surprise: load_reward_model makes it

Messages = list[dict[str, str]]
VALUE_HEAD_FILE = "value_head.safetensors"
TEMPLATE_DATE = "26 Jul 2024"  # Llama 3 templates write today's date: a score must not change with the day


def pick_device(name: str, threads: int = 0) -> torch.device:
    """The device of that name, `auto` being CUDA where there is one; from now on `threads` CPU threads (0: torch's)."""
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bfloat16 arithmetic on CUDA when asked for; nothing on CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and precision == "bfloat16")


def load_tokenizer(source: str, field: str):
    """A fast tokenizer with a chat template. Raises ConfigError naming the config field."""
    if source.startswith(("/", ".", "~")) and not Path(resolve(source)).is_dir():
        raise ConfigError(f"{field} = {source!r}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(source))
    except Exception as error:  # whatever transformers, the hub client or safetensors raise
        raise ConfigError(explain(error, field, source)) from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ConfigError(f"{field} = {source!r} has no tokenizer: a tokenizer.json must be beside its config.json")
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{field} = {source!r}: its tokenizer has no chat template; put a chat_template.jinja beside it, "
            "or use an instruction-tuned model"
        )
    return tokenizer


def render(tokenizer, messages: Messages, *, generation_prompt: bool = False) -> str:
    """The conversation as the tokenizer's chat template writes it, with a fixed date."""
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt, date_string=TEMPLATE_DATE
    )


def load_policy(
    source: str, device: torch.device, config: Config | None = None, trained: Path | None = None
) -> tuple[nn.Module, Any]:
    """(causal LM in float32, tokenizer). With a config: the policy that it trains, with its adapters or in 4 bits.

    trained: a folder with what was trained from `source` on: the whole model, or its adapters.
    """
    tokenizer = load_tokenizer(source, "policy_model")
    whole = trained is not None and (trained / "config.json").is_file()
    settings = base_settings(config, device) if config else {"dtype": torch.float32}
    model = _load(AutoModelForCausalLM, str(trained) if whole else source, "policy_model", **settings)
    model = model.eval() if "device_map" in settings else model.to(device).eval()
    return with_adapters(model, config, "CAUSAL_LM", trained) if config else model, tokenizer


def _load(kind: type, source: str, field: str, **settings):
    """kind.from_pretrained from safetensors, with errors that name the config field."""
    try:
        return kind.from_pretrained(resolve(source), use_safetensors=True, **settings)
    except Exception as error:  # whatever transformers, the hub client or safetensors raise
        raise ConfigError(explain(error, field, source)) from None


# what is trained: all weights, or adapters on a frozen base


def base_settings(config: Config, device: torch.device) -> dict:
    """from_pretrained's settings for a model that is trained: float32, or under LoRA a frozen base in fewer bits."""
    if not config.lora_rank:
        return {"dtype": torch.float32}
    bits16 = device.type == "cuda" and config.precision == "bfloat16"
    dtype = torch.bfloat16 if bits16 else torch.float32
    if not config.load_in_4bit:
        return {"dtype": dtype}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score", "classifier"],
    )
    return {"dtype": dtype, "quantization_config": quantization, "device_map": {"": device}}


def with_adapters(model: nn.Module, config: Config, task: str, folder: Path | None = None) -> nn.Module:
    """The model with LoRA adapters in float32, new or from a checkpoint's folder; as it is where lora_rank is 0.

    task: CAUSAL_LM, or SEQ_CLS (then the reward head is trained whole beside the adapters).
    """
    if not config.lora_rank:
        return model
    from peft import LoraConfig, PeftModel, get_peft_model  # slow to import

    if folder is not None and (folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    else:
        r = config.lora_rank
        settings = LoraConfig(task_type=task, r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules="all-linear")
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # the same adapters in every process, and after any stage
            model = get_peft_model(model, settings)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True  # in eval mode, on a CPU, its kernel gives no gradient and says nothing
    return model


def adapted(model: nn.Module) -> bool:
    """Whether this is a PeftModel."""
    return hasattr(model, "get_base_model")


def plain(model: nn.Module) -> nn.Module:
    """The transformers model, with or without adapters in it."""
    return model.get_base_model() if adapted(model) else model


def save_merged(model: nn.Module, source: str, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Save a trained model as one that plain `from_pretrained` loads; adapters are merged into `source` in float32.

    weights: the state dict to save, by default the model's own.
    """
    if adapted(model):
        from peft import PeftModel

        model.save_pretrained(folder)
        classifier = hasattr(plain(model), "score")
        base = type(plain(model)).from_pretrained(
            resolve(source), dtype=torch.float32, **({"num_labels": 1} if classifier else {})
        )
        model, weights = PeftModel.from_pretrained(base, folder).merge_and_unload(), None
        for file in folder.glob("adapter_*"):
            file.unlink()
    model.save_pretrained(folder, state_dict=weights)


@contextlib.contextmanager
def recomputing(model: nn.Module, on: bool) -> Iterator[None]:
    """Gradient checkpointing for the forwards inside. Only the layers' own flag is set, so dropout stays off."""
    on = on and torch.is_grad_enabled()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if on else []
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def is_recomputing(model: nn.Module) -> bool:
    return any(
        m.gradient_checkpointing and m.training for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    )


@dataclass(frozen=True)
class Scored:
    """What one forward of the reward model gives for N conversations."""

    rewards: Tensor  # [N] float32
    prompt_hidden: Tensor  # [N, H] float32, the hidden state that V reads


@dataclass(frozen=True)
class Encoded:
    """N rendered conversations as token ids; masks come from lengths.

    ids: token ids of each conversation; prompt_ends: index of the token that V reads.
    """

    ids: list[list[int]]
    prompt_ends: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Encoded:
        return Encoded(self.ids[rows], self.prompt_ends[rows])


class RewardModel(nn.Module):
    """A scalar reward model and its value head: R = h_phi(f_omega(x, y)), V = v_psi(f_omega(x)).

    R is read at the last token of the rendered conversation, V at the last prompt token. In a causal backbone both
    come from one forward. A bidirectional one would let V see the response, so there V takes a forward of its own.
    """

    def __init__(self, model: nn.Module, tokenizer, *, value_head: str = "linear", value_position: str = "user_turn"):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.scorer = Scorer(model)
        self.value_position, self.value_kind = value_position, value_head
        width = model.config.get_text_config().hidden_size
        out = nn.Linear(width, 1)
        nn.init.zeros_(out.bias)
        self.value_head = (
            nn.Sequential(out) if value_head == "linear" else nn.Sequential(nn.Linear(width, width), nn.Tanh(), out)
        )
        self.value_head.to(model.device)

    @property
    def device(self) -> torch.device:
        return self.value_head[-1].weight.device

    def reward_head_parameters(self) -> list[nn.Parameter]:
        """phi: everything of the classification model that is not its backbone; under LoRA, what of it is trained."""
        backbone = {id(p) for p in plain(self.model).base_model.parameters()}
        return [p for p in self.model.parameters() if id(p) not in backbone and self._trained(p)]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """omega; under LoRA its adapters."""
        return [p for p in plain(self.model).base_model.parameters() if self._trained(p)]

    def _trained(self, parameter: nn.Parameter) -> bool:
        return not adapted(self.model) or parameter.requires_grad

    # text -> ids

    def encode(self, conversations: list[tuple[Messages, str]]) -> Encoded:
        """Render (prompt messages, response) pairs by this model's own chat template.

        Raises ConfigError for an empty prompt or response, or a conversation longer than the context.
        """
        if not conversations:
            return Encoded([], [])
        at_generation = self.value_position == "generation_prompt"
        prompts = {id(m): render(self.tokenizer, m, generation_prompt=at_generation) for m, _ in conversations}
        texts = [render(self.tokenizer, [*m, {"role": "assistant", "content": r}]) for m, r in conversations]
        out = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)  # the template wrote the BOS
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        special = set(self.tokenizer.all_special_ids)
        ends = []
        rows = zip(conversations, texts, out["input_ids"], out["offset_mapping"], strict=True)
        for (messages, _), text, row, offsets in rows:
            prefix, said = prompts[id(messages)], f"prompt: {messages[-1]['content'][:60]!r}"
            if not text.startswith(prefix):
                raise ConfigError(
                    "reward_model: the chat template does not render the prompt as a prefix of the conversation, so V "
                    f"has no token to read (value_position = {self.value_position!r}); {said}"
                )
            if limit and len(row) > limit:
                raise ConfigError(
                    f"reward_model: a conversation of {len(row)} tokens exceeds its context of {limit}; {said}; "
                    "shorten max_new_tokens or max_prompt_tokens"
                )
            inside = [i for i, (_, stop) in enumerate(offsets) if stop <= len(prefix)]
            if self.value_position == "user_turn":  # the end-of-turn token: a tokenizer merges nothing with it
                inside = [i for i in inside if row[i] in special and i > 0] or inside
            ends.append(inside[-1])
        return Encoded(out["input_ids"], ends)

    # ids -> R, hidden state for V

    def score(self, batch: Encoded) -> Scored:
        """The scores of N conversations. Rows with the same prompt share its computation (`savelib.prefix`)."""
        prompts = [tuple(row[: end + 1]) for row, end in zip(batch.ids, batch.prompt_ends, strict=True)]
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        ends = self._tensor(batch.prompt_ends)  # [N]
        saved = sum(map(len, prompts)) - sum(map(len, number))
        followed = all(len(row) > end + 1 for row, end in zip(batch.ids, batch.prompt_ends, strict=True))
        shared = saved > 0.05 * sum(map(len, batch.ids)) and followed and self.scorer.shares_prefixes()
        if not shared:
            ids, lengths = self.padded(batch.ids)
            rewards, hidden = self.scorer(ids, lengths, ends)
        else:
            of = self._tensor([number[prompt] for prompt in prompts])  # [N]
            prefixes = self.padded(list(number), left=True)  # [U, P]
            rest = [row[end + 1 :] for row, end in zip(batch.ids, batch.prompt_ends, strict=True)]
            rewards, hidden = self.scorer(*self.padded(rest), ends, (*prefixes, of))
        return Scored(rewards.float(), hidden.float())

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.device)

    def padded(self, rows: list, left: bool = False) -> tuple[Tensor, Tensor]:
        """Rows of token ids as (ids [N, S], lengths [N]), padded on the right or on the left."""
        width, pad = max(map(len, rows)), self.model.config.get_text_config().pad_token_id or 0
        fill = [[pad] * (width - len(row)) for row in rows]
        ids = [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)]
        return self._tensor(ids), self._tensor(list(map(len, rows)))

    def values(self, prompt_hidden: Tensor) -> Tensor:
        """V [N] of hidden states [N, H] that are not differentiated: L_V moves psi only."""
        return self.value_head(prompt_hidden.detach()).squeeze(-1)

    # files

    def save_value_head(self, folder: str | Path) -> None:
        folder = Path(folder)
        save_file(
            {k: v.contiguous().cpu() for k, v in self.value_head.state_dict().items()},
            folder / VALUE_HEAD_FILE,
            # one entry: safetensors writes several in random order, and equal heads should be equal files
            metadata={"made_with": json.dumps({"value_head": self.value_kind, "value_position": self.value_position})},
        )


class Scorer(nn.Module):
    """The classification model as one call: (ids [N, S], lengths [N], ends [N]) -> (R [N], hidden for V [N, H]).

    prefixes: (ids [U, P] left-padded, lengths [U], of [N]), then `ids` is what follows prefix of[i], whose end V reads.
    The logits of all tokens are never made: the reward head sees each row's last hidden state only.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.causal = hasattr(plain(model), "score") and _is_causal(plain(model))

    def shares_prefixes(self) -> bool:
        """Whether `prefixes` can be given now; gradient checkpointing recomputes without keys and values."""
        backbone = plain(self.model).base_model
        return self.causal and not is_recomputing(backbone) and shares_prefixes(backbone)

    def forward(
        self, ids: Tensor, lengths: Tensor, ends: Tensor, prefixes: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        model = plain(self.model)
        where = torch.arange(ids.shape[1], device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)
        if prefixes is not None:
            prefix_ids, prefix_lengths, of = prefixes
            first = forward_prefixes(model.base_model, prefix_ids, prefix_lengths)
            hidden = forward_suffixes(
                model.base_model, first.past_key_values, prefix_lengths, of, ids, lengths
            ).last_hidden_state
            return model.score(hidden[rows, lengths - 1]).squeeze(-1), first.last_hidden_state[of, -1]
        mask = (where < lengths[:, None]).long()  # [N, S]
        if self.causal:
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            rewards = model.score(hidden[rows, lengths - 1]).squeeze(-1)
        else:
            rewards = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
            alone = (where <= ends[:, None]).long()
            hidden = model.base_model(input_ids=ids, attention_mask=alone).last_hidden_state
        return rewards, hidden[rows, ends]


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether a token's hidden state is blind to what follows: measured, whatever the architecture says."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], device=model.device) % model.config.get_text_config().vocab_size
    hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return torch.allclose(hidden[0, :2], hidden[1, :2], atol=1e-4)


def load_reward_model(
    source: str, config: Config, device: torch.device, trained: Path | str | None = None
) -> RewardModel:
    """A reward model from a hub id or folder, float32, with its value head if one lies beside it.

    A causal LM without a reward head gets one of zeros (stage 1 trains it). trained: a folder with what was trained
    from `source` on: the value head, and the whole model or the adapters, if they were.
    Raises ConfigError for a model with more than one label, none at all, or no chat template.
    """
    tokenizer = load_tokenizer(source, "reward_model")
    trained = Path(trained) if trained else None
    path = resolve(str(trained) if trained and (trained / "config.json").is_file() else source)
    settings = base_settings(config, device) | {"num_labels": _labels(path), "output_loading_info": True}
    model, info = _load(AutoModelForSequenceClassification, path, "reward_model", **settings)
    if model.config.num_labels != 1:
        raise ConfigError(
            f"reward_model = {source!r} has {model.config.num_labels} labels; a scalar reward model has exactly 1"
        )
    if model.config.get_text_config().pad_token_id is None and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if any("score" in key or "classifier" in key for key in info["missing_keys"]):
        backbone = {id(p) for p in model.base_model.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in backbone:
                nn.init.zeros_(parameter)
    model = model if config.load_in_4bit else model.to(device)
    model = with_adapters(model.eval(), config, "SEQ_CLS", trained)
    rm = RewardModel(model, tokenizer, value_head=config.value_head, value_position=config.value_position)
    head_file = (trained or Path(path)) / VALUE_HEAD_FILE
    if head_file.is_file():
        with safe_open(head_file, "pt") as f:
            made = json.loads((f.metadata() or {}).get("made_with", "{}"))
        wanted = {"value_head": config.value_head, "value_position": config.value_position}
        if made != wanted:
            raise ConfigError(
                f"{head_file}: its value head was made with {made or 'other code'}, this run asks for {wanted}"
            )
        rm.value_head.load_state_dict(load_file(head_file))
    return rm


def _labels(path: str) -> int:
    """1 for a causal LM that is to become a reward model; what its config says for a classifier."""
    found = _load(AutoConfig, path, "reward_model")
    classifier = any("SequenceClassification" in name for name in found.architectures or [])
    return found.num_labels if classifier else 1
