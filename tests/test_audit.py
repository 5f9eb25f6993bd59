"""The audit of the paper's tables, against the files and a few values worked out by hand."""

import csv
from pathlib import Path

import pytest

from savelib.experiments import audit

PAPER = Path(__file__).parent.parent / "data" / "paper"
INITIAL = "Initial RM (Skywork-Reward-V2-Llama-3.2-3B)"


def test_every_average_is_recomputed_from_its_columns():
    table = audit.averages()
    rows = [r for name in audit.TABLES for r in csv.DictReader((PAPER / f"{name}.csv").read_text().splitlines())]
    assert len(table) == len(rows) == 29
    for (_, found), row in zip(table.iterrows(), rows, strict=True):
        mean = sum(float(row[c]) for c in audit.FIGURES) / 6
        assert found["recomputed"] == pytest.approx(mean, abs=1e-3) and found["printed"] == float(row["Average"])
    assert table["agrees"].all()


def test_a_wrong_average_would_be_seen(monkeypatch):
    table = audit.paper_table("table5_group_size")
    table.loc[0, "Average"] += 0.2
    monkeypatch.setattr(audit, "TABLES", ("table5_group_size",))
    monkeypatch.setattr(audit, "paper_table", lambda name: table if name == "table5_group_size" else sizes)
    sizes = __import__("savelib.analysis", fromlist=["x"]).paper_table("benchmark_sizes")
    assert audit.averages()["agrees"].tolist() == [False, True, True]


def test_only_the_initial_models_judgebench_is_no_share_of_350():
    table = audit.judgebench_counts()
    assert table.index[table["right of 350"] == "none"].tolist() == [("table1", INITIAL)]
    assert table.loc[("table1", "Qwen3-4B-Instruct-2507, SAVE"), "right of 350"] == "250"


def test_macro_prints_as_the_paper_and_micro_does_not():
    found = audit.initial_judgebench()
    assert found["macro"] == pytest.approx((99 / 154 + 64 / 98 + 49 / 56 + 25 / 42) * 25)
    assert found["micro"] == pytest.approx(100 * 237 / 350)
    gains = audit.like_for_like()["gain, like for like"]
    assert gains["Qwen3-4B-Instruct-2507, SAVE", "JudgeBench"] == pytest.approx(71.4 - 100 * 237 / 350)
    assert gains["Qwen3-4B-Instruct-2507, SAVE", "Average"] == pytest.approx(1.55, abs=0.01)


def test_what_sizes_resolve():
    table = audit.resolvable(audit.rows_of("table1_rm_benchmarks").loc[INITIAL])
    assert table.loc["JudgeBench", "standard error"] == pytest.approx(2.47, abs=0.005)
    assert (table["smallest difference, paired"] < table["smallest difference, unpaired"]).all()


def test_claims_and_the_rows_against_the_text():
    claims = audit.claims()
    sure = claims[claims["average resolved"] == "yes"]
    assert len(claims) == 16 and sure["second"].str.endswith("Mean Reward").all() and len(sure) == 2
    text = audit.against_the_text()
    wrong = text.index[~text["as the text says"]].tolist()
    assert ("Qwen2.5-3B-Instruct", "GRPO + SAVE", "AlpacaEval 2 WR") in wrong and len(wrong) == 2
    row = text.loc[("Qwen2.5-3B-Instruct", "GRPO + SAVE", "AlpacaEval 2 WR")]
    assert row["difference"] == pytest.approx(21.59 - 24.41)


def test_a_looser_level_resolves_more():
    args = ("table1_rm_benchmarks", "Qwen3-4B-Instruct-2507, SAVE", INITIAL)
    strict, loose = (audit.compared(*args, level)["resolved"] for level in (0.999, 0.6))
    assert (strict == "yes").sum() < (loose == "yes").sum() or (strict == "no").sum() > (loose == "no").sum()
