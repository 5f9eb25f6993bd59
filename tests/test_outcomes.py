"""The tables of the study of remedies: differences, what is taken and avoided, curves; on runs made by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from savelib.config import ConfigError
from savelib.experiments import outcomes
from savelib.experiments.cells import Study, read_study
from savelib.plots import COLOURS, remedy_looks

SETTINGS = {
    "frozen": {"rule": "frozen"},
    "A": {"rule": "save"},
    "B": {"rule": "hl_bt"},
    "C": {"rule": "ser"},
    "RAFT": {"rule": "frozen", "algo": "raft"},
    "ceiling": {"rule": "oracle"},
}
STUDY = Study(title="made", reference="frozen", cells=[{"name": name, "set": of} for name, of in SETTINGS.items()])
STEPS = (0, 10, 20)


def made(gold: dict[str, list[float]], pairs: dict[str, list[float]], setting: str = "x=1") -> pd.DataFrame:
    """Courses of a run per cell and world from gold and pairs at the end (percent); they start at 40 and 70."""
    rows = []
    for cell, values in gold.items():
        for world, (end, accuracy) in enumerate(zip(values, pairs.get(cell, [70] * len(values)), strict=True)):
            for step in STEPS:
                on = step / STEPS[-1]
                rows.append(
                    {"cell": cell, "setting": setting, "world": world, "seed": 0, "step": step}
                    | {"eval/gold": (40 + on * (end - 40)) / 100, "eval/rm_accuracy": (70 + on * (accuracy - 70)) / 100}
                    | {"eval/rm_accuracy_current": 0.6, "gold/success_rate": (45 + on * (end - 45)) / 100}
                    | {"policy/kl": math.nan if step == 0 else 0.1 * on, "response/tokens": 6.0, "final_kl": math.nan}
                )
    return read(pd.DataFrame(rows))


def read(courses: pd.DataFrame) -> pd.DataFrame:
    courses["kl"] = (courses["policy/kl"] * courses["response/tokens"]).fillna(0)
    return courses


GOLD = {
    "frozen": [50, 55, 60, 65], "A": [61, 65, 71, 75], "B": [58, 67, 68, 75], "C": [52, 53, 61, 5],
    "RAFT": [50, 55, 60, 65], "ceiling": [90, 96, 99, 99],
}  # fmt: skip
PAIRS = {"A": [75, 74, 76, 75], "B": [70, 71, 69, 70], "C": [60, 61, 59, 62], "ceiling": [99, 98, 99, 99]}


@pytest.fixture
def runs():
    return outcomes.runs(STUDY, made(GOLD, PAIRS))


def test_a_run_s_measures(runs):
    assert list(runs["cell"].unique()) == list(SETTINGS)
    of = runs.set_index(["cell", "world"])
    assert of.loc[("A", 1), ["held-out pairs", "gold", "best gold", "steps"]].tolist() == pytest.approx(
        [74, 65, 65, 20]
    )
    assert of.loc[("A", 1), "KL"] == pytest.approx(0.6) and of.loc[("A", 1), "gold per nat"] == pytest.approx(25 / 0.6)
    assert of.loc[("C", 3), "best gold"] == 40, "of all evaluations, the start's too"
    assert runs[runs["harmed"]]["cell"].tolist() == ["C"] * 4 and of.index[of["collapsed"]].tolist() == [("C", 3)]
    assert of.loc["RAFT", "KL"].isna().all(), "its batches hold the best responses alone"
    measured = outcomes.runs(STUDY, made(GOLD, PAIRS).assign(final_kl=0.25)).set_index("cell")
    assert (measured["KL"] == 0.25).all()


def test_differences_are_paired_and_clustered_by_world(runs):
    two = pd.concat([runs, runs.assign(setting="x=2", gold=runs["gold"] + 3 * (runs["cell"] == "A") * runs["world"])])
    apart = np.array([11, 10, 11, 10])
    rows = outcomes.against(two, "gold", "frozen", ["setting", "cell"])
    found = stats.ttest_1samp(apart, 0).confidence_interval()
    assert rows.loc[("x=1", "A"), ["difference", "low", "high"]].tolist() == pytest.approx(
        [10.5, found.low, found.high]
    )
    assert rows.loc[("x=1", "A"), "resolved"] and math.isnan(rows.loc[("x=1", "frozen"), "difference"])
    pooled = outcomes.against(two, "gold", "frozen", ["cell"])
    found = stats.ttest_1samp(apart + 1.5 * np.arange(4), 0).confidence_interval()
    assert pooled.loc[[("A",)], ["low", "high"]].to_numpy()[0] == pytest.approx([found.low, found.high])


def test_what_is_taken_and_avoided_follows_from_the_runs(runs):
    found = outcomes.judged(STUDY, runs)
    assert "ceiling" not in found.index.unique("cell") and found.loc[("gold", "x=1", "B"), "sign"] == 1
    assert outcomes.counts(found).loc["A"].tolist() == ["better in 1", "", "better in 1"]
    assert outcomes.counts(found).loc["C"].tolist() == ["worse in 1", "", ""]
    row = outcomes.decisions(STUDY, runs, found).loc["x=1"]
    assert row.tolist() == ["A: pairs, gold; B: gold", "B", "C: worse in pairs, 4 more harmed"]
    fallen = runs.assign(collapsed=runs["cell"].isin(["A", "RAFT"]) & (runs["world"] < 2))
    row = outcomes.decisions(STUDY, fallen, found).loc["x=1"]
    assert row.tolist() == [
        "B: gold",
        "",
        "A: 2 more collapsed; C: worse in pairs, 4 more harmed; RAFT: 2 more collapsed",
    ]
    ranked = outcomes.ranking(STUDY, runs, found)
    assert ranked.loc[("x=1", "gold")].tolist() == ["A (+10.5), B (+9.5)", "B", "none"]
    nothing = runs[runs["cell"].isin(["frozen", "RAFT"])]
    row = outcomes.decisions(STUDY, nothing, outcomes.judged(STUDY, nothing)).loc["x=1"]
    assert row.tolist() == ["frozen: nothing is resolved better without harm", "", "none"]


def test_the_headline_follows_from_the_runs(runs):
    said = outcomes.headline(STUDY, runs, outcomes.judged(STUDY, runs))
    assert said[0] == "Gold at the end, resolved better than frozen in how many of 1 settings: A: 1, B: 1; worse: none."
    assert said[1:3] == [
        "Runs whose reward model lost more than 2 points, of 4: C: 4.",
        "Runs that collapsed, of 4: C: 1.",
    ]
    nats = (np.mean([90, 96, 99, 99]) - 40) / 0.6
    assert said[3].startswith(f"Most gold per nat of KL, in points: ceiling: {nats:.0f}, A: 47, B: 45; frozen: 29")


def test_the_shown_table_has_levels_of_the_reference_and_differences_of_the_others(runs):
    cost = pd.DataFrame({"cell": ["frozen", "A"], "ratio": [1.0, 1.25]})
    table = outcomes.shown(STUDY, runs, cost, "x=1")
    assert table.loc["frozen", ["held-out pairs", "gold", "step / GRPO's"]].tolist() == ["70.0", "57.5", "1.00"]
    assert table.loc["A", "gold"] == "+10.5 (9.6 to 11.4) *" and table.loc["A", "step / GRPO's"] == "1.25"
    assert table.loc["RAFT", ["gold", "KL", "harmed", "step / GRPO's"]].tolist() == [
        "same",
        "not measured",
        "0 of 4",
        "not measured",
    ]


def test_gold_that_turns_down():
    courses = made(GOLD, PAIRS)
    middle = (courses["cell"] == "A") & (courses["step"] == 10)
    courses.loc[middle, "eval/gold"] = [0.80, 0.85, 0.90, 0.95]
    table = outcomes.turned_down(courses).loc["x=1"]
    low, high = stats.ttest_1samp([19, 20, 19, 20], 0).confidence_interval()
    assert table.loc["A", ["best at", "loss", "low", "high"]].tolist() == pytest.approx([10, 19.5, low, high])
    assert table.loc["A", "resolved"] and table.loc["B", "loss"] == 0 and not table.loc["B", "resolved"]


def test_curves_begin_at_the_start_and_of_raft_have_its_ends_alone():
    curves = outcomes.curves(STUDY, made(GOLD, PAIRS)).set_index("cell")
    assert curves.loc["A", "kl"].tolist() == pytest.approx([0, 0.3, 0.6])
    assert curves.loc["A", "gold"].tolist() == pytest.approx([40, (45 + 68) / 2, 68]), "of the batch after the start"
    assert curves.loc[["RAFT"], "step"].tolist() == [0]
    measured = outcomes.curves(STUDY, made(GOLD, PAIRS).assign(final_kl=0.25)).set_index("cell")
    assert measured.loc["RAFT", "step"].tolist() == [0, 20] and measured.loc["RAFT", "kl"].tolist() == [0, 0.25]
    assert measured.loc["A", "kl"].tolist() == pytest.approx([0, 0.3, 0.6])


@pytest.mark.parametrize("name", ["remedies", "remedies_development"])
def test_each_remedy_has_a_colour_of_its_own(name):
    study = read_study(f"data/studies/{name}.yaml")
    keys = {cell.name: outcomes.remedy(cell.set) for cell in study.cells}
    assert set(keys.values()) <= set(COLOURS) and len({COLOURS[key] for key in keys.values()}) == len(
        set(keys.values())
    )
    looks = [tuple(look.items()) for look in remedy_looks(keys).values()]
    assert len(set(looks)) == len(study.cells)
    assert {keys[n] for n in ("PAR", "SAVE + PAR", "RAFT", "ensemble UWO")} == {
        "par",
        "save_par",
        "raft",
        "ensemble_uwo",
    }


def test_the_verdict_is_shown_where_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(outcomes, "resolve", lambda name: str(tmp_path / name))
    assert outcomes.default_folders() == ["data/results/studies/remedies_development"]
    for name in ("remedies_long", "remedies"):
        (tmp_path / "data/results/studies" / name).mkdir(parents=True)
    assert outcomes.default_folders() == ["data/results/studies/remedies", "data/results/studies/remedies_long"]


def test_shipped_files_are_read_and_two_lengths_are_two_settings():
    folder = f"data/results/studies/{outcomes.DEVELOPMENT}"
    study, courses, cost = outcomes.read([folder])
    assert not courses["final_kl"].isna().any() and set(cost["cell"]) == {cell.name for cell in study.cells}
    assert cost.set_index("cell")["ratio"][study.reference] == 1
    _, both, _ = outcomes.read([folder, folder])
    assert set(both["setting"]) == {"start_share=0.4, T=60", "start_share=0.8, T=60"}
    with pytest.raises(ConfigError, match="have other cells; name folders of one study"):
        outcomes.read([folder, "data/results/studies/smol_loop"])
