"""Rule save_checked: its tests and decisions against transcriptions, its guarantee by simulation, and blocks undone."""

import copy
import json
import math

import pytest
import torch
from scipy import stats
from tiny_models import paper_run

from savelib.config import ConfigError, make_config
from savelib.method.guard import (
    REST,
    GuardState,
    certified,
    correct_change,
    e_value,
    improvement_z,
    normalized_margins,
)
from savelib.models.compute import seed_everything
from savelib.runs.memory import guard_bytes
from savelib.runs.sizes import model_sizes
from savelib.training.algorithm import prepare, save_step
from savelib.training.engine import Engine
from savelib.training.guard import GUARDED
from savelib.training.scoring import encode_groups, score_groups

# formulas


def test_z_against_scipy_and_blind_to_scale():
    torch.manual_seed(0)
    before = torch.randn(40, dtype=torch.float64)
    now = before + 0.3 * torch.randn(40, dtype=torch.float64) + 0.2
    a, b = (x / math.sqrt((x**2).mean()) for x in (now, before))
    assert improvement_z(now, before) == pytest.approx(stats.ttest_rel(a.numpy(), b.numpy()).statistic)
    assert improvement_z(3 * now, before / 7) == pytest.approx(improvement_z(now, before))
    assert improvement_z(before, before) == 0.0
    assert normalized_margins(before).square().mean().item() == pytest.approx(1)


def test_e_value_against_a_loop():
    change, delta = torch.tensor([1.0, 0, -1, 0, 0.5]), 0.02
    total = 0.0
    for share in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        wealth = 1.0
        for d in change.tolist():
            wealth *= 1 + share * (d + delta) / (1 - delta)
        total += wealth / 6
    assert e_value(change, delta) == pytest.approx(total)
    assert e_value(change.flip(0), delta) == pytest.approx(total), "the order of the pairs does not matter"
    with pytest.raises(ValueError, match="delta 1"):
        e_value(change, 1)


def test_a_tie_is_half_right():
    now, start = torch.tensor([1.0, -1, 0, 0]), torch.tensor([-1.0, 1, 1, 0])
    assert correct_change(now, start).tolist() == [1, -1, -0.5, 0]


def changes(generator, runs, n, better, worse):
    """Paired changes of verdicts [runs, n]: 1 with probability `better`, -1 with `worse`."""
    u = torch.rand(runs, n, generator=generator)
    return (u < better).double() - (u > 1 - worse).double()


@pytest.mark.parametrize(("better", "worse"), [(0.0, 0.05), (0.1, 0.15), (0.3, 0.35), (0.45, 0.5)])
def test_false_certificates_are_rarer_than_alpha(better, worse):
    """10,000 runs at the edge of the null (accuracy fell by exactly delta), 12 looks at the same 100 pairs each.

    The candidates of the looks are independent here, which is the worst case: more chances to be wrong.
    """
    generator, delta, alpha = torch.Generator().manual_seed(1), 0.05, 0.05
    false = torch.zeros(10_000, dtype=torch.bool)
    for look in range(1, 13):
        change = changes(generator, 10_000, 100, better, worse)
        stakes = torch.tensor((0.1, 0.2, 0.3, 0.5, 0.7, 0.9), dtype=torch.float64) / (1 - delta)
        wealth = (1 + stakes[:, None, None] * (change + delta)[None]).log().sum(2).exp().mean(0)  # [runs]
        assert wealth[0].item() == pytest.approx(e_value(change[0], delta)), "the same formula for all runs at once"
        false |= wealth >= look * (look + 1) / alpha
    assert false.double().mean() <= alpha


def test_a_clear_gain_is_certified_at_the_first_looks():
    generator = torch.Generator().manual_seed(2)
    start, right = torch.ones(100), changes(generator, 400, 100, 0.20, 0.02)
    found = {1: 0, 6: 0}
    for change in right:
        before = torch.where(change > 0, -1.0, start)
        now = torch.where(change < 0, -1.0, 1.0)
        for look in found:
            found[look] += certified(now, before, look, alpha=0.05, delta=0.02)
    assert found[1] >= 0.9 * 400 and found[6] >= 0.7 * 400


def test_blocks_take_turns_rest_and_rest_longer():
    state, seen = GuardState(), []
    for accepted in (True, False, True, False, False):
        state = state.after(accepted, forms=2)
        seen.append((state.form, state.failures, state.resting))
    assert seen == [(0, 0, 0), (1, 1, 0), (1, 0, 0), (0, 1, 0), (1, 2, REST)]
    for left in range(REST, 0, -1):
        assert state.resting == left
        state = state.rested()
    assert state.resting == 0
    for accepted in (False, False):
        state = state.after(accepted, forms=2)
    assert state.resting == 2 * REST and state.after(True, forms=2) == GuardState(state.form)


# training


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    guard = folder / "guard.jsonl"
    rows = [{"prompt": f"Question {i}?", "chosen": f"Answer {i * 7}", "rejected": f"{i}, no"} for i in range(16)]
    guard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paper_run(folder) | dict(
        rule="save_checked", guard_preferences=str(guard), guard_pairs=12, guard_every=2, anchor_prompts=8,
        total_steps=6, batch_size=4, precision="float32", gradient_checkpointing=False, tracker="none",
        backbone_lr=1e-4, reward_head_lr=1e-2, value_head_lr=1e-2, policy_lr=1e-3,
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("folders")


def trained(t):
    models = (t.reward_model.model, t.reward_model.value_head)
    return [p.detach().clone() for m in models for p in m.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def verdicts(t, monkeypatch, *zs):
    """Let the guard's z be these, block by block, as if each block had updated the reward model."""
    given = iter(zs)
    monkeypatch.setattr(t.guard.pairs, "margins", lambda: torch.rand(12))
    monkeypatch.setattr("savelib.training.guard.improvement_z", lambda now, before: next(given))


@pytest.mark.parametrize("values", [{}, {"lora_rank": 4}, {"optimizer": "adamw_8bit"}], ids=str)
def test_an_undone_block_leaves_no_trace(base, values, monkeypatch):
    """After an undone block, weights, value head and Adam's states are those of the last block that stayed."""
    t = prepare(make_config(**base | values))
    verdicts(t, monkeypatch, 2.0, -1.0)
    for step in (1, 2):
        metrics, _ = save_step(t, step)
    kept, states = trained(t), copy.deepcopy([t.engines[n].state() for n in GUARDED])
    assert metrics["guard/accepted"] == 1 and metrics["guard/z"] == 2.0 and metrics["rm/mirrored"] == 0
    held = sum(v.nbytes for name, v in t.guard.confirmed.items() if name.startswith("reward_model."))
    planned = guard_bytes(model_sizes(t.config.reward_model, "reward_model"), t.config, gpus=1)
    assert held == pytest.approx(planned, rel=0.05), "the plan counts the copy"
    save_step(t, 3)
    assert not same(trained(t), kept)
    before = copy.deepcopy(t.guard)
    metrics, _ = save_step(t, 4)
    assert same(trained(t), kept) and metrics["guard/undone"] == 1 and before.state.form == 0
    for old, name in zip(states, GUARDED, strict=True):
        now = t.engines[name].state()
        assert now.keys() == old.keys() and all(torch.equal(now[k], old[k]) for k in old)
    metrics, _ = save_step(t, 5)
    assert metrics["rm/mirrored"] == 1, "the other loss has its turn"


def test_the_policy_learns_from_the_restored_rewards(base, monkeypatch):
    t = prepare(make_config(**base))
    verdicts(t, monkeypatch, -1.0)
    start = trained(t)
    save_step(t, 1)
    seed_everything("step", t.config.seed, 2)
    rollout = copy.deepcopy(t).sample(2)
    metrics, samples = save_step(t, 2)
    assert same(trained(t), start)
    rewards = score_groups(t.reward_model, encode_groups(t.reward_model, rollout), t.config).rewards
    assert metrics["reward/mean"] == pytest.approx(rewards.mean().item(), abs=1e-5)


def test_two_undone_blocks_rest_the_reward_model_but_not_the_value_head(base, monkeypatch):
    t = prepare(make_config(**base | dict(guard_every=1, total_steps=10)))
    verdicts(t, monkeypatch, -1.0, -1.0, 5.0)
    for step in (1, 2):
        save_step(t, step)
    before = trained(t)
    head = t.reward_model.value_head[-1].weight.detach().clone()
    for step in range(3, 3 + REST):
        metrics, _ = save_step(t, step)
        assert metrics["guard/resting"] == 1 and metrics["rm/groups"] == 0 and "guard/z" not in metrics
    assert same(trained(t)[:-2], before[:-2]) and not torch.equal(t.reward_model.value_head[-1].weight, head)
    metrics, _ = save_step(t, 3 + REST)
    assert metrics["guard/accepted"] == 1 and metrics["guard/resting"] == 0


@pytest.mark.parametrize("form", [0, 1])
def test_the_gradient_cannot_shift_the_preference_pairs_level(base, form):
    """One step of either loss against R - (m - stopgrad m), written down with autograd on the whole batch."""
    values = base | dict(guard_every=4, curriculum="linear", initial_margin=0.1)
    t = prepare(make_config(**values))
    t.guard.state = GuardState(form=form)
    copied, c = copy.deepcopy(t.reward_model), t.config
    seed_everything("step", c.seed, 1)
    rollout = copy.deepcopy(t).sample(1)
    metrics, _ = save_step(t, 1)

    groups = encode_groups(copied, rollout)
    rewards = torch.stack([copied.score(group).rewards for group in groups])
    values_ = torch.stack([copied.values(copied.score(group).prompt_hidden)[0] for group in groups]).detach()
    said = [(p.prompt, text) for p in t.batch(t.data.pairs, 1) for text in (p.chosen, p.rejected)]
    mean = torch.stack([copied.score(copied.encode([one])).rewards[0] for one in said]).mean()
    shifted = rewards - (mean - mean.detach())
    losses = []
    for R, V, ok in zip(shifted, values_, rollout.finished, strict=True):
        keep = [bool(e) and torch.sigmoid((r - V).abs()) >= t.threshold(1) for r, e in zip(R, ok, strict=True)]
        good = [r for r, k in zip(R, keep, strict=True) if k and r >= V]
        bad = [r for r, k in zip(R, keep, strict=True) if k and r < V]
        if form == 1:  # the mirror image
            good, bad, V = [-r for r in bad], [-r for r in good], -V
        if good and bad:
            top = V.exp() + sum(r.exp() for r in good)
            low = V.exp() + sum(r.exp() for r in bad)
            losses.append(-sum((r.exp() / top).log() for r in good) / len(good) - (V.exp() / low).log())
    assert len(losses) == metrics["rm/groups"] >= 1
    (sum(losses) / len(losses)).backward()
    norm = torch.nn.utils.clip_grad_norm_(copied.model.parameters(), c.max_grad_norm)
    assert metrics["rm/grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def test_a_certificate_decides_what_is_returned_not_how_training_goes(base, monkeypatch):
    outcomes = []
    for pairs, verdict in ((0, False), (4, False), (4, True)):
        monkeypatch.setattr("savelib.training.guard.certified", lambda *_, verdict=verdict: verdict)
        t = prepare(make_config(**base | dict(certificate_pairs=pairs)))
        start = trained(t)
        verdicts(t, monkeypatch, 2.0, -1.0, 2.0)
        metrics = [save_step(t, step)[0]["reward/mean"] for step in range(1, 7)]
        outcomes.append(metrics)
        said, at_end = t.guard.finish(step=6), trained(t)
        assert "2 block(s) of 2 steps kept, 1 undone" in said
        assert same(at_end, start) == (pairs > 0 and not verdict)
        if pairs:
            assert ("step 6 is certified" if verdict else "no look was conclusive") in said
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_block_without_an_update_is_not_judged(base):
    """With a threshold that no response passes the reward model stays as it is, V learns, and no form is blamed."""
    t = prepare(make_config(**base | dict(curriculum="fixed", initial_margin=0.99)))
    start = trained(t)
    for step in (1, 2, 3, 4):
        metrics, _ = save_step(t, step)
        assert metrics["rm/groups"] == 0
    reward_model = len(list(t.reward_model.model.parameters()))
    assert same(trained(t)[:reward_model], start[:reward_model]) and not same(trained(t), start)
    assert "guard/z" not in metrics and metrics["guard/undone"] == metrics["guard/resting"] == 0
    assert t.guard.state == GuardState()


def test_a_block_that_the_end_of_a_run_cuts_short_is_undone(base, monkeypatch):
    t = prepare(make_config(**base))
    verdicts(t, monkeypatch, 2.0)
    for step in (1, 2):
        save_step(t, step)
    checked = trained(t)
    save_step(t, 3)
    assert not same(trained(t), checked)
    t.guard.finish(step=3)
    assert same(trained(t), checked)


# what is taken from where


def test_guard_pairs_are_taken_evenly_out_of_stage_1_s(base, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = base | dict(
        preferences=str(tmp_path / "pairs.jsonl"), guard_preferences="", eval_preferences=str(tmp_path / "pairs.jsonl")
    )
    data = prepare(make_config(**values | dict(guard_pairs=10, certificate_pairs=5))).data
    names = [[p.prompt[0]["content"] for p in part] for part in (data.pairs, data.guard_pairs, data.certificate_pairs)]
    assert [len(n) for n in names] == [85, 10, 5] and len(set(sum(names, []))) == 100
    with pytest.raises(ConfigError, match=r"preferences = .* has 100 pairs; guard_pairs = 90 .* need 154"):
        prepare(make_config(**values | dict(guard_pairs=90)))
    with pytest.raises(ConfigError, match=r"guard_preferences = .* has 16 pairs; guard_pairs = 17"):
        prepare(make_config(**base | dict(guard_pairs=17)))
    with pytest.raises(ConfigError, match="rule 'save_checked' needs pairs"):
        make_config(**base | dict(preferences=""))
    with pytest.raises(ConfigError, match="rule 'save_checked' cannot undo a block under deepspeed_zero3"):
        make_config(**base | dict(backend="deepspeed_zero3"))


def test_engines_give_back_what_they_copied_before_their_first_step():
    weight = torch.nn.Parameter(torch.ones(3))
    engine = Engine("x", torch.optim.AdamW([weight], lr=0.1), 1.0)
    empty = engine.copy()
    engine.backward((weight * torch.tensor([1.0, 2, 3])).sum())
    engine.step()
    first = weight.detach().clone()
    engine.restore(empty)
    assert torch.equal(weight, torch.ones(3)) and not engine.state()
    engine.backward((weight * torch.tensor([1.0, 2, 3])).sum())
    engine.step()
    assert torch.equal(weight, first)
