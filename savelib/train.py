"""One run from its config to its folder: stages, loop, evaluation, checkpoints."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from savelib.checkpoint import latest_checkpoint, load_optimizers, save_checkpoint, save_models
from savelib.config import Config, ConfigError
from savelib.evaluation import evaluate
from savelib.loop import Trainer, save_step
from savelib.paths import runs_dir
from savelib.runlog import RunLog, new_run_id, read_config, read_manifest, refuse_existing


def train(config: Config) -> Path:
    """Run SAVE to the end; returns the run's folder with config, metrics, samples, manifest and both final models.

    Raises ConfigError for bad input, NonFiniteError when a reward or loss is no number.
    """
    config = config.model_copy(update={"run_id": new_run_id(config)})
    folder = runs_dir() / config.run_id
    found: tuple[int, Path | None] = (-1, None)
    resuming = config.resume == "auto" and (folder / "config.yaml").exists()
    if resuming:
        _check_same(config, folder)
        if read_manifest(folder)["status"] == "done":
            print(f"{folder} is already done", flush=True)
            return folder
        found = latest_checkpoint(folder) or found
    else:
        refuse_existing(config.run_id)  # before any work is done
    done, checkpoint = found
    t = Trainer(config, (str(checkpoint / "policy"), str(checkpoint / "reward_model")) if checkpoint else None)
    with RunLog.resume(config, done) if resuming else RunLog.create(config) as log:
        if checkpoint:
            load_optimizers(t, checkpoint)
            print(f"going on after step {done} from {checkpoint}", flush=True)
        else:
            log.metrics(0, evaluate(t))
        for step in range(max(done, 0) + 1, config.total_steps + 1):
            metrics, samples = save_step(t, step)
            last = step == config.total_steps
            if last or (config.eval_every and step % config.eval_every == 0):
                metrics |= evaluate(t)
            metrics["memory/peak_gb"] = _peak_memory(t.device)
            log.samples(samples)
            log.metrics(step, metrics)
            if config.checkpoint_every and step % config.checkpoint_every == 0 and not last:
                save_checkpoint(t, step, folder)
        save_models(t, folder)
    return folder


def _peak_memory(device: torch.device) -> float:
    """GiB: the allocator's peak on CUDA, the process's resident peak elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB here


def _check_same(config: Config, folder: Path) -> None:
    """ConfigError if the run to go on with was made by another configuration."""
    made, wanted = read_config(folder).model_dump(), config.model_dump()
    changed = [k for k in wanted if made[k] != wanted[k] and k not in ("resume", "device", "threads")]
    if changed:
        raise ConfigError(
            f"run_id = {config.run_id!r} was made with other values of {', '.join(changed)}; give the same"
        )
