"""The study on a real language model: its runs step by step, and gold where two runs have moved equally far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from savelib.benchmarks.statistics import interval_of_mean
from savelib.experiments.cells import Study
from savelib.paths import resolve, write_atomically
from savelib.runs.folder import read_metrics, read_samples

STEP_METRICS = (
    "gold/success_rate", "gold/pseudo_label_accuracy", "policy/kl", "policy/responses", "reward/mean",
    "reward/std_in_group", "filter/kept", "filter/valid_prompts", "value/lag", "response/tokens",
)  # fmt: skip
ENDS = {"eval/rm_accuracy": "held-out pairs", "eval/rm_accuracy_current": "current responses", "eval/gold": "gold"}
WINDOW = 5  # steps of a running mean: one step's gold is a share of few responses


def read_steps(folder: str | Path) -> pd.DataFrame:
    """steps.csv of a study's folder: one row per run and step. Made of the study's runs where it is not there."""
    return _made_once(Path(resolve(str(folder))), "steps.csv", _steps)


def read_responses(folder: str | Path) -> pd.DataFrame:
    """samples.csv of a study's folder: the logged responses of each run's first and last step."""
    return _made_once(Path(resolve(str(folder))), "samples.csv", _ends)


def _made_once(folder: Path, name: str, of: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
    if not (folder / name).is_file():
        runs = pd.read_csv(folder / "cells.csv")[["cell", "seed", "run_id"]].drop_duplicates()
        parts = [of(run.run_id).assign(cell=run.cell, seed=run.seed) for run in runs.itertuples()]
        table = pd.concat(parts, ignore_index=True)
        write_atomically(folder / name, table.to_csv(index=False, float_format="%.5g"))
    return pd.read_csv(folder / name)


def _steps(run: str) -> pd.DataFrame:
    metrics = read_metrics(run)
    return metrics.loc[metrics["step"] > 0, ["step", *(name for name in STEP_METRICS if name in metrics)]]


def _ends(run: str) -> pd.DataFrame:
    samples = read_samples(run)
    return samples[samples["step"].isin([samples["step"].min(), samples["step"].max()])]


def ends(courses: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Where each run began and ended, in percent: two tables by cell and seed, one column per measure of `ENDS`."""
    by_run = courses.sort_values("step")[["cell", "seed", *ENDS]].groupby(["cell", "seed"])
    first, last = (at.mul(100).rename(columns=ENDS) for at in (by_run.first(), by_run.last()))
    return first, last


def apart(study: Study, last: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By measure of `ENDS`: `paired` with the study's reference, cells in the study's order. last: of `ends`."""
    order = [cell.name for cell in study.cells if cell.name in last.index.unique("cell")]
    return {name: paired(last[name].reset_index(), name, study.reference).loc[order] for name in last}


def gold_at_kl(steps: pd.DataFrame, levels: list[float]) -> pd.DataFrame:
    """The batch's gold of each run where its policy has gone a KL from the start: cell, seed, level, gold.

    Gold and KL are running means over `WINDOW` steps; gold is interpolated where the KL first reaches the level, and
    nan for a run that never does.
    Pitfall: the levels that only some runs reach compare those runs alone.
    """
    rows = []
    for (cell, seed), run in steps.sort_values("step").groupby(["cell", "seed"], sort=False):
        smooth = run[["gold/success_rate", "policy/kl"]].rolling(WINDOW).mean().dropna()
        gold, kl = smooth["gold/success_rate"].to_numpy(), smooth["policy/kl"].to_numpy()
        for level in levels:
            after = int(np.argmax(kl >= level)) if (kl >= level).any() else None
            if after is None or (after == 0 and kl[0] > level):
                value = float("nan")
            else:
                value = float(np.interp(level, kl[max(0, after - 1) : after + 1], gold[max(0, after - 1) : after + 1]))
            rows.append({"cell": cell, "seed": seed, "level": level, "gold": value})
    return pd.DataFrame(rows)


def paired(table: pd.DataFrame, value: str, reference: str) -> pd.DataFrame:
    """Differences of each cell to the reference, seed by seed: runs, mean, difference, low, high, resolved.

    table: one row a cell and seed. low, high: Student's 95% interval over the seeds that both have.
    """
    by_seed = table.pivot(index="seed", columns="cell", values=value)
    rows = {}
    for cell in table["cell"].drop_duplicates():
        apart = (by_seed[cell] - by_seed[reference]).dropna()
        low, high = interval_of_mean(apart)
        rows[cell] = {
            "runs": int(by_seed[cell].notna().sum()), "mean": by_seed[cell].mean(),
            "difference": float("nan") if cell == reference else apart.mean(), "low": low, "high": high,
            "resolved": bool(low > 0 or high < 0),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")
