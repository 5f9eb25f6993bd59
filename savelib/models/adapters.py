"""LoRA adapters on a frozen base: made, switched off, merged."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from savelib.config import Config
from savelib.data.hub import from_pretrained
from savelib.models.compute import in_bfloat16


def base_settings(config: Config, device: torch.device) -> dict:
    """from_pretrained's settings for a model that is trained: float32, or under LoRA a frozen base in fewer bits."""
    if not config.lora_rank:
        return {"dtype": torch.float32}
    dtype = torch.bfloat16 if in_bfloat16(device, config.precision) else torch.float32
    if not config.load_in_4bit:
        return {"dtype": dtype}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score", "classifier"],
    )
    return {"dtype": dtype, "quantization_config": quantization, "device_map": {"": device}}


def with_adapters(model: nn.Module, config: Config, task: str, folder: Path | None = None) -> nn.Module:
    """The model with LoRA adapters in float32, new or from a checkpoint's folder; as it is where lora_rank is 0.

    task: CAUSAL_LM, or SEQ_CLS (then the reward head is trained whole beside the adapters).
    """
    if not config.lora_rank:
        return model

    from peft import LoraConfig, PeftModel, get_peft_model  # slow to import

    if folder is not None and (folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(model, folder, is_trainable=True, torch_device=str(model.device))
    else:
        r = config.lora_rank
        settings = LoraConfig(task_type=task, r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules="all-linear")
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # the same adapters in every process, and after any stage
            model = get_peft_model(model, settings)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True  # in eval mode, on a CPU, its kernel gives no gradient and says nothing
    return model


def adapted(model: nn.Module) -> bool:
    """Whether this is a PeftModel."""
    return hasattr(model, "get_base_model")


def plain(model: nn.Module) -> nn.Module:
    """The transformers model, with or without adapters in it."""
    return model.get_base_model() if adapted(model) else model


def save_merged(model: nn.Module, source: str, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Save a trained model as one that plain `from_pretrained` loads; adapters are merged into `source` in float32.

    weights: the state dict to save, by default the model's own.
    """
    if adapted(model):
        from peft import PeftModel

        model.save_pretrained(folder)
        classifier = hasattr(plain(model), "score")
        field, labels = ("reward_model", {"num_labels": 1}) if classifier else ("policy_model", {})
        base = from_pretrained(type(plain(model)), source, field, dtype=torch.float32, **labels)
        model, weights = PeftModel.from_pretrained(base, folder, torch_device="cpu").merge_and_unload(), None
        for file in folder.glob("adapter_*"):
            file.unlink()
    model.save_pretrained(folder, state_dict=weights)
