"""`preflight`: its figures against the parts that they are made of."""

import pytest
import torch
from tiny_models import paper_run

from savelib.config import make_config
from savelib.experiments.preflight import preflight
from savelib.method import feature_geometry
from savelib.training.algorithm import prepare


def test_geometry_of_features_with_a_known_offset():
    features = torch.randn(200, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    offset = torch.zeros(32, dtype=torch.float64)
    offset[3] = 30.0
    ratio, spread = feature_geometry(features + offset)
    assert spread == pytest.approx((32 * 7 / 8) ** 0.5, rel=0.02), "7/8: about the group's own mean"
    assert ratio == pytest.approx(30 / spread, rel=0.02)


def test_preflight_measures_and_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path / "cache"))
    values = paper_run(tmp_path) | dict(
        anchor_prompts=4, precision="float32", gradient_checkpointing=False, reward_head_lr=1e-2, rule="frozen"
    )
    table = preflight(make_config(**values), prompts=8, responses=4)["value"]
    t = prepare(make_config(**values | dict(rule="save", batch_size=8, group_size=4)))
    rollout = t.sample(1)
    rm, states = t.reward_model, []
    for prompt, texts in zip(rollout.prompts, rollout.texts, strict=True):
        encoded = rm.encode([(prompt.messages, text) for text in texts])
        with torch.no_grad():
            hidden = [rm.model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in encoded.ids]
        states.append(torch.stack(hidden))
    assert table["features: norm of the mean / spread in a group"] == pytest.approx(
        feature_geometry(torch.stack(states))[0], rel=1e-3
    )
    assert table["responses that finish"] == pytest.approx(rollout.finished.float().mean().item())
    assert 0 <= table["groups with both sides"] <= 1 and table["rewards: spread within a group (std)"] > 0
    assert not (tmp_path / "runs").exists()
