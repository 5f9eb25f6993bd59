"""A study: cells of a table, each run by notebook 03 for each seed; tidy tables and a summary, made from files.

A study file names the cells, what sets each apart, and the paper's row beside it. What is done is not run again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from savelib.analysis import BEFORE_AFTER
from savelib.benchmarks import BENCHMARKS
from savelib.benchmarks.scoring import find_data
from savelib.benchmarks.statistics import interval_of_mean
from savelib.config import Config, ConfigError, check_names, make_config
from savelib.errors import sentence
from savelib.experiments.audit import rows_of
from savelib.paths import project_root, refuse_unwritable_folders, resolve, runs_dir, writable_folder, write_atomically
from savelib.progress import Progress
from savelib.runs.folder import read_manifest, read_metrics
from savelib.runs.launch import key_of, launch, needs_torchrun, worker
from savelib.runs.notebook import run_notebook

NOTEBOOKS = project_root() / "notebooks"
MOST_SEEDS = 10_000
MEASURED = (  # what a run's course says of it: these metrics, each the mean since the evaluation before
    "reward/mean", "reward/std_in_group", "reward/skew_in_group", "force/pull", "force/push", "filter/kept",
    "filter/positive", "filter/negative", "filter/valid_prompts", "value/error", "gold/success_rate",
    "gold/pseudo_label_accuracy", "response/tokens", "response/unfinished", "policy/kl",
)  # fmt: skip


class Cell(BaseModel):
    """One row of a table."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    set: dict[str, Any] = {}  # config fields
    times: dict[str, float] = {}  # factors on the profile's values
    reward_model_of: str = ""  # an earlier cell: the reward model that its run returned is taken as it is
    paper: str = ""  # the row of the paper's table, by its label in `audit.rows_of`


class Study(BaseModel):
    """A study file, data/studies/*.yaml."""

    model_config = ConfigDict(extra="forbid")

    title: str
    table: str = ""  # of the paper: a file of data/paper
    column: str = "Average"  # of that table, set beside ours
    reference: str  # the cell that differences are taken from, seed by seed
    common: dict[str, Any] = {}  # config fields of all cells
    grid: dict[str, list[Any]] = {}  # config fields with several values: every cell is run at every combination
    worlds: str = ""  # backbones, such as 200-204, each with every seed; empty: a seed is its own world
    cells: list[Cell] = Field(min_length=1)


@dataclass(frozen=True)
class Job:
    """One run of one cell. after: the run whose reward model it takes."""

    cell: str
    setting: str  # its values of the grid's fields
    config: Config
    after: str = ""

    @property
    def folder(self) -> Path:
        return runs_dir() / self.config.run_id

    @property
    def done(self) -> bool:
        return (self.folder / "manifest.json").is_file() and read_manifest(self.folder)["status"] == "done"


def read_study(path: str | Path) -> Study:
    """A study file. Raises ConfigError naming the file, the cell and the field."""
    where = f"study {str(path)!r}"
    try:
        study = Study(**yaml.safe_load(Path(resolve(str(path))).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{where}: {said}") from None
    names = [cell.name for cell in study.cells]
    check_names([*study.common, *study.grid], Config.model_fields)
    empty = [field for field, values in study.grid.items() if not values]
    if empty:
        raise ConfigError(f"{where}: grid.{empty[0]} has no values; give some, or leave it out")
    if study.reference not in names:
        raise ConfigError(f"{where}: reference = {study.reference!r} is no cell; cells: {', '.join(names)}")
    try:
        rows = rows_of(study.table) if study.table else pd.DataFrame()
    except OSError:
        raise ConfigError(f"{where}: table = {study.table!r} is no table of data/paper") from None
    for i, cell in enumerate(study.cells):
        _check_cell(study, cell, rows, names[:i], f"{where}, cell {cell.name!r}")
    return study


def _check_cell(study: Study, cell: Cell, rows: pd.DataFrame, before: list[str], where: str) -> None:
    """Raise ConfigError for a cell that cannot be. rows: the paper's table. before: the names of the earlier cells."""
    check_names([*cell.set, *cell.times], Config.model_fields)
    if cell.name in before:
        raise ConfigError(f"{where}: the name is there twice")
    if cell.reward_model_of and cell.reward_model_of not in before:
        raise ConfigError(f"{where}: reward_model_of = {cell.reward_model_of!r} must name an earlier cell")
    if cell.paper and (cell.paper not in rows.index or study.column not in rows):
        raise ConfigError(
            f"{where}: paper = {cell.paper!r} and column = {study.column!r} are not in table = {study.table!r}; "
            f"rows: {', '.join(rows.index)}; columns: {', '.join(rows.columns)}"
        )
    odd = [name for name in cell.times if Config.model_fields[name].annotation not in (int, float)]
    if odd:
        raise ConfigError(f"{where}: times.{odd[0]}: a factor is for numbers alone")


def read_studies(paths: Iterable[str | Path]) -> dict[str, Study]:
    """name -> study of several files. Raises ConfigError for two of one name, whose tables would be one folder."""
    studies: dict[str, Study] = {}
    for path in paths:
        name = Path(path).stem
        if name in studies:
            raise ConfigError(f"study {str(path)!r}: there are two of the name {name!r}; rename one file")
        studies[name] = read_study(path)
    return studies


def read_seeds(text: str, field: str = "seeds") -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]. Raises ConfigError for what is no list of at most MOST_SEEDS numbers."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise ConfigError(f"{field} = {text[:100]!r}: write numbers and ranges, such as 0-9 or 100,101")
        more = range(int(found[1]), int(found[2] or found[1]) + 1)
        if len(seeds) + len(more) > MOST_SEEDS:
            raise ConfigError(f"{field} = {text[:100]!r} are more than {MOST_SEEDS}; give fewer")
        seeds += more
    return list(dict.fromkeys(seeds))


def jobs_of(study: Study, seeds: list[int], **values: Any) -> list[Job]:
    """All runs of a study, world by world and seed by seed; `values` are config fields over the file's.

    A run's id is made of its whole configuration and of the code: a cell that changed is another run, and one that
    two studies share is one run.
    """
    worlds = read_seeds(study.worlds, "worlds") if study.worlds else []
    jobs = []
    for (world, seed), point in itertools.product(
        itertools.product(worlds, seeds) if worlds else zip(seeds, seeds, strict=True),
        itertools.product(*study.grid.values()),
    ):
        at = dict(zip(study.grid, point, strict=True))
        setting = ", ".join(f"{field}={value}" for field, value in at.items())
        ids: dict[str, str] = {}
        for cell in study.cells:
            mine = {"seed": seed, "world_seed": world} | study.common | at | cell.set | values
            after = ids.get(cell.reward_model_of, "")
            if after:
                mine |= {"reward_model": str(runs_dir() / after / "reward_model"), "bt_epochs": 0}
            plain = make_config(**mine)
            mine |= {field: factor * getattr(plain, field) for field, factor in cell.times.items()}
            config = make_config(**mine)
            words = ("study", config.profile, config.rule, config.algo, f"s{seed}", key_of(config)[:8])
            ids[cell.name] = "-".join(words)
            config = config.model_copy(update={"run_id": ids[cell.name], "resume": "auto"})
            jobs.append(Job(cell.name, setting, config, after))
    return jobs


def run_study(
    name: str,
    study: Study,
    seeds: list[int],
    workers: int = 1,
    benchmarks: str = "",
    data_dir: str = "",
    plain: bool = False,
    quick: bool = False,
    say: Callable[[str], None] = print,
    **values: Any,
) -> tuple[Path, dict[str, str]]:
    """Run what is missing of a study and write its tables; (folder, run id -> error of each that failed).

    workers: runs at a time. benchmarks, data_dir: notebook 05's, for each run's reward model. plain: train without
    notebook 03, in a third of the time where a run takes seconds. quick: one seed (and world), three steps. values:
    config fields.
    A failed run stops only those that need it. Files in runs/studies/<name>/: cells.csv (a row per cell, seed and
    measure), courses.csv (a row per run and evaluation), summary.csv, study.yaml.
    """
    if quick:
        seeds, values = seeds[:1], {"total_steps": 3} | values
        study = study.model_copy(update={"worlds": study.worlds and str(read_seeds(study.worlds, "worlds")[0])})
    jobs = jobs_of(study, seeds, **values)
    folder = check_before_work(name, study, benchmarks, data_dir)
    todo = [job for job in jobs if not (job.done and not _unmeasured(job, benchmarks))]
    say(f"{name}: {len(jobs)} runs, {len(jobs) - len(todo)} done before")
    failed, stopped, once = {}, threading.Event(), {job.config.run_id: job for job in todo}
    progress = Progress("run", len(once), say=say, every=0)
    futures: dict[str, Future[str]] = {}

    def work(job: Job) -> str:
        if job.after in futures and futures[job.after].result():  # begun before, so this waits for no one in the queue
            return f"needs {job.after}, which failed"
        if stopped.is_set():
            return "stopped"
        try:
            error = "" if job.done else processes.submit(_train, job, plain).result()
        except BrokenExecutor:
            return "the process that trained it, or one beside it, was killed"
        return error or _measure(job, benchmarks, data_dir)

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _silence) as processes, ThreadPoolExecutor(workers) as pool:
        for run, job in once.items():  # in their order: what a run needs comes before it
            futures[run] = pool.submit(work, job)
        owners = {futures[run]: job for run, job in once.items()}
        try:
            for future in as_completed(owners):
                job, error = owners[future], future.result()
                if error:
                    failed[job.config.run_id] = error
                what = ", ".join(filter(None, (job.cell, job.setting, _which(job.config))))
                progress.add(1, f"{what}: {f'FAILED: {error}' if error else 'done'}")
        finally:
            stopped.set()
    write_tables(folder, study, [job for job in jobs if job.done])
    return folder, failed


def check_before_work(name: str, study: Study, benchmarks: str = "", data_dir: str = "") -> Path:
    """The folder of a study's tables. Raises ConfigError for all that would stop the study only after its first run."""
    refuse_unwritable_folders()
    check_benchmarks(benchmarks, data_dir)

    def ours(folder: Path) -> bool:
        return (folder / "study.yaml").is_file() and read_study(folder / "study.yaml").title == study.title

    return writable_folder("tables", runs_dir() / "studies" / name, {}, ours)


def check_benchmarks(benchmarks: str, data_dir: str) -> None:
    """Raise ConfigError for a benchmark that there is not, and for a folder without its data."""
    for wanted in _names(benchmarks):
        if wanted not in BENCHMARKS:
            raise ConfigError(f"benchmarks = {wanted!r}: choose from {', '.join(BENCHMARKS)}")
        if data_dir and data_dir != "hub":
            find_data(BENCHMARKS[wanted], Path(data_dir))


def _silence() -> None:
    """In a process that trains: what its libraries and a notebook's kernel print is not the study's output."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def _train(job: Job, plain: bool) -> str:
    """Notebook 03 in the run's folder, or the run without a notebook; its error, or nothing."""
    base = make_config(profile=job.config.profile).model_dump()
    given = [name for name, value in job.config.model_dump().items() if value != base[name]]
    try:
        if plain:
            job.folder.mkdir(parents=True, exist_ok=True)
            with open(job.folder / "train.log", "a") as log, contextlib.redirect_stdout(log):
                (launch if needs_torchrun(job.config) else worker)(job.config)
        else:
            run_notebook(NOTEBOOKS / "03_save_train.ipynb", job.config, ["profile", *given])
    except Exception as error:  # one cell must not stop the others
        said = (sentence(error) or f"{type(error).__name__}: {error}").splitlines()
        return " | ".join(line.strip()[:300] for line in dict.fromkeys([said[0], said[-1]]))
    return "" if job.done else "the run is not done, though its training ended"


def _which(config: Config) -> str:
    world = "" if config.world_seed == config.seed else f"world {config.world_seed}, "
    return f"{world}seed {config.seed}"


def _measure(job: Job, benchmarks: str, data_dir: str) -> str:
    """Notebook 05 on the run's reward model, for the benchmarks that have no figures there yet."""
    missing = ",".join(_unmeasured(job, benchmarks))
    if not missing:
        return ""
    given = {"profile": job.config.profile, "first": job.folder / "reward_model", "benchmarks": missing,
             "data_dir": data_dir or "hub", "out": job.folder / "evaluation"}  # fmt: skip
    pairs = [str(word) for name, value in given.items() for word in ("-p", name, value)]
    notebook = NOTEBOOKS / "05_evaluate_rm.ipynb"
    words = ["-m", "papermill", notebook, job.folder / notebook.name, "--no-progress-bar", *pairs]
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return " | ".join(line.strip()[:300] for line in lines[-2:]) if done.returncode else ""


def _unmeasured(job: Job, benchmarks: str) -> list[str]:
    return [name for name in _names(benchmarks) if not _figures(job, name).is_file()]


def _names(benchmarks: str) -> list[str]:
    return list(filter(None, benchmarks.replace(" ", "").split(",")))


def _figures(job: Job, benchmark: str) -> Path:
    return job.folder / "evaluation" / "first" / f"{benchmark}.json"


# tables


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
