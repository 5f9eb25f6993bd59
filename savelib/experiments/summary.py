"""The tables of a study, made from the files of its runs: tidy rows, courses, and a summary with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from savelib.analysis import BEFORE_AFTER
from savelib.benchmarks import BENCHMARKS
from savelib.benchmarks.statistics import interval_of_mean
from savelib.config import ConfigError
from savelib.experiments.audit import rows_of
from savelib.experiments.cells import Job, Study, read_study
from savelib.paths import resolve, runs_dir, write_atomically
from savelib.runs.folder import read_metrics

MEASURED = (  # what a run's course says of it: these metrics, each the mean since the evaluation before
    "reward/mean", "reward/std_in_group", "reward/skew_in_group", "force/pull", "force/push", "filter/kept",
    "filter/positive", "filter/negative", "filter/valid_prompts", "value/error", "gold/success_rate",
    "gold/pseudo_label_accuracy", "response/tokens", "response/unfinished", "policy/kl",
    "time/rollout", "time/reward_model", "time/policy",
)  # fmt: skip


def write_tables(folder: Path, study: Study, jobs: list[Job]) -> None:
    """cells.csv, courses.csv, summary.csv and study.yaml of the runs that are done."""
    cells = tidy(jobs)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "cells.csv", cells.to_csv(index=False))
    write_atomically(folder / "courses.csv", courses(jobs).to_csv(index=False, float_format="%.5g"))
    write_atomically(folder / "summary.csv", summary(cells, study).to_csv(index=False))
    write_atomically(folder / "study.yaml", yaml.safe_dump(study.model_dump(), sort_keys=False))


def tidy(jobs: list[Job]) -> pd.DataFrame:
    """One row per run and measure: before, after, change, run_id. nan where a run has no such measure."""
    rows = []
    for job in jobs:
        metrics = read_metrics(job.folder)
        for measure in BEFORE_AFTER:
            known = metrics[measure].dropna() if measure in metrics else pd.Series(dtype=float)
            ends = (known.iloc[0], known.iloc[-1]) if len(known) else (float("nan"),) * 2
            row = _name(job) | {"measure": measure, "before": ends[0], "after": ends[1]}
            rows.append(row | {"change": ends[1] - ends[0], "run_id": job.config.run_id})
        for file in sorted((job.folder / "evaluation" / "first").glob("*.json")):
            if file.stem in BENCHMARKS:
                row = _name(job) | {"measure": file.stem, "run_id": job.config.run_id}
                rows.append(row | {"after": json.loads(file.read_text())["overall"]})
    columns = ["cell", "setting", "world", "seed", "measure", "before", "after", "change", "run_id"]
    return pd.DataFrame(rows, columns=columns)


def _name(job: Job) -> dict[str, Any]:
    return {"cell": job.cell, "setting": job.setting, "world": job.config.world_seed, "seed": job.config.seed}


def courses(jobs: list[Job]) -> pd.DataFrame:
    """One row per run and evaluation: its measures, and the mean of the metrics `MEASURED` since the one before."""
    parts = []
    for job in jobs:
        metrics = read_metrics(job.folder)
        known = [name for name in MEASURED if name in metrics]
        evaluations = [name for name in metrics if name.startswith("eval/")]
        at = metrics[evaluations].notna().any(axis=1)
        since = at[::-1].cumsum()[::-1]  # rows up to and with an evaluation have one number
        means = metrics.groupby(since)[known].mean().loc[since[at]].reset_index(drop=True)
        found = metrics.loc[at, ["step", *evaluations]].reset_index(drop=True)
        parts.append(pd.concat([pd.DataFrame([_name(job)] * len(found)), found, means], axis=1))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def summary(cells: pd.DataFrame, study: Study) -> pd.DataFrame:
    """One row per measure, setting and cell: mean and sd over the worlds, and the difference to the reference.

    Seeds of one world are averaged first, so that the errors are clustered by backbone; differences are taken run by
    run. low, high: Student's 95% interval of the mean difference, nan with fewer than two worlds in common; resolved:
    whether it leaves out 0; rose: runs that ended higher than they began. paper, paper_difference: the paper's figure
    and its difference to the reference's, of other scale.
    """
    table = rows_of(study.table)[study.column] if study.table else pd.Series(dtype=float)
    label = {cell.name: cell.paper for cell in study.cells}
    rows = []
    for (measure, setting), of in cells.groupby(["measure", "setting"], sort=False, dropna=False):
        after = of.pivot(index=["world", "seed"], columns="cell", values="after")
        for cell in [c.name for c in study.cells if c.name in after and after[c.name].notna().any()]:
            mine, reference = after[cell], after.get(study.reference, pd.Series(index=after.index, dtype=float))
            by_world = mine.dropna().groupby("world").mean()
            apart = (mine - reference).dropna().groupby("world").mean()
            low, high = interval_of_mean(apart)
            printed = table.get(label[cell], float("nan"))
            change = of.loc[of["cell"] == cell, "change"]
            rows.append(
                {
                    "measure": measure, "setting": setting, "cell": cell, "worlds": len(by_world),
                    "runs": int(mine.notna().sum()), "mean": by_world.mean(), "sd": by_world.std(),
                    "change": change.groupby(of["world"]).mean().mean(), "rose": int((change > 0).sum()),
                    "difference": apart.mean() if cell != study.reference else float("nan"), "low": low, "high": high,
                    "resolved": bool(low > 0 or high < 0), "paper": printed,
                    "paper_difference": printed - table.get(label[study.reference], float("nan")),
                    "run_ids": " ".join(of.loc[of["cell"] == cell, "run_id"]),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def as_text(summary: pd.DataFrame) -> str:
    """The summary's main columns, a block a measure and setting."""
    blocks = []
    for (measure, setting), of in summary.groupby(["measure", "setting"], sort=False):
        shown = of.set_index("cell")[
            ["worlds", "runs", "mean", "sd", "change", "difference", "low", "high", "resolved"]
        ]
        shown = shown.join(of.set_index("cell")[["paper", "paper_difference"]].dropna(axis=1, how="all"))
        title = " at ".join(filter(None, (measure, setting)))
        blocks.append(f"{title}\n{shown.to_string(float_format='{:.3f}'.format, na_rep='-')}")
    return "\n\n".join(blocks)


def read_tables(folder: str | Path) -> tuple[Study, pd.DataFrame, pd.DataFrame]:
    """(study.yaml, summary.csv, courses.csv) of a folder that `write_tables` made.

    Raises ConfigError where it is not there, or where no run was done.
    """
    place = Path(resolve(str(folder)))
    try:
        tables = [pd.read_csv(place / name) for name in ("summary.csv", "courses.csv")]
        tables = [t.assign(setting=t["setting"].astype(object).fillna("")) for t in tables]  # without a grid: empty
    except (OSError, pd.errors.EmptyDataError):
        raise ConfigError(
            f"results: no tables of a study in {str(folder)!r}; `make tables` writes them to {runs_dir() / 'studies'}"
        ) from None
    return read_study(place / "study.yaml"), *tables
