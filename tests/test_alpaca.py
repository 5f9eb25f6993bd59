"""AlpacaEval 2: published figures where the real files are, and the length-controlled fit by another optimiser."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from savelib.benchmarks import statistics
from savelib.benchmarks.judged import alpaca
from savelib.config import ConfigError

REAL = Path(__file__).parents[2] / "shared" / "benchdata" / "alpaca_eval"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"AlpacaEval's files are not in {REAL}")
DIFFICULTY = REAL / "instruction_difficulty_recovered.csv"
WEIGHTS = REAL / "glm_weights_length_controlled_v1_baseline_gpt4_1106_preview.csv"


def leaderboard():
    return pd.read_csv(REAL / "leaderboard_weighted_alpaca_eval_gpt4_turbo.csv", index_col=0)


def annotation(i=0, **values):
    row = {"instruction": f"do {i}", "output_1": "a" * (50 + 7 * i), "output_2": "b" * (20 + 11 * i)}
    return row | {"generator_1": "base", "generator_2": "model", "preference": 1.25} | values


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


@real
@pytest.mark.parametrize(
    "name, rate", [("gemma-7b-it", 6.937294), ("claude-2", 17.188240), ("vicuna-7b-v1.5", 4.797494)]
)
def test_published_win_rates(name, rate):
    file = next(REAL.glob(f"ann_*{name}.json"))
    found, notes = alpaca.alpaca_json(file)
    published = leaderboard().loc[name]
    assert found["win_rate"] == pytest.approx(rate, abs=1e-6)
    assert found["win_rate"] == pytest.approx(published["win_rate"], abs=1e-9)
    assert found["standard_error"] == pytest.approx(published["standard_error"], abs=1e-9)
    assert [found[k] for k in ("n", "wins", "losses", "draws")] == [
        published[k] for k in ("n_total", "n_wins", "n_wins_base", "n_draws")
    ]
    assert int(found["average_length"]) == published["avg_length"]
    assert "length_controlled_winrate" not in found and "gamed" in notes[0]


@real
def test_published_weights_predict_lc():
    weights, difficulty = alpaca.read_weights(WEIGHTS), alpaca.read_table(DIFFICULTY, "instruction_difficulty")
    published = leaderboard()["length_controlled_winrate"].drop(alpaca.BASELINE)
    names = [name for name in published.index if name in weights.index]
    error = np.array([alpaca.predicted_lc(weights, name, difficulty) - published[name] for name in names])
    assert (len(names), (abs(error) < 1e-6).sum()) == (198, 188)
    assert alpaca.predicted_lc(weights, alpaca.BASELINE, difficulty) == 50
    found, _ = alpaca.alpaca_json(weights=WEIGHTS, model="claude-2", difficulty=DIFFICULTY)
    assert found["length_controlled_winrate"] == pytest.approx(28.155196, abs=1e-5)
    with pytest.raises(ConfigError, match="'claude2'.*did you mean 'claude-2'"):
        alpaca.alpaca_json(weights=WEIGHTS, model="claude2", difficulty=DIFFICULTY)


@real
def test_real_annotations_in_canonical_order(tmp_path):
    """The order of the file does not matter where the difficulty says which instruction is which."""
    table, difficulty = alpaca.read_annotations(REAL / "ann_claude-2.json"), pd.read_csv(DIFFICULTY)
    ordered = alpaca.in_order(table.sample(frac=1, random_state=0), difficulty.sample(frac=1, random_state=1))
    assert ordered["instruction"].tolist() == table["instruction"].tolist()
    assert (ordered["instruction_difficulty"].to_numpy() == difficulty["instruction_difficulty"].to_numpy()).all()
    text = (REAL / "ann_claude-2.json").read_text()
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match="cut.json.*JSON"):
        alpaca.alpaca_json(tmp_path / "cut.json")
    with pytest.raises(ConfigError, match="804 of 805"):
        alpaca.alpaca_json(write(tmp_path / "short.json", json.loads(text)[1:]))


@real
def test_policies_are_compared_on_the_same_instructions():
    a, b = (alpaca.result(alpaca.read_annotations(REAL / f"ann_{name}.json")) for name in ("claude-2", "gemma-7b-it"))
    found = statistics.compare(a, b)
    assert found.difference == pytest.approx(17.188240 - 6.937294, abs=1e-6) and found.resolved and found.n == 805
    low, high = statistics.interval(a)
    assert (low, high) == pytest.approx((17.188 - 1.96 * 1.1748, 17.188 + 1.96 * 1.1748), abs=0.15)


def test_win_rate_by_hand():
    preferences = [1, 2, 0, 1.75, None, float("nan")]
    found = alpaca.win_rate(pd.DataFrame([annotation(i, preference=p) for i, p in enumerate(preferences)]))
    given = [0, 1, 0.5, 0.75]
    assert found["win_rate"] == pytest.approx(56.25)
    assert found["standard_error"] == pytest.approx(100 * np.std(given, ddof=1) / 2)
    assert [found[k] for k in ("n", "dropped", "wins", "losses", "draws")] == [4, 2, 2, 1, 1]


def test_notes_count_what_is_missing_or_empty(tmp_path):
    rows = [annotation(i) for i in range(6)]
    rows[1]["preference"], rows[2]["output_2"], rows[3]["output_2"] = None, "", " \n"
    found, notes = alpaca.alpaca_json(write(tmp_path / "a.json", rows), instructions=6)
    assert found["n"] == 5 and found["dropped"] == 1
    assert any("1 of 6 annotations" in n for n in notes) and any("2 of the model's 6 outputs" in n for n in notes)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda rows: rows.append(rows[0]), "1 instructions are there twice, the first 'do 0'"),
        (lambda rows: rows.pop(), "5 of 6"),
        (lambda rows: rows[4].update(generator_2="other"), "generator_2 has 2 names"),
        (lambda rows: [row.update(preference=None) for row in rows], "0 of 6"),
        (lambda rows: rows.clear(), "has 0 of 6"),
        (lambda rows: rows.insert(0, "text"), "str, not an object"),
    ],
)
def test_bad_annotations(tmp_path, change, said):
    rows = [annotation(i) for i in range(6)]
    change(rows)
    with pytest.raises(ConfigError, match=said):
        alpaca.alpaca_json(write(tmp_path / "a.json", rows), instructions=6)


def test_bad_files_and_arguments(tmp_path):
    rows = write(tmp_path / "a.json", [annotation(i) for i in range(3)])
    difficulty = tmp_path / "d.csv"
    difficulty.write_text("index,instruction_difficulty,instruction\n0,1,do 0\n1,2,do 1\n2,3,do 7\n")
    with pytest.raises(ConfigError, match="1 of 3 annotations have one that difficulty lacks, 1 of 3 are not"):
        alpaca.alpaca_json(rows, difficulty, instructions=3)
    with pytest.raises(ConfigError, match="d.csv' has 3 of 4"):
        alpaca.alpaca_json(rows, difficulty, instructions=4)
    with pytest.raises(ConfigError, match="no column preference, std_delta_len"):
        alpaca.alpaca_json(rows, gamed=difficulty, instructions=3)
    difficulty.write_text("index,instruction_difficulty\n0,1\n1,\n2,3\n")
    with pytest.raises(ConfigError, match="1 of 3 rows have no number in instruction_difficulty, .* row 2: nan"):
        alpaca.alpaca_json(rows, difficulty, instructions=3)
    for bad in (
        {},
        {"weights": "w"},
        {"weights": "w", "model": "m"},
        {"gamed": "g"},
        {"annotations": "a", "model": "m"},
    ):
        with pytest.raises(ConfigError, match="needs all three|give annotations"):
            alpaca.alpaca_json(**bad)
    for missing in ({"annotations": tmp_path / "no.json"}, {"annotations": rows, "difficulty": tmp_path / "no.csv"}):
        with pytest.raises(ConfigError, match="no\\.(json|csv)"):
            alpaca.alpaca_json(**missing, instructions=3)


# ---- length control


def made(n=160, length=1.2, strength=-0.4, seed=0):
    """Annotations whose judge likes long outputs, the difficulty, and rows of two gamed baselines."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=n)
    one, two = rng.integers(50, 400, n), rng.integers(50, 600, n)
    scaled = (one - two) / (one - two).std(ddof=1)

    def judged(logit):
        return 1 / (1 + np.exp(-logit - rng.normal(size=len(logit))))

    own = judged(-length * np.tanh(scaled) + 0.7 * hard + strength)
    rows = [
        {"instruction": f"q{i}", "output_1": "x" * one[i], "output_2": "y" * two[i], "generator_1": "base",
         "generator_2": "model", "preference": 1 + own[i]}
        for i in range(n)
    ]  # fmt: skip
    gamed = []
    for name, shift in (("verbose", -1.0), ("concise", 1.0)):
        delta = rng.normal(shift, 0.5, n)
        liked = judged(-length * np.tanh(delta))
        gamed.append(pd.DataFrame({"model": name, "index": range(n), "preference": liked, "std_delta_len": delta,
                                   "instruction_difficulty": hard, "not_gamed_baseline": False}))  # fmt: skip
    difficulty = pd.DataFrame(
        {"index": range(n), "instruction_difficulty": hard, "instruction": [r["instruction"] for r in rows]}
    )
    return rows, difficulty, pd.concat(gamed)


def transcription(rows, hard, gamed):
    """LC, from the method's description: loops, its own L1 solver (w = u - v, both >= 0), folds dealt in turn."""
    delta = np.array([len(r["output_1"]) - len(r["output_2"]) for r in rows], float)
    delta /= np.sqrt(((delta - delta.mean()) ** 2).sum() / (len(delta) - 1))
    lines = [(np.tanh(g.std_delta_len), g.instruction_difficulty, 0.0, g.preference, 0.1) for g in gamed.itertuples()]
    lines += [(np.tanh(d), h, 1.0, r["preference"] - 1, 1.0) for d, h, r in zip(delta, hard, rows, strict=True)]
    lines = np.array([line for line in lines if not np.isnan(line[3])])
    x, y, w = lines[:, :3], lines[:, 3], lines[:, 4]

    def losses(coef, k):
        z = x[k] @ coef
        return w[k] * (y[k] * np.logaddexp(0, -z) + (1 - y[k]) * np.logaddexp(0, z))

    def fit(c, k):
        def objective(uv):
            coef = uv[:3] - uv[3:]
            slope = c * x[k].T @ (w[k] * (1 / (1 + np.exp(-x[k] @ coef)) - y[k]))
            return uv.sum() + c * losses(coef, k).sum(), np.concatenate([1 + slope, 1 - slope])

        uv = minimize(objective, np.zeros(6), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 6,
                      options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 5000}).x  # fmt: skip
        return uv[:3] - uv[3:]

    fold = np.arange(len(lines)) % 5
    sizes = 10.0 ** np.linspace(-4, 4, 10)
    total = [sum(losses(fit(c, fold != f), fold == f).sum() / (2 * (fold == f).sum()) for f in range(5)) for c in sizes]
    coef = fit(sizes[int(np.argmin(total))], np.arange(len(lines)))
    return 100 * np.mean(1 / (1 + np.exp(-(coef[1] * np.asarray(hard) + coef[2])))), coef


@pytest.mark.parametrize("seed, strength, n", [(0, -0.4, 160), (1, 1.0, 160), (2, 0.02, 25), (9, 0.02, 13)])
def test_length_controlled_against_a_transcription(tmp_path, seed, strength, n):
    """In the last case C depends on whether a fold's loss is divided by its rows or by their weights."""
    rows, difficulty, gamed = made(n=n, seed=seed, strength=strength)
    rows[3]["preference"] = float("nan")
    rows[4]["preference"] = 0
    gamed.to_csv(tmp_path / "gamed.csv", index=False)
    shuffled = [rows[i] for i in np.random.default_rng(9).permutation(n)]
    difficulty.to_csv(tmp_path / "d.csv", index=False)
    found, notes = alpaca.alpaca_json(
        write(tmp_path / "a.json", shuffled), tmp_path / "d.csv", tmp_path / "gamed.csv", instructions=n
    )
    rows[4]["preference"] = 1.5
    lc, coef = transcription(rows, difficulty["instruction_difficulty"].to_numpy(), gamed)
    assert list(found["weights"].values()) == pytest.approx(coef, abs=5e-3)
    assert found["length_controlled_winrate"] == pytest.approx(lc, abs=0.05)
    assert len(notes) == 1  # the missing preference
    without, _ = alpaca.alpaca_json(write(tmp_path / "b.json", rows), gamed=tmp_path / "gamed.csv", instructions=n)
    assert without["length_controlled_winrate"] == pytest.approx(found["length_controlled_winrate"], abs=1e-9)


def test_length_controlled_removes_length():
    """A judge that sees only length: the raw rate is far from 50, the controlled one is not."""
    rows, difficulty, gamed = made(n=400, length=2.0, strength=0.0, seed=4)
    table = alpaca.in_order(pd.DataFrame(rows), difficulty)
    lc, weights = alpaca.length_controlled(table, gamed)
    assert weights[alpaca.LENGTH] < -1
    assert abs(alpaca.win_rate(table)["win_rate"] - 50) > 8 and abs(lc - 50) < 4


def test_no_length_to_control():
    rows, difficulty, gamed = made(n=20)
    table = alpaca.in_order(pd.DataFrame(rows), difficulty).assign(output_1="x", output_2="y")
    with pytest.raises(ConfigError, match="every length difference is 0"):
        alpaca.length_controlled(table, gamed)
    with pytest.raises(ConfigError, match="0 to 1"):
        alpaca.length_controlled(table.assign(output_1=table["instruction"]), gamed.assign(preference=1.5))


def test_predicted_lc_is_relative_to_the_baseline():
    columns = [alpaca.LENGTH, alpaca.DIFFICULTY, alpaca.OWN]
    weights = pd.DataFrame([[9, 0.5, 0.2], [5, 0.1, -0.3]], index=["m", "b"], columns=columns)
    found = alpaca.predicted_lc(weights, "m", pd.DataFrame({"instruction_difficulty": [1.0, -2.0]}), baseline="b")
    assert found == pytest.approx(50 * (1 / (1 + np.exp(-0.9)) + 1 / (1 + np.exp(0.3))))
    with pytest.raises(ConfigError, match="1 models are there twice"):
        alpaca.predicted_lc(pd.concat([weights, weights[:1]]), "m", pd.DataFrame(), baseline="b")
