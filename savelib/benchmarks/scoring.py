"""Scores of a reward model on the rows of a benchmark, kept in a file.

Conversations are rendered by the model's own chat template over [user, assistant], no system prompt, with a fixed date
and no special tokens but the template's. Too long ones lose tokens at the beginning, as in reward-bench: the response's
end, which is scored, stays, and so does the first token where it is BOS.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from savelib.benchmarks.rows import Benchmark, Row, Scores
from savelib.config import ConfigError
from savelib.data.chat import render
from savelib.models.compute import in_bfloat16
from savelib.models.reward_model import Encoded, RewardModel, score_in_batches
from savelib.paths import write_atomically
from savelib.progress import Progress

Truncation = Literal["left", "right", "refuse"]


@dataclass
class Scorer:
    """Scores rows with a reward model, and keeps them in a file. fingerprint: of the model, as `key` needs it."""

    rm: RewardModel
    fingerprint: str
    precision: str
    max_length: int
    truncation: Truncation
    batch_tokens: int
    batch_rows: int

    def settings(self) -> dict[str, Any]:
        """What every figure is recorded with."""
        half = in_bfloat16(self.rm.device, self.precision)
        return {
            "fingerprint": self.fingerprint,
            "dtype": "float32 weights, bfloat16 autocast" if half else "float32",
            "device": torch.cuda.get_device_name(self.rm.device) if self.rm.device.type == "cuda" else "cpu",
            "max_length": self.max_length,
            "truncation": self.truncation,
            "batch_tokens": self.batch_tokens,
            "batch_rows": self.batch_rows,
        }

    def scores(
        self, benchmark: Benchmark, rows: list[Row], file: Path, say: Callable[[str], None]
    ) -> tuple[Scores, dict[str, int]]:
        """(scores of the rows that count, in their order; what was counted). `file` gets each row once it is scored."""
        rows = [row for row in rows if row.counts]
        tokens, counts = self._tokens(rows)
        keys = {row.id: self._key(tokens[row.id]) for row in rows}
        lines = {line["key"]: line for line in _kept(file)}
        done: Scores = {}
        for row in rows:
            with_key = lines.get(keys[row.id])
            if with_key and benchmark.read_scores(with_key)[0] == row.id:
                done[row.id] = benchmark.read_scores(with_key)[1]
        if len(lines) > len(done):
            say(f"{benchmark.name}: {len(lines) - len(done)} scores in {file} are of another model, setting or text")

        cut = f"{counts['truncated']} of {counts['responses']} conversations cut to {self.max_length} tokens"
        say(f"{benchmark.name}: {len(rows)} rows, {cut}, {len(done)} rows scored before")

        def as_line(row: Row) -> str:
            return json.dumps(benchmark.write_scores(row.id, done[row.id]) | {"key": keys[row.id]}) + "\n"

        def write_all() -> None:
            write_atomically(file, "".join(as_line(row) for row in rows if row.id in done))

        write_all()
        counts |= {"rows": len(rows), "scored_before": len(done)}
        progress, tokens_done = Progress(f"{benchmark.name} rows", len(rows), len(done), say), 0
        with open(file, "a", encoding="utf-8") as log:
            for part in self._parts([row for row in rows if row.id not in done], tokens):
                flat = self._rewards([ids for row in part for ids in tokens[row.id]])
                for row in part:
                    done[row.id] = [next(flat) for _ in row.responses]
                    if not all(map(math.isfinite, done[row.id])):
                        raise ConfigError(
                            f"{benchmark.name}, row {row.id!r}: the model's score is no finite number; try float32"
                        )
                    log.write(as_line(row))
                log.flush()
                tokens_done += sum(len(ids) for row in part for ids in tokens[row.id])
                progress.add(len(part), f"{tokens_done / progress.seconds:.0f} tokens/s")
        write_all()  # in the rows' order
        return {row.id: done[row.id] for row in rows}, counts

    def _tokens(self, rows: list[Row]) -> tuple[dict[str, list[np.ndarray]], dict[str, int]]:
        """(row id -> token ids of each conversation, counts of conversations cut)."""
        tokenizer, limit = self.rm.tokenizer, self.max_length
        counts = {"responses": 0, "tokens": 0, "truncated": 0, "responses_cut": 0}
        tokens: dict[str, list[np.ndarray]] = {}
        for row in rows:
            turns = [[*row.prompt, {"role": "assistant", "content": response}] for response in row.responses]
            rendered = [render(tokenizer, messages) for messages in turns]
            found = tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template wrote the BOS
            long = [ids for ids in found if len(ids) > limit]
            if long and self.truncation == "refuse":
                raise ConfigError(
                    f"row {row.id!r}: a conversation of {len(long[0])} tokens exceeds {limit}; raise max_length, or "
                    "choose truncation=left"
                )
            if long:
                prefix = render(tokenizer, row.prompt, generation_prompt=True)
                start = len(tokenizer(prefix, add_special_tokens=False)["input_ids"])  # of the response
                cut = [self.truncation == "right" or len(ids) - limit > start - self._bos(ids) for ids in long]
                counts["responses_cut"] += sum(cut)
                counts["truncated"] += len(long)
            tokens[row.id] = [np.array(self._cut(ids), np.int32) for ids in found]
            counts["responses"] += len(found)
            counts["tokens"] += sum(map(len, tokens[row.id]))
        return tokens, counts

    def _bos(self, ids: list[int]) -> int:
        """How many tokens at the beginning stay when it is cut off."""
        return int(ids[0] == self.rm.tokenizer.bos_token_id)

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_length or self.truncation == "right":
            return ids[: self.max_length]
        kept = self._bos(ids)
        return ids[:kept] + ids[len(ids) - self.max_length + kept :]

    def _key(self, tokens: list[np.ndarray]) -> str:
        """Of all that a row's scores depend on."""
        digest = hashlib.sha256(f"{self.fingerprint} {self.settings()['dtype']}".encode())
        for ids in tokens:
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()[:32]

    def _parts(self, rows: list[Row], tokens: dict[str, list[np.ndarray]]) -> Iterator[list[Row]]:
        """Rows in parts of about a batch, the longest first: what is too long for the memory fails at once."""
        part: list[Row] = []
        size = 0
        for row in sorted(rows, key=lambda row: -max(map(len, tokens[row.id]))):
            part.append(row)
            size += sum(map(len, tokens[row.id]))
            if size >= self.batch_tokens:
                yield part
                part, size = [], 0
        if part:
            yield part

    def _rewards(self, conversations: list[np.ndarray]) -> Iterator[float]:
        """The score of each conversation, in their order."""
        encoded = Encoded([ids.tolist() for ids in conversations], [0] * len(conversations))
        return iter(score_in_batches(self.rm, encoded, self._batches(encoded), self.precision).rewards.tolist())

    def _batches(self, encoded: Encoded) -> Iterator[list[int]]:
        """Rows of one forward each; alike lengths share one."""
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded.ids[i]))
        while order:
            count = max(1, min(self.batch_rows, self.batch_tokens // len(encoded.ids[order[0]])))
            yield order[:count]
            order = order[count:]


def _kept(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of scores; one that a killed writer left unfinished is scored again."""
    kept = []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        kept += [value] if isinstance(value, dict) and "key" in value else []
    return kept
