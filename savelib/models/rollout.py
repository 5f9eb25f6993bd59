"""Sampling from the policy, and the log-probabilities of what it sampled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from savelib.config import Config, ConfigError
from savelib.data.chat import check_ids, render
from savelib.data.pairs_and_prompts import Prompt
from savelib.models.compute import autocast, in_bfloat16, is_recomputing, recomputing, rounded
from savelib.models.prefix import forward_prefixes, forward_suffixes, left_mask, shares_prefixes, with_room
from savelib.processes import largest, share


@dataclass(frozen=True)
class Responses:
    """G responses to each of B prompts, as the reward model needs them."""

    prompts: list[Prompt]  # B
    texts: list[list[str]]  # B x G, without special tokens
    completion_lengths: Tensor  # [B, G] tokens, the end token counted
    finished: Tensor  # [B, G] bool: an end token was sampled

    def gold(self) -> Tensor:
        """Gold of each response [B, G] float32; nan where it is unknown."""
        return self._gold

    @cached_property
    def _gold(self) -> Tensor:
        return torch.tensor([[p.gold(t) for t in row] for p, row in zip(self.prompts, self.texts, strict=True)])


@dataclass(frozen=True)
class Rollout(Responses):
    """The same with their tokens. Rows are flattened as prompt-major N = B * G; T is the longest completion."""

    prompt_ids: Tensor  # [B, P] left-padded
    prompt_lengths: Tensor  # [B]
    completion_ids: Tensor  # [B, G, T]

    @property
    def completion_mask(self) -> Tensor:
        """[B, G, T] bool, from lengths."""
        steps = torch.arange(self.completion_ids.shape[-1], device=self.completion_ids.device)
        return steps < self.completion_lengths[..., None]


def end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """Token ids that end a response: the model's own list (there may be several), else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise ConfigError("policy_model has no end-of-sequence token: set eos_token_id in its generation_config.json")
    return sorted(set(ids if isinstance(ids, list) else [ids]))


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row [n]: where the cumulative probability of scores [n, vocab] passes the uniform number [n]."""
    cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)  # [n, vocab]
    drawn = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True).squeeze(-1).clamp(max=scores.shape[1] - 1)


def next_tokens(scores: Tensor, uniforms: Tensor, config: Config) -> Tensor:
    """The token of each row [n] from logits [n, vocab] by top-k, temperature and top-p, the latter of the k alone."""
    ids = None
    if 0 < config.top_k < scores.shape[1]:
        ids = scores.topk(config.top_k).indices.sort(1).values  # [n, k]
        scores = scores.gather(1, ids)
    warpers = LogitsProcessorList()
    warpers += [TemperatureLogitsWarper(config.temperature)] if config.temperature != 1 else []
    warpers += [TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
    tokens = draw(warpers(ids, scores), uniforms)
    return tokens if ids is None else ids.gather(1, tokens[:, None]).squeeze(1)


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer,
    prompts: list[Prompt],
    group_size: int,
    config: Config,
    uniforms: Tensor | None = None,
    lockstep: bool = False,
) -> Rollout:
    """Sample group_size responses to each prompt with the config's temperature, top-p and top-k.

    uniforms [N, max_new_tokens]: the random numbers of each token, by default drawn here from torch's generator. So
    a response depends neither on config.rollout_rows, the chunks that go through `generate`, nor on the processes that
    share a batch. lockstep: continue until all processes are done (ZeRO-3 gathers weights in each forward).
    Raises ConfigError for a prompt beyond max_prompt_tokens or the model's context.
    """
    device, ends = model.device, end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    ids = [
        tokenizer(render(tokenizer, p.messages, generation_prompt=True), add_special_tokens=False)["input_ids"]
        for p in prompts
    ]
    check_ids(ids, model.get_input_embeddings().num_embeddings, "policy_model")
    _check_lengths(ids, prompts, model, config)
    prompt_lengths = torch.tensor([len(row) for row in ids], device=device)  # [B]
    width = int(prompt_lengths.max())
    prompt_ids = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)  # [B, P]
    count = len(prompts) * group_size  # N
    uniforms = torch.rand(count, config.max_new_tokens) if uniforms is None else uniforms
    chunks = []
    on_cpu = device.type == "cpu" and in_bfloat16(device, config.precision)
    with autocast(device, config.precision), rounded(model, on_cpu):
        for rows in torch.arange(count, device=device).split(config.rollout_rows):
            groups, of = torch.unique(rows // group_size, return_inverse=True)
            numbers = uniforms[rows.cpu()].to(device)
            chunks.append(
                _decode(model, prompt_ids[groups], prompt_lengths[groups], of, numbers, ends, pad, config, lockstep)
            )
    longest = max(c.shape[1] for c in chunks)
    completions = torch.cat([nn.functional.pad(c, (0, longest - c.shape[1]), value=pad) for c in chunks])  # [N, T]
    is_end = torch.isin(completions, torch.tensor(ends, device=device))
    finished = is_end.any(1)
    lengths = torch.where(finished, is_end.int().argmax(1) + 1, config.max_new_tokens).clamp(max=longest)  # [N]
    texts = [
        tokenizer.decode(row[:n], skip_special_tokens=True)
        for row, n in zip(completions.tolist(), lengths.tolist(), strict=True)
    ]
    shape = (len(prompts), group_size)
    return Rollout(
        prompts=prompts,
        prompt_ids=prompt_ids,
        prompt_lengths=prompt_lengths,
        completion_ids=completions.view(*shape, -1),
        completion_lengths=lengths.view(shape),
        finished=finished.view(shape),
        texts=[texts[i : i + group_size] for i in range(0, len(texts), group_size)],
    )


def _decode(
    model: nn.Module, prompts: Tensor, prompt_lengths: Tensor, of: Tensor, uniforms: Tensor, ends: list[int], pad: int,
    config: Config, lockstep: bool,
) -> Tensor:  # fmt: skip
    """Completions [n, T'] of rows that begin with prompt of[i], padded after the end token.

    Each prompt goes through the model once; rows that have ended leave the batch when they are half of it.
    """
    end_ids, width = torch.tensor(ends, device=prompts.device), prompts.shape[1]
    out = prompts.new_full((len(of), config.max_new_tokens), pad)
    rows = torch.arange(len(of), device=prompts.device)  # those in the batch
    going = torch.ones_like(rows, dtype=torch.bool)  # those of them that have not ended
    positions = prompt_lengths[of]  # of the next token
    mask = torch.cat([left_mask(positions, width), going.new_ones(len(of), config.max_new_tokens)], 1).long()
    made = forward_prefixes(model, prompts, prompt_lengths, logits_to_keep=1)
    cache, scores = with_room(made.past_key_values, of, config.max_new_tokens), made.logits[of, -1]  # [n, vocab]
    for step in range(config.max_new_tokens):
        tokens = next_tokens(scores.float(), uniforms[rows, step], config)
        out[rows, step] = torch.where(going, tokens, pad)  # a mask as an index would wait for the device
        going = going & ~torch.isin(tokens, end_ids)
        left = int(going.sum())
        if step + 1 == config.max_new_tokens or not (largest(left)[0] if lockstep else left):
            break
        if left <= len(rows) / 2:
            keep = going.nonzero().squeeze(1) if left else rows.new_zeros(1)
            cache.batch_select_indices(keep)
            rows, going, tokens, mask, positions = (x[keep] for x in (rows, going, tokens, mask, positions))
        made = model(
            input_ids=tokens[:, None],
            attention_mask=mask[:, : width + step + 1],
            position_ids=(positions + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        scores = made.logits[:, -1]
    return out[:, : step + 1]


def _check_lengths(ids: list[list[int]], prompts: list[Prompt], model: nn.Module, config: Config) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    for row, prompt in zip(ids, prompts, strict=True):
        if len(row) > config.max_prompt_tokens:
            raise ConfigError(
                f"prompt {prompt.id!r} has {len(row)} tokens, more than max_prompt_tokens = {config.max_prompt_tokens}"
            )
        if len(row) + config.max_new_tokens > context:
            raise ConfigError(
                f"prompt {prompt.id!r} has {len(row)} tokens; with max_new_tokens = {config.max_new_tokens} that "
                f"exceeds the policy's context of {context}; shorten the prompt or max_new_tokens"
            )


def completion_logprobs(model: nn.Module, rollout: Rollout, rows: Tensor, config: Config) -> Tensor:
    """Log-probabilities [n, T] of the sampled tokens at the sampling temperature, for flat row indices `rows` [n].

    Differentiable. T is cut to the longest of the chosen rows. Values beyond a row's length are meaningless: mask them.
    """
    group_size = rollout.completion_ids.shape[1]
    lengths = rollout.completion_lengths.flatten()[rows]  # [n]
    steps = int(lengths.max())
    completions = rollout.completion_ids.flatten(0, 1)[rows, :steps]  # [n, T]
    groups, of = torch.unique(rows // group_size, return_inverse=True)  # [U], [n]
    prompt_lengths = rollout.prompt_lengths[groups]  # [U]
    prompts = rollout.prompt_ids[groups, rollout.prompt_ids.shape[1] - int(prompt_lengths.max()) :]  # [U, P]

    def chosen(logits: Tensor, tokens: Tensor) -> Tensor:  # [n, t, vocab], [n, t] -> [n, t]
        logprobs = torch.log_softmax(logits.float() / config.temperature, -1)
        return logprobs.gather(-1, tokens[..., None]).squeeze(-1)

    with autocast(prompts.device, config.precision), recomputing(model, config.gradient_checkpointing):
        if len(groups) < len(rows) and not is_recomputing(model) and shares_prefixes(model):
            first = forward_prefixes(model, prompts, prompt_lengths, logits_to_keep=1)
            parts = [chosen(first.logits[of], completions[:, :1])]
            if steps > 1:
                rest = forward_suffixes(
                    model, first.past_key_values, prompt_lengths, of, completions[:, :-1], (lengths - 1).clamp(min=1)
                )
                parts.append(chosen(rest.logits, completions[:, 1:]))
            return torch.cat(parts, 1)
        ids = torch.cat([prompts[of], completions], 1)  # [n, P+T]
        right = torch.arange(steps, device=ids.device) < lengths[:, None]
        mask = torch.cat([left_mask(prompt_lengths[of], prompts.shape[1]), right], 1).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=steps + 1, use_cache=False
        )
        return chosen(out.logits[:, :-1], completions)


def shared_sample(
    policy: nn.Module, tokenizer, batch: list[Prompt], count: int, config: Config, lockstep: bool = False
) -> Rollout:
    """This process's share of `count` responses to each prompt, from random numbers drawn for the whole batch."""
    numbers = torch.rand(len(batch), count, config.max_new_tokens)
    mine = torch.stack(share(list(numbers))).flatten(0, 1)  # [N, T]
    return sample(policy, tokenizer, share(batch), count, config, mine, lockstep)
