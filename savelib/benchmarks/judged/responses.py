"""Responses of a policy to the prompts of AlpacaEval 2 and Arena-Hard v2.0, in the shapes of the benchmarks' own files.

Prompts and responses are read from JSON lists or JSONL. AlpacaEval: `instruction`, `output`, `generator`, `dataset`
(of an annotation file, with its `output_1`, too). Arena-Hard: `uid`, `prompt`, `category` of a question; `uid`,
`model`, `messages`, `metadata` of an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from savelib.benchmarks.judged.answers import (
    TEXT,
    Log,
    Row,
    _files,
    by_id,
    count_style,
    output,
    read_rows,
    text_of,
    write_rows,
    wrote,
)
from savelib.config import Config, make_config
from savelib.data.chat import render
from savelib.data.pairs_and_prompts import Prompt
from savelib.models.compute import pick_device
from savelib.models.loading import load_policy, policy_source
from savelib.models.rollout import sample
from savelib.paths import digest, resolve, writable_file
from savelib.progress import Progress

SAMPLING = ("seed", "temperature", "top_p", "top_k", "max_new_tokens", "precision")
TABLE8 = {"profile": "paper", "num_processes": 1, "backend": "ddp", "max_prompt_tokens": 16384}  # in one process


def generate(
    policy: str,
    benchmark: str,
    prompts: str | Path,
    out: str | Path,
    config: Config | None = None,
    name: str | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> Row:
    """Sample one response to each prompt and write them all to `out`, a JSON list or JSONL by its ending; say how many.

    policy: folder, hub id, smollm2 or embedded; benchmark: alpaca or arena; name: of the policy in the file.
    config: sampling and device, by default table 8's with prompts of up to 16,384 tokens.
    count_tokens: for Arena-Hard's `token_len`, by default the policy's tokenizer. Style control against published
    baselines wants theirs: `lambda text: len(tiktoken.encoding_for_model("gpt-4o").encode(text))`.
    Responses are kept in `<out>.partial.jsonl` as they come, and are not sampled again: interrupt it and call again.
    A response's random numbers depend on its id and config.seed alone. `out` is written when all are there.
    Raises ConfigError for bad prompts, and where `out` is an input or holds what no earlier call wrote.
    """
    config = config or make_config(**TABLE8)
    log_file = Path(f"{out}.partial.jsonl")
    inputs = {"policy": policy, "prompts": prompts}
    out = writable_file("out", out, inputs, wrote(log_file))
    writable_file("out", log_file, inputs, Path.is_file)  # Log checks what is in it
    asked = by_id(read_rows(prompts, "prompts"), benchmark, f"prompts = {str(prompts)!r}")
    texts = {i: text_of(row, TEXT[benchmark], f"prompts: {i[:60]!r}") for i, row in asked.items()}
    source = resolve(policy_source(config.model_copy(update={"policy_model": str(policy)})))
    name = name or Path(policy).name
    made_with = [source, _files(Path(source)), config.only(*SAMPLING)]
    keys = {i: digest([made_with, i, text]) for i, text in texts.items()}
    with Log(log_file) as log:
        done = {row["key"]: row for row in log.rows}
        todo = [Prompt(i, [{"role": "user", "content": text}]) for i, text in texts.items() if keys[i] not in done]
        if todo:
            model, tokenizer = load_policy(source, pick_device(config.device, config.threads))
            todo.sort(key=lambda p: -len(render(tokenizer, p.messages)))  # the longest first: what fails, fails at once
            count = count_tokens or (lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        progress = Progress("responses", len(texts), len(texts) - len(todo))
        for start in range(0, len(todo), config.rollout_rows):
            batch = todo[start : start + config.rollout_rows]
            uniforms = torch.stack([_uniforms(p.id, config) for p in batch])
            rollout = sample(model, tokenizer, batch, 1, config, uniforms)
            for prompt, [text], finished in zip(batch, rollout.texts, rollout.finished[:, 0].tolist(), strict=True):
                row = {"key": keys[prompt.id], "output": text, "finished": finished, "token_len": count(text)}
                done[row["key"]] = log.append(row)
            progress.add(len(batch))
        rows = [_shaped(benchmark, asked[i], texts[i], name, done[keys[i]]) for i in texts]
        write_rows(out, rows, log)
    return {
        "responses": len(rows),
        "unfinished": sum(not row["finished"] for row in rows),
        "empty": sum(not output(row, benchmark).strip() for row in rows),
    }


def _uniforms(name: str, config: Config) -> torch.Tensor:
    """The random numbers of a response's tokens [max_new_tokens]."""
    seed = int(digest(["response", config.seed, name])[:15], 16)
    return torch.rand(config.max_new_tokens, generator=torch.Generator().manual_seed(seed))


def _shaped(benchmark: str, asked: Row, prompt: str, name: str, made: Row) -> Row:
    """A response as the benchmark's own files have it; `finished` is ours: whether an end token was sampled."""
    if benchmark == "alpaca":
        row = {"instruction": prompt, "output": made["output"], "generator": name, "dataset": asked.get("dataset", "")}
        return row | {"finished": made["finished"]}
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": made["output"]}}]
    metadata = {"token_len": made["token_len"]} | count_style(made["output"])
    return {"uid": asked["uid"], "model": name, "messages": said, "metadata": metadata, "finished": made["finished"]}
