"""Make the four files of the profile `smol`: `python data/make_smol_data.py [--force]`.

Prompts are drawn from savelib.data.instructions, responses are sampled from SmolLM2-135M-Instruct, and the checkers
label them. Simplified: a pair is one response that passes and one that fails, whatever else tells them apart.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from savelib.data.instructions import gold, make_prompts
from savelib.data.smollm2 import smollm2_path

FOLDER = Path(__file__).parent
SEED = 0
N_PREFERENCE, N_RL, N_HELDOUT = 160, 128, 48  # prompts, all different
RESPONSES = 4  # sampled for each preference and each held-out prompt
PAIRS = 2  # at most, of one prompt
PROMPTS_AT_ONCE = 8
SAMPLING = dict(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, max_new_tokens=32)

Samples = list[tuple[str, bool]]  # response, whether it ended its turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    force = parser.parse_args().force

    prompts = make_prompts(N_PREFERENCE + N_RL + N_HELDOUT, SEED)
    for_pairs, for_rl, heldout = prompts[:N_PREFERENCE], prompts[N_PREFERENCE:-N_HELDOUT], prompts[-N_HELDOUT:]
    names = ["smol_prompts", "smol_heldout_prompts", "smol_preferences", "smol_heldout_preferences"]
    files = [FOLDER / f"{name}.jsonl" for name in names]
    if not force and (there := [str(f) for f in files if f.exists()]):
        sys.exit(f"already there: {', '.join(there)}; --force overwrites")

    sampled = for_pairs + heldout
    samples = sample(sampled)
    report(sampled, samples)
    pairs, heldout_pairs = make_pairs(for_pairs, samples), make_pairs(heldout, samples[N_PREFERENCE:])
    for file, rows in zip(files, (for_rl, heldout, pairs, heldout_pairs), strict=True):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{file.name}: {len(rows)} rows, {file.stat().st_size / 1000:.0f} kB")


@torch.inference_mode()
def sample(prompts: list[dict]) -> list[Samples]:
    """RESPONSES samples for each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path(), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(smollm2_path()).eval()
    torch.manual_seed(SEED)
    samples: list[Samples] = []
    tokens, start = 0, time.perf_counter()
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        chats = [[{"role": "user", "content": row["prompt"]}] for row in prompts[first : first + PROMPTS_AT_ONCE]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        outputs = model.generate(**inputs, **SAMPLING, num_return_sequences=RESPONSES)
        completions = outputs[:, inputs["input_ids"].shape[1] :]  # [prompts * RESPONSES, T]
        ended = (completions == tokenizer.eos_token_id).any(dim=1).tolist()
        texts = [text.strip() for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]
        rows = list(zip(texts, ended, strict=True))
        samples += [rows[i : i + RESPONSES] for i in range(0, len(rows), RESPONSES)]
        tokens += int((completions != tokenizer.pad_token_id).sum())  # a count for the eye only
        seconds = time.perf_counter() - start
        print(f"{len(samples)}/{len(prompts)} prompts, {seconds:.0f} s, {tokens / seconds:.0f} tokens/s", flush=True)
    return samples


def make_pairs(prompts: list[dict], samples: list[Samples]) -> list[dict]:
    """Up to PAIRS pairs for each prompt among the different responses that ended their turn."""
    pairs = []
    for row, responses in zip(prompts, samples, strict=False):
        texts = list(dict.fromkeys(text for text, ended in responses if ended and text))
        passed = [text for text in texts if gold(row["checks"], text)]
        failed = [text for text in texts if not gold(row["checks"], text)]
        for i, (chosen, rejected) in enumerate(list(zip(passed, failed, strict=False))[:PAIRS]):
            pairs.append({"id": f"{row['id']}-{i}", "prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def report(prompts: list[dict], samples: list[Samples]) -> None:
    """Print the success rate: of all prompts, by number of checks, and of each kind where it stands alone."""
    passed: dict[str, list[float]] = defaultdict(list)
    mixed, ended = 0, []
    for row, responses in zip(prompts, samples, strict=True):
        golds = [gold(row["checks"], text) for text, _ in responses]
        mixed += 0 < sum(golds) < len(golds)
        ended += [end for _, end in responses]
        alone = len(row["checks"]) == 1
        for key in ["all", "one check" if alone else "two checks", *(c["kind"] for c in row["checks"] if alone)]:
            passed[key] += golds
    print(f"\nended their turn: {sum(ended) / len(ended):.2f}; prompts with both outcomes: {mixed / len(prompts):.2f}")
    print("| prompts with | responses | success |\n|---|---|---|")
    for key, golds in passed.items():
        print(f"| {key} | {len(golds)} | {sum(golds) / len(golds):.2f} |")
    print()


if __name__ == "__main__":
    main()
