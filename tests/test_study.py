"""Studies: what each cell runs, what the tables say, and a small one run by papermill with a cell that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from savelib.config import ConfigError
from savelib.experiments.cells import jobs_of, read_seeds, read_study
from savelib.experiments.study import run_study
from savelib.experiments.summary import MEASURED, courses, read_tables, summary, tidy, write_tables
from savelib.runs.folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted((ROOT / "data" / "studies").glob("table*.yaml"))
STEM = [path.stem for path in STUDIES]


pytestmark = pytest.mark.usefixtures("folders")


def made(folder: Path, **values) -> Path:
    path = folder / "made.yaml"
    path.write_text(
        yaml.safe_dump({"title": "made", "reference": "A", "cells": [{"name": "A"}]} | values, sort_keys=False)
    )
    return path


# what each cell runs


def test_there_is_a_study_for_each_table():
    assert [f"table{n}" for n in range(1, 7)] == STEM


@pytest.mark.parametrize("profile", ["tiny", "paper"])
@pytest.mark.parametrize("path", STUDIES, ids=STEM)
def test_cells_are_configurations(path, profile):
    study = read_study(path)
    jobs = jobs_of(study, [3, 5], profile=profile)
    assert [job.cell for job in jobs] == [cell.name for cell in study.cells] * 2
    seeds = [(job.config.seed, job.config.world_seed) for job in jobs]
    assert seeds == [(3, 3)] * len(study.cells) + [(5, 5)] * len(study.cells), "a seed is its own world"
    assert len({job.config.run_id for job in jobs}) == len(jobs)
    for job in jobs:
        assert job.config.profile == profile
    assert {cell.paper for cell in study.cells} > {""} or all(cell.paper for cell in study.cells)


TUNED = ("tuning", "remedies_development")
GONE = {"save_either_way", "save_zero_net_force", "spread"}  # rules that shipped studies have cells of
JUDGED = ("claims", "claims_settings", "forms_low", "forms_high", "forms_long_low", "forms_long_high", "remedies")


@pytest.mark.parametrize("name", [*TUNED, "warning", *JUDGED])
def test_studies_of_the_world_are_tuned_on_other_worlds_than_they_judge(name):
    def configs(study):
        return [job.config for job in jobs_of(read_study(ROOT / "data" / "studies" / f"{study}.yaml"), [0])]

    worlds = {config.world_seed for config in configs(name)}
    assert min(worlds) >= 100 if name in JUDGED else max(worlds) < 10
    tuned = {config.rule for study in TUNED for config in configs(study)}
    assert {config.rule for config in configs(name)} <= tuned | {"frozen"}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "data/results/studies").iterdir()))
def test_a_shipped_study_is_the_one_of_its_file(name):
    """Its cells without those of rules that are gone, and of their reward models."""
    shipped, file = read_study(ROOT / "data/results/studies" / name / "study.yaml"), ROOT / f"data/studies/{name}.yaml"
    gone = {cell.name for cell in shipped.cells if cell.set.get("rule") in GONE}
    left = [cell for cell in shipped.cells if not {cell.name, cell.reward_model_of} & gone]
    if not left:
        assert not file.exists()
        return
    studies = (shipped.model_copy(update={"cells": left}), read_study(file))
    there, ours = ([(job.cell, job.config) for job in jobs_of(study, [0])] for study in studies)
    assert there == ours


def test_the_papers_tables_4_to_6_are_its_own_values_in_its_profile():
    of = {path.stem: jobs_of(read_study(path), [0], profile="paper") for path in STUDIES}
    rates = [(j.config.backbone_lr, j.config.reward_head_lr, j.config.value_head_lr) for j in of["table4"]]
    assert np.allclose(rates, [(1e-6, 1e-6, 1e-5), (1e-6, 1e-6, 1e-6), (1e-7, 1e-7, 1e-5), (1e-7, 1e-7, 1e-6),
                               (1e-7, 1e-7, 1e-7)])  # fmt: skip
    assert [j.config.group_size for j in of["table5"]] == [4, 8, 16]
    assert [j.config.initial_margin for j in of["table6"]] == [0.3, 0.5, 0.7]
    shared = [{j.config.run_id for j in of[t]} for t in ("table1", "table2", "table4", "table5", "table6")]
    assert len(set.intersection(*shared)) == 1, "the paper's own setting is one run in all tables"


def test_the_improved_reward_model_is_that_of_the_run_before():
    jobs = {job.cell: job for job in jobs_of(read_study(ROOT / "data/studies/table3.yaml"), [4], total_steps=2)}
    made, improved = jobs["GRPO + SAVE"], jobs["GRPO + Improved RM"]
    assert improved.config.reward_model == str(made.folder / "reward_model") and improved.config.bt_epochs == 0
    assert improved.after == made.config.run_id and not made.after
    assert (improved.config.rule, improved.config.total_steps) == ("frozen", 2)


@pytest.mark.parametrize(
    "text, seeds", [("0-3,7", [0, 1, 2, 3, 7]), ("5", [5]), (" 1 , 1-2", [1, 2]), ("100-101", [100, 101])]
)
def test_seeds(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "3-1", "a", "1;2", "-1"])
def test_bad_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="write numbers and ranges"):
        read_seeds(text)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"reference": "B"}, "reference = 'B' is no cell; cells: A"),
        ({"cells": []}, "cells: List should have at least 1 item"),
        ({"cells": [{"name": "A"}, {"name": "A"}]}, "cell 'A': the name is there twice"),
        ({"cells": [{"name": "A", "sett": {}}]}, "cells.0.sett: Extra inputs are not permitted"),
        ({"cells": [{"name": "A", "set": {"alg": "rloo"}}]}, "unknown parameter 'alg' .did you mean 'algo'"),
        ({"cells": [{"name": "A", "reward_model_of": "B"}]}, "reward_model_of = 'B' must name an earlier cell"),
        ({"table": "table5_group_size", "cells": [{"name": "A", "paper": "5"}]}, "rows: 4, 8, 16; columns: Rew"),
    ],
)
def test_bad_studies_are_named(tmp_path, values, said):
    with pytest.raises(ConfigError, match=said):
        read_study(made(tmp_path, **values))


def test_a_study_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="study 'nowhere.yaml' cannot be read"):
        read_study("nowhere.yaml")


# tables


def test_summary_equals_a_paired_t_test(tmp_path):
    study = read_study(
        made(
            tmp_path, table="table5_group_size", reference="A",
            cells=[{"name": "A", "paper": "16"}, {"name": "B", "paper": "4"}],
        )
    )  # fmt: skip
    a, b = np.array([0.5, 0.7, 0.6, 0.9]), np.array([0.6, 0.9, 0.7, 0.95])
    rows = [
        {
            "cell": c,
            "setting": "",
            "world": s,
            "seed": s,
            "measure": "m",
            "before": 0.4,
            "after": v,
            "change": v - 0.4,
            "run_id": f"{c}{s}",
        }
        for c, values in (("A", a), ("B", b))
        for s, v in enumerate(values)
        if (c, s) != ("A", 3)  # a run that failed: seeds are paired all the same
    ]
    table = summary(pd.DataFrame(rows), study).set_index("cell")
    found = stats.ttest_rel(b[:3], a[:3]).confidence_interval()
    assert table.loc["B", ["low", "high"]].tolist() == pytest.approx([found.low, found.high])
    assert table.loc["B", "difference"] == pytest.approx((b[:3] - a[:3]).mean())
    assert table.loc["B", "resolved"] == (found.low > 0) and not table.loc["A", "resolved"]
    assert table["runs"].tolist() == [3, 4] and table.loc["B", "sd"] == pytest.approx(b.std(ddof=1))
    assert table.loc["B", ["paper", "paper_difference"]].tolist() == pytest.approx([76.4, -0.3])
    assert np.isnan(table.loc["A", "difference"]) and table.loc["B", "rose"] == 4


def test_errors_are_clustered_by_world(tmp_path):
    study = read_study(made(tmp_path, cells=[{"name": "A"}, {"name": "B"}]))
    generator = np.random.default_rng(0)
    after = {c: generator.normal(size=(3, 2)) for c in "AB"}  # [worlds, seeds]
    rows = [
        {"cell": c, "setting": "x=1", "world": w, "seed": s, "measure": "m", "after": after[c][w, s], "run_id": "r"}
        | {"before": 0.0, "change": after[c][w, s]}
        for c in "AB" for w in range(3) for s in range(2)
    ]  # fmt: skip
    table = summary(pd.DataFrame(rows), study).set_index("cell")
    found = stats.ttest_1samp((after["B"] - after["A"]).mean(1), 0).confidence_interval()
    assert table.loc["B", ["low", "high"]].tolist() == pytest.approx([found.low, found.high])
    assert table["worlds"].tolist() == [3, 3] and table["runs"].tolist() == [6, 6]
    assert table.loc["B", "sd"] == pytest.approx(after["B"].mean(1).std(ddof=1))
    assert table.loc["A", "rose"] == (after["A"] > 0).sum()


# runs


def test_a_grid_runs_every_cell_at_every_combination_in_every_world(tmp_path):
    grid = {"start_share": [0.2, 0.8], "total_steps": [3, 5]}
    cells = [{"name": "A"}, {"name": "B", "set": {"rule": "frozen"}, "reward_model_of": "A"}]
    study = read_study(made(tmp_path, grid=grid, worlds="7-8", cells=cells))
    jobs = jobs_of(study, [1])
    assert len({job.config.run_id for job in jobs}) == len(jobs) == 2 * 2 * 2 * 2
    assert [job.config.world_seed for job in jobs] == [7] * 8 + [8] * 8 and {job.config.seed for job in jobs} == {1}
    points = [(job.config.start_share, job.config.total_steps) for job in jobs[:8:2]]
    assert points == [(0.2, 3), (0.2, 5), (0.8, 3), (0.8, 5)]
    assert jobs[2].setting == "start_share=0.2, total_steps=5"
    assert all(b.after == a.config.run_id for a, b in zip(jobs[::2], jobs[1::2], strict=True))


def test_an_axis_of_named_settings_sets_several_fields_at_once(tmp_path):
    starts = {"overfit": {"bt_head_lr": 0.01, "label_bias": 0}, "biased": {"bt_head_lr": 0.001, "label_bias": 0.65}}
    study = read_study(made(tmp_path, grid={"start": starts, "feature_offset": [0, 6]}, worlds=7))
    jobs = [job for job in jobs_of(study, [1]) if job.cell == study.cells[0].name]
    found = [(j.setting, j.config.bt_head_lr, j.config.label_bias, j.config.feature_offset) for j in jobs]
    assert found == [
        ("start=overfit, feature_offset=0", 0.01, 0.0, 0.0),
        ("start=overfit, feature_offset=6", 0.01, 0.0, 6.0),
        ("start=biased, feature_offset=0", 0.001, 0.65, 0.0),
        ("start=biased, feature_offset=6", 0.001, 0.65, 6.0),
    ]
    with pytest.raises(ConfigError, match="label_biass"):
        read_study(made(tmp_path, grid={"start": {"odd": {"label_biass": 0.5}}}))


def test_a_study_survives_a_cell_that_fails_and_goes_on(tmp_path):
    cells = [
        {"name": "A"},
        {"name": "bad", "set": {"prompts": str(tmp_path / "nowhere.jsonl")}},
        {"name": "after", "set": {"rule": "frozen"}, "reward_model_of": "bad"},
        {"name": "again", "set": {"rule": "frozen"}, "reward_model_of": "A"},
    ]
    path, said = made(tmp_path, cells=cells), []
    few = {"total_steps": 2, "eval_every": 1}
    folder, failed = run_study("made", read_study(path), [0], 2, plain=True, say=said.append, **few)
    jobs = {job.cell: job for job in jobs_of(read_study(path), [0], **few)}
    assert set(failed) == {jobs["bad"].config.run_id, jobs["after"].config.run_id}
    assert "nowhere.jsonl" in failed[jobs["bad"].config.run_id]
    assert failed[jobs["after"].config.run_id] == f"needs {jobs['bad'].config.run_id}, which failed"
    table = pd.read_csv(folder / "cells.csv")
    assert set(table["cell"]) == {"A", "again"} and set(table["run_id"]) <= {
        p.name for p in jobs["A"].folder.parent.iterdir()
    }
    first = table.query("measure == 'eval/rm_accuracy'").set_index("cell")
    assert first.loc["again", "before"] == first.loc["A", "after"], "it starts from the reward model of A"
    assert said[0] == "made: 4 runs, 0 done before" and any("0:00:" in line for line in said[1:])
    assert "step 2/2" in (jobs["A"].folder / "train.log").read_text()

    said.clear()
    stamp = (jobs["A"].folder / "manifest.json").stat().st_mtime_ns
    run_study("made", read_study(path), [0], plain=True, say=said.append, **few)
    assert said[0] == "made: 4 runs, 2 done before" and (jobs["A"].folder / "manifest.json").stat().st_mtime_ns == stamp
    done = [job for job in jobs.values() if job.done]
    assert len(tidy(done)) == 8

    found, table, course = read_tables(folder)
    assert found == read_study(path) and set(table["cell"]) == {"A", "again"} and set(table["setting"]) == {""}
    assert course["eval/gold"].tolist() == pytest.approx(courses(done)["eval/gold"].tolist(), rel=1e-4)

    course = courses(done).query("cell == 'A'")
    metrics = read_metrics(jobs["A"].folder)
    assert course["step"].tolist() == [0, 1, 2] and set(course) >= {*MEASURED, "eval/gold"}
    assert course["force/push"].tolist()[1:] == metrics["force/push"].tolist()[1:]
    sparse = metrics.assign(**{c: metrics[c].where(metrics["step"] != 1) for c in metrics if c.startswith("eval/")})
    sparse.to_json(jobs["A"].folder / "metrics.jsonl", orient="records", lines=True)
    course = courses(done).query("cell == 'A'")
    assert course["step"].tolist() == [0, 2]
    assert course["force/push"].iloc[1] == pytest.approx(metrics["force/push"].mean()), "the mean since step 0"


def test_quick_tables_by_the_command_line(tmp_path):
    file = str(ROOT / "data" / "studies" / "table6.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "savelib", "study", file, "--quick", "--jobs", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "table6: 3 runs, 0 done before" in done.stdout and "run 3/3" in done.stdout
    table = pd.read_csv(tmp_path / "runs" / "studies" / "table6" / "summary.csv")
    assert set(table["cell"]) == {cell.name for cell in read_study(file).cells}
    manifests = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("study-*/manifest.json")]
    assert len(manifests) == 3 and all(m["status"] == "done" for m in manifests)
    assert len(list((tmp_path / "runs").glob("study-*/03_save_train.ipynb"))) == 3, "each executed notebook is kept"


def test_tables_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no tables of a study in 'nowhere/table1'; `make tables` writes them to"):
        read_tables("nowhere/table1")
    write_tables(tmp_path / "made", read_study(made(tmp_path)), [])
    with pytest.raises(ConfigError, match="no tables of a study"):
        read_tables(tmp_path / "made")
