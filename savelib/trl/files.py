"""The reward model's side in TRL's checkpoints, written and read."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from savelib.config import Config, ConfigError
from savelib.training.reward_side import RewardSide

SAME = ("lora_rank", "optimizer", "rule")  # what the files depend on


def _trained(folder: Path, config: Config) -> Path:
    """Where a checkpoint has what was trained. Adapters in a folder of the checkpoint itself would be the policy's."""
    return folder / "adapters" if config.lora_rank else folder


def save_side(side: RewardSide, folder: Path) -> None:
    """Reward model, value head, optimizers, guard and numbers."""
    rm, trained = side.reward_model, _trained(folder, side.config)
    trained.mkdir(parents=True, exist_ok=True)
    rm.model.save_pretrained(trained)
    rm.tokenizer.save_pretrained(trained)
    rm.save_value_head(trained)
    tensors = {f"{name}_optimizer": engine.state() for name, engine in side.engines.items()}
    if side.guard:
        tensors["guard"] = side.guard.tensors()
    for name, of_it in tensors.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in of_it.items()}, folder / f"{name}.safetensors")
    numbers = {"guard": side.guard.numbers() if side.guard else {}}
    (folder / "save.json").write_text(json.dumps(numbers | {"made_with": side.config.only(*SAME)}, indent=2))


def loaded_side(folder: Path, side: RewardSide, source: str) -> RewardSide:
    """The reward model's side of a checkpoint, in the place of `side`."""
    if not (folder / "save.json").is_file():
        raise ConfigError(f"{folder.parent} has no reward_model/save.json: it is no checkpoint of SAVE in TRL")
    saved = json.loads((folder / "save.json").read_text())
    if saved["made_with"] != side.config.only(*SAME):
        raise ConfigError(f"{folder} was made with {saved['made_with']}; give the same to resume from it")
    side = RewardSide(side.config, side.data, source, _trained(folder, side.config))
    for name, engine in side.engines.items():
        engine.load_state(load_file(folder / f"{name}_optimizer.safetensors"))
    if side.guard:
        side.guard.load(saved["guard"], load_file(folder / "guard.safetensors"))
    return side
