"""A prompt computed once for its group: the same scores, log-probabilities, gradients and tokens as row by row."""

import pytest
import torch
from tiny_models import make_policy, make_reward_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from savelib.config import make_config
from savelib.data.pairs_and_prompts import Prompt
from savelib.models import prefix
from savelib.models.loading import load_policy, load_reward_model
from savelib.models.rollout import completion_logprobs, draw, sample

CPU = torch.device("cpu")
WORDS = ["Hi?", "Name a colour, any colour will do.", "Why is the sky blue?"]


def prompts():
    return [Prompt(f"p{i}", [{"role": "user", "content": text}]) for i, text in enumerate(WORDS)]


def settings(**values):
    small = dict(num_processes=1, backend="ddp", device="cpu", max_new_tokens=14, rollout_rows=5)
    return make_config(**(dict(profile="paper", gradient_checkpointing=False) | small | values))


def alone(monkeypatch):
    """From here on nothing is shared."""
    monkeypatch.setattr("savelib.models.reward_model.shares_prefixes", lambda model: False)
    monkeypatch.setattr("savelib.models.rollout.shares_prefixes", lambda model: False)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys() and found
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 + 1e-5 * grad.abs().max().item(), msg=name)


def tokens_through(model):
    counted = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return counted


def test_scores_and_gradients_equal_those_of_whole_rows(tmp_path, monkeypatch):
    rm = load_reward_model(str(make_reward_model(tmp_path / "rm")), settings(), CPU)
    batch = rm.encode([(p.messages, "a longer one " * (1 + i * k)) for i, p in enumerate(prompts()) for k in range(3)])
    weights = torch.randn(9, generator=torch.Generator().manual_seed(0))

    def total(scored):
        return (scored.rewards * weights).sum() + scored.prompt_hidden.square().sum() / 100

    assert rm.scorer.shares_prefixes()
    counted = tokens_through(rm.model.base_model)
    shared = rm.score(batch)
    found, spent = gradients(rm.model, total(shared)), sum(counted)
    alone(monkeypatch)
    counted.clear()
    whole = rm.score(batch)
    assert spent < 0.8 * sum(counted)
    torch.testing.assert_close(shared.rewards, whole.rewards, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared.prompt_hidden, whole.prompt_hidden, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, gradients(rm.model, total(whole)))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_logprobs_and_gradients_equal_those_of_whole_rows(tmp_path, monkeypatch, architecture):
    c = settings(temperature=0.7)
    model, tokenizer = load_policy(str(make_policy(tmp_path / "policy", architecture)), CPU)
    rollout = sample(model, tokenizer, prompts(), 4, c)
    rows = torch.tensor([0, 2, 3, 8, 10])
    mask = rollout.completion_mask.flatten(0, 1)[rows]
    assert prefix.shares_prefixes(model)
    shared = completion_logprobs(model, rollout, rows, c)
    mask = mask[:, : shared.shape[1]]
    found = gradients(model, (shared * mask).sum())
    alone(monkeypatch)
    whole = completion_logprobs(model, rollout, rows, c)
    torch.testing.assert_close(shared[mask], whole[mask], rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, gradients(model, (whole * mask).sum()))


def test_gradient_checkpointing_goes_without(tmp_path):
    model, tokenizer = load_policy(str(make_policy(tmp_path / "policy")), CPU)
    c = settings(gradient_checkpointing=True)
    rollout = sample(model, tokenizer, prompts(), 2, c)
    assert prefix.shares_prefixes(model)
    counted = tokens_through(model)
    checkpointed = completion_logprobs(model, rollout, torch.arange(6), c)
    assert len(counted) == 1 and checkpointed.requires_grad
    torch.testing.assert_close(checkpointed, completion_logprobs(model, rollout, torch.arange(6), settings()))
    assert len(counted) == 3


def test_models_that_forget_are_not_shared(tmp_path):
    small = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    windowed = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=64, sliding_window=2, **small)).eval()
    assert not prefix.shares_prefixes(windowed)
    full = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=64, sliding_window=None, **small)).eval()
    assert prefix.shares_prefixes(full)


class Drawn(LogitsProcessor):
    """Our draw as a processor of transformers' `generate`."""

    def __init__(self, uniforms, start):
        self.uniforms, self.start = uniforms, start

    def __call__(self, input_ids, scores):
        token = draw(scores, self.uniforms[:, input_ids.shape[1] - self.start])
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("cut", [dict(temperature=1.0, top_p=1.0, top_k=0), dict(), dict(temperature=0.01)])
def test_tokens_are_those_of_transformers_generate(tmp_path, architecture, cut):
    c = settings(**cut)
    folder = make_policy(tmp_path / "policy", architecture)
    model, tokenizer = load_policy(str(folder), CPU)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20)]
    uniforms = torch.rand(12, c.max_new_tokens, generator=torch.Generator().manual_seed(1))
    ours = sample(model, tokenizer, prompts(), 4, c, uniforms)
    assert 0 < ours.finished.sum() < 12 or c.temperature < 0.1

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    asked = [tokenizer.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True) for p in prompts()]
    inputs = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {k: v.repeat_interleave(4, 0) for k, v in inputs.items()}
    start = inputs["input_ids"].shape[1]
    warpers = [TemperatureLogitsWarper(c.temperature)] if c.temperature != 1 else []
    warpers += [TopKLogitsWarper(c.top_k)] if c.top_k else []
    warpers += [TopPLogitsWarper(c.top_p)] if c.top_p < 1 else []
    processors = LogitsProcessorList([*warpers, Drawn(uniforms, start)])
    theirs = model.generate(**inputs, max_new_tokens=c.max_new_tokens, do_sample=False, logits_processor=processors)
    width = ours.completion_ids.shape[-1]
    mask = ours.completion_mask.flatten(0, 1)
    assert theirs.shape[1] - start == width
    assert torch.equal(ours.completion_ids.flatten(0, 1)[mask], theirs[:, start:][mask])


def test_prompts_are_computed_once_and_ended_rows_leave_the_batch(tmp_path):
    c = settings(rollout_rows=64, max_new_tokens=40)
    model, tokenizer = load_policy(str(make_policy(tmp_path / "policy")), CPU)
    counted = tokens_through(model)
    rollout = sample(model, tokenizer, prompts(), 8, c)
    lengths = rollout.completion_lengths
    assert counted[0] == rollout.prompt_ids.numel()
    assert counted[1] == 24 and counted == [counted[0], *sorted(counted[1:], reverse=True)]
    assert lengths.max() > lengths.float().mean() * 1.5, "the case needs rows of different lengths"
    assert lengths.sum() - 24 <= sum(counted[1:]) <= 2 * lengths.sum()


def test_rounding_errors_of_large_logits_do_not_stop_sharing(tmp_path):
    model, _ = load_policy(str(make_policy(tmp_path / "policy")), CPU)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert model(ids).logits.abs().max() > 1e3
    assert prefix.shares_prefixes(model)
