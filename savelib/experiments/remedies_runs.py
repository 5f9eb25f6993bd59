"""What the remedies' tables need beside a study's own: KL of the final policies, CPU seconds of a step.

`python -m savelib.experiments.remedies_runs FOLDER` writes kl.csv and cost.csv into a study's folder, from its runs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from savelib.errors import sentence
from savelib.experiments.cells import Study, jobs_of, read_study
from savelib.models.compute import seed_everything
from savelib.models.loading import load_policy, policy_source
from savelib.models.rollout import completion_logprobs, sample
from savelib.paths import resolve, runs_dir, write_atomically
from savelib.runs.folder import read_config
from savelib.training.algorithm import prepare, save_step
from savelib.training.trainer import load_data

RESPONSES = 16  # to each of config.eval_prompts held-out prompts
STEPS = 20  # of each cell: a block of save_checked, its check included


@torch.no_grad()
def final_kl(run: Path) -> dict[str, float]:
    """KL of a run's final policy to its initial one, in nats a response: the mean of sum_t log pi - log pi_init.

    On fresh responses to held-out prompts, all of them: a run's own policy/kl is of the responses it learns from, which
    for RAFT are the best ones, and so is too high.
    """
    config = read_config(run)
    device = torch.device("cpu")
    initial, _ = load_policy(policy_source(config), device)
    policy, tokenizer = load_policy(str(run / "policy"), device)
    seed_everything("final_kl", config.seed)
    prompts = load_data(config).heldout_prompts[: config.eval_prompts]
    rollout = sample(policy, tokenizer, prompts, RESPONSES, config)
    apart = []
    for rows in torch.arange(len(prompts) * RESPONSES).split(config.micro_batch_responses):
        of_policy, of_initial = (completion_logprobs(model, rollout, rows, config) for model in (policy, initial))
        inside = rollout.completion_mask.flatten(0, 1)[rows, : of_policy.shape[1]]
        apart.append(((of_policy - of_initial) * inside).sum(1))
    each = torch.cat(apart)  # [N]
    return {"kl": each.mean().item(), "standard_error": (each.std() / len(each) ** 0.5).item()}


def kl_of_runs(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per run of a study's cells.csv: cell, setting, world, seed, kl, standard_error."""
    runs = cells[["cell", "setting", "world", "seed", "run_id"]].drop_duplicates()
    return pd.DataFrame([run | final_kl(runs_dir() / run.pop("run_id")) for run in runs.to_dict("records")])


def cost_of_steps(study: Study, seed: int = 0, steps: int = STEPS, **values) -> pd.DataFrame:
    """CPU seconds of each step of each cell, in the study's first world and setting: cell, step, seconds.

    The cells take turns, a step each, on one thread, so that a machine that is busy for a while is so for all; what
    other processes take does not count. values: config fields over the study's.
    """
    torch.set_num_threads(1)
    first = {job.cell: job for job in reversed(jobs_of(study, [seed], **values))}
    trainers = {cell.name: prepare(first[cell.name].config) for cell in study.cells}
    rows = []
    for step in range(1, steps + 1):
        for cell, trainer in trainers.items():
            begun = time.process_time()
            save_step(trainer, step)
            rows.append({"cell": cell, "step": step, "seconds": time.process_time() - begun})
    return pd.DataFrame(rows)


def main(folder: Annotated[Path, typer.Argument(help="a study's folder; its runs are in $SAVE_RUNS or runs/")]) -> None:
    """Write kl.csv and cost.csv (minutes)."""
    place = Path(resolve(str(folder)))
    tables = {
        "kl.csv": lambda: kl_of_runs(pd.read_csv(place / "cells.csv")),
        "cost.csv": lambda: cost_of_steps(read_study(place / "study.yaml")),
    }
    for name, table in tables.items():
        write_atomically(place / name, table().to_csv(index=False, float_format="%.5g"))
        print(f"wrote {place / name}", flush=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except Exception as error:
        if said := sentence(error):
            sys.exit(said)
        raise
