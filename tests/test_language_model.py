"""The study on a real language model: gold at equal KL, paired differences, and its shipped files."""

import math

import pandas as pd
import pytest
from scipy import stats

from savelib.experiments.cells import read_study
from savelib.experiments.language_model import STEP_METRICS, WINDOW, gold_at_kl, paired, read_responses, read_steps
from savelib.experiments.summary import read_tables

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


def test_shipped_files_are_those_of_one_study():
    study, summary, courses = read_tables(SHIPPED)
    assert study == read_study("data/studies/smol_loop.yaml")
    steps, responses = read_steps(SHIPPED), read_responses(SHIPPED)
    runs = {(cell, seed) for cell, seed in zip(courses["cell"], courses["seed"], strict=True)}
    for table in (steps, responses):
        assert set(zip(table["cell"], table["seed"], strict=True)) == runs
    assert set(steps) == {"cell", "seed", "step", *STEP_METRICS}
    assert set(summary["cell"]) == {cell for cell, _ in runs}
