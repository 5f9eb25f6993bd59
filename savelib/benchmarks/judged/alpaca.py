"""AlpacaEval 2 (arXiv 2404.04475; tatsu-lab/alpaca_eval): win rate and length-controlled win rate, in percent.

A judge's preference is 1 (the baseline's output_1 wins) to 2 (the model's output_2 wins); 0 is a draw.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import norm

from savelib.benchmarks.statistics import Result, Stratum
from savelib.config import ConfigError, check_names, shown
from savelib.data.files import Record, checked, column, file_rows, number

BASELINE = "gpt4_1106_preview"
INSTRUCTIONS = 805
GAMED_WEIGHT = 0.1  # of a row of one of the two gamed baselines: 0.2 / 2
LENGTH, DIFFICULTY, OWN = "np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)"
FIELDS = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "preference")


def read_annotations(path: str | Path, instructions: int = INSTRUCTIONS) -> pd.DataFrame:
    """The judge's annotations of one model (a JSON list as alpaca_eval writes it, or JSONL), one row an instruction.

    Raises ConfigError unless there is each instruction once, `instructions` of them, of one model and one baseline.
    """
    where = f"annotations = {str(path)!r}"
    rows = checked(file_rows(path, "annotations"), _annotation, where)
    doubled = [text for text, count in Counter(row["instruction"] for row in rows).items() if count > 1]
    if doubled:
        raise ConfigError(f"{where}: {len(doubled)} instructions are there twice, the first {shown(doubled[0])}")
    for field in ("generator_1", "generator_2"):
        names = sorted({row[field] for row in rows})
        if len(names) > 1:
            raise ConfigError(f"{where}: {field} has {len(names)} names, {', '.join(names[:3])}; give one model's rows")
    if len(rows) != instructions:
        raise ConfigError(f"{where} has {len(rows)} of {instructions} instructions; annotate all, a part has no total")
    return pd.DataFrame(rows, columns=FIELDS)


def _annotation(row: Record, _: str) -> Record:
    """The fields that are used; an output may be empty, and a preference may be missing (the judge gave none)."""
    for field in set(FIELDS) - {"preference"}:
        if not isinstance(column(row, field), str):
            raise ConfigError(f"column {field!r} is {shown(row[field])}, not a text")
    value = row.get("preference")
    if value is not None and value == value and number(value, "column 'preference'") != 0 and not 1 <= value <= 2:
        raise ConfigError(f"column 'preference' is {value}; it is 1 to 2, 0 for a draw, or missing")
    return {field: row.get(field) for field in FIELDS}


def credit(annotations: pd.DataFrame) -> pd.Series:
    """What the model gets of each instruction, 0 to 1; a draw .5; NaN where the judge gave nothing."""
    return annotations["preference"].astype(float).replace(0.0, 1.5) - 1


def win_rate(annotations: pd.DataFrame) -> dict[str, float]:
    """Win rate and its standard error (ddof 1) in percent, over the n rows that have a preference."""
    given = credit(annotations).dropna()
    if len(given) < 2:
        raise ConfigError(
            f"preference: {len(given)} of {len(annotations)} rows have one; the judge failed, run it again"
        )
    rate, error = 100 * given.mean(), 100 * given.sem()
    half = norm.ppf(0.975) * error
    return {
        "win_rate": float(rate),
        "standard_error": float(error),
        "ci95": [float(rate - half), float(rate + half)],
        "n": len(given),
        "dropped": len(annotations) - len(given),
        "wins": int((given > 0.5).sum()),
        "losses": int((given < 0.5).sum()),
        "draws": int((given == 0.5).sum()),
        "average_length": float(annotations["output_2"].str.len().mean()),
    }


def result(annotations: pd.DataFrame) -> Result:
    """The win rate as a Result, to be compared with another model's on the same instructions."""
    given = credit(annotations).dropna()
    ids = annotations.loc[given.index, "instruction"].tolist()
    stratum = Stratum("win_rate", 1.0, ids, given.to_numpy()[:, None])
    return Result([stratum], {"win_rate": 100 * stratum.value()}, {"rows": len(given)})


def read_table(path: str | Path, *columns: str) -> pd.DataFrame:
    """A CSV file that must have these columns of numbers, each row filled; a preference may be missing."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as CSV: {' '.join(str(error).split())}") from None
    missing = [c for c in columns if c not in table]
    if missing:
        raise ConfigError(f"{str(path)!r} has no column {', '.join(missing)}; it has {', '.join(map(str, table))}")
    for name in columns:
        numbers = pd.to_numeric(table[name], errors="coerce")
        bad = ~np.isfinite(numbers) & ~(table[name].isna() & (name == "preference"))
        if bad.any():
            first = f"the first is row {bad.argmax() + 1}: {table[name][bad.argmax()]}"
            raise ConfigError(f"{str(path)!r}: {bad.sum()} of {len(table)} rows have no number in {name}, {first}")
    return table


def in_order(annotations: pd.DataFrame, difficulty: pd.DataFrame) -> pd.DataFrame:
    """The annotations in the canonical order of `difficulty`, with its column. By text where it has `instruction`."""
    if "index" in difficulty:
        difficulty = difficulty.sort_values("index")
    values = difficulty[DIFFICULTY].to_numpy()
    if "instruction" not in difficulty:
        if len(annotations) != len(values):
            raise ConfigError(f"difficulty has {len(values)} rows, annotations {len(annotations)}; give all of both")
        return annotations.reset_index(drop=True).assign(**{DIFFICULTY: values})
    known = dict(zip(difficulty["instruction"], range(len(values)), strict=True))
    place = annotations["instruction"].map(known)
    missing = len(known) - place.nunique()
    if place.isna().any() or missing:
        raise ConfigError(
            f"instructions: {place.isna().sum()} of {len(annotations)} annotations have one that difficulty lacks, "
            f"{missing} of {len(known)} are not annotated; both files must be of the same set"
        )
    out = annotations.assign(place=place.astype(int)).sort_values("place", ignore_index=True).drop(columns="place")
    return out.assign(**{DIFFICULTY: values})


def length_controlled(annotations: pd.DataFrame, gamed: pd.DataFrame) -> tuple[float, dict[str, float]]:
    """(length-controlled win rate in percent, the model's weights), fitted with the gamed baselines' rows.

    annotations: in canonical order, with `instruction_difficulty` (`in_order`). gamed: `preference` in [0, 1],
    `std_delta_len`, `instruction_difficulty`. Logistic regression of the preference on tanh of the standardised
    length difference, the difficulty, and an intercept that gamed rows lack; LC is its mean at no length difference.
    """
    difference = annotations["output_1"].str.len() - annotations["output_2"].str.len()
    if not difference.std() > 0:
        raise ConfigError(f"output_1, output_2: every length difference is {difference.iloc[0]}; no length to control")
    if not gamed["preference"].dropna().between(0, 1).all():
        raise ConfigError("gamed: preference must be 0 to 1 (the judge's minus 1)")
    gamed = gamed.reset_index(drop=True)
    own = pd.DataFrame(
        {
            "preference": credit(annotations),
            "std_delta_len": difference / difference.std(),
            DIFFICULTY: annotations[DIFFICULTY],
        }
    )
    rows = pd.concat([gamed[own.columns].assign(own=0.0), own.assign(own=1.0)], ignore_index=True)
    rows = rows[rows["preference"].notna()]
    features = np.column_stack([np.tanh(rows["std_delta_len"]), rows[DIFFICULTY], rows["own"]])
    fitted = _fit(features, rows["preference"].to_numpy(), np.where(rows["own"] == 1, 1.0, GAMED_WEIGHT))
    weights = dict(zip((LENGTH, DIFFICULTY, OWN), map(float, fitted), strict=True))
    return 100 * float(expit(weights[DIFFICULTY] * annotations[DIFFICULTY] + weights[OWN]).mean()), weights


def _fit(features: np.ndarray, preference: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """L1 logistic regression on soft labels: each row stands there twice, as 1 and as 0, weighted by its preference.

    C is one of scikit-learn's ten, by 5-fold cross-validation; a row's two copies are in one fold, and a fold's loss
    is divided by its number of rows, not by their weights.
    """

    import sklearn  # slow to import
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    def loss(label: np.ndarray, predicted: np.ndarray, soft: np.ndarray) -> float:
        return -float(np.mean(soft * np.log(np.clip(np.where(label == 1, predicted, 1 - predicted), 1e-15, 1))))

    n = len(features)
    soft = np.concatenate([preference, 1 - preference]) * np.concatenate([weight, weight])
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(loss, response_method="predict_proba", greater_is_better=False)
        model = LogisticRegressionCV(
            l1_ratios=(1,),
            solver="liblinear",
            fit_intercept=False,
            random_state=123,
            cv=GroupKFold(5),
            scoring=scorer.set_score_request(soft=True),
            use_legacy_attributes=False,
        ).set_fit_request(sample_weight=True)
        model.fit(
            np.tile(features, (2, 1)),
            np.repeat([1, 0], n),
            sample_weight=soft,
            soft=soft,
            groups=np.tile(np.arange(n), 2),
        )
    return model.coef_[0]


def predicted_lc(weights: pd.DataFrame, model: str, difficulty: pd.DataFrame, baseline: str = BASELINE) -> float:
    """The LC in percent that published weights (one row a model, by name) predict against `baseline`."""
    for name in (model, baseline):
        check_names([name], weights.index)
    if not weights.index.is_unique:
        raise ConfigError(f"weights: {weights.index.duplicated().sum()} models are there twice; leave one row of each")
    of = weights.loc[model] - weights.loc[baseline]
    return 100 * float(expit(of[OWN] + of[DIFFICULTY] * difficulty[DIFFICULTY]).mean())


def read_weights(path: str | Path) -> pd.DataFrame:
    """alpaca_eval's weights/.../baseline_*.csv: a model's name in the first column."""
    table = read_table(path, LENGTH, DIFFICULTY, OWN)
    return table.set_index(table.columns[0])


def alpaca_json(
    annotations: str | Path | None = None,
    difficulty: str | Path | None = None,
    gamed: str | Path | None = None,
    weights: str | Path | None = None,
    model: str | None = None,
    instructions: int = INSTRUCTIONS,
) -> tuple[dict[str, Any], list[str]]:
    """(figures, notes) of the files given. `length_controlled_winrate` only where it can be known:

    annotations + gamed [+ difficulty, else the gamed rows'] is a fit; weights + model + difficulty a prediction.
    """
    if bool(weights) != bool(model) or (weights and not difficulty):
        raise ConfigError(
            f"weights = {weights}, model = {model}, difficulty = {difficulty}: a prediction needs all three"
        )
    if (gamed and not annotations) or (gamed and weights) or not (annotations or weights):
        raise ConfigError(
            f"annotations = {annotations}, gamed = {gamed}, weights = {weights}: give annotations, with "
            "or without gamed or weights, or weights alone"
        )
    out: dict[str, Any] = {}
    notes = []
    hardness = read_table(difficulty, DIFFICULTY) if difficulty else None
    if hardness is not None and len(hardness) != instructions:
        raise ConfigError(
            f"difficulty {str(difficulty)!r} has {len(hardness)} of {instructions} instructions; give all"
        )
    if annotations:
        table = read_annotations(annotations, instructions)
        if gamed:
            regulariser = read_table(gamed, "index", "preference", "std_delta_len", DIFFICULTY)
            if hardness is None:
                hardness = regulariser.drop_duplicates("index")[["index", DIFFICULTY]]
        if hardness is not None:
            table = in_order(table, hardness)
        out = {"model": table["generator_2"].iloc[0], "baseline": table["generator_1"].iloc[0]} | win_rate(table)
        if out["dropped"]:
            notes.append(f"{out['dropped']} of {len(table)} annotations have no preference and are left out")
        if empty := int((table["output_2"].str.strip() == "").sum()):
            notes.append(f"{empty} of the model's {len(table)} outputs are empty; they count as judged")
        if gamed:
            out["length_controlled_winrate"], out["weights"] = length_controlled(table, regulariser)
            out["length_controlled_from"] = "fit"
        elif not weights:
            notes.append(
                "length_controlled_winrate is left out: its fit needs the rows of the two gamed baselines "
                "(df_gamed.csv of the hub's tatsu-lab/alpaca_eval); without them it is off by 0.5 to 2.5"
            )
    if weights:
        if out and out["model"] != model:
            notes.append(f"the annotations are of {out['model']}, the weights of {model}")
        out |= {
            "length_controlled_winrate": predicted_lc(read_weights(weights), model, hardness),
            "length_controlled_from": f"published weights of {model}",
        }
    return out, notes
