"""Make the four files of the profile `smol`: `python data/make_smol_data.py [--force]`.

Prompts are drawn from savelib.data.instructions, responses are sampled from SmolLM2-135M-Instruct, and the checkers
label them. Simplified: a pair is one response that passes and one that fails, whatever else tells them apart.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path

from savelib.config import make_config
from savelib.data.instructions import gold, make_prompts
from savelib.data.pairs_and_prompts import Prompt
from savelib.models.compute import pick_device, seed_everything
from savelib.models.loading import load_policy, policy_source
from savelib.models.rollout import sample as sample_responses

FOLDER = Path(__file__).parent
SEED = 0
# Constraints that a linear probe on SmolLM2's hidden states can tell to be fulfilled or not; data/README.md has all.
READABLE = ("question", "digits", "sentences", "max_words", "list_items", "min_words", "exclamation")
# Prompts, all different: pairs of stage 1, RL, gold, held-out pairs
PROMPTS = {"preferences": 150, "prompts": 300, "heldout_prompts": 200, "heldout_preferences": 350}
RESPONSES = 6  # sampled for each prompt that pairs are made of
PAIRS = 3  # at most, of one prompt
PROMPTS_AT_ONCE = 16

Samples = list[tuple[str, bool]]  # response, whether it ended its turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    force = parser.parse_args().force

    files = {name: FOLDER / f"smol_{name}.jsonl" for name in PROMPTS}
    if not force and (there := [str(f) for f in files.values() if f.exists()]):
        sys.exit(f"already there: {', '.join(there)}; --force overwrites")

    rows = prompts_of_files()
    paired = [name for name in rows if name.endswith("preferences")]
    sampled = [row for name in paired for row in rows[name]]
    samples = sample(sampled)
    report(sampled, samples)
    for name in paired:
        count = len(rows[name])
        rows[name], samples = make_pairs(rows[name], samples[:count]), samples[count:]
    for name, file in files.items():
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]), encoding="utf-8")
        print(f"{file.name}: {len(rows[name])} rows, {file.stat().st_size / 1000:.0f} kB")


def prompts_of_files() -> dict[str, list[dict]]:
    """The prompts that each file is made of, by its name in PROMPTS."""
    prompts = iter(make_prompts(sum(PROMPTS.values()), SEED, READABLE))
    return {name: list(islice(prompts, count)) for name, count in PROMPTS.items()}


def sample(prompts: list[dict]) -> list[Samples]:
    """RESPONSES samples for each prompt, with the sampling of profile smol."""
    config = make_config(profile="smol")
    policy, tokenizer = load_policy(policy_source(config), pick_device("cpu", threads=1))
    samples: list[Samples] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        rows = prompts[first : first + PROMPTS_AT_ONCE]
        batch = [Prompt(row["id"], [{"role": "user", "content": row["prompt"]}]) for row in rows]
        seed_everything("smol data", SEED, first)
        rollout = sample_responses(policy, tokenizer, batch, RESPONSES, config)
        for texts, ended in zip(rollout.texts, rollout.finished.tolist(), strict=True):
            samples.append([(text.strip(), end) for text, end in zip(texts, ended, strict=True)])
        print(f"{len(samples)}/{len(prompts)} prompts, {time.perf_counter() - start:.0f} s", flush=True)
    return samples


def make_pairs(prompts: list[dict], samples: list[Samples]) -> list[dict]:
    """Up to PAIRS pairs for each prompt among the different responses that ended their turn."""
    pairs = []
    for row, responses in zip(prompts, samples, strict=True):
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
