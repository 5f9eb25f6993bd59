"""precision=bfloat16_cpu: bfloat16 on a CPU that has it; weights and rewards stay float32."""

import pytest
import torch
from tiny_models import paper_run
from torch import nn

from savelib.config import make_config
from savelib.models.compute import in_bfloat16, rounded
from savelib.training.algorithm import prepare, save_step
from savelib.training.scoring import encode_pairs, score_groups

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("has_it", [True, False])
def test_a_cpu_computes_in_bfloat16_only_if_asked_to_and_if_it_can(has_it, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    precisions = ("float32", "bfloat16", "bfloat16_cpu")
    assert [in_bfloat16(CPU, p) for p in precisions] == [False, False, has_it]
    assert [in_bfloat16(CUDA, p) for p in precisions] == [False, True, True]


def test_rounded_weights_come_back_bit_for_bit():
    model = nn.Linear(8, 4)
    before = model.weight.detach().clone()
    with rounded(model, False):
        assert model.weight.dtype == torch.float32
    with pytest.raises(KeyError), rounded(model, True):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.equal(model.weight, before.bfloat16())
        raise KeyError
    assert torch.equal(model.weight, before) and model.weight.requires_grad


def test_a_step_in_bfloat16_keeps_float32_weights_and_rewards(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # where it is not, slowly
    base = paper_run(tmp_path) | dict(anchor_prompts=4, total_steps=2, batch_size=2, group_size=4, tracker="none")
    found = {}
    for precision in ("float32", "bfloat16_cpu"):
        t = prepare(make_config(**base | dict(precision=precision)))
        metrics, _ = save_step(t, 1)
        models = (t.policy, t.reward_model, t.reference)
        assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
        scores = score_groups(t.reward_model, encode_pairs(t.reward_model, t.data.pairs), t.config)
        found[precision] = metrics, scores.rewards
    (whole, exact), (half, rewards) = found["float32"], found["bfloat16_cpu"]
    assert half["reward/mean"] != whole["reward/mean"] == pytest.approx(half["reward/mean"], abs=0.05)
    assert not torch.equal(rewards, rewards.bfloat16().float()), "the reward head is never in bfloat16"
    torch.testing.assert_close(rewards, exact, atol=0.05, rtol=0.05)
