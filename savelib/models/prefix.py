"""A prompt's keys and values, computed once for all responses to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def left_mask(lengths: Tensor, width: int) -> Tensor:
    """[N, width] bool of left-padded rows, lengths [N]."""
    return torch.arange(width, device=lengths.device) >= width - lengths[:, None]


def forward_prefixes(model: nn.Module, ids: Tensor, lengths: Tensor, **kwargs: Any) -> Any:
    """The model's output for left-padded prefixes [U, P] of these lengths [U], with `past_key_values`."""
    mask = left_mask(lengths, ids.shape[1])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=True, **kwargs)


def forward_suffixes(
    model: nn.Module, cache: Cache, prefix_lengths: Tensor, of: Tensor, ids: Tensor, lengths: Tensor
) -> Any:
    """The model's output for right-padded rows [n, S] of these lengths [n], row i after prefix of[i]; differentiable.

    cache: of `forward_prefixes`; its keys and values are given to each row, so it is used up.
    """
    width = cache.get_seq_length()
    cache.reorder_cache(of)
    steps = torch.arange(ids.shape[1], device=ids.device)
    mask = torch.cat([left_mask(prefix_lengths, width)[of], steps < lengths[:, None]], 1).long()  # [n, P+S]
    positions = prefix_lengths[of][:, None] + torch.minimum(steps, lengths[:, None] - 1)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)


@torch.no_grad()
def shares_prefixes(model: nn.Module) -> bool:
    """Whether prefixes can be computed apart from what follows: full attention, and measured on a few tokens.

    Not under ZeRO-3, whose backward hangs where a module was run twice.
    """
    known = getattr(model, "_shares_prefixes", None)
    if known is None:
        c = model.config.get_text_config()
        kinds = set(getattr(c, "layer_types", None) or ["full_attention"])
        full = kinds == {"full_attention"} and getattr(c, "sliding_window", None) is None
        sharded = any(hasattr(p, "ds_id") for p in model.parameters())
        model._shares_prefixes = known = full and not sharded and _equal_on_a_few_tokens(model)
    return known


def _equal_on_a_few_tokens(model: nn.Module) -> bool:
    """Two prefixes of 1 and 3 tokens with three suffixes of 1 to 2, apart and whole, without autocast."""
    vocabulary = model.config.get_text_config().vocab_size
    rows = [([1], [2, 3]), ([1], [4]), ([2, 3, 4], [5, 6])]
    make = lambda x: torch.tensor(x, device=model.device) % vocabulary  # noqa: E731
    prefix_lengths, of, lengths = (torch.tensor(x, device=model.device) for x in ([1, 3], [0, 0, 1], [2, 1, 2]))
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    with torch.autocast(model.device.type, enabled=False):
        cache = forward_prefixes(model, make([[0, 0, 1], [2, 3, 4]]), prefix_lengths).get("past_key_values")
        if not isinstance(cache, DynamicCache):
            return False
        found = forward_suffixes(model, cache, prefix_lengths, of, make([[2, 3], [4, 0], [5, 6]]), lengths)[0]
        for i, (prefix, suffix) in enumerate(rows):
            whole = model(input_ids=make([prefix + suffix]), use_cache=False)[0][0, len(prefix) :]
            size = whole.abs().max().item()  # SmolLM2's logits reach 30, and their rounding errors .001
            if not torch.allclose(
                found[i, : len(suffix)], whole, rtol=0, atol=max(1e-3, 1e-4 * size) if exact else 0.05 * size
            ):
                return False
    return True


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for `more` tokens, so that a new token copies nothing but itself."""

    def __init__(self, layer: DynamicLayer, rows: Tensor, more: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        n, (heads, self.length) = len(rows), layer.keys.shape[1:3]
        self.room = [x.new_empty(n, heads, self.length + more, x.shape[-1]) for x in (layer.keys, layer.values)]
        self._show()
        for x, shown in ((layer.keys, self.keys), (layer.values, self.values)):
            torch.index_select(x, 0, rows, out=shown)

    def _show(self) -> None:
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin, self.length = self.length, self.length + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, begin : self.length] = states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room = [room[indices] for room in self.room]
        self._show()


def with_room(cache: Cache, rows: Tensor, more: int) -> Cache:
    """A cache of prefixes as one of rows, row i having prefix rows[i], with room for `more` tokens; not differentiable.

    Layers of another kind than full attention are repeated and grow as transformers has it.
    """
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, rows, more)
        else:
            layer.reorder_cache(rows)
    return cache
