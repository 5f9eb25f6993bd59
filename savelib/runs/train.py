"""One run from its config to its folder: stages, loop, evaluation, checkpoints; in one process or many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from savelib.config import Config, ConfigError
from savelib.models.compute import peak_memory, reset_peak_memory
from savelib.paths import refuse_unwritable_folders, resolve, runs_dir
from savelib.processes import is_main, largest, say, told
from savelib.runs.checkpoint import check, latest_checkpoint, load_optimizers, save_checkpoint, save_final
from savelib.runs.folder import RunLog, checkpoints, new_run_id, read_config, read_manifest, refuse_existing
from savelib.training.algorithm import prepare, save_step
from savelib.training.engine import connect, disconnect
from savelib.training.evaluation import evaluate
from savelib.training.finite import NonFiniteError
from savelib.training.trainer import Trainer

# fields that may change when a run is resumed
MAY_CHANGE = ("resume", "device", "threads", "checkpoint_every", "keep_checkpoints", "tracker", "rollout_rows")


def train(config: Config) -> Path:
    """Run SAVE to the end; returns the run's folder with config, metrics, samples, manifest and both final models.

    Raises ConfigError for bad input, NonFiniteError when a reward or loss is no number, CheckpointError when the disk
    is full.
    """
    connect(config)
    config = config.model_copy(update={"run_id": told(new_run_id(config))})
    folder = runs_dir() / config.run_id
    if is_main():
        refuse_unwritable_folders()
    with _log(config) as log:  # the run's lock is taken before anything is loaded
        resuming = config.resume == "auto" and (folder / "config.yaml").exists()
        if resuming:
            _check_same(config, folder)
            if read_manifest(folder)["status"] == "done":
                say(f"{folder} is already done")
                return folder
        done, checkpoint = told(_start(config, folder, resuming) if is_main() else None)
        t = prepare(config, checkpoint)
        log.begin(resuming, checkpoint.parent.parent if checkpoint and not resuming else None, done)
        with _tracker(config, folder) as track, _names_checkpoint(folder, checkpoint):
            _steps(t, log, track, done, checkpoint)
        save_final(t, folder)
    disconnect()
    return folder


def _steps(t: Trainer, log: RunLog | _NoLog, track: Callable[..., None], done: int, checkpoint: Path | None) -> None:
    """The steps after `done`, each with its line of metrics; evaluations and checkpoints where they are due."""
    config, folder = t.config, runs_dir() / t.config.run_id
    if checkpoint:
        load_optimizers(t, checkpoint)
        say(f"resuming after step {done} from {checkpoint}")
    else:
        metrics = evaluate(t)
        log.metrics(0, metrics)
        track(metrics, step=0)
    for step in range(max(done, 0) + 1, config.total_steps + 1):
        reset_peak_memory(t.device)
        metrics, samples = save_step(t, step)
        far = metrics.get("policy/kl_response", 0.0)
        too_far = bool(config.max_kl) and far > config.max_kl
        last = step == config.total_steps or too_far
        if last and t.guard:
            say(t.guard.finish(step))
        if last or (config.eval_every and step % config.eval_every == 0):
            metrics |= evaluate(t)
        (metrics["memory/peak_gb"],) = largest(peak_memory(t.device))
        log.samples(samples)
        log.metrics(step, metrics)
        track(metrics, step=step)
        say(log.progress())
        if too_far:
            said = f"the policy is {far:.3g} nats per response from its start, more than max_kl = {config.max_kl}"
            say(f"step {step} is the last: {said}")
            return
        if config.checkpoint_every and step % config.checkpoint_every == 0 and not last:
            save_checkpoint(t, step, folder)


def _start(config: Config, folder: Path, resuming: bool) -> tuple[int, Path | None]:
    """(steps done, checkpoint to resume from); (-1, None) for a new run. The main process decides for all."""
    if not resuming:
        refuse_existing(config.run_id)  # before any work is done
        if config.resume in ("never", "auto"):
            return -1, None
        checkpoint = _given(config.resume)
        step = check(checkpoint, config)
        if step >= config.total_steps:
            raise ConfigError(
                f"resume = {config.resume!r} is at step {step}; total_steps = {config.total_steps} is done"
            )
        return step, checkpoint
    return latest_checkpoint(folder) or (-1, None)


def _given(resume: str) -> Path:
    """The checkpoint's folder that `resume` names. Raises ConfigError for everything else, a run's folder too."""
    folder = Path(resolve(resume))
    if (folder / "config.yaml").is_file():
        there = checkpoints(folder)
        newest = f"its newest checkpoint is {there[-1]}" if there else "it has no checkpoint"
        raise ConfigError(
            f"resume = {resume!r} is a run's folder: {newest}; to continue the run itself, write "
            f"run_id={folder.resolve().name} and resume=auto"
        )
    if not folder.is_dir():
        raise ConfigError(
            f"resume = {resume!r}: write never, auto, or a checkpoint's folder, runs/ID/checkpoints/step_N"
        )
    return folder


def _log(config: Config) -> RunLog | _NoLog:
    """The run's log on the main process, one that writes nothing on the others."""
    return RunLog(config) if is_main() else _NoLog()


class _NoLog:
    def begin(self, resuming: bool, source: Path | None, step: int) -> None: ...

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def samples(self, rows: list[dict]) -> None: ...

    def progress(self) -> str: ...

    def __enter__(self) -> _NoLog:
        return self

    def __exit__(self, *_): ...


@contextlib.contextmanager
def _tracker(config: Config, folder: Path) -> Iterator[Callable[..., None]]:
    """(metrics, step=) -> accelerate's tracker, if any; tensorboard writes to the run's folder."""
    if config.tracker == "none":
        yield lambda values, step: None
        return
    from accelerate import Accelerator  # slow to import

    accelerator = Accelerator(log_with=config.tracker, project_dir=folder)
    if not accelerator.log_with:
        raise ConfigError(f"tracker = {config.tracker!r}: not installed; pip install {config.tracker}, or tracker=none")
    if config.tracker == "tensorboard":
        accelerator.init_trackers("tensorboard")  # config.yaml lies beside it
    else:
        accelerator.init_trackers("save", config.model_dump(), {config.tracker: {"name": config.run_id}})
    try:
        yield accelerator.log
    finally:
        accelerator.end_training()


@contextlib.contextmanager
def _names_checkpoint(folder: Path, begun: Path | None) -> Iterator[None]:
    """A NonFiniteError tells the last good checkpoint, from which a run with other learning rates may start.

    begun: the checkpoint that this run went on from.
    """
    try:
        yield
    except NonFiniteError as error:
        _, left = latest_checkpoint(folder) or (0, begun)
        error.checkpoint = str(left or "")
        raise


def _check_same(config: Config, folder: Path) -> None:
    """ConfigError if the run to resume was made by another configuration."""
    made, wanted = read_config(folder).model_dump(), config.model_dump()
    changed = [k for k in wanted if made[k] != wanted[k] and k not in MAY_CHANGE]
    if changed:
        raise ConfigError(
            f"run_id = {config.run_id!r} was made with other values of {', '.join(changed)}; give the same"
        )
