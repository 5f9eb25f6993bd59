"""Reward-model benchmarks: figures against naive transcriptions and published scores; rows from files; bad input."""

import json
import math
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from savelib.benchmarks import BENCHMARKS
from savelib.benchmarks.ppe import SETS
from savelib.benchmarks.rewardbench import SECTIONS
from savelib.benchmarks.rows import Row
from savelib.benchmarks.scores import score_file
from savelib.cli import app
from savelib.config import ConfigError

SHARED = Path(__file__).parents[2] / "shared" / "benchdata"
needs = pytest.mark.skipif
TURN = [{"role": "user", "content": "Hi"}]


def write(path, rows) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def row(name, responses=2, group="", counts=True, **facts) -> Row:
    return Row(name, TURN, ["x"] * responses, facts, group, counts)


def figures(name, rows, scores):
    return BENCHMARKS[name].aggregate(rows, scores)


# RewardBench

RIGHT = {"math-prm": 400, "hep-cpp": 100, "hep-go": 150, "mt-bench-hard": 20, "llmbar-natural": 99, "donotanswer": 7}


@pytest.fixture(scope="module")
def rewardbench():
    """All subsets in their real sizes; some right, else every second a tie and every second wrong."""
    rows, scores = [], {}
    for section in SECTIONS.values():
        for subset, weight in section.items():
            for i in range(447 if subset == "math-prm" else weight):
                rows.append(row(f"{subset}-{i}", group=subset))
                scores[rows[-1].id] = [1.5, 0.5] if i < RIGHT.get(subset, 10) else [0.5, 0.5] if i % 2 else [0.0, 1.0]
    return rows, scores


def test_rewardbench_weights_math_prm_like_all_code(rewardbench):
    result = figures("rewardbench", *rewardbench)
    assert len(rewardbench[0]) == result.n == 2985
    reasoning = (984 * 400 / 447 + 100 + 150 + 4 * 10) / (984 + 6 * 164)
    hard = (20 + 99 + 4 * 10) / (37 + 100 + 134 + 92 + 47 + 46)
    chat, safety = 5 * 10 / 358, (4 * 10 + 7) / 740
    assert result.parts["math-prm"] == pytest.approx(100 * 400 / 447) and result.counts["math-prm"] == 447
    for name, value in {"Chat": chat, "Chat Hard": hard, "Safety": safety, "Reasoning": reasoning}.items():
        assert result.parts[name] == pytest.approx(100 * value, abs=1e-9), name
    assert result.overall == pytest.approx(100 * (chat + hard + safety + reasoning) / 4, abs=1e-9)
    assert sum(s.weight for s in result.strata) == pytest.approx(1) and not result.missing
    assert result.counts["Reasoning"] == 447 + 6 * 164


def test_rewardbench_of_some_subsets_says_which_lack():
    rows = [
        row("a", group="math-prm"),
        row("b", group="math-prm"),
        row("c", group="hep-go"),
        row("d", group="donotanswer"),
    ]
    result = figures("rewardbench", rows, {"a": [1, 0], "b": [0, 1], "c": [1, 0], "d": [1, 1]})
    reasoning = (984 * 0.5 + 164) / (984 + 164)
    assert result.parts["Reasoning"] == pytest.approx(100 * reasoning) and result.parts["Safety"] == 0
    assert result.overall == pytest.approx(100 * reasoning / 2)
    assert len(result.missing) == 20 and "hep-go" not in result.missing


# RewardBench 2


def naive_ties(rows, scores):
    """Score of Ties from BENCHMARKS' words, a prompt at a time."""
    margin, spread = {}, {}
    for r in rows:
        good, bad = scores[r.id][: r.facts["right"]], scores[r.id][r.facts["right"] :]
        margin[r.id] = min(good) - max(bad)
        spread[r.id] = max(good) - min(good)
    refs = [i for i in margin if i.startswith("ref:")]
    tied = [i for i in margin if i.startswith("tied:")]
    total = 0.3 * sum(margin[i] > 0 for i in tied) / len(tied) + 0.3 * sum(margin[i] > 0 for i in refs) / len(refs)
    both = [i for i in tied if "ref:" + i[5:] in margin]
    for i in both:
        d, least = spread[i], min(margin[i], margin["ref:" + i[5:]])
        total += 0.2 * (margin[i] > d) / len(both) + 0.2 * (least > d) / len(both)
        if d > 0:
            total += 0.01 * math.tanh(least / d - 1) / len(both)
        elif least:
            total += 0.01 * math.copysign(1, least) / len(both)
    return 100 * total


def ties_case():
    """Prompts with many values of margin and spread, without spread, with margin 0 and spread 0, without a partner."""
    random, rows, scores = Random(0), [], {}
    for p in range(12):
        for kind, right in (("ref", 1), ("tied", 3)):
            if (p, kind) in ((10, "ref"), (11, "tied")):
                continue
            rows.append(row(f"{kind}:{p}", right + 4, "Ties", right=right))
            good = [random.choice([1.0, 2.0, 3.0]) for _ in range(right)]
            bad = [random.choice([-1.0, 0.0, 0.5, 1.0]) for _ in range(4)]
            scores[rows[-1].id] = good + bad
    scores["tied:0"], scores["ref:0"] = [1.0] * 3 + [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0]  # 0 / 0
    scores["tied:1"], scores["ref:1"] = [1.0] * 3 + [0.0] * 4, [1.0, 0.0, 0.0, 0.0, 0.0]  # inf
    scores["tied:2"], scores["ref:2"] = [1.0] * 3 + [2.0] * 4, [1.0, 0.0, 0.0, 0.0, 0.0]  # -inf
    return rows, scores


def test_ties():
    rows, scores = ties_case()
    result = figures("rewardbench2", rows, scores)
    assert result.parts["Ties"] == pytest.approx(naive_ties(rows, scores), abs=1e-9)
    assert result.counts["Ties"] == result.n == 22 and len(result.strata[0].ids) == 12
    assert result.strata[0].credit.shape == (12, 5) and np.isnan(result.strata[0].credit).sum() == 2 * (1 + 3)


def test_ties_by_hand():
    rows = [row("ref:1", 3, "Ties", right=1), row("tied:1", 4, "Ties", right=2)]
    result = figures("rewardbench2", rows, {"ref:1": [2.0, 0.5, 0.0], "tied:1": [3.0, 2.0, 0.0, -1.0]})
    assert result.overall == pytest.approx(100 * (0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(0.5)))  # c 2, d 1, c_ref 1.5
    result = figures("rewardbench2", rows, {"ref:1": [0.5, 0.5, 0.0], "tied:1": [3.0, 2.0, 1.0, -1.0]})
    assert result.overall == pytest.approx(100 * (0.3 + 0.01 * math.tanh(-1.0)))  # c_ref 0 is wrong, c 1 = d


def test_credit_is_divided_among_the_responses_at_the_maximum():
    cases = [([2, 1, 1, 1], 1), ([2, 2, 1, 1], 1 / 2), ([2, 2, 2, 2], 1 / 4), ([1, 2, 0, 0], 0), ([2, 1, 2, 2], 1 / 3)]
    rows = [row(str(i), 4, "Focus") for i in range(len(cases))]
    result = figures("rewardbench2", rows, {str(i): s for i, (s, _) in enumerate(cases)})
    assert result.overall == pytest.approx(100 * sum(credit for _, credit in cases) / len(cases))


def test_rewardbench2_is_the_plain_mean_of_its_subsets():
    given = {"Factuality": 762, "Precise IF": 456, "Math": 694, "Safety": 931, "Focus": 960}
    rows, scores = [], {}
    for subset, right in given.items():
        for i in range(1000):
            rows.append(row(f"{subset}{i}", 4, subset))
            scores[rows[-1].id] = [1, 0, 0, 0] if i < right else [0, 1, 0, 0]
    # 67.7: 300 prompts, of which 202 have all terms but the last (1.00), 1 only accuracy (0.30 + 0.30), others nothing
    kinds = [([1, 0], [1, 1, 0])] * 202 + [([1, 0], [9, 1, 0])] + [([0, 1], [0, 1, 2])] * 97
    for i, (ref, tied) in enumerate(kinds):
        rows += [row(f"ref:{i}", 2, "Ties", right=1), row(f"tied:{i}", 3, "Ties", right=2)]
        scores |= {f"ref:{i}": ref, f"tied:{i}": tied}
    result = figures("rewardbench2", rows, scores)
    assert [round(result.parts[s], 1) for s in given] == [76.2, 45.6, 69.4, 93.1, 96.0] and not result.missing
    ties = naive_ties(rows[5000:], scores)
    assert result.parts["Ties"] == pytest.approx(ties) and abs(ties - 67.7) < 1
    assert result.overall == pytest.approx(74.667 + (ties - 67.7) / 6, abs=1e-3)


# RM-Bench


def naive_rmbench(rows, scores):
    """(domain -> level -> percent, overall) by counting pairs."""
    out = {}
    for domain in ("chat", "math", "code", "safety"):
        of = [scores[r.id] for r in rows if r.group == domain]
        matrix = [[sum(s[i] > s[3 + j] for s in of) / len(of) for j in range(3)] for i in range(3)]
        hard = (matrix[0][1] + matrix[0][2] + matrix[1][2]) / 3
        normal = (matrix[0][0] + matrix[1][1] + matrix[2][2]) / 3
        easy = (matrix[1][0] + matrix[2][0] + matrix[2][1]) / 3
        out[domain] = {"easy": 100 * easy, "normal": 100 * normal, "hard": 100 * hard}
    return out, sum(sum(levels.values()) / 3 for levels in out.values()) / 4


def test_rmbench_matrix():
    random = Random(1)
    sizes = {"chat": 5, "math": 7, "code": 3, "safety": 11}
    rows = [row(f"{d}{i}", 6, d) for d, n in sizes.items() for i in range(n)]
    # chosen responses a little better, fancier ones better still; small integers, so that there are ties
    scores = {r.id: [random.randrange(4) + (k < 3) + k % 3 for k in range(6)] for r in rows}
    expected, overall = naive_rmbench(rows, scores)
    result = figures("rmbench", rows, scores)
    assert result.overall == pytest.approx(overall) and result.n == 26 and not result.missing
    for domain, levels in expected.items():
        assert result.parts[domain] == pytest.approx(sum(levels.values()) / 3)
        for level, value in levels.items():
            assert result.parts[f"{domain} {level}"] == pytest.approx(value), (domain, level)
    for level in ("easy", "normal", "hard"):
        assert result.parts[level] == pytest.approx(sum(e[level] for e in expected.values()) / 4)
    assert expected["safety"]["easy"] > expected["safety"]["hard"]  # the case can tell them apart
    wins = sum(scores[r.id][0] > scores[r.id][5] for r in rows if r.group == "math")
    assert result.more["matrix"]["math"][0][2] == pytest.approx(100 * wins / 7)


def test_rmbench_overall_is_the_mean_of_its_levels():
    """Levels 91.5, 84.1 and 67.8 in each domain: 81.13."""
    rows = [row(f"{d}{i}", 6, d) for d in ("chat", "math", "code", "safety") for i in range(1000)]

    def scores(i):  # level by level: a chosen response of style k beats its rejected one or not
        easy, normal, hard = i < 915, i < 841, i < 678
        if hard:
            return [3, 3, 3, 0, 0, 0]
        if normal:
            return [1, 3, 5, 0, 2, 4]
        return [1, 3, 5, 1, 3, 5] if easy else [0, 0, 0, 0, 0, 0]

    result = figures("rmbench", rows, {r.id: scores(int(r.id.lstrip("chatmodesfy"))) for r in rows})
    levels = [result.parts[level] for level in ("easy", "normal", "hard")]
    assert levels == pytest.approx([91.5, 84.1, 67.8]) and round(result.overall, 2) == 81.13


def test_rmbench_pools_safety_and_tells_equal_ids_apart(tmp_path):
    def raw(name, domain):
        return {"id": name, "prompt": "Hi", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": domain}

    rows = [raw(8, "chat"), raw(8, "code"), raw(9, "safety-refuse"), raw(10, "safety-response"), raw(11, "math")]
    read = BENCHMARKS["rmbench"].rows(write(tmp_path / "r.jsonl", rows))
    assert [r.id for r in read] == ["chat:8", "code:8", "9", "10", "11"]
    assert [r.group for r in read] == ["chat", "code", "safety", "safety", "math"]
    assert read[0].responses == list("abcdef")
    lines = [{"id": r.id, "chosen": [1, 1, 1], "rejected": [0, 0, 2 * (r.id == "9")]} for r in read]
    said = score_file("rmbench", str(tmp_path / "r.jsonl"), write(tmp_path / "s.jsonl", lines))
    assert said["parts"]["safety"] == pytest.approx(100 * (6 + 9) / 18)
    assert said["overall"] == pytest.approx((300 + 100 * 15 / 18) / 4) and said["counts"]["safety"] == 2
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "chat_filtered.json").write_text(json.dumps([{**rows[0], "domain": None}]))
    (tmp_path / "all" / "safety-refuse_filtered.json").write_text(json.dumps([{**rows[2], "domain": None}]))
    assert [r.group for r in BENCHMARKS["rmbench"].rows(str(tmp_path / "all"))] == ["chat", "safety"]


@needs(not (SHARED / "rmbench").is_dir(), reason="RM-Bench's chat file is not in ../shared/benchdata")
def test_rmbench_real_chat_file(tmp_path):
    file = str(SHARED / "rmbench" / "chat_filtered.json")
    rows = BENCHMARKS["rmbench"].rows(file)
    assert len(rows) == 129 and {r.group for r in rows} == {"chat"} and all(len(r.responses) == 6 for r in rows)
    raw = json.loads(Path(file).read_text())[5]
    assert rows[5].responses == raw["chosen"] + raw["rejected"]
    lengths = {r.id: [float(len(t)) for t in r.responses] for r in rows}  # a reward for length
    lines = [{"id": i, "chosen": s[:3], "rejected": s[3:]} for i, s in lengths.items()]
    said = score_file("rmbench", file, write(tmp_path / "s.jsonl", lines))
    hard = sum(s[i] > s[3 + j] for s in lengths.values() for i, j in ((0, 1), (0, 2), (1, 2))) / 3 / 129
    assert said["parts"]["chat hard"] == pytest.approx(100 * hard) and said["n"] == 129
    assert said["parts"]["chat easy"] > 75 > 25 > said["parts"]["chat hard"]
    assert "not of rmbench (1327 rows): the data lack math, code, safety" in said["note"]


# PPE


def test_ppe_preference(tmp_path):
    def vote(i, winner, **more):
        return {"question_id": f"q{i}", "prompt": "Hi", "response_1": "a", "response_2": "b", "winner": winner} | more

    winners = ["model_a", "model_b", "model_a", "model_b", "tie", "tie (bothbad)", "model_a"]
    votes = [vote(i, w, hard_prompt=i in (0, 2)) for i, w in enumerate(winners)]
    given = [[2, 1], [2, 1], [1, 1], [1, 1], [0, 9], [0, 0], [-1, -2]]  # right, wrong, tie, tie, out, out, right
    lines = [{"question_id": f"q{i}", "scores": s} for i, s in enumerate(given)]
    data = write(tmp_path / "v.jsonl", votes)
    said = score_file("ppe_preference", data, write(tmp_path / "s.jsonl", lines))
    assert said["overall"] == pytest.approx(40) and said["n"] == 5 and said["parts"] == {"hard_prompt": 50.0}
    assert said["counts"] == {"decided": 5, "tied": 2, "hard_prompt": 2}
    lines = [line for line in lines if line["question_id"] not in ("q4", "q5")]
    assert score_file("ppe_preference", data, write(tmp_path / "s.jsonl", lines)) == said
    with pytest.raises(ConfigError, match="row 1: column 'winner' = 'A' must be model_a"):
        BENCHMARKS["ppe_preference"].rows(write(tmp_path / "w.jsonl", [vote(0, "A")]))


def best_of_k(name, count, k=6):
    """Questions of one set in the real schema, the last without a conflict."""
    random = Random(name)
    rows = []
    for i in range(count):
        truth = [float(random.random() < 0.5) for _ in range(k - 2)] + [0.0, 1.0]
        pairs = [[a, b] for a in range(k) for b in range(k) if truth[a] != truth[b]]
        rows.append(
            {"question_id": f"{i}", "prompt": "Hi", "model_name": "m", "scores": truth}
            | {f"response_{r + 1}": f"{name} {i} {r}" for r in range(k)}
            | {"sampled_conflict_pairs": random.sample(pairs, 1 + i) if i < count - 1 else []}
        )
    return rows


@pytest.fixture()
def correctness(tmp_path):
    """(folder with five sets, their rows, random scores by id)."""
    folder, rows, random = tmp_path / "correctness", {name: best_of_k(name, 4) for name in SETS}, Random(3)
    for name, found in rows.items():
        (folder / f"PPE-{name}-Best-of-K").mkdir(parents=True)
        pd.DataFrame(found).to_parquet(folder / f"PPE-{name}-Best-of-K" / "train-00000-of-00001.parquet")
    ids = [f"{name}:{r['question_id']}" for name, found in rows.items() for r in found]
    return folder, rows, {i: [random.randrange(4) for _ in range(6)] for i in ids}


def naive_correctness(found, name, scores):
    right = pairs = 0
    for r in found:
        for i, j in r["sampled_conflict_pairs"]:
            good, bad = (i, j) if r["scores"][i] > r["scores"][j] else (j, i)
            given = scores[f"{name}:{r['question_id']}"]
            right, pairs = right + (given[good] > given[bad]), pairs + 1
    return 100 * right / pairs


def test_ppe_correctness_is_the_mean_of_five_sets(correctness, tmp_path):
    folder, rows, scores = correctness
    lines = [{"question_id": i, "scores": s} for i, s in scores.items()]
    said = score_file("ppe_correctness", str(folder), write(tmp_path / "s.jsonl", lines))
    expected = {name: naive_correctness(found, name, scores) for name, found in rows.items()}
    assert said["parts"] == pytest.approx(expected) and len(set(expected.values())) > 2
    assert said["overall"] == pytest.approx(sum(expected.values()) / 5) and "note" not in said
    assert said["counts"]["GPQA pairs"] == 6 and said["n"] == 15 and said["counts"]["without a conflict"] == 5
    read = BENCHMARKS["ppe_correctness"].rows(str(folder))
    assert read[0].responses == [rows[read[0].group][0][f"response_{k}"] for k in range(1, 7)]


def test_ppe_correctness_of_one_set(correctness, tmp_path):
    folder, rows, scores = correctness
    lines = [{"question_id": i[5:], "scores": s} for i, s in scores.items() if i.startswith("GPQA:")]
    file = str(next((folder / "PPE-GPQA-Best-of-K").glob("*.parquet")))
    said = score_file("ppe_correctness", file, write(tmp_path / "s.jsonl", lines))
    assert said["overall"] == pytest.approx(naive_correctness(rows["GPQA"], "GPQA", scores))
    assert (
        said["parts"] == {"GPQA": said["overall"]} and "the data lack MMLU-Pro, MATH, MBPP-Plus, IFEval" in said["note"]
    )
    bad = rows["GPQA"][0] | {"sampled_conflict_pairs": [[0, 6]]}
    with pytest.raises(ConfigError, match=r"row 1: column 'sampled_conflict_pairs': \[0, 6\] is no pair"):
        BENCHMARKS["ppe_correctness"].rows(write(tmp_path / "gpqa.jsonl", [bad]))


# JudgeBench


def pair(i, source="mmlu-pro-law", label="A>B", **more):
    return {
        "pair_id": f"p{i}",
        "source": source,
        "question": "Hi",
        "response_A": "a",
        "response_B": "b",
        "label": label,
    } | more


def test_judgebench_counts_equal_scores_as_b(tmp_path):
    sources = ["mmlu-pro-law", "mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench"]
    labels = ["A>B", "B>A", "B>A", "A>B", "B>A"]
    given = [[1, 1], [1, 1], [0, 1], [2, 1], [2, 1]]  # wrong, right, right, right, wrong
    data = write(
        tmp_path / "d.jsonl", [pair(i, s, lab) for i, (s, lab) in enumerate(zip(sources, labels, strict=True))]
    )
    lines = [{"pair_id": f"p{i}", "scores": s} for i, s in enumerate(given)]
    said = score_file("judgebench", data, write(tmp_path / "s.jsonl", reversed(lines)))
    assert said["overall"] == pytest.approx(60) and said["macro"] == pytest.approx((50 + 100 + 100 + 0) / 4)
    assert said["parts"] == {"knowledge": 50, "reasoning": 100, "math": 100, "coding": 0}
    assert said["ci95"][0] < 60 < said["ci95"][1] and said["n"] == 5


@needs(not (SHARED / "judgebench").is_dir(), reason="JudgeBench is not in ../shared/benchdata")
@pytest.mark.parametrize(("model", "overall", "parts"), [
    ("skywork-reward-llama-3.1-8b", 62.29, [59.09, 64.29, 76.79, 50.00]),
    ("internlm2-7b-reward", 59.43, [56.49, 61.22, 71.43, 50.00]),
])  # fmt: skip
def test_judgebench_published_figures(model, overall, parts):
    said = score_file(
        "judgebench", str(SHARED / "judgebench/gpt.jsonl"), str(SHARED / f"judgebench/scores/{model}.jsonl")
    )
    assert round(said["overall"], 2) == overall and [round(v, 2) for v in said["parts"].values()] == parts
    assert said["macro"] == pytest.approx(sum(said["parts"].values()) / 4)
    assert said["n"] == 350 and list(said["counts"].values()) == [154, 98, 56, 42] and "note" not in said


# bad score files and bad data

GOOD = [{"pair_id": f"p{i}", "scores": [1.0, 0.5]} for i in range(3)]


@pytest.mark.parametrize(("lines", "said"), [
    (GOOD[:1], "2 missing, the first 'p1'"),
    ([*GOOD, GOOD[1]], "1 ids are there more than once, the first 'p1'"),
    ([*GOOD, {"pair_id": "z", "scores": [1, 2]}], "1 not in the benchmark, the first 'z'"),
    ([*GOOD[:2], '{"pair_id": "p2", "scores": [1, NaN]}'], "s.jsonl, row 3: 'scores.1.' is nan, not a finite number"),
    ([*GOOD[:2], {"pair_id": "p2", "scores": [1]}], "1 with another number of scores, the first 'p2'"),
    ([*GOOD[:2], {"pair_id": "p2", "scores": 1}], "1 of 3 rows are bad, .*s.jsonl, row 3: scores must be a list"),
    ([*GOOD[:2], {"id": "p2", "scores": [1, 2]}], "row 3: no field 'pair_id'; it has 'id', 'scores'"),
    ([], "has no scores"),
    ([*GOOD[:2], '{"pair_id": "p2", "sco'], "s.jsonl: row 3 is not valid JSON"),
    ([*GOOD, ""], "row 4 is empty; remove the line"),
    ([*GOOD[:2], "[1]"], "row 3 holds a list, not an object"),
])  # fmt: skip
def test_a_bad_score_file_is_named_and_counted(tmp_path, lines, said):
    data = write(tmp_path / "data.jsonl", [pair(i) for i in range(3)])
    with pytest.raises(ConfigError, match=said):
        score_file("judgebench", data, write(tmp_path / "s.jsonl", lines))


def test_lists_of_unequal_length_are_refused(tmp_path):
    rows = [{"id": 1, "prompt": "Hi", "chosen": ["a"] * 3, "rejected": ["b"] * 3, "domain": "chat"}]
    lines = [{"id": 1, "chosen": [1, 2], "rejected": [1, 2, 3, 4]}]
    with pytest.raises(ConfigError, match="chosen and rejected must be lists of the same length"):
        score_file("rmbench", write(tmp_path / "d.jsonl", rows), write(tmp_path / "s.jsonl", lines))


def raw_rewardbench(**more):
    return {"id": 1, "prompt": "Hi", "chosen": "a", "rejected": "b", "subset": "math-prm"} | more


def raw_rewardbench2(**more):
    good = {"id": "1", "prompt": "Hi", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Focus"}
    return good | {"num_correct": 1, "total_completions": 4} | more


BAD = [
    (
        "judgebench",
        [pair(1), pair(2, response_B=" "), pair(3, label="A")],
        "2 of 3 rows are bad, the first.*row 2: column 'r",
    ),
    ("judgebench", [pair(1, label="A=B")], "row 1: column 'label' = 'A=B' must be one of A>B, B>A"),
    ("judgebench", [pair(1, "arena")], "row 1: column 'source' = 'arena' must begin with one of mmlu-pro"),
    ("judgebench", [pair(1), pair(1)], "1 ids are there more than once, the first 'knowledge:p1'"),
    (
        "judgebench",
        [raw_rewardbench()],
        "row 1: no column 'source'; it has 'id', 'prompt', 'chosen'",
    ),
    (
        "judgebench",
        [json.dumps(pair(1)), json.dumps(pair(2))[:70]],
        "data.jsonl: row 2 is not valid JSON",
    ),
    ("judgebench", [], "has no rows"),
    ("rewardbench", [raw_rewardbench(subset="anthropic_hhh")], "column 'subset' = 'anthropic_hhh' must be one of"),
    ("rewardbench", [raw_rewardbench(chosen="")], "row 1: column 'chosen' is empty"),
    ("rewardbench", [raw_rewardbench(prompt=None)], "row 1: column 'prompt' is null"),
    ("rewardbench2", [raw_rewardbench2(rejected=["b", ""])], r"row 1: column 'rejected\[1\]' is empty"),
    ("rewardbench2", [raw_rewardbench2(rejected=["b"])], "'total_completions' = 4, but it has 2 responses"),
    ("rewardbench2", [raw_rewardbench2(num_correct=2)], "'num_correct' = 2, but 'chosen' has 1 responses"),
    ("rewardbench2", [raw_rewardbench2(subset="Ties")], "must be ref:<prompt> or tied:<prompt>"),
    ("rmbench", [raw_rewardbench2(domain="chat")], "row 1: column 'chosen' must be a list of 3 texts"),
    ("rmbench", [raw_rewardbench2(chosen=["a"] * 3, rejected=["a"] * 3)], "no column 'domain' that begins with chat"),
]


@pytest.mark.parametrize(("name", "rows", "said"), BAD)
def test_bad_data_name_file_row_and_column(tmp_path, name, rows, said):
    file = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(ConfigError, match=said) as error:
        BENCHMARKS[name].rows(file)
    assert file in str(error.value) and name in str(error.value)


def test_files_that_are_cut_off_or_of_another_format(tmp_path):
    whole = json.dumps([pair(1), pair(2)])
    (tmp_path / "cut.json").write_text(whole[:-20])
    pd.DataFrame([pair(1), pair(2)]).to_parquet(tmp_path / "good.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-50])
    (tmp_path / "parquet.jsonl").write_bytes((tmp_path / "good.parquet").read_bytes())
    (tmp_path / "table.csv").write_text("a,b\n")
    for name, said in {
        "cut.json": "it is not valid JSON",
        "cut.parquet": "is not a readable Parquet file",
        "parquet.jsonl": "row 1 is not UTF-8 text|row 1 is not valid JSON",
        "table.csv": "must end in .jsonl, .jsonl.gz, .json, .json.gz, .parquet",
        "none.jsonl": "no such file",
    }.items():
        with pytest.raises(ConfigError, match=said):
            BENCHMARKS["judgebench"].rows(str(tmp_path / name))
    (tmp_path / "good.json").write_text(whole)
    read = BENCHMARKS["judgebench"].rows
    assert (
        read(str(tmp_path / "good.json")) == read(str(tmp_path / "good.parquet"))
        and len(read(str(tmp_path / "good.json"))) == 2
    )


def test_an_unknown_benchmark_names_the_others(tmp_path):
    with pytest.raises(ConfigError, match="benchmark = 'x': choose from rewardbench, .*judgebench"):
        score_file("x", "d", "s")


# the command line


@needs(not (SHARED / "alpaca_eval").is_dir(), reason="the real benchmark files are not in ../shared/benchdata")
def test_commands_print_the_published_figures():
    scores = SHARED / "judgebench/scores/skywork-reward-llama-3.1-8b.jsonl"
    words = ["score", "--benchmark", "judgebench", "--data", SHARED / "judgebench/gpt.jsonl", "--scores", scores]
    done = CliRunner().invoke(app, list(map(str, words)))
    figures = json.loads(done.stdout)
    assert round(figures["overall"], 2) == 62.29 and {"parts", "n", "ci95", "macro"} <= set(figures)
    annotations = SHARED / "alpaca_eval/ann_claude-2.json"
    done = CliRunner().invoke(app, ["alpaca", "--annotations", str(annotations)])
    figures = json.loads(done.stdout)
    assert round(figures["win_rate"], 6) == 17.188240 and "length_controlled_winrate" not in figures
    assert "length_controlled_winrate is left out" in done.stderr
    done = CliRunner().invoke(app, ["score", "--benchmark", "judgbench", "--data", "x", "--scores", "y"])
    assert done.exit_code == 2 and "benchmark = 'judgbench': choose from" in done.stderr
