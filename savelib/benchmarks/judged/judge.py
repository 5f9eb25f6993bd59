"""Pairwise judging of responses by any OpenAI-compatible endpoint, as AlpacaEval 2 and Arena-Hard v2.0 do it.

AlpacaEval: one request a pair, the order drawn per instruction exactly as alpaca_eval draws it; the preference is
P(token of output_2 | m or M) from the log-probabilities, else the answer's text. Arena-Hard: two games a pair, first
with the baseline as assistant A; the verdict is the last label such as [[A>B]].

The templates here are our own wording in the benchmarks' shape. Figures compare with published ones only if the judge
and the template are the official ones: `template=FILE`. A template is ChatML text with {instruction}, {output_1},
{output_2} (or {QUESTION}, {ANSWER_A}, {ANSWER_B}), as AlpacaEval's `alpaca_eval_clf.txt`; for Arena-Hard, put the
category's system prompt from `utils/judge_utils.py` and `prompt_template` of `config/arena-hard-v2.0.yaml` into one.
"""

from __future__ import annotations

import math
import os
import random
import re
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from savelib.benchmarks.judged.answers import Log, Row, by_id, output, read_rows, text_of, write_rows, wrote
from savelib.config import ConfigError
from savelib.data.chat import Messages
from savelib.paths import digest, strict_json, writable_file
from savelib.progress import Progress

CATEGORIES = ("hard_prompt", "creative_writing")
SETTINGS = {  # of the two benchmarks' own configurations
    "alpaca": {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 5},
    "arena": {"max_tokens": 16000, "temperature": 0.0},
}
# verdicts that mean the same, each under its official name
LABELS = {"A>>B": "A>>B", "A>B": "A>B", "A=B": "A=B", "B>A": "B>A", "B>>A": "B>>A"}
LABELS |= {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}
GIVE_UP = 20  # requests that fail one after another
FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
_TURN = re.compile(r"<\|im_start\|>(system|user)\n(.*?)<\|im_end\|>", re.DOTALL)
_PLACE = {"instruction": 0, "QUESTION": 0, "output_1": 1, "ANSWER_A": 1, "output_2": 2, "ANSWER_B": 2}
_PLACES = re.compile(r"\{(" + "|".join(_PLACE) + r")\}")

_ALPACA = """<|im_start|>system
You compare answers of language models and pick the better one. Your picks become a leaderboard, which should rank the \
models as people would.
<|im_end|>
<|im_start|>user
Two models, "m" and "M", were given this instruction:

<instruction>
{instruction}
</instruction>

<model id="m">
{output_1}
</model>

<model id="M">
{output_2}
</model>

Which output would people prefer, for its quality and for how well it does what was asked? The order of the two means \
nothing. Reply with the id of the better model, m or M: this one letter and nothing else.
<|im_end|>"""
_ARENA = """<|im_start|>system
You are an impartial judge of two AI assistants, A and B, who answered the same prompt. FIRSTFind what is wrong in \
either answer and say what would be right. Weigh correctness, helpfulness and relevance; prefer an answer without \
padding; where the prompt is ambiguous, asking is better than guessing; where it calls for it, weigh originality. Name \
what is missing. Neither the order of the answers nor their length is a merit.

End with your verdict as one of these labels, in double square brackets:
[[A>>B]] A is much better
[[A>B]] A is slightly better
[[A=B]] they are about equal
[[B>A]] B is slightly better
[[B>>A]] B is much better
<|im_end|>
<|im_start|>user
<|User Prompt|>
{QUESTION}

<|The Start of Assistant A's Answer|>
{ANSWER_A}
<|The End of Assistant A's Answer|>

<|The Start of Assistant B's Answer|>
{ANSWER_B}
<|The End of Assistant B's Answer|>
<|im_end|>"""
TEMPLATES = {
    "alpaca": _ALPACA,
    "hard_prompt": _ARENA.replace("FIRST", "First answer the prompt yourself, then compare both answers with yours. "),
    "creative_writing": _ARENA.replace("FIRST", ""),
}


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is. The key is read from the environment variable `key_env` and never written anywhere."""

    base_url: str  # for example https://api.openai.com/v1
    model: str
    key_env: str = "OPENAI_API_KEY"  # may be unset for a server that asks for none
    timeout: float = 300.0  # seconds that the server may be silent
    retries: int = 6  # of 408, 409, 429, 5xx, broken connections and timeouts, after Retry-After or 0.5, 1, 2, 4, 8 s
    concurrency: int = 8  # requests under way
    price_in: float | None = None  # per million tokens, in any currency
    price_out: float | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for a number that no request can be made with."""
        for name, most in (("timeout", 1e6), ("price_in", 1e9), ("price_out", 1e9)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most or name == "timeout" and not value:
                raise ConfigError(
                    f"{name} = {value}: give a number from 0 to {most:g}{', not 0' * (name == 'timeout')}"
                )

    def key(self) -> str:
        key = os.environ.get(self.key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"key_env = {self.key_env!r}: its value is no key: line breaks or non-ASCII in it")
        return key

    def client(self) -> openai.OpenAI:
        try:
            url = urlsplit(self.base_url)
            fits = url.port != 0 and url.scheme in ("http", "https") and url.hostname and self.base_url.isprintable()
        except ValueError:  # a port or an address that is none
            fits = False
        if not fits or " " in self.base_url or url.username or url.query:
            raise ConfigError(
                "base_url must be http(s)://host[:port]/path, without a password or a query: the key comes from the "
                f"environment variable {self.key_env}"
            )
        key = self.key() or "none"
        return openai.OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=self.retries)


@dataclass(frozen=True)
class Pair:
    """One comparison. swapped: AlpacaEval shows the policy's response first."""

    id: str
    question: str
    baseline: Row
    answer: Row
    category: str = ""
    swapped: bool = False


@dataclass(frozen=True)
class Game:
    """One request to the judge; `key` tells it from every other."""

    key: str
    id: str
    number: int
    messages: Messages


def judge(
    benchmark: str,
    outputs: str | Path,
    baseline: str | Path,
    out: str | Path,
    endpoint: Endpoint,
    *,
    questions: str | Path | None = None,
    category: str = "hard_prompt",
    template: str | Path | None = None,
    settings: Row | None = None,
    seed: int = 0,
    allow_missing: bool = False,
) -> Row:
    """Have every response of `outputs` compared with the baseline's; write the judgments and a summary; return it.

    benchmark: alpaca or arena; `out` gets alpaca_eval's annotations (JSON list or JSONL, by its ending) or
    arena-hard-auto's judgments (JSONL). questions, category: Arena-Hard's questions, and which of them.
    settings: fields of the request over the benchmark's own; None leaves a field out (`logprobs` is not known to all).
    seed: of AlpacaEval's orders; published annotations have 0.
    Every answer is appended to `<out>.games.jsonl` at once and not asked for again: interrupt it and call again.
    The judge is known by endpoint.model alone. `<out>.summary.json` has the counts, the cost, and what is missing.
    Raises ConfigError if a game has no verdict and allow_missing is not set: then `out` is not written. With it, a
    missing preference is null, a missing game has the score null. Also where `out` is an input, or is there already
    and no earlier call wrote it.
    """
    log_file, summary_file = Path(f"{out}.games.jsonl"), Path(f"{out}.summary.json")
    inputs = {"outputs": outputs, "baseline": baseline, "questions": questions, "template": template}
    out = writable_file("out", out, inputs, wrote(log_file))
    writable_file("out", summary_file, inputs, wrote(log_file))
    writable_file("out", log_file, inputs, Path.is_file)  # Log checks what is in it
    pairs = _pairs(benchmark, outputs, baseline, questions, category, seed)
    text = TEMPLATES["alpaca" if benchmark == "alpaca" else category] if template is None else _read_template(template)
    turns = parse_template(text, "template" if template is None else f"template = {str(template)!r}")
    settings = {k: v for k, v in (SETTINGS[benchmark] | (settings or {})).items() if v is not None}
    games = {pair.id: _games(benchmark, pair, turns, settings, endpoint.model) for pair in pairs}
    wanted = {game.key: game for two in games.values() for game in two}
    with Log(log_file) as log:
        asked = [row for row in log.rows if row["key"] in wanted]
        done = {row["key"] for row in asked if row["verdict"] is not None}
        todo = [game for game in wanted.values() if game.key not in done]
        asked += _ask_all(benchmark, todo, settings, endpoint, log, len(wanted))
        last = {row["key"]: row for row in sorted(asked, key=lambda row: row["verdict"] is not None)}
        missing = defaultdict(list)
        for game in wanted.values():
            row = last.get(game.key, {"verdict": None, "error": "not asked"})
            if row["verdict"] is None:
                missing[row["error"]].append(game.id if benchmark == "alpaca" else f"{game.id}, game {game.number + 1}")
        summary = {
            "benchmark": benchmark if benchmark == "alpaca" else f"{benchmark}, {category}",
            "judge": endpoint.model,
            "template": f"{'built-in' if template is None else Path(template).name} {digest([turns])[:12]}",
            "settings": settings,
            "pairs": len(pairs),
            "games": len(wanted),
            "judged": len(wanted) - sum(map(len, missing.values())),
            "judged_by": dict(Counter(row["by"] for row in last.values() if row["verdict"] is not None)),
            "missing": dict(missing),
            "empty_responses": [p.id for p in pairs if not output(p.answer, benchmark).strip()],
            **_spent(asked, endpoint),
        }
        log.write(summary_file, strict_json(summary, indent=2) + "\n")
        if missing and not allow_missing:
            kept = f" ({out} is of an earlier call)" if out.exists() else ""
            counts = "; ".join(f"{len(ids)} {why}, the first {ids[0][:60]!r}" for why, ids in missing.items())
            raise ConfigError(
                f"{sum(map(len, missing.values()))} of {len(wanted)} games have no verdict: {counts}; all are in {out}"
                f".summary.json. No judgments are written{kept}. Call again to ask for these alone, or set "
                "allow_missing"
            )
        shape = _annotation if benchmark == "alpaca" else _judgment
        rows = [shape(p, endpoint.model, [(g, last.get(g.key)) for g in games[p.id]]) for p in pairs]
        write_rows(out, rows, log)
    return summary


def _spent(asked: list[Row], endpoint: Endpoint) -> Row:
    """What all requests for these games took, in earlier calls too. cost is None where it cannot be known."""
    read, written = (sum(row[side] or 0 for row in asked) for side in ("prompt_tokens", "completion_tokens"))
    unknown = sum(row["answer"] is not None and row["prompt_tokens"] is None for row in asked)
    priced = endpoint.price_in is not None and endpoint.price_out is not None and not unknown
    return {
        "requests": len(asked),
        "retries": sum(row["retries"] for row in asked),
        "prompt_tokens": read,
        "completion_tokens": written,
        "answers_without_usage": unknown,
        "cost": (read * endpoint.price_in + written * endpoint.price_out) / 1e6 if priced else None,
    }


# pairs and games


def _pairs(benchmark, outputs, baseline, questions, category: str, seed: int) -> list[Pair]:
    """One pair a question, in the order of the questions (AlpacaEval: of the baseline). Raises ConfigError."""
    where = {"outputs": f"outputs = {str(outputs)!r}", "baseline": f"baseline = {str(baseline)!r}"}
    ours = by_id(read_rows(outputs, "outputs"), benchmark, where["outputs"])
    theirs = by_id(read_rows(baseline, "baseline"), benchmark, where["baseline"])
    if benchmark == "alpaca":
        asked = every = theirs
    else:
        if questions is None or category not in CATEGORIES:
            raise ConfigError(f"arena needs questions=FILE and a category of {', '.join(CATEGORIES)}, not {category!r}")
        every = by_id(read_rows(questions, "questions"), benchmark, f"questions = {str(questions)!r}")
        asked = {i: row for i, row in every.items() if row.get("category") == category}
        if not asked:
            raise ConfigError(f"questions = {str(questions)!r}: none has the category {category!r}")
    for field, rows in (("outputs", ours), ("baseline", theirs)):
        missing, extra = [i for i in asked if i not in rows], [i for i in rows if i not in every]
        if missing or extra:
            first = f"the first {(missing or extra)[0][:60]!r}"
            raise ConfigError(
                f"{where[field]}: {len(missing)} of {len(asked)} responses are missing and {len(extra)} answer no "
                f"question, {first}; give the responses to these questions"
            )
        for name in asked:
            try:
                ok = isinstance(output(rows[name], benchmark), str)
            except (KeyError, IndexError, TypeError):
                ok = False
            if not ok:
                raise ConfigError(f"{where[field]}: the row of {name[:60]!r} has no response in {benchmark}'s shape")
    if benchmark == "alpaca":
        return [Pair(i, i, row, ours[i], swapped=swapped(i, seed)) for i, row in asked.items()]
    prompts = {i: text_of(row, "prompt", f"questions: {i!r}") for i, row in asked.items()}
    return [Pair(i, prompt, theirs[i], ours[i], category) for i, prompt in prompts.items()]


def swapped(instruction: str, seed: int = 0) -> bool:
    """Whether alpaca_eval shows output_2 first. With seed 0 it is so in the published annotations."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True], k=1)[0]


def parse_template(text: str, where: str) -> Messages:
    """ChatML text -> messages with places. Raises ConfigError unless all three places are in it."""
    turns = [{"role": role, "content": content.strip()} for role, content in _TURN.findall(text)]
    found = {_PLACE[name] for turn in turns for name in _PLACES.findall(turn["content"])}
    if found != {0, 1, 2} or turns[-1]["role"] != "user":
        raise ConfigError(
            f"{where} must be ChatML, <|im_start|>system or user, text, <|im_end|>, the last turn the user's, with "
            "{instruction}, {output_1} and {output_2} (or {QUESTION}, {ANSWER_A} and {ANSWER_B})"
        )
    return turns


def _read_template(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"template = {str(path)!r} cannot be read: {error}") from None


def _games(benchmark: str, pair: Pair, turns: Messages, settings: Row, model: str) -> list[Game]:
    baseline, answer = output(pair.baseline, benchmark), output(pair.answer, benchmark)
    orders = [(baseline, answer), (answer, baseline)]
    games = []
    for number, shown in enumerate(orders[pair.swapped : pair.swapped + 1] if benchmark == "alpaca" else orders):
        texts = (pair.question, *shown)
        messages = [  # in one pass: what is put in is not searched for places
            turn | {"content": _PLACES.sub(lambda m: texts[_PLACE[m[1]]], turn["content"])}  # noqa: B023
            for turn in turns
        ]
        games.append(Game(digest([pair.id, number, model, messages, settings]), pair.id, number, messages))
    return games


# asking


def _ask_all(benchmark: str, games: list[Game], settings: Row, endpoint: Endpoint, log: Log, total: int) -> list[Row]:
    """Ask for each game, several at a time. Stops at a refused key or model, and when requests keep failing."""
    client, stop, lock, rows, failed = endpoint.client(), threading.Event(), threading.Lock(), [], 0
    progress = Progress("games", total, total - len(games))

    def work(game: Game) -> Row | None:
        nonlocal failed
        try:
            if stop.is_set():
                return None
            row = log.append(_ask(benchmark, client, game, settings, endpoint))
            with lock:
                failed = failed + 1 if row["answer"] is None else 0
                if failed >= GIVE_UP:
                    stop.set()
            return row
        except BaseException:
            stop.set()  # before this thread takes the next game
            raise

    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        try:
            for future in as_completed([pool.submit(work, game) for game in games]):
                row = future.result()
                if row is None:
                    continue
                rows.append(row)
                progress.add()
        finally:
            stop.set()  # those under way are waited for and kept
    return rows


def _ask(benchmark: str, client: openai.OpenAI, game: Game, settings: Row, endpoint: Endpoint) -> Row:
    """One row of the log: the verdict and how it was read, or the error; the answer, tokens and retries."""
    start, key = time.monotonic(), endpoint.key()
    row = dict(key=game.key, id=game.id, game=game.number, verdict=None, by=None, error=None, detail=None, answer=None)
    row |= dict(prompt_tokens=None, completion_tokens=None, retries=0)

    def clean(said: Any) -> str:
        """A server may repeat the key."""
        return str(said).replace(key, "<key>") if key else str(said)

    try:
        raw = client.chat.completions.with_raw_response.create(
            model=endpoint.model, messages=game.messages, extra_body=settings
        )
        row["retries"] = raw.retries_taken
        done = raw.parse()
        choice = done.choices[0]
        answer = choice.message.content or ""
        row["answer"] = clean(answer)
        if done.usage is not None:
            row |= {side: int(getattr(done.usage, side)) for side in ("prompt_tokens", "completion_tokens")}
        read = read_preference if benchmark == "alpaca" else read_label
        row["verdict"], row["by"] = read(answer, getattr(choice, "logprobs", None))
        if row["verdict"] is None:
            row["error"] = "cut off before a verdict" if choice.finish_reason == "length" else "without a verdict"
    except FATAL as error:
        raise ConfigError(
            f"the judge {endpoint.model!r} at {endpoint.base_url} answered HTTP {error.status_code}: "
            f"{_line(clean(error))}; check base_url, model, and the key in the environment variable "
            f"{endpoint.key_env}. The judgments so far are kept"
        ) from None
    except openai.APIStatusError as error:
        row |= {"error": f"HTTP {error.status_code}", "detail": _line(clean(error))}
        row["retries"] = int(error.request.headers.get("x-stainless-retry-count", 0))
    except openai.APIConnectionError as error:
        timed_out = isinstance(error, openai.APITimeoutError)
        row |= {"error": "timed out" if timed_out else "connection failed", "detail": _line(clean(error))}
        row["retries"] = int(error.request.headers.get("x-stainless-retry-count", 0))
    except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
        row |= {"error": "with an answer that is no chat completion", "detail": _line(clean(error))}
    return row | {"seconds": round(time.monotonic() - start, 3)}


def _line(said: str) -> str:
    """A server's words as one short line in which nothing acts on a terminal."""
    return ascii(said[:300])


def read_preference(answer: str, logprobs: Any) -> tuple[float | None, str | None]:
    """AlpacaEval: (1 for m, the first output, to 2 for M, how it was read), from the first token's log-probabilities.

    A token beyond the top ones counts as impossible; where neither is among them, the text must be m or M alone.
    """
    content = getattr(logprobs, "content", None)
    if content:
        given = {t.token: t.logprob for t in content[0].top_logprobs if t.token in ("m", "M")}
        if not all(value <= 1e-3 for value in given.values()):  # rounding may leave a little above 0
            raise ValueError(f"log-probabilities {given} are no logarithms of probabilities")
        p = {token: math.exp(value) for token, value in given.items()}
        if sum(p.values()) > 0:
            return 2 - p.get("m", 0.0) / sum(p.values()), "logprobs"
    said = answer.strip(" \t\n\"'`*.()")
    return (1.0 if said == "m" else 2.0, "text") if said in ("m", "M") else (None, None)


def read_label(answer: str, logprobs: Any = None) -> tuple[str | None, str | None]:
    """Arena-Hard: (the last label in double brackets, else in single ones, by its official name, how it was read)."""
    for pattern in (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"):
        found = [label for label in re.findall(pattern, answer.upper()) if label in LABELS]
        if found:
            return LABELS[found[-1]], "text"
    return None, None


# judgments in the benchmarks' own shapes


def _annotation(pair: Pair, model: str, asked: list[tuple[Game, Row | None]]) -> Row:
    row = asked[0][1] or {"verdict": None, "answer": None}
    shown = row["verdict"]
    return {
        "instruction": pair.id,
        "dataset": pair.baseline.get("dataset", pair.answer.get("dataset", "")),
        "output_1": output(pair.baseline, "alpaca"),
        "generator_1": pair.baseline.get("generator", pair.baseline.get("generator_1", "baseline")),
        "output_2": output(pair.answer, "alpaca"),
        "generator_2": pair.answer.get("generator", "policy"),
        "annotator": model,
        "preference": 3 - shown if shown is not None and pair.swapped else shown,
        "raw_completion": row["answer"],
    }


def _judgment(pair: Pair, model: str, asked: list[tuple[Game, Row | None]]) -> Row:
    games = [
        {"score": row and row["verdict"], "judgment": {"answer": row and row["answer"]}, "prompt": game.messages}
        for game, row in asked
    ]
    names = {
        "judge": model,
        "model": pair.answer.get("model", "policy"),
        "baseline": pair.baseline.get("model", "baseline"),
    }
    return {"uid": pair.id, "category": pair.category, **names, "games": games}
