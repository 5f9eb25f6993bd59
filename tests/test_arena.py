"""Arena-Hard v2.0: hand-made judgments against a transcription of the protocol, and the real questions."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from savelib.benchmarks import statistics
from savelib.benchmarks.judged import arena
from savelib.config import ConfigError

REAL = Path(__file__).parents[2] / "shared" / "benchdata" / "arena_hard" / "v2.0_question.jsonl"
real = pytest.mark.skipif(not REAL.is_file(), reason=f"Arena-Hard's questions are not at {REAL}")


def record(uid, *labels, model="ours", **more):
    games = [{"score": label} if label in (None, *arena.VERDICTS) else {"judgment": label} for label in labels]
    named = {"uid": uid, "category": "hard_prompt", "judge": "j", "model": model, "baseline": "base"}
    return named | {"games": games} | more


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(tmp_path, rows, **more):
    return arena.arena_json(write(tmp_path / "judgments.jsonl", rows), **more)


def naive(records):
    """Every battle of a list of (label of game 1, label of game 2), from the model's side: game 1 has it as B."""
    wins = []
    for first, second in records:
        for label, ours in ((first, "B"), (second, "A")):
            times = 3 if ">>" in label else 1
            wins += [0.5 if "=" in label else float(label[0] == ours)] * times  # the winner stands before > or >>
    return wins


@pytest.mark.parametrize(
    "labels, score",
    [
        (("B>A", "A>B"), 100),
        (("A>B", "B>A"), 0),
        (("A>B", "A>B"), 50),  # A wins both times: the judge goes by the place
        (("B>>A", "B>A"), 75),  # three battles won, one lost
        (("A>>B", "A>B"), 25),
        (("A=B", "A>>B"), 87.5),
        (("A=B", "B>>A"), 12.5),
    ],
)
def test_one_question_by_hand(tmp_path, labels, score):
    found, _ = scored(tmp_path, [record("q", *labels)])
    assert found["score"] == pytest.approx(score) and 100 * np.mean(naive([labels])) == pytest.approx(score)


def test_score_counts_and_intervals(tmp_path):
    rng = np.random.default_rng(0)
    labels = [tuple(rng.choice(list(arena.VERDICTS), 2, p=[0.1, 0.3, 0.1, 0.3, 0.2])) for _ in range(200)]
    rows = [record(f"q{i}", *pair) for i, pair in enumerate(labels)]
    rows += [record("null", None, "A>B"), record("text", "no verdict here", "[[B>A]]"), record("gone", "A>B", "A>B")]
    rows[-1]["games"][0] = None
    found, notes = scored(tmp_path, rows)
    battles = np.array(naive(labels))
    assert found["score"] == pytest.approx(100 * battles.mean())
    flat = [label for pair in labels for label in pair]
    assert found["counts"] == {
        "questions": 203, "dropped_questions": 3, "games_without_verdict": 3, "battles": len(battles),
        "strong_verdicts": sum(">>" in x for x in flat), "draws": flat.count("A=B"),
    }  # fmt: skip
    assert any("3 of 203 questions" in note for note in notes) and any("203 judged questions" in note for note in notes)
    # the official interval: battles by themselves
    drawn = [battles[rng.integers(len(battles), size=len(battles))].mean() for _ in range(4000)]
    assert found["ci90"] == pytest.approx(100 * np.quantile(drawn, [0.05, 0.95]), abs=0.25)
    # ours: questions
    sums = np.array([[sum(naive([pair])), len(naive([pair]))] for pair in labels])
    draws = sums[rng.integers(200, size=(4000, 200))].sum(1)
    assert found["ci95"] == pytest.approx(100 * np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975]), abs=0.4)


def test_verdicts_in_texts(tmp_path):
    """The last label counts, in the text or in the answer of a judgment; other spellings of a label are the same."""
    texts = ["First [[A>B]]. No: [[B>>A]]", "My verdict: [[b>>a]]", "[[A<<B]]"]
    for text in texts:
        found, _ = scored(
            tmp_path, [record("q", "", "") | {"games": [{"judgment": {"answer": text}}, {"score": "B<A"}]}]
        )
        assert found["score"] == 100 and found["counts"]["battles"] == 4
    with pytest.raises(ConfigError, match="no question of hard_prompt has two verdicts for .'ours'.; the judge failed"):
        scored(tmp_path, [record("q", "[[A]]", "garbage"), record("r", "A>B", "A>>>B")])


def test_bad_judgments(tmp_path):
    good = [record("q1", "A>B", "A>B"), record("q2", "A>B", "A>B")]
    questions = write(
        tmp_path / "questions.jsonl", [{"uid": f"q{i}", "category": "hard_prompt", "prompt": "p"} for i in (1, 2)]
    )
    for rows, said in (
        ([*good, good[0]], r"1 questions are there twice.*'q1'"),
        ([*good, record("q9", "A>B", "A>B")], "1 are not among the 2 questions .'q9'"),
        (good[:1], "1 of 2 questions of hard_prompt are missing, the first 'q2'"),
        ([*good[:1], good[1] | {"judge": "another"}], "several judges"),
        ([*good[:1], good[1] | {"baseline": "another"}], "several baselines"),
    ):
        with pytest.raises(ConfigError, match=said):
            scored(tmp_path, rows, questions=questions)
    path = write(tmp_path / "cut.jsonl", good)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match="cut.jsonl: row 2 is not valid JSON"):
        arena.arena_json(path)
    with pytest.raises(ConfigError, match="no.jsonl"):
        arena.arena_json(tmp_path / "no.jsonl")
    with pytest.raises(ConfigError, match="other.jsonl'.*2 of 2 rows are bad.*row 1: no column 'uid'"):
        scored(tmp_path, good, questions=write(tmp_path / "other.jsonl", [{"question_id": 1}, {"question_id": 2}]))


def test_categories_and_models(tmp_path):
    rows = [record("q1", "B>A", "A>B"), record("q2", "B>A", "B>A"),
            record("c1", "A>B", "B>A", category="creative_writing", baseline=None)]  # fmt: skip
    found, _ = scored(tmp_path, rows)
    assert (found["category"], found["score"]) == ("hard_prompt", 75)
    assert found["categories"]["creative_writing"]["score"] == 0
    assert found["categories"]["creative_writing"]["baseline"] == "gemini-2.0-flash-001"
    found, _ = scored(tmp_path, rows, category="creative_writing")
    assert found["score"] == 0
    both, _ = scored(tmp_path, [*rows, record("q1", "A>B", "B>A", model="other")])
    assert both["models"]["ours"]["score"] == 75 and both["models"]["other"]["score"] == 0


def test_policies_are_compared_on_the_same_questions():
    labels = list(arena.VERDICTS)
    rng = np.random.default_rng(1)
    rows = [record(f"q{i}", *rng.choice(labels, 2, p=p), model=m) for i in range(150)
            for m, p in (("ours", [0.1, 0.2, 0.2, 0.3, 0.2]), ("other", [0.2, 0.3, 0.2, 0.2, 0.1]))]  # fmt: skip
    judged, _, _ = arena.read_judgments(rows)
    ours, other = (arena.result(judged["hard_prompt"][m]) for m in ("ours", "other"))
    found = statistics.compare(ours, other)
    pairs = {m: [tuple(g["score"] for g in r["games"]) for r in rows if r["model"] == m] for m in ("ours", "other")}
    assert found.difference == pytest.approx(100 * (np.mean(naive(pairs["ours"])) - np.mean(naive(pairs["other"]))))
    assert found.low < found.difference < found.high


# ---- style control


def style_rows(models, n=120, seed=0, pull=0.0):
    """Judgments and answers; `pull`: how much the judge likes what is longer."""
    rng = np.random.default_rng(seed)
    rows, answers = [], []
    for name in ("base", *models):
        for i in range(n):
            length = int(rng.integers(80, 400) * (1.6 if name == "long" else 1))
            headers, lists, bold = (int(rng.integers(0, most)) for most in (5, 9, 9))
            metadata = {"token_len": length, "header_count": {"h1": headers, "h2": 1}}
            metadata |= {"list_count": {"ordered": lists, "unordered": 2}, "bold_count": {"**": bold, "__": 0}}
            answers.append({"uid": f"q{i}", "model": name, "messages": [], "metadata": metadata})
    length = {(a["model"], a["uid"]): a["metadata"]["token_len"] for a in answers}
    for name in models:
        for i in range(n):
            a, b = length[name, f"q{i}"], length["base", f"q{i}"]
            p = 1 / (1 + np.exp(-pull * (a - b) / (a + b) - rng.normal(0, 0.5)))
            labels = []
            for side in "BA":
                won, strong = rng.random() < p, rng.random() < 0.3
                other = "A" if side == "B" else "B"
                winner, loser = (side, other) if won else (other, side)
                labels.append("A=B" if rng.random() < 0.15 else f"{winner}{'>>' if strong else '>'}{loser}")
            rows.append(record(f"q{i}", *labels, model=name))
    return rows, answers


def transcribed_style_scores(rows, answers, models):
    """Bradley-Terry over exploded battles with a column for the baseline too, by L-BFGS from 0.5."""
    count = {}
    for a in answers:
        m = a["metadata"]
        count[a["model"], a["uid"]] = [m["token_len"]] + [
            sum(m[k].values()) for k in ("header_count", "list_count", "bold_count")
        ]
    names, lines, wins = sorted({*models, "base"}), [], []
    for row in rows:
        us, them = count[row["model"], row["uid"]], count["base", row["uid"]]
        feature = [(us[0] - them[0]) / (us[0] + them[0])]
        for k in (1, 2, 3):
            one, two = us[k] / us[0], them[k] / them[0]
            feature.append((one - two) / (one + two + 1))
        for win in naive([tuple(g["score"] for g in row["games"])]):
            lines.append([float(n == row["model"]) - float(n == "base") for n in names] + feature)
            wins.append(win)
    x, y = np.array(lines), np.array(wins)
    raw = x[:, len(names) :].copy()
    x[:, len(names) :] = (raw - raw.mean(0)) / raw.std(0, ddof=1)

    def loss(w):
        z = x @ w
        return (np.logaddexp(0, z) - y * z).sum(), x.T @ (1 / (1 + np.exp(-z)) - y)

    w = minimize(loss, np.full(x.shape[1], 0.5), jac=True, method="L-BFGS-B", options={"gtol": 1e-8, "ftol": 1e-15}).x
    base, slope = w[names.index("base")], w[len(names) :] / raw.std(0, ddof=1)
    return {m: (100 / (1 + np.exp(base - w[names.index(m)])),
                100 / (1 + np.exp(base - w[names.index(m)] + slope @ raw.mean(0)))) for m in models}  # fmt: skip


@pytest.mark.parametrize("models", [("ours",), ("ours", "long")])
def test_style_control_against_a_transcription(tmp_path, models):
    rows, answers = style_rows(models, pull=3.0)
    found, notes = scored(tmp_path, rows, answers=write(tmp_path / "answers.jsonl", answers))
    by_model = found.get("models") or {models[0]: found}
    for name, (score, equal) in transcribed_style_scores(rows, answers, models).items():
        assert by_model[name]["style_controlled_score"] == pytest.approx(score, abs=1e-3)
        assert by_model[name]["equal_style_score"] == pytest.approx(equal, abs=1e-3)
        low, high = by_model[name]["style_controlled_ci90"]
        assert low < score < high and high - low < 16
    assert any("one model's battles" in note for note in notes) == (len(models) == 1)


def test_style_control_takes_off_what_length_gave(tmp_path):
    """A judge that likes length alone: the long model wins, but not at equal style."""
    rows, answers = style_rows(("long",), n=400, pull=4.0)
    found, _ = scored(tmp_path, rows, answers=write(tmp_path / "answers.jsonl", answers))
    assert found["score"] > 60 and found["style_controlled_score"] > 60
    assert abs(found["equal_style_score"] - 50) < 6


def test_style_control_needs_all_metadata(tmp_path):
    rows, answers = style_rows(("ours",), n=20)
    for keep in (lambda a: a["model"] == "ours", lambda a: (a["model"], a["uid"]) != ("base", "q3")):
        found, notes = scored(tmp_path, rows, answers=write(tmp_path / "a.jsonl", filter(keep, answers)))
        assert "style_controlled_score" not in found and any("left out" in note for note in notes)
    del answers[5]["metadata"]["list_count"]
    found, notes = scored(tmp_path, rows, answers=[write(tmp_path / "a.jsonl", answers)])
    assert any("1 of 40 answers have no style metadata" in note and "list_count" in note for note in notes)
    answers[5]["metadata"] |= {"list_count": 2, "token_len": 0}
    found, notes = scored(tmp_path, rows, answers=write(tmp_path / "a.jsonl", answers))
    assert found["score"] > 0 and any("1 of 40 answers have no style metadata or no token" in note for note in notes)
    rows, answers = style_rows(("ours",), n=3)
    found, notes = scored(tmp_path, rows, answers=write(tmp_path / "a.jsonl", answers))
    assert "style_controlled_score" not in found and any("too few questions" in note for note in notes)


def test_style_control_of_a_model_that_always_wins(tmp_path):
    rows, answers = style_rows(("ours",), n=50)
    rows = [record(row["uid"], "B>A", "A>B") for row in rows]
    found, _ = scored(tmp_path, rows, answers=write(tmp_path / "a.jsonl", answers))
    assert found["style_controlled_score"] == pytest.approx(100)


def test_style_that_never_varies(tmp_path):
    """A feature that is the same everywhere has no slope, and the score is the plain one."""
    rows, answers = style_rows(("ours",), n=40)
    for answer in answers:
        answer["metadata"] = {"token_len": 100, "header_count": 0, "list_count": 2, "bold_count": {"**": 1}}
    found, _ = scored(tmp_path, rows, answers=write(tmp_path / "a.jsonl", answers))
    assert found["style_controlled_score"] == pytest.approx(found["score"])
    assert found["equal_style_score"] == pytest.approx(found["score"])


@real
def test_real_questions(tmp_path):
    questions = arena.read_questions(REAL)
    assert len(questions) == 750
    assert {c: list(questions.values()).count(c) for c in arena.QUESTIONS} == arena.QUESTIONS
    rows = [record(uid, "B>A", "A>B", category=None) for uid, c in questions.items() if c == "hard_prompt"]
    found, notes = scored(tmp_path, rows, questions=REAL)
    assert (found["score"], found["counts"]["questions"]) == (100, 500)
    assert notes == [n for n in notes if "style" in n]
    with pytest.raises(ConfigError, match="1 of 500 questions of hard_prompt are missing"):
        scored(tmp_path, rows[1:], questions=REAL)


def test_style_differences_by_hand():
    """Densities are counts a token: 30 / 10 against 30 / 30, and their difference is divided by their sum plus 1."""
    found = arena.style_differences(np.array([[10.0, 30, 0, 5]]), np.array([[30.0, 30, 0, 0]]))
    assert found[0] == pytest.approx([-0.5, (3 - 1) / (3 + 1 + 1), 0, 0.5 / 1.5])
