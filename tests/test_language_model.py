"""The study on a real language model: gold at equal KL, paired differences, and its shipped files."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from scipy import stats

from savelib.config import make_config
from savelib.experiments import stored_responses
from savelib.experiments.cells import jobs_of, read_study
from savelib.experiments.language_model import (
    ENDS,
    STEP_METRICS,
    WINDOW,
    apart,
    ends,
    gold_at_kl,
    paired,
    read_responses,
    read_steps,
)
from savelib.experiments.stored_responses import (
    FAST,
    LAGGING,
    RATES,
    WAYS,
    Stored,
    accuracies,
    changes,
    fine_tuned,
    improve,
    start,
)
from savelib.experiments.summary import read_tables
from savelib.models.loading import load_reward_model, reward_source

SHIPPED = "data/results/studies/smol_loop"


def test_gold_is_read_where_the_kl_first_reaches_a_level():
    steps = range(1, 13)
    run = pd.DataFrame({"cell": "a", "seed": 1, "step": steps, "policy/kl": [0.1 * s for s in steps]})
    run["gold/success_rate"] = [0.02 * s for s in steps]  # running means keep both on one line: gold = KL / 5
    still = run.assign(cell="b", **{"policy/kl": 0.0})
    late = run.assign(cell="c", **{"policy/kl": run["policy/kl"] + 1})
    table = gold_at_kl(pd.concat([run, still, late]), [0.55, 0.8, 5.0])
    first = 0.1 * (1 + WINDOW) / 2  # KL of the first running mean
    assert first < 0.55
    found = table.set_index(["cell", "level"])["gold"]
    assert found["a", 0.55] == pytest.approx(0.11) and found["a", 0.8] == pytest.approx(0.16)
    assert math.isnan(found["a", 5.0]) and math.isnan(found["b", 0.55]), "never that far"
    assert math.isnan(found["c", 0.55]), "beyond it from the first measurement on"


def test_differences_are_paired_by_seed():
    table = pd.DataFrame(
        {"cell": ["r"] * 3 + ["a"] * 3, "seed": [1, 2, 3] * 2, "gold": [0.1, 0.5, 0.9, 0.2, 0.7, 0.95]}
    )
    rows = paired(table, "gold", "r")
    low, high = stats.t.interval(0.95, 2, *(f([0.1, 0.2, 0.05]) for f in (lambda x: sum(x) / 3, stats.sem)))
    assert rows.loc["a", "difference"] == pytest.approx(0.35 / 3)
    assert (rows.loc["a", "low"], rows.loc["a", "high"]) == pytest.approx((low, high))
    assert not rows.loc["a", "resolved"] and math.isnan(rows.loc["r", "difference"])


def test_ends_are_each_runs_first_and_last_evaluation_in_percent():
    rows = [(0, 0.5, 0.7, 0.2), (20, 0.6, 0.4, 0.3), (10, 0.9, 0.9, 0.9)]
    courses = pd.DataFrame(rows, columns=["step", *ENDS]).assign(cell="a", seed=1)
    first, last = ends(courses)
    assert first.loc["a", 1].to_dict() == pytest.approx({"held-out pairs": 50, "current responses": 70, "gold": 20})
    assert last.loc["a", 1].to_dict() == pytest.approx({"held-out pairs": 60, "current responses": 40, "gold": 30})


def test_differences_at_the_end_have_the_studys_order():
    study, _, courses = read_tables(SHIPPED)
    _, last = ends(courses)
    tables = apart(study, last)
    assert list(tables) == list(ENDS.values())
    for name, table in tables.items():
        assert list(table.index) == [cell.name for cell in study.cells]
        by_hand = (last.loc["SAVE", name] - last.loc[study.reference, name]).mean()
        assert table.loc["SAVE", "difference"] == pytest.approx(by_hand)


@pytest.mark.parametrize("profile", ["smol", "single_gpu", "paper"])
def test_the_study_is_one_command_for_other_models_too(profile):
    study = read_study("data/studies/smol_loop.yaml")
    jobs = jobs_of(study, [1, 2], profile=profile)
    assert [job.cell for job in jobs] == [cell.name for cell in study.cells] * 2
    assert {job.config.profile for job in jobs} == {profile}
    models = {(job.config.policy_model, job.config.reward_model) for job in jobs}
    assert models == {(make_config(profile=profile).policy_model, make_config(profile=profile).reward_model)}


def test_shipped_files_are_those_of_one_study():
    study, summary, courses = read_tables(SHIPPED)
    assert study == read_study("data/studies/smol_loop.yaml")
    steps, responses = read_steps(SHIPPED), read_responses(SHIPPED)
    runs = {(cell, seed) for cell, seed in zip(courses["cell"], courses["seed"], strict=True)}
    for table in (steps, responses):
        assert set(zip(table["cell"], table["seed"], strict=True)) == runs
    assert {"cell", "seed", "step"} < set(steps) <= {"cell", "seed", "step", *STEP_METRICS}
    assert set(summary["cell"]) == {cell for cell, _ in runs}


@pytest.fixture
def stored():
    """States in which quality is the first direction, with room for a reward head that begins on the second."""
    torch.manual_seed(0)
    gold = (torch.rand(40, 6) < 0.4).float()
    groups = torch.randn(40, 6, 8)
    groups[..., 0] += 2 * gold
    pairs = torch.randn(60, 2, 8)
    pairs[:, 0, 0] += 1.0
    heldout = torch.randn(80, 2, 8)
    heldout[:, 0, 0] += 2.0
    return Stored(pairs, heldout, groups, groups.mean(1), gold, torch.ones(40, 6, dtype=torch.bool))


def with_offset(stored, by):
    return replace(stored, **{name: getattr(stored, name) + by for name in ("pairs", "heldout", "groups", "prompts")})


def test_true_labels_improve_a_head_and_offsets_are_removed(stored):
    config = make_config(profile="smol")
    head, value = start(stored, config, 0)
    before = accuracies(stored, head)
    after = improve(stored, head, value, WAYS["gold"], 1e-2, config, 0)
    assert before["held-out pairs"] > 60 and after["held-out pairs"] > before["held-out pairs"]
    shifted = with_offset(stored, 5.0)
    assert shifted.offset > 4 > stored.offset > shifted.centred().offset
    torch.testing.assert_close(shifted.centred().groups, stored.centred().groups)


def test_metarm_is_offline_training_that_looks_ahead(stored):
    heads = {}
    for rule, rate in (("offline_bt", 1e-12), ("metarm", 1e-12), ("metarm, far", 5.0)):
        config = make_config(profile="smol", meta_lr=rate)
        head, value = start(stored, config, 0)
        heads[rule] = improve(stored, head, value, WAYS[rule.partition(",")[0]], 1e-2, config, 0)
    assert heads["metarm"] == pytest.approx(heads["offline_bt"])
    assert heads["metarm, far"]["stored responses"] != pytest.approx(heads["offline_bt"]["stored responses"], abs=0.1)


def test_the_table_has_each_backbone_raw_and_centred(stored, monkeypatch):
    monkeypatch.setattr(stored_responses, "SPLITS", 3)
    monkeypatch.setattr(stored_responses, "WAYS", {rule: WAYS[rule] for rule in ("save", "hl_bt")})
    config = make_config(profile="smol")
    table = changes({"frozen": stored, "fine-tuned": with_offset(stored, 5.0)}, config)
    keys = ["backbone", "features", "rule", "reward_head_lr"]
    assert len(table) == len(table[keys].drop_duplicates()) == 2 * 2 * 2 * len(RATES)
    offset = table.groupby(["backbone", "features"])["offset"].first()
    assert offset["fine-tuned", "raw"] > 4 > offset["frozen", "raw"] > offset["fine-tuned", "centred"]
    starts = [start(stored, config, split) for split in range(3)]
    by_hand = [
        improve(stored, head, value, WAYS["hl_bt"], RATES[2], config, split)["held-out pairs"]
        - accuracies(stored, head)["held-out pairs"]
        for split, (head, value) in enumerate(starts)
    ]
    row = table.set_index(keys).loc["frozen", "raw", "hl_bt", RATES[2]]
    assert row["change"] == pytest.approx(sum(by_hand) / 3)
    assert row["low"] <= row["change"] <= row["high"]


def test_a_backbone_is_trained_on_the_pairs():
    config = make_config(bt_backbone_lr=0.0)
    trained = fine_tuned(config)
    plain = load_reward_model(reward_source(config), config, torch.device("cpu"))
    tuned = load_reward_model(reward_source(trained), trained, torch.device("cpu"))
    moved = [(a - b).abs().max() > 0 for a, b in zip(plain.parameters(), tuned.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_accuracies_are_those_of_a_plain_loop(stored):
    head = torch.randn(8)
    rewards = (stored.groups @ head).tolist()
    verdicts = [
        r > w
        for row, gold in zip(rewards, stored.gold.tolist(), strict=True)
        for r, right in zip(row, gold, strict=True)
        for w, other in zip(row, gold, strict=True)
        if right > other
    ]
    assert accuracies(stored, head)["stored responses"] == pytest.approx(100 * sum(verdicts) / len(verdicts))


def test_a_level_that_falls_leaves_the_value_head_behind(stored):
    """The mechanism in small: with an offset in the features V lags, and fewer groups are valid."""
    config = make_config(profile="smol", value_head_lr=1e-5)
    found = []
    for offset in (0.0, 5.0):
        of = replace(stored, groups=stored.groups + offset, prompts=stored.prompts + offset)
        head, value = start(of, config, 0)
        found.append(improve(of, head, value, WAYS["save"], 1e-2, config, 0))
    assert found[1]["lag"] > found[0]["lag"] + 0.5 and found[1]["valid groups"] < found[0]["valid groups"]
    slow = config.model_copy(update={"value_head_lr": 1e-3})
    runs = {
        rule: improve(of, head, value, WAYS[rule], 1e-2, slow, 0) for rule in ("save", FAST, "mean_reward", LAGGING)
    }
    pairs, lag = ({rule: run[name] for rule, run in runs.items()} for name in ("held-out pairs", "lag"))
    assert lag["mean_reward"] == 0 < lag[FAST] < lag["save"] / 2 < 1 < lag[LAGGING]
    assert pairs[FAST] < pairs["save"] - 20, "a V that keeps up takes SAVE's brake away"
    assert pairs[LAGGING] > pairs["mean_reward"] + 20, "an anchor that lags gives Mean Reward one"
