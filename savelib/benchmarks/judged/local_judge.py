"""A judge on loopback that a Python function decides: an OpenAI-compatible endpoint where gold or a reward model knows.

It takes the place of a paid judge in lessons and tests, and what asks it is the same `judge` that asks a real one.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from savelib.benchmarks.judged.judge import TEMPLATES, Endpoint, parse_template

Prefer = Callable[[str, str, str], float]
_BOUNDS = ((0.1, "A>>B"), (0.4, "A>B"), (0.6, "A=B"), (0.9, "B>A"), (1.0, "B>>A"))


@contextmanager
def local_judge(prefer: Prefer, name: str = "local") -> Iterator[Endpoint]:
    """Serve `prefer` on 127.0.0.1 while inside, as the endpoint to give to `judge`, which must use its own templates.

    prefer: (question, first response, second response) -> probability that the second is better, 0 to 1. Alpaca's
    judge answers with the log-probabilities of m and M, Arena-Hard's with the label of its fifth: [[A>>B]] up to .1,
    [[A>B]] to .4, [[A=B]] to .6, [[B>A]] to .9, then [[B>>A]]. An error of `prefer` is an HTTP 422 with its text.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                code, answer = 200, _completion(asked, prefer)
            except Exception as error:  # the caller's own function
                code, answer = 422, {"error": {"message": f"{type(error).__name__}: {error}"}}
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", name, key_env="SAVE_LOCAL_JUDGE_KEY", retries=0)
    finally:
        server.shutdown()
        server.server_close()


def read_game(messages: list[dict[str, str]]) -> tuple[str, tuple[str, str, str]]:
    """(alpaca, hard_prompt or creative_writing, (question, first, second)) of a request made from our own templates."""
    for name, text in TEMPLATES.items():
        turns = parse_template(text, name)
        if [turn["content"] for turn in turns[:-1]] == [m["content"] for m in messages[:-1]]:
            pattern = re.sub(r"\\\{\w+\\\}", lambda _: "(.*)", re.escape(turns[-1]["content"]))
            if found := re.fullmatch(pattern, messages[-1]["content"], re.DOTALL):
                return name, found.groups()
    raise ValueError("the request is not made from the built-in templates")


def _completion(asked: dict[str, Any], prefer: Prefer) -> dict[str, Any]:
    """A chat completion with the verdict."""
    name, game = read_game(asked["messages"])
    p = float(prefer(*game))
    if not 0 <= p <= 1:
        raise ValueError(f"prefer returned {p} for {game[0]!r}; give a probability")
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if name == "alpaca":
        said = "M" if p > 0.5 else "m"
        tops = [{"token": t, "logprob": math.log(q), "bytes": None} for t, q in (("m", 1 - p), ("M", p)) if q]
        first = {"token": said, "logprob": math.log(max(p, 1 - p)), "bytes": None, "top_logprobs": tops}
        choice["logprobs"] = {"content": [first]}
    else:
        said = f"[[{next(label for bound, label in _BOUNDS if p <= bound)}]]"
    choice["message"] = {"role": "assistant", "content": said}
    tokens = {"prompt_tokens": sum(len(m["content"].split()) for m in asked["messages"]), "completion_tokens": 1}
    tokens["total_tokens"] = sum(tokens.values())
    made = {"id": "local", "object": "chat.completion", "created": 0, "model": asked["model"]}
    return made | {"choices": [choice], "usage": tokens}
