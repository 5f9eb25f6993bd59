"""The simulation: its forces against a loop in float64, its accuracy against drawn pairs, and what it has to show."""

import math

import pandas as pd
import pytest
import torch

from savelib.experiments import simulation_tables as tables
from savelib.experiments.forms import FORMS, spread_loss, two_clusters, zero_net_force
from savelib.experiments.simulation import (
    Setting,
    Worlds,
    fit_heads,
    head_gradient,
    simulate,
    trajectory,
)
from savelib.experiments.simulation_tables import TABLES, over_seeds
from savelib.experiments.tables import Tables
from savelib.method import RULES, partition, rm_advantages, save_loss

SEEDS = range(4)


def batch(settings, seeds=SEEDS, step=1):
    worlds = Worlds(settings, seeds)
    heads = fit_heads(worlds)
    z, mean, right = worlds.groups(step)
    return worlds, heads, z, mean, right


def naive_gradient(head, z, mean, threshold):
    """Eq. 15-20 of one world, by hand: the gradient on the head, sum of A and sum of D over all prompts."""
    total, pulls, pushes, valid = [0.0] * len(head), 0.0, 0.0, 0
    for group, centre in zip(z.tolist(), mean.tolist(), strict=True):
        value = sum(w * m for w, m in zip(head, centre, strict=True))
        gaps = [sum(w * x for w, x in zip(head, response, strict=True)) - value for response in group]
        kept = [g for g, a in enumerate(gaps) if 1 / (1 + math.exp(-abs(a))) >= threshold]
        positive, negative = [g for g in kept if gaps[g] >= 0], [g for g in kept if gaps[g] < 0]
        if not positive or not negative:
            continue
        valid += 1
        up, down = (1 + sum(math.exp(gaps[g]) for g in side) for side in (positive, negative))
        by_reward = {g: math.exp(gaps[g]) / up - 1 / len(positive) for g in positive}
        by_reward |= {g: math.exp(gaps[g]) / down for g in negative}
        pulls, pushes = pulls + 1 / up, pushes + 1 - 1 / down
        for g, slope in by_reward.items():
            total = [t + slope * x for t, x in zip(total, group[g], strict=True)]
    return [t / valid for t in total], pulls, pushes


@pytest.mark.parametrize("threshold", [0.74, 0.5])
def test_gradient_and_forces_are_those_of_the_equations(threshold):
    _, heads, z, mean, _ = batch([Setting(success=0.3)])
    gradient, seen = head_gradient(RULES["save"], heads, z, mean, threshold)
    for world in range(len(heads)):
        expected, pull, push = naive_gradient(heads[world].tolist(), z[world], mean[world], threshold)
        torch.testing.assert_close(gradient[world], torch.tensor(expected), rtol=1e-4, atol=1e-5)
        assert seen["pull"][world].item() == pytest.approx(pull / 16, rel=1e-4)
        assert seen["push"][world].item() == pytest.approx(push / 16, rel=1e-4)


def test_worlds_do_not_mix_and_a_seed_gives_the_same_in_any_company():
    many = [Setting(success=0.2), Setting(success=0.6, lr=1e-2, nuisance=1.0, total_steps=60)]
    alone, together = simulate("save", many[1:], [2]), simulate("save", many, SEEDS)
    same = together.query("setting == 1 and seed == 2")["final"].item()
    assert same == pytest.approx(alone["final"].item(), abs=1e-3)
    assert simulate("save", many, SEEDS).equals(together) and together["final"].nunique() == 8


def test_settings_of_one_call_share_their_shape():
    with pytest.raises(ValueError, match="total_steps"):
        simulate("save", [Setting(), Setting(total_steps=10)], SEEDS)


def test_draws_are_as_the_setting_says():
    settings = [Setting(success=0.2, success_end=0.8, separation=3.0, nuisance=1.0, reward_scale=2.5)]
    worlds, heads, z, mean, right = batch(settings, range(8))
    assert worlds.success(1).unique().tolist() == pytest.approx([0.2])
    assert worlds.success(60).unique().tolist() == pytest.approx([0.8])
    assert (right > 0).float().mean().item() == pytest.approx(0.2, abs=0.05)
    torch.testing.assert_close(worlds.spread(heads), torch.full((8,), 2.5))
    around = torch.einsum("wbgd,wd->wbg", z - mean[:, :, None], worlds.quality)
    assert around.mean().abs() < 0.15  # mean is the expectation of z
    assert around[right > 0].mean() - around[right < 0].mean() == pytest.approx(6.0, abs=0.2)
    style = torch.einsum("wbgd,wd->wbg", z - mean[:, :, None], worlds.style)
    assert style.std().item() == pytest.approx(math.sqrt(2), abs=0.1)


def test_accuracy_is_that_of_drawn_pairs():
    worlds = Worlds([Setting(nuisance=1.5, batch_size=1000, group_size=20)], range(2))
    heads = fit_heads(worlds)
    z, _, right = worlds.groups(1)
    rewards = torch.einsum("wbgd,wd->wbg", z, heads)
    pairs = (right[..., :, None] > 0) & (right[..., None, :] < 0)
    wins = ((rewards[..., :, None] > rewards[..., None, :]) & pairs).sum((1, 2, 3)) / pairs.sum((1, 2, 3))
    torch.testing.assert_close(worlds.accuracy(heads), wins, atol=0.02, rtol=0)


def test_paper_form_helps_where_most_is_wrong_and_harms_where_most_is_right():
    changes = over_seeds(simulate("save", [Setting(success=p) for p in (0.1, 0.5, 0.9)], range(6)))["change"]
    assert changes[0] > 10 and changes[1] > 3 and changes[2] < -15


def test_with_an_offset_the_falling_level_harms_unless_the_anchor_lags():
    settings = [Setting(success=0.2, offset=o, anchor_memory=m) for o, m in ((0.0, 0.0), (6.0, 0.0), (6.0, 1.0))]
    found = {form: over_seeds(simulate(form, settings, range(6))) for form in ("save", "mean_reward", "hl_bt")}
    for form in ("save", "mean_reward"):
        plain, follows, lags = found[form]["change"]
        assert plain > 15 and follows < -2 < 0 < lags + 1, form
        assert found[form]["drift"][1] < 4 * found[form]["drift"][2] < -4, "a lagging anchor ends the fall"
    assert found["hl_bt"]["change"].std() < 0.5, "no net force: nothing moves the level"
    worlds = Worlds(settings[1:2], range(4))
    z, mean, right = worlds.groups(1)
    within = (z - z.mean(2, keepdim=True)).square().sum(-1).mean().sqrt()
    assert (mean.mean((0, 1)).norm() / within).item() == pytest.approx(6.0, rel=0.1)


def test_either_way_pushes_up_where_most_looks_right():
    settings = [Setting(success=p) for p in (0.1, 0.9)]
    paper, ours = (over_seeds(simulate(form, settings, range(6)))["change"] for form in ("save", "save_either_way"))
    assert ours[0] > 8 and ours[1] > 8 > -20 > paper[1]
    _, heads, z, mean, _ = batch([Setting(success=0.8)])
    first = torch.arange(len(heads)) == 0  # the first world alone is mirrored
    gradient, _ = head_gradient(FORMS["save_either_way"], heads, z, mean, 0.6, first)
    plain, _ = head_gradient(RULES["save"], heads, z, mean, 0.6)
    image, _ = head_gradient(RULES["save"], heads, -z, -mean, 0.6)  # -w . z is the image's reward
    torch.testing.assert_close(gradient[1:], plain[1:])
    torch.testing.assert_close(gradient[0], image[0])


def test_zero_net_force_keeps_the_values_and_centres_the_gradient():
    rewards = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = rewards.detach().mean(1)
    eligible = torch.ones_like(rewards, dtype=torch.bool)
    eligible[:, 0] = False
    parts = partition(rm_advantages(rewards, values), 0.5, eligible)
    assert torch.equal(zero_net_force(rewards), rewards)
    (plain,) = torch.autograd.grad(save_loss(rewards, values, parts), rewards)
    (centred,) = torch.autograd.grad(save_loss(zero_net_force(rewards), values, parts), rewards)
    torch.testing.assert_close(centred, plain - plain.mean(1, keepdim=True))
    (centred,) = torch.autograd.grad(save_loss(zero_net_force(rewards, eligible), values, parts), rewards)
    torch.testing.assert_close(centred.sum(1), torch.zeros(len(values), dtype=torch.float64))
    assert not centred[:, 0].any() and centred[parts.valid].any()


def test_spread_loss_is_its_formula_and_leaves_out_who_is_not_eligible():
    rewards = torch.tensor([[1.0, 2.0, 6.0, 50.0], [0.0, 9.0, 9.0, 9.0]], dtype=torch.float64, requires_grad=True)
    eligible = torch.tensor([[True, True, True, False], [True, False, False, False]])
    loss = spread_loss(rewards, eligible)
    assert loss.item() == pytest.approx(-0.5 * math.log(1 + 14 / 3))
    (gradient,) = torch.autograd.grad(loss, rewards)
    expected = [-(r - 3) / 3 / (1 + 14 / 3) for r in (1, 2, 6)]  # in proportion to the distance from the mean
    torch.testing.assert_close(gradient, torch.tensor([[*expected, 0.0], [0.0] * 4], dtype=torch.float64))
    assert spread_loss(rewards[1:], eligible[1:]).item() == 0


def test_two_clusters_are_the_best_of_all_splits():
    rewards = torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, upper in zip(rewards, two_clusters(rewards), strict=True):
        splits = [row > cut for cut in row.sort().values[:-1]]
        within = [row[s].var(correction=0) * s.sum() + row[~s].var(correction=0) * (~s).sum() for s in splits]
        assert torch.equal(upper, splits[torch.stack(within).argmin()])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_runs_and_moves_the_head(form):
    steps = trajectory(form, [Setting(total_steps=3)], range(2))
    assert len(steps) == 8 and steps["accuracy"].between(0, 1).all()
    assert steps.groupby("seed")["accuracy"].agg(lambda a: a.iloc[0] != a.iloc[-1]).all()


@pytest.mark.parametrize("form", ["save_zero_net_force", "spread", "hl_bt", "clusters", "anchor_gradient"])
def test_forces_of_these_forms_sum_to_zero(form):
    """With every response of a prompt and the prompt itself moved alike, the loss does not change."""
    _, heads, z, mean, _ = batch([Setting(success=0.8)])
    shift = torch.zeros_like(z) + 1.0
    gradient, _ = head_gradient(FORMS[form], heads, z, mean, 0.6)
    moved, _ = head_gradient(FORMS[form], heads, z + shift, mean + 1.0, 0.6)
    torch.testing.assert_close(gradient, moved, rtol=1e-3, atol=1e-3)
    paper, _ = head_gradient(FORMS["save"], heads, z, mean, 0.6)
    paper_moved, _ = head_gradient(FORMS["save"], heads, z + shift, mean + 1.0, 0.6)
    assert (paper - paper_moved).abs().max() > 0.05


def test_tables_have_a_row_for_each_cell(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "AXES", {"nuisance": (0.0, 1.0)})
    monkeypatch.setattr(tables, "FRESH", range(2))
    phase = tables.phase_diagram(["spread"], range(2))
    assert list(zip(phase["value"], phase["success"], strict=True)) == [(v, p) for v in (0, 1) for p in tables.SUCCESS]
    assert len(tables.with_pairs(["spread"], range(2))) == 2 * 4 * 3
    forms = tables.forms_table(3, ["save"])
    tuning, fresh = forms.query("stage == 'tuning'"), forms.query("stage == 'fresh'")
    assert (len(tuning), len(fresh), set(fresh["seeds"])) == (20, 5, {2})
    assert fresh["lr"].unique().tolist() == [tuning.groupby("lr")["change"].mean().idxmax()]
    monkeypatch.setattr("sys.argv", ["tables", "--out", str(tmp_path)])
    Tables("simulation", {"forms": lambda: forms}, "seconds").main()
    assert len(pd.read_csv(tmp_path / "simulation_forms.csv")) == 25


def test_shipped_files_are_of_this_code():
    phase = TABLES.table("phase").query("form == 'save' and axis == 'nuisance' and value == 1")
    here = over_seeds(simulate("save", [Setting(success=p, nuisance=1.0) for p in tables.SUCCESS], tables.FRESH))
    assert here["change"].tolist() == pytest.approx(phase["change"].tolist(), abs=0.2)
    assert set(TABLES.table("forms")["form"]) == set(FORMS)
