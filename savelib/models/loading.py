"""The policy and the reward model: where they come from, and how they are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from savelib.config import Config, ConfigError
from savelib.data import world_models
from savelib.data.chat import load_tokenizer
from savelib.data.hub import from_pretrained
from savelib.data.smollm2 import smollm2_path
from savelib.models.adapters import base_settings, with_adapters
from savelib.models.reward_model import VALUE_HEAD_FILE, RewardModel
from savelib.paths import resolve


def load_policy(
    source: str, device: torch.device, config: Config | None = None, trained: Path | None = None
) -> tuple[nn.Module, Any]:
    """(causal LM in float32, tokenizer). With a config: the policy that it trains, with its adapters or in 4 bits.

    trained: a folder with what was trained from `source` on: the whole model, or its adapters.
    """
    tokenizer = load_tokenizer(source, "policy_model")
    whole = trained is not None and (trained / "config.json").is_file()
    settings = base_settings(config, device) if config else {"dtype": torch.float32}
    model, missing = _loaded(AutoModelForCausalLM, str(trained) if whole else source, "policy_model", settings)
    if missing:
        raise ConfigError(
            f"policy_model = {source!r} lacks weights that a causal language model needs: {_names(missing)}; give a "
            "policy's folder, not a reward model's"
        )
    _check_tokenizer(tokenizer, model, f"policy_model = {source!r}")
    model = model.eval() if "device_map" in settings else model.to(device).eval()
    if config and config.policy_layers:
        _train_last_layers(model, config)
    return with_adapters(model, config, "CAUSAL_LM", trained) if config else model, tokenizer


def _loaded(kind: type, source: str, field: str, settings: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """(the model, weights that its files lack). ConfigError names weights of another shape or with a nan or inf."""
    model, info = from_pretrained(
        kind, source, field, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise ConfigError(
            f"{field} = {source!r}: {name} has the shape {list(found)} in its files, and {list(wanted)} by its "
            "config.json (vocab_size, hidden_size, ...); give config and weights of one model"
        )
    odd = [n for n, p in model.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
    if odd and not set(odd) <= info["missing_keys"]:
        raise ConfigError(f"{field} = {source!r} holds weights that are not finite: {_names(odd)}; get it again")
    return model, sorted(info["missing_keys"])


def _names(weights: list[str]) -> str:
    return ", ".join(weights[:3]) + (f" and {len(weights) - 3} others" if len(weights) > 3 else "")


def _check_tokenizer(tokenizer: Any, model: nn.Module, said: str) -> None:
    """Raise ConfigError for a tokenizer that is larger than the embeddings. A few added tokens may lie beyond them."""
    rows = model.get_input_embeddings().num_embeddings
    if max(tokenizer.vocab_size - 1, tokenizer.pad_token_id or 0) >= rows:
        raise ConfigError(
            f"{said}: its tokenizer has {len(tokenizer)} tokens, but the model has embeddings of {rows} (vocab_size); "
            "put the tokenizer beside it that it was trained with"
        )


def _train_last_layers(model: nn.Module, config: Config) -> None:
    """Freeze all but the last policy_layers layers and the final norm: no gradient is computed below them."""
    layers, norm = _layers(model, "policy_layers", config.policy_layers), model.base_model.norm
    model.requires_grad_(False)
    for module in (*layers[-config.policy_layers :], norm):
        module.requires_grad_(True)


def _layers(model: nn.Module, field: str, count: int) -> nn.ModuleList:
    """The decoder layers of a model. Raises ConfigError naming the field where there are not `count` of them."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None or not hasattr(model.base_model, "norm"):
        raise ConfigError(f"{field} = {count}: {type(model).__name__} has no list of layers with a norm; use {field}=0")
    if len(layers) < count:
        raise ConfigError(f"{field} = {count}: the model has {len(layers)} layers; give at most that")
    return layers


def share_frozen(reference: nn.Module, policy: nn.Module) -> None:
    """Let the reference use the policy's frozen parameters, which are the initial policy's too, in place of its own."""
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            setattr(reference.get_submodule(owner), leaf, parameter)


def load_reward_model(
    source: str, config: Config, device: torch.device, trained: Path | str | None = None
) -> RewardModel:
    """A reward model from a hub id or folder, with its value head if one lies beside it.

    In float32, but for a base that is frozen under adapters (`base_settings`); the reward head is trained whole.

    A causal LM without a reward head gets one of zeros (stage 1 trains it). trained: a folder with what was trained
    from `source` on: the value head, and the whole model or the adapters, if they were.
    Raises ConfigError for a model with more than one label, none at all, or no chat template.
    """
    tokenizer = load_tokenizer(source, "reward_model")
    trained = Path(trained) if trained else None
    path = resolve(str(trained) if trained and (trained / "config.json").is_file() else source)
    settings = base_settings(config, device)
    exact = settings | {"dtype": torch.float32, "num_labels": _labels(path)}
    model, missing = _loaded(AutoModelForSequenceClassification, path, "reward_model", exact)
    _new_head(model, missing, config, source)
    _check_tokenizer(tokenizer, model, f"reward_model = {source!r}")
    for p in model.base_model.parameters():  # `model.to` would round the tables of rotations too
        p.data = p.data.to(settings["dtype"]) if p.is_floating_point() else p.data
    if config.reward_layers:
        del _layers(model, "reward_layers", config.reward_layers)[config.reward_layers :]
        model.config.num_hidden_layers = config.reward_layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[: config.reward_layers]
    if model.config.num_labels != 1:
        raise ConfigError(
            f"reward_model = {source!r} has {model.config.num_labels} labels; a scalar reward model has exactly 1"
        )
    if model.config.get_text_config().pad_token_id is None and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model = model if config.load_in_4bit else model.to(device)
    model = with_adapters(model.eval(), config, "SEQ_CLS", trained)
    rm = RewardModel(model, tokenizer, value_head=config.value_head, value_position=config.value_position)
    head_file = (trained or Path(path)) / VALUE_HEAD_FILE
    if head_file.is_file():
        _load_value_head(rm, head_file, config)
    return rm


def _new_head(model: nn.Module, missing: list[str], config: Config, source: str) -> None:
    """Zeros for a reward head that the files lack, if stage 1 trains it. Raises ConfigError for all else they lack."""
    backbone = {id(p) for p in model.base_model.parameters()}
    head = [name for name, p in model.named_parameters() if id(p) not in backbone]
    if missing and (not set(missing) <= set(head) or not config.bt_epochs):
        raise ConfigError(
            f"reward_model = {source!r} lacks weights: {_names(missing)}; give a reward model's folder, or, for a "
            f"causal language model, bt_epochs of at least 1 (here {config.bt_epochs}), which train a new reward head"
        )
    for name in missing:
        nn.init.zeros_(model.get_parameter(name))


def value_head_settings(file: Path) -> dict[str, Any]:
    """The fields of the config that a value head was made with. Raises ConfigError for a file that is damaged."""
    with _whole(file), safe_open(file, "pt") as opened:
        return dict(json.loads((opened.metadata() or {}).get("made_with", "{}")))


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ConfigError(f"{file} is damaged ({error}): delete it, stage 2 makes a new one") from None


def _load_value_head(rm: RewardModel, file: Path, config: Config) -> None:
    """Raises ConfigError for a file that is damaged, or made for another value head."""
    wanted, made = {"value_head": config.value_head, "value_position": config.value_position}, value_head_settings(file)
    with _whole(file):
        weights = load_file(file)
    if made != wanted:
        raise ConfigError(f"{file}: its value head was made with {made or 'other code'}, this run asks for {wanted}")
    shapes = {name: list(p.shape) for name, p in rm.value_head.state_dict().items()}
    found = {name: list(p.shape) for name, p in weights.items()}
    if found != shapes or not all(torch.isfinite(p).all() for p in weights.values()):
        raise ConfigError(f"{file} holds {found}, this model needs {shapes} with finite numbers: delete the file")
    rm.value_head.load_state_dict(weights)


def _labels(path: str) -> int:
    """1 for a causal LM that is to become a reward model; what its config says for a classifier."""
    found = from_pretrained(AutoConfig, path, "reward_model")
    classifier = any("SequenceClassification" in name for name in found.architectures or [])
    return found.num_labels if classifier else 1


def policy_source(config: Config) -> str:
    """Folder or hub id of the initial policy."""
    if config.policy_model == "embedded":
        return str(world_models.build_policy(config.world_seed, config.start_share))
    return str(smollm2_path()) if config.policy_model == "smollm2" else config.policy_model


def reward_source(config: Config) -> str:
    """Folder or hub id of what stage 1 starts from."""
    if config.reward_model == "embedded":
        return str(world_models.build_backbone(config.world_seed, config.feature_offset))
    return str(smollm2_path()) if config.reward_model == "smollm2" else config.reward_model
