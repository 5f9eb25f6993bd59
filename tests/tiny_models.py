"""Locally made tiny models of the paper's architectures, with byte-level tokenizers and their kind of chat template."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """256 bytes and the special tokens of a Llama 3 (`llama`) or ChatML (`chatml`) tokenizer, in different order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=kind == "chatml")
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "llama":
        names = dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|pad|>")
        extra = ["<|start_header_id|>", "<|end_header_id|>"]
    else:
        names = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
        extra = ["<|im_start|>"]
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, additional_special_tokens=extra)
    made.chat_template = LLAMA3 if kind == "llama" else CHATML
    return made


SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, initializer_range=0.2,
)  # fmt: skip


def make_policy(folder: Path, architecture: str = "qwen2", chat_template: bool = True) -> Path:
    """A Qwen2 or Qwen3 causal LM with a ChatML tokenizer."""
    torch.manual_seed(1)
    tokenizer = byte_tokenizer("chatml")
    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[architecture]
    more = {"head_dim": 8} if architecture == "qwen3" else {}
    config = kind(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES,
        **more,
    )
    if not chat_template:
        tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_config(config)
    # an untrained policy rarely finds its end token: a third of the bytes end a response too
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(90)]
    return _save(model, tokenizer, folder)


def make_reward_model(folder: Path, num_labels: int = 1, kind: str = "llama") -> Path:
    """A Llama sequence classifier with a Llama 3 template, or a bidirectional BERT one (`bert`)."""
    torch.manual_seed(2)
    tokenizer = byte_tokenizer("llama")
    common = dict(vocab_size=len(tokenizer), num_labels=num_labels, pad_token_id=tokenizer.pad_token_id)
    if kind == "llama":
        config = LlamaConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **common, **SIZES
        )
    else:
        config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **common)
    return _save(AutoModelForSequenceClassification.from_config(config), tokenizer, folder)


PAIRS = (
    ("Name a colour.", "Red is a colour.", "No."),
    ("Say hi.", "Hi there!", "x"),
    ("Count.", "One two", "zz"),
    ("Why?", "Because", "q"),
)


def paper_run(folder: Path, architecture: str = "qwen2") -> dict:
    """Config values of a small `paper` run on local models and files, through the same code as the paper's hub ids."""
    prompts, pairs = folder / "prompts.jsonl", folder / "pairs.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Prompt number {i}."}) + "\n" for i in range(20)))
    rows = [dict(zip(("prompt", "chosen", "rejected"), p, strict=True)) for p in PAIRS]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(
        profile="paper", policy_model=str(make_policy(folder / "policy", architecture)),
        reward_model=str(make_reward_model(folder / "rm")), prompts=str(prompts), preferences=str(pairs),
        anchor_responses=4, group_size=4, max_new_tokens=6, eval_prompts=2, device="cpu", curriculum="none",
        num_processes=1, backend="ddp",
    )  # fmt: skip


def checkable_prompts(folder: Path) -> Path:
    """Prompts with gold: random bytes are now one word, now several."""
    path = folder / "checkable.jsonl"
    row = {"checks": [{"kind": "max_words", "n": 1}]}
    path.write_text("".join(json.dumps(row | {"id": f"p{i}", "prompt": f"Say {i}"}) + "\n" for i in range(20)))
    return path


def centre_rewards(source: str, folder: Path) -> str:
    """A copy of a reward model whose rewards of PAIRS have mean 0 and sd 2: one that SER is sure of now and then."""
    from savelib.models.reward_model import RewardModel  # after the environment is set

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    rm = RewardModel(model.eval(), tokenizer)
    said = [([{"role": "user", "content": prompt}], text) for prompt, *texts in PAIRS for text in texts]
    encoded, w = rm.encode(said), model.score.weight.data
    with torch.no_grad():
        states = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in encoded.ids]
        mean = torch.stack(states).mean(0)
        w -= (w @ mean) * mean / (mean @ mean)
        w *= 2 / rm.score(encoded).rewards.std()
    return str(_save(model, tokenizer, folder))


def _save(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
