"""Less work where weights are frozen: hidden states kept, the policy's last layers alone, a shorter reward model."""

import copy

import pytest
import torch
from tiny_models import make_reward_model, paper_run
from transformers import AutoModelForSequenceClassification

from savelib.config import ConfigError, make_config
from savelib.models.loading import load_reward_model
from savelib.models.reward_model import RewardModel
from savelib.runs.train import train
from savelib.training.algorithm import prepare, save_step
from savelib.training.evaluation import evaluate
from savelib.training.stages import fit_bradley_terry
from savelib.training.trainer import load_data


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("base")) | dict(
        anchor_prompts=8, total_steps=4, batch_size=4, precision="float32", gradient_checkpointing=False,
        backbone_lr=0.0, reward_head_lr=1e-2, value_head_lr=1e-2, policy_lr=1e-3, tracker="none", group_size=6,
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("folders")


@pytest.mark.parametrize("values", [{}, dict(rule="offline_bt"), dict(rm_steps=2, micro_batch_groups=3)], ids=str)
def test_steps_with_kept_states_equal_the_plain_ones(base, values, monkeypatch):
    found = []
    for keep in (True, False):
        if not keep:
            monkeypatch.setattr(RewardModel, "fixed", property(lambda self: False))
        t = prepare(make_config(**base | values))
        metrics = [save_step(t, step)[0] for step in (1, 2)] + [evaluate(t)]
        found.append((metrics, t.reward_model.model.score.weight.detach(), t.policy.state_dict()))
        assert (t.heldout_pairs.encoded[0].states is not None) == keep
    (kept, head, policy), (plain, plain_head, plain_policy) = found
    for a, b in zip(kept, plain, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith("time/"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    torch.testing.assert_close(head, plain_head, atol=1e-5, rtol=1e-4)
    for key in policy:
        torch.testing.assert_close(policy[key], plain_policy[key], atol=1e-4, rtol=1e-3)


def test_a_conversation_goes_through_a_fixed_backbone_once(base, monkeypatch):
    t = prepare(make_config(**base))
    seen, whole = [], t.reward_model.scorer.states
    monkeypatch.setattr(t.reward_model.scorer, "states", lambda ids, *rest: seen.append(len(ids)) or whole(ids, *rest))
    save_step(t, 1)
    assert sum(seen) == 4 * 6, "the second pass of the step takes the states of the first"
    seen.clear()
    evaluate(t)
    pairs, first = 2 * len(t.data.heldout_pairs), sum(seen)
    seen.clear()
    evaluate(t)
    assert sum(seen) == first - pairs > 0, "the fixed pairs go through once, the policy's responses each time"


def test_stage_1_computes_each_pair_of_a_fixed_backbone_once(base, monkeypatch):
    c = make_config(**base | dict(bt_epochs=3, bt_backbone_lr=0.0, bt_head_lr=1e-2))
    pairs, found = load_data(c).pairs, []
    for keep in (True, False):
        rm = load_reward_model(c.reward_model, c, torch.device("cpu"))
        torch.manual_seed(0)
        if not keep:
            monkeypatch.setattr(RewardModel, "fixed", property(lambda self: False))
        seen, whole = [], rm.scorer.states
        monkeypatch.setattr(
            rm.scorer, "states", lambda ids, *rest, f=whole, s=seen: s.append(len(ids)) or f(ids, *rest)
        )
        found.append((fit_bradley_terry(rm, pairs, c), rm.model.score.weight.detach()))
        assert sum(seen) == 2 * len(pairs) * (1 if keep else 3)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-5)


def test_a_trained_backbone_keeps_nothing(base):
    t = prepare(make_config(**base | dict(backbone_lr=1e-5)))
    save_step(t, 1)
    assert not t.reward_model.fixed and t.heldout_pairs.encoded[0].states is None


def test_only_the_last_layers_of_the_policy_move_and_the_reference_shares_the_others(base):
    t = prepare(make_config(**base | dict(policy_layers=1)))
    before = copy.deepcopy(t.policy.state_dict())
    whole = prepare(make_config(**base))
    (metrics, _), (other, _) = save_step(t, 1), save_step(whole, 1)
    assert metrics["policy/loss"] == pytest.approx(other["policy/loss"], abs=1e-5), "the same loss, another gradient"
    assert 0 < metrics["policy/grad_norm"] < other["policy/grad_norm"]
    moved = {k for k, v in t.policy.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("model.layers.1.", "model.norm.")) for k in moved)
    theirs, own = dict(t.reference.named_parameters()), dict(t.policy.named_parameters())
    shared = {k for k in own if theirs[k].data_ptr() == own[k].data_ptr()}
    assert shared == {k for k, p in own.items() if not p.requires_grad} and "model.embed_tokens.weight" in shared
    state = t.reference.state_dict()
    assert all(torch.equal(state[k], before[k]) for k in before), "the reference is the initial policy"


def test_a_reward_model_of_the_first_layers_loads_plainly(base, tmp_path):
    run = train(make_config(**base | dict(reward_layers=1, backbone_lr=1e-4, total_steps=2, run_id="one")))
    model = AutoModelForSequenceClassification.from_pretrained(run / "reward_model")
    assert model.config.num_hidden_layers == len(model.model.layers) == 1 and model.config.num_labels == 1
    t = prepare(make_config(**base | dict(reward_layers=1)))
    conversation = t.reward_model.encode([([{"role": "user", "content": "Hi"}], "Yes")])
    full = AutoModelForSequenceClassification.from_pretrained(base["reward_model"])
    with torch.no_grad():
        first = full.model(torch.tensor(conversation.ids), output_hidden_states=True).hidden_states[1]
        expected = full.score(full.model.norm(first))[0, -1]
    assert t.reward_model.score(conversation).rewards.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(("values", "said"), [
    (dict(policy_layers=3), "policy_layers = 3: the model has 2 layers"),
    (dict(reward_layers=9), "reward_layers = 9: the model has 2 layers"),
    (dict(policy_layers=1, lora_rank=4), "policy_layers = 1 and reward_layers = 0 choose among all weights"),
])  # fmt: skip
def test_what_cannot_be_is_said(base, values, said):
    with pytest.raises(ConfigError, match=said):
        prepare(make_config(**base | values))


def test_a_model_without_a_list_of_layers_is_refused(base, tmp_path):
    values = base | dict(
        reward_layers=1, rule="frozen", reward_model=str(make_reward_model(tmp_path / "bert", kind="bert"))
    )
    with pytest.raises(ConfigError, match="reward_layers = 1: BertForSequenceClassification has no list of layers"):
        prepare(make_config(**values))
