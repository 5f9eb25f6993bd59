"""A study, run: each cell by notebook 03 for each seed. What is done is not run again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from savelib.benchmarks import BENCHMARKS
from savelib.benchmarks.evaluate import find_data
from savelib.config import Config, ConfigError, make_config
from savelib.errors import sentence
from savelib.experiments.cells import Job, Study, jobs_of, read_seeds, read_study
from savelib.experiments.summary import write_tables
from savelib.paths import project_root, refuse_unwritable_folders, runs_dir, writable_folder
from savelib.progress import Progress
from savelib.runs.launch import launch, needs_torchrun, worker
from savelib.runs.notebook import run_notebook

NOTEBOOKS = project_root() / "notebooks"


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
