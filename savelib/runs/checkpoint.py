"""Checkpoints: both models, the value head and all optimizers as safetensors, written atomically.

A step draws its data and its random numbers from (seed, step), so a checkpoint needs no generator state and no place in
the data, of any process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file, save_model

from savelib.config import Config, ConfigError
from savelib.models.adapters import adapted, save_merged
from savelib.paths import atomic_folder, digest, drop, publish, sync, temporary_folder
from savelib.processes import is_main, rank, told, wait
from savelib.runs.folder import LOGS, CheckpointError, checkpoints
from savelib.training.trainer import Trainer, extras_of

MANIFEST = "checkpoint.json"
SAME_FILES = ("backend", "num_processes", "optimizer", "lora_rank")  # what a checkpoint's files depend on


def save_checkpoint(t: Trainer, step: int, run: Path) -> Path:
    """Write run/checkpoints/step_NNNNNN, all processes together, and drop all but the newest keep_checkpoints.

    Raises CheckpointError where it cannot be written; the checkpoints before it stay.
    """
    target = run / "checkpoints" / f"step_{step:06d}"
    folder = None
    try:
        folder = Path(told(str(temporary_folder(target)) if is_main() else None))
        _save_models(t, folder)
        for name, engine in t.engines.items():
            if engine.lockstep or is_main():  # the others hold the same as the main process
                tensors = {k: v.detach().cpu().contiguous() for k, v in engine.state().items()}
                save_file(tensors, folder / _optimizer_file(name))
        if t.guard and (t.lockstep or is_main()):
            save_file(t.guard.tensors(), folder / _guard_file(rank()))
        wait()
        if is_main():
            for name in LOGS:  # a checkpoint on the disk must find its lines there
                sync(run / name)
            files = {str(f.relative_to(folder)): _sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
            made = {
                "step": step,
                "made_with": t.config.only(*SAME_FILES),
                "guard": t.guard.numbers() if t.guard else {},
                "sha256": files,
            }
            (folder / MANIFEST).write_text(json.dumps(made | {"sha256_of_this": digest(made)}, indent=2))
            if target.exists():  # a damaged one, that was not used
                drop(target)
            publish(folder, target)
            there = checkpoints(run)
            newest = there.index(target) + 1  # those beyond it are damaged: the run went on from one before them
            for other in there[newest:] + there[: max(0, newest - t.config.keep_checkpoints)]:
                drop(other)
        wait()
    except (OSError, SafetensorError) as error:
        what = f"step {step}: no checkpoint could be written to {target.parent}"
        raise CheckpointError(what, error, run) from None
    finally:
        if folder and is_main():
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _guard_file(rank: int) -> str:
    return f"guard.rank{rank}.safetensors"


def _optimizer_file(name: str) -> str:
    return f"{name}_optimizer.rank{rank()}.safetensors"


def _save_models(t: Trainer, folder: Path) -> None:
    """policy/ and reward_model/: whole models, or adapters, and the value head; what else is trained, a file each."""
    for name, model in (("policy", t.policy), ("reward_model", t.reward_model.model)):
        weights = t.engines[name].full_weights(model)
        if is_main():
            model.save_pretrained(folder / name, **({} if adapted(model) else {"state_dict": weights}))
    if is_main():
        t.reward_model.save_value_head(folder / "reward_model")
        for name, module in t.extras.items():
            save_model(module, folder / f"{name}.safetensors")


def save_final(t: Trainer, run: Path) -> None:
    """run/policy and run/reward_model, each written atomically, as folders that plain `from_pretrained` loads.

    Raises CheckpointError where they cannot be written.
    """
    for name, model, tokenizer in (
        ("policy", t.policy, t.tokenizer),
        ("reward_model", t.reward_model.model, t.reward_model.tokenizer),
    ):
        weights = t.engines[name].full_weights(model)
        if is_main():
            try:
                if (run / name).exists():  # of a run that was stopped while it wrote them
                    drop(run / name)
                with atomic_folder(run / name) as folder:
                    save_merged(model, t.sources[name], folder, weights)
                    tokenizer.save_pretrained(folder)
                    if name == "reward_model":
                        t.reward_model.save_value_head(folder)
                        if t.rule.extra:
                            save_model(t.extras[t.rule.extra], folder / f"{t.rule.extra}.safetensors")
            except (OSError, SafetensorError) as error:
                what = f"the trained {name} could not be written to {run / name}"
                raise CheckpointError(what, error, run) from None
    wait()


def check(folder: Path, config: Config | None = None) -> int:
    """The step of a checkpoint whose files are as they were written. Raises ConfigError naming the first other one.

    With a config: ConfigError too if a run of that config cannot resume from it.
    """
    made, bad = _made(folder), None
    for name, sha256 in made["sha256"].items():
        try:
            if _sha256(folder / name) != sha256:
                bad = name
            elif name.endswith(".safetensors"):
                with safe_open(folder / name, "pt"):
                    pass
        except (OSError, SafetensorError) as error:
            bad = f"{name}: {error}"
        if bad:
            raise ConfigError(f"checkpoint {folder} is damaged ({bad})")
    if config:
        _refuse_other(folder, made, config)
    return made["step"]


def _made(folder: Path) -> dict[str, Any]:
    """What checkpoint.json says, if it is as it was written."""
    try:
        made = json.loads((folder / MANIFEST).read_text())
        if made.pop("sha256_of_this") == digest(made):
            return made
        why = MANIFEST
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{MANIFEST}: {type(error).__name__}: {error}"
    raise ConfigError(f"checkpoint {folder} is damaged ({why})")


def _refuse_other(folder: Path, made: dict[str, Any], config: Config) -> None:
    other = [f"{k} = {v!r}" for k, v in made["made_with"].items() if getattr(config, k) != v]
    if other:
        raise ConfigError(f"checkpoint {folder} was made with {', '.join(other)}; give the same to resume from it")
    missing = [name for name in extras_of(config) if f"{name}.safetensors" not in made["sha256"]]
    if missing:
        raise ConfigError(
            f"checkpoint {folder} has no {', '.join(missing)}, which rule = {config.rule!r} or algo = {config.algo!r} "
            "trains: resume a run of the same rule and algorithm"
        )


def latest_checkpoint(run: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint whose checksums hold; a damaged one is named on stderr, not used."""
    there = checkpoints(run)
    for i, folder in reversed(list(enumerate(there))):
        try:
            return check(folder), folder
        except ConfigError as error:
            instead = "the one before is used" if i else "no checkpoint is left, the run starts from the beginning"
            print(f"{error}; {instead}", file=sys.stderr, flush=True)
    return None


def load_optimizers(t: Trainer, folder: Path) -> None:
    """Put the optimizer states and the guard of a checkpoint into a trainer with its models."""
    made = _made(folder)
    _refuse_other(folder, made, t.config)
    if t.guard:
        t.guard.load(made["guard"], load_file(folder / _guard_file(rank() if t.lockstep else 0)))
    for name, engine in t.engines.items():
        file = folder / (_optimizer_file(name) if engine.lockstep else f"{name}_optimizer.rank0.safetensors")
        engine.load_state(load_file(file))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
