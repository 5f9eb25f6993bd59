"""Checkpoints: both models, the value head and all optimizers as safetensors, whole or not at all.

A step draws its data and its random numbers from (seed, step), so a checkpoint needs no generator state.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from savelib.loop import Trainer
from savelib.paths import atomic_folder

OPTIMIZERS = ("policy_optimizer", "reward_optimizer", "value_optimizer")


def save_checkpoint(t: Trainer, step: int, run: Path) -> Path:
    """Write run/checkpoints/step_NNNNNN and drop all but the newest keep_checkpoints."""
    target = run / "checkpoints" / f"step_{step:06d}"
    with atomic_folder(target) as folder:
        save_models(t, folder)
        for name in OPTIMIZERS:
            state = getattr(t, name).state_dict()["state"]
            tensors = {f"{i}.{k}": torch.as_tensor(v).contiguous() for i, s in state.items() for k, v in s.items()}
            save_file(tensors, folder / f"{name}.safetensors")
        files = {str(f.relative_to(folder)): _sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
        (folder / "checkpoint.json").write_text(json.dumps({"step": step, "sha256": files}, indent=2))
    for old in sorted(target.parent.glob("step_*"))[: -t.config.keep_checkpoints]:
        shutil.rmtree(old)
    return target


def save_models(t: Trainer, folder: Path) -> None:
    """policy/ and reward_model/ as folders that plain `from_pretrained` loads."""
    t.policy.save_pretrained(folder / "policy")
    t.tokenizer.save_pretrained(folder / "policy")
    t.reward_model.save(folder / "reward_model")


def latest_checkpoint(run: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint whose checksums hold; a damaged one is named on stderr, not used."""
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        try:
            made = json.loads((folder / "checkpoint.json").read_text())
            bad = [name for name, digest in made["sha256"].items() if _sha256(folder / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            bad = [str(error)]
        if not bad:
            return made["step"], folder
        print(f"checkpoint {folder} is damaged ({bad[0]}); the one before is used", file=sys.stderr, flush=True)
    return None


def load_optimizers(t: Trainer, folder: Path) -> None:
    """Put the optimizer states of a checkpoint into a trainer whose models were loaded from it."""
    for name in OPTIMIZERS:
        optimizer = getattr(t, name)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(folder / f"{name}.safetensors").items():
            index, _, part = key.partition(".")
            state.setdefault(int(index), {})[part] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
