"""The value-anchored reward model: R and V of conversations in one forward.

Trained weights are always float32 (an update of lr 1e-7 is lost in bfloat16); on CUDA `autocast` computes in bfloat16.
The models stay in eval mode: no dropout, so that the reward that filtered is the reward in the loss.
With lora_rank the weights are a frozen base, and adapters are trained on all its linear layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from savelib.config import ConfigError
from savelib.data.chat import Messages, check_ids, render
from savelib.models.adapters import adapted, plain
from savelib.models.compute import autocast, is_recomputing
from savelib.models.prefix import forward_prefixes, forward_suffixes, shares_prefixes

VALUE_HEAD_FILE = "value_head.safetensors"


@dataclass(frozen=True)
class Scored:
    """What one forward of the reward model gives for N conversations."""

    rewards: Tensor  # [N] float32
    prompt_hidden: Tensor  # [N, H] float32, the hidden state that V reads


@dataclass(frozen=True)
class Encoded:
    """N rendered conversations as token ids; masks come from lengths.

    ids: token ids of each conversation; prompt_ends: index of the token that V reads; states: what `embed` adds.
    """

    ids: list[list[int]]
    prompt_ends: list[int]
    states: tuple[Tensor, Tensor] | None = None  # [N, H] that the reward head reads, [N, H] that V reads

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Encoded:
        return self.take(list(range(len(self)))[rows])

    def take(self, rows: list[int]) -> Encoded:
        """The conversations of these rows."""
        states = self.states and (self.states[0][rows], self.states[1][rows])
        return Encoded([self.ids[i] for i in rows], [self.prompt_ends[i] for i in rows], states)

    @classmethod
    def joined(cls, parts: list[Encoded]) -> Encoded:
        """The conversations of all parts; they have states if all parts have."""
        ids, ends = [row for p in parts for row in p.ids], [end for p in parts for end in p.prompt_ends]
        states = [p.states for p in parts if p.states]
        whole = len(states) == len(parts) > 0
        return cls(ids, ends, tuple(map(torch.cat, zip(*states, strict=True))) if whole else None)


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
        check_ids(out["input_ids"], self.model.get_input_embeddings().num_embeddings, "reward_model")
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

    @property
    def fixed(self) -> bool:
        """Whether the backbone cannot have changed since it was loaded: none of it is trained (backbone_lr = 0)."""
        return self.scorer.causal and not any(p.requires_grad for p in plain(self.model).base_model.parameters())

    @torch.no_grad()
    def embed(self, batch: Encoded) -> Encoded:
        """The batch with the hidden states of a fixed backbone, which `score` takes; unchanged if omega is trained."""
        return replace(batch, states=self.hidden(batch)) if self.fixed else batch

    def hidden(self, batch: Encoded) -> tuple[Tensor, Tensor]:
        """The hidden states [N, H] that the reward head reads, and those that V reads, of a causal backbone."""
        return self._forward(batch, self.scorer.states)

    def score(self, batch: Encoded) -> Scored:
        """The rewards of N conversations, and the hidden states that V reads."""
        if batch.states:
            last, hidden = batch.states
            rewards = self.scorer.reward(last)
        else:
            rewards, hidden = self._forward(batch, self.scorer)
        return Scored(rewards.float(), hidden.float())

    def _forward(self, batch: Encoded, forward: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What `scorer` or `scorer.states` gives; rows with the same prompt share its computation (`models.prefix`)."""
        prompts = [tuple(row[: end + 1]) for row, end in zip(batch.ids, batch.prompt_ends, strict=True)]
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        ends = self._tensor(batch.prompt_ends)  # [N]
        saved = sum(map(len, prompts)) - sum(map(len, number))
        followed = all(len(row) > end + 1 for row, end in zip(batch.ids, batch.prompt_ends, strict=True))
        shared = saved > 0.05 * sum(map(len, batch.ids)) and followed and self.scorer.shares_prefixes()
        if not shared:
            ids, lengths = self.padded(batch.ids)
            return forward(ids, lengths, ends)
        of = self._tensor([number[prompt] for prompt in prompts])  # [N]
        prefixes = self.padded(list(number), left=True)  # [U, P]
        rest = [row[end + 1 :] for row, end in zip(batch.ids, batch.prompt_ends, strict=True)]
        return forward(*self.padded(rest), ends, (*prefixes, of))

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


@torch.no_grad()
def score_in_batches(rm: RewardModel, encoded: Encoded, batches: Iterable[list[int]], precision: str) -> Scored:
    """The scores of all conversations without gradients, in their order; batches: the rows of each forward."""
    parts, order = [], []
    for rows in batches:
        with autocast(rm.device, precision):
            parts.append(rm.score(encoded.take(rows)))
        order += rows
    place = torch.tensor(order, device=rm.device).argsort()
    return Scored(torch.cat([p.rewards for p in parts])[place], torch.cat([p.prompt_hidden for p in parts])[place])


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
        if self.causal:
            last, hidden = self.states(ids, lengths, ends, prefixes)
            return self.reward(last), hidden
        model, where = plain(self.model), torch.arange(ids.shape[1], device=ids.device)
        rewards = model(input_ids=ids, attention_mask=(where < lengths[:, None]).long()).logits.squeeze(-1)
        alone = (where <= ends[:, None]).long()  # [N, S]
        hidden = model.base_model(input_ids=ids, attention_mask=alone).last_hidden_state
        return rewards, hidden[torch.arange(len(ids), device=ids.device), ends]

    def reward(self, last: Tensor) -> Tensor:
        """h_phi: the rewards [N] of last hidden states [N, H], without autocast: bfloat16 would round them to 1/128."""
        with torch.autocast(last.device.type, enabled=False):
            return plain(self.model).score(last.float()).squeeze(-1)  # a reward head is held in float32

    def states(
        self, ids: Tensor, lengths: Tensor, ends: Tensor, prefixes: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """f_omega of a causal backbone: the hidden states [N, H] that the reward head reads, and those that V reads."""
        backbone, rows = plain(self.model).base_model, torch.arange(len(ids), device=ids.device)
        if prefixes is not None:
            prefix_ids, prefix_lengths, of = prefixes
            first = forward_prefixes(backbone, prefix_ids, prefix_lengths)
            after = forward_suffixes(backbone, first.past_key_values, prefix_lengths, of, ids, lengths)
            return after.last_hidden_state[rows, lengths - 1], first.last_hidden_state[of, -1]
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()  # [N, S]
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[rows, lengths - 1], hidden[rows, ends]


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether a token's hidden state is blind to what follows: measured, whatever the architecture says."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], device=model.device) % model.config.get_text_config().vocab_size
    hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return torch.allclose(hidden[0, :2], hidden[1, :2], atol=1e-4)
