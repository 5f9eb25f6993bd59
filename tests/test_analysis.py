"""What is said of runs: grouping over seeds, first and last, changes, warnings, the paper's tables. Folders by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from savelib import analysis
from savelib.cli import app
from savelib.config import ConfigError, make_config
from savelib.runs.folder import RunLog, read_metrics


@pytest.fixture(autouse=True)
def runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path))


def make_run(run_id: str, accuracies: list[float], train: list[dict] | None = None, **values) -> str:
    """A finished run with an evaluation at each step, and the given training metrics from step 1 on."""
    with RunLog.create(make_config(run_id=run_id, **values)) as log:
        for step, accuracy in enumerate(accuracies):
            extra = train[step - 1] if train and step else {}
            log.metrics(step, {"eval/rm_accuracy": accuracy} | extra)
    return run_id


def test_runs_that_differ_in_seeds_alone_are_one_group():
    a = make_run("a", [0.6, 0.7], seed=0)
    b = make_run("b", [0.5, 0.9], seed=1, world_seed=3)
    c = make_run("c", [0.6, 0.6], rule="frozen")
    groups = analysis.group_runs([a, b, c, a])
    assert {label: len(frames) for label, frames in groups.items()} == {"save": 2, "frozen": 1}


def test_group_names_say_what_sets_groups_apart():
    runs = [make_run("a", [0.6]), make_run("b", [0.6], algo="rloo"), make_run("c", [0.6], rule="hl_bt", beta=0.1)]
    labels = list(analysis.group_runs(runs))
    assert labels == ["save, algo=grpo, beta=0.04", "save, algo=rloo, beta=0.04", "hl_bt, algo=grpo, beta=0.1"]


def test_profiles_are_named_without_what_follows_from_them():
    runs = [make_run("a", [0.6]), make_run("b", [0.6], profile="smol")]
    assert list(analysis.group_runs(runs)) == ["save, tiny", "save, smol"]


def test_changes_over_seeds():
    groups = analysis.group_runs([make_run("a", [0.6, 0.9, 0.7]), make_run("b", [0.5, 0.1, 0.8], seed=1)])
    row = analysis.changes(groups, "eval/rm_accuracy").loc["save"]
    assert (row["runs"], row["runs up"]) == (2, 2)
    assert row["change"] == pytest.approx(0.2)
    assert row["standard error"] == pytest.approx(math.sqrt(((0.1 - 0.2) ** 2 + (0.3 - 0.2) ** 2) / 1) / math.sqrt(2))


def test_compare_takes_tenths_at_both_ends_and_skips_what_was_not_measured():
    train = [{"reward/mean": float(i)} for i in range(1, 21)]  # 1, 2, ... 20
    groups = analysis.group_runs([make_run("a", [0.5] * 21, train)])
    table = analysis.compare(groups, ["reward/mean", "eval/gold"])
    assert len(table) == 1
    assert table.iloc[0].to_dict() == {("save", "first"): 1.5, ("save", "last"): 19.5, ("save", "mean"): 10.5}


def test_before_after_is_the_first_and_the_last_evaluation():
    run = make_run("a", [0.6, 0.9, 0.7])
    assert analysis.before_after(run).round(6).iloc[0].to_dict() == {"before": 0.6, "after": 0.7, "change": 0.1}


def test_newest_run_is_the_one_that_finished_last_and_was_not_cut(tmp_path):
    assert analysis.newest_run() is None
    for name, finished, status in (
        ("z", "2026-01-01", "done"),
        ("a", "2026-01-02", "done"),
        ("b", "2026-01-03", "failed"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("profile: tiny")
        (tmp_path / name / "manifest.json").write_text(f'{{"status": "{status}", "finished": "{finished}"}}')
    assert analysis.newest_run() == "a"
    assert analysis.newest_run(but_not=("a", "b")) == "z"


@pytest.mark.parametrize(
    "rows, words",
    [
        ({"reward/mean": [0.0, -1.0, -2.0]}, ["drift"]),
        ({"reward/mean": [0.0, 0.4, -0.4]}, []),
        (
            {"force/push": [0.6, 0.6], "force/pull": [0.1, 0.1], "gold/success_rate": [0.3, 0.8]},
            ["1 step(s) from 2 to 2", "recommended: rule=save_checked"],
        ),
        ({"force/push": [0.6, 0.6], "force/pull": [0.1, 0.1], "gold/success_rate": [0.3, 0.4]}, []),
        ({"force/push": [0.6] * 20, "force/pull": [0.1] * 20, "gold/success_rate": [0.4] * 18 + [0.6] * 2}, []),
        ({"force/push": [0.1, 0.1], "force/pull": [0.6, 0.6], "gold/success_rate": [0.8, 0.8]}, []),
        ({"force/push": [0.4] * 2 + [0.9] * 4, "force/pull": [0.1] * 6}, ["net force: A - D is -0.30", "recommended"]),
        (
            {"reward/mean": [0.0, -2.0], "force/push": [0.6] * 2, "force/pull": [0.1] * 2, "guard/accepted": [0, 1]},
            ["drift"],
        ),
        (dict.fromkeys(("force/push", "gold/success_rate", "rm/mirrored"), [0.9] * 6) | {"force/pull": [0.8] * 6}, []),
        ({"force/push": [0.5] * 2 + [0.1] * 4, "force/pull": [0.1] * 6}, []),
        ({"gold/pseudo_label_accuracy": [0.8, 0.3]}, ["30%"]),
        ({"eval/gold": [0.4, 0.9, 0.1]}, ["fell from 0.900 to 0.100"]),
        ({}, []),
        ({"value/lag": [0.8, 1.6]}, ["lag: V lies 1.2 spreads"]),
        ({"value/lag": [-3.0, 1.9]}, []),
    ],
)
def test_warnings(rows, words):
    length = max(map(len, rows.values()), default=2)
    said = analysis.warnings(pd.DataFrame({"step": range(1, length + 1)} | rows))
    assert len(said) == len(words)
    assert all(word in sentence for word, sentence in zip(words, said, strict=True))


def test_config_table_shows_what_differs_with_both_values():
    table = analysis.config_table(make_config(rule="hl_bt"), against=analysis.paper_defaults())
    assert table.loc["rule", ["value", "paper"]].tolist() == ["hl_bt", "save"]
    assert table.loc["reward_head_lr", "paper"] == "1e-07"
    assert "beta" not in table.index
    assert set(analysis.config_table(make_config()).index) == set(type(make_config()).model_fields)


def test_paper_tables():
    changes = analysis.paper_changes("Qwen3-4B-Instruct-2507")
    assert changes.round(1).to_dict() == {
        "save": 1.3,
        "hl_bt": 0.1,
        "mean_reward": -7.4,
        "offline_bt": 0.4,
        "frozen": 0.0,
    }
    for name in (
        "table1_rm_benchmarks",
        "table2_rl_algorithms",
        "table4_learning_rates",
        "table5_group_size",
        "table6_initial_margin",
    ):
        table = analysis.paper_table(name)
        six = table[["RewardBench", "RewardBench 2", "RM-Bench", "PPE Preference", "PPE Correctness", "JudgeBench"]]
        assert (six.mean(axis=1) - table["Average"]).abs().max() < 0.051, name


def test_unknown_run_is_named_with_those_there_are():
    make_run("known", [0.5])
    with pytest.raises(ConfigError, match="'unknown' not found .* there are: known"):
        read_metrics("unknown")


def test_runs_are_listed_with_their_states(tmp_path):
    make_run("finished", [0.6, 0.7], [{"reward/mean": 0.5}], total_steps=1)
    with pytest.raises(RuntimeError), RunLog.create(make_config(run_id="broken")):
        raise RuntimeError("full disk")
    with pytest.raises(KeyboardInterrupt), RunLog.create(make_config(run_id="halted")):
        raise KeyboardInterrupt
    alive = RunLog.create(make_config(run_id="alive"))
    RunLog.create(make_config(run_id="gone")).lock.close()  # as after kill -9: the lock goes, no manifest was written
    table = analysis.runs_table()
    assert table["state"].to_dict() == {
        "finished": "done", "broken": "failed", "halted": "stopped", "alive": "running", "gone": "killed",
    }  # fmt: skip
    assert table.loc["finished", "step"] == "1/1" and table.loc["finished", "eval/rm_accuracy"] == 0.7
    alive.lock.close()


@pytest.mark.parametrize("words", [["runs"], ["glossary"], ["plan", "--gpus", "1", "--memory-gb", "8"]])
def test_commands_print_tables(words):
    make_run("mine", [0.6, 0.7])
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    expected = {"runs": "mine", "glossary": "time/tokens_per_second", "plan": "deepspeed_zero2_offload"}[words[0]]
    assert expected in done.stdout


def test_early_signs_are_means_of_the_first_third():
    step = np.arange(0, 13)
    rows = {"step": step, "force/pull": step, "force/push": step**2, "filter/positive": 0.2, "filter/negative": 0.6}
    rows |= {"reward/mean": -1.0 * step, "eval/reward": [0.5] + [math.nan] * 12, "filter/kept": step / 10}
    signs = analysis.early_signs(pd.DataFrame(rows))
    assert signs["net force"] == pytest.approx(2.5 - 7.5) and signs["positive share"] == pytest.approx(0.25)
    assert signs["drift"] == pytest.approx(-2.5 - 0.5) and signs["kept"] == pytest.approx(0.25)
    assert math.isnan(signs["spread"]), "no such metric"


def test_a_threshold_tells_bad_runs_from_others():
    values, bad = pd.Series([0.1, 0.2, math.nan, 0.6, 0.3, 0.9]), pd.Series([False, False, True, True, True, True])
    found = analysis.threshold_of(values, bad)
    assert found == {"threshold": pytest.approx(0.25), "side": "above", "balanced accuracy": 1.0}
    assert analysis.threshold_of(-values, bad)["side"] == "below"
    assert analysis.threshold_of(pd.Series([1.0, 1.0]), pd.Series([True, False]))["balanced accuracy"] == 0.5


def test_signs_and_outcomes_are_a_row_a_run():
    step = [0, 2, 4, 6]
    course = {"cell": "A", "setting": "", "world": 1, "step": step, "eval/gold": [0.4, 0.5, 0.6, 0.7]}
    course |= {"eval/rm_accuracy": 0.8, "eval/rm_accuracy_current": [0.8, 0.7, 0.6, math.nan], "eval/reward": 0.1}
    course |= {"filter/positive": [math.nan, 0.3, 1.0, 1.0], "filter/negative": [math.nan, 0.1, 1.0, 1.0]}
    runs = pd.concat([pd.DataFrame(course | {"seed": seed}) for seed in (3, 4)])
    table = analysis.signs_and_outcomes(runs)
    assert table.index.get_level_values("seed").tolist() == [3, 4]
    assert table["positive share"].tolist() == pytest.approx([0.75, 0.75])
    assert table["eval/gold"].tolist() == pytest.approx([0.3, 0.3]) and table["eval/rm_accuracy"].tolist() == [0, 0]
    assert table["eval/rm_accuracy_current"].isna().all()
