"""Files that cannot be used: each gives one sentence that names the file, and the row and column where there is one."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from savelib.benchmarks import BENCHMARKS, statistics
from savelib.benchmarks.judged.alpaca import DIFFICULTY, LENGTH, OWN, alpaca_json
from savelib.benchmarks.judged.answers import read_rows
from savelib.benchmarks.judged.arena import arena_json
from savelib.benchmarks.judged.judge import Endpoint, read_preference
from savelib.benchmarks.scores import score_file
from savelib.config import ConfigError, make_config
from savelib.data.pairs_and_prompts import load_preferences, load_prompts, train_and_heldout_prompts
from savelib.experiments import audit

CONFIG = make_config(prompt_selection="all")
ROW = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
DEEP = b"[" * 100_000


def refused(call, *words):
    """One sentence, with these words in their order."""
    with pytest.raises(ConfigError) as caught:
        call()
    said, rest = str(caught.value), str(caught.value)
    for word in words:
        assert word in rest, said
        rest = rest.partition(word)[2]
    assert "\n" not in said and len(said) < 700, said


# files that cannot be read

UNREADABLE = {
    "none.jsonl": (None, "does not exist"),
    "none.csv": (None, "does not exist"),
    "folder.jsonl": ("folder", "is no file"),
    "table.csv": (b"a,b\n", "must end in .jsonl"),
    "cut.jsonl.gz": (gzip.compress(ROW * 50)[:-9], "cannot be read: Compressed file ended"),
    "header.jsonl.gz": (gzip.compress(ROW)[:5], "cannot be read"),
    "corrupt.jsonl.gz": (gzip.compress(ROW)[:14] + b"\xff" * 40, "cannot be read"),
    "checksum.jsonl.gz": (gzip.compress(ROW)[:-8] + b"\0" * 8, "cannot be read: CRC check failed"),
    "plain.jsonl.gz": (ROW, "cannot be read: Not a gzipped file"),
    "cut.json.gz": (gzip.compress(b"[" + ROW + b"]")[:-9], "cannot be read"),
    "none.parquet": (b"no parquet", "it is not a readable Parquet file"),
    "empty.parquet": (b"", "it is not a readable Parquet file"),
    "cut.parquet": ("parquet", "it is not a readable Parquet file"),
    "gzip.jsonl": (gzip.compress(ROW), "row 1 is not UTF-8 text"),
    "latin.jsonl": (ROW + '{"prompt": "é"}\n'.encode("latin-1"), "row 2 is not UTF-8 text: invalid continuation"),
    "utf16.jsonl": (ROW.decode().encode("utf-16"), "row 1 is not UTF-8 text"),
    "utf16.json": (b"[]".decode().encode("utf-16-be"), "row 1 is not valid JSON"),
    "null.jsonl": (ROW + b"\0\0\0\n", "row 2 is not valid JSON"),
    "surrogate.jsonl": (ROW + ROW.replace(b"b", b"x\\ud800y"), r"row 2 has half a character, '\ud800'"),
    "surrogate_name.jsonl": (b'{"\\uDC00": 1}\n', "row 1 has half a character"),
    "surrogate_deep.jsonl": (b'{"prompt": [{"content": {"a": ["\\udfff"]}}]}\n', "row 1 has half a character"),
    "surrogate.json": (b'[{"prompt": "\\udABC"}]', "it has half a character"),
    "blank.jsonl": (ROW + b"\n" + ROW, "row 2 is empty; remove the line"),
    "spaces.jsonl": (ROW + b" \t\n", "row 2 is empty; remove the line"),
    "half.jsonl": (ROW + b'{"prompt": \n', "row 2 is not valid JSON: Expecting value at column 13"),
    "two.jsonl": (ROW.strip() + ROW, "row 1 is not valid JSON: Extra data"),
    "single.jsonl": (b"{'prompt': 'a'}\n", "row 1 is not valid JSON"),
    "list.jsonl": (b"[1]\n", "row 1 holds a list, not an object"),
    "text.jsonl": (ROW + b'"a"\n', "row 2 holds a str, not an object"),
    "number.jsonl": (b"3\n", "row 1 holds a int, not an object"),
    "nothing.jsonl": (b"null\n", "row 1 holds a NoneType, not an object"),
    "twice.jsonl": (b'{"prompt": "a", "prompt": "b"}\n', "row 1 is not usable JSON: the name 'prompt' is there twice"),
    "deep.jsonl": (DEEP + b"\n", "row 1 is not usable JSON: maximum recursion depth"),
    "deep.json": (DEEP, "it is not usable JSON: maximum recursion depth"),
    "long_number.jsonl": (b'{"prompt": ' + b"1" * 5000 + b"}\n", "row 1 is not usable JSON: Exceeds the limit"),
    "cut.json": (b"[" + ROW + b", ", "it is not valid JSON"),
    "texts.json": (b'["a"]', "row 1 holds a str, not an object"),
    "pretty.json": (b'{\n "prompt": "a"\n}', "row 1 is not valid JSON"),
    "empty.jsonl": (b"", "has no rows"),
    "empty.jsonl.gz": (gzip.compress(b""), "has no rows"),
    "empty.json": (b"[]", "has no rows"),
}  # fmt: skip


@pytest.fixture
def unreadable(request, tmp_path):
    """(the file of a case, what is said of it)."""
    path, (content, said) = tmp_path / request.param, UNREADABLE[request.param]
    if content == "folder":
        path.mkdir()
    elif content == "parquet":
        pd.DataFrame({"prompt": ["a"] * 9}).to_parquet(path)
        path.write_bytes(path.read_bytes()[:-20])
    elif content is not None:
        path.write_bytes(content)
    return path, said


@pytest.mark.parametrize("unreadable", UNREADABLE, indirect=True)
def test_a_file_that_cannot_be_read(unreadable):
    path, said = unreadable
    refused(lambda: read_rows(path, "outputs"), "outputs", str(path), said)
    if path.exists():
        refused(lambda: load_preferences(str(path), CONFIG), "preferences", str(path), said)
    else:
        refused(lambda: load_preferences(str(path), CONFIG), f"preferences = '{path}': no such file")


def test_a_byte_order_mark_and_other_line_ends_are_no_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + ROW.replace(b"\n", b"\r\n") * 2)
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf[" + ROW + b"," + ROW + b"]")
    assert [len(load_preferences(str(tmp_path / name), CONFIG)) for name in ("a.jsonl", "b.json")] == [2, 2]


# rows of pairs and prompts

USER = {"role": "user", "content": "Hi"}
PAIRS = [
    ({"prompt": "a", "chosen": "b"}, "no column 'rejected'; it has 'prompt', 'chosen'"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "column 'rejected' is empty"),
    ({"prompt": "a", "chosen": None, "rejected": "c"}, "column 'chosen' is null"),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, "column 'chosen' is 3, not a text"),
    ({"prompt": "a", "chosen": {"role": "assistant"}, "rejected": "c"}, "column 'chosen' is {'role'"),
    ({"prompt": "a", "chosen": [], "rejected": "c"}, "column 'chosen' must be a text or a list of {role, content}"),
    ({"prompt": "a", "chosen": [USER], "rejected": "c"}, "column 'chosen' does not end with an assistant turn"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt's last message is empty"),
    ({"prompt": None, "chosen": "b", "rejected": "c"}, "column 'prompt' is null"),
    ({"prompt": 3, "chosen": "b", "rejected": "c"}, "the prompt must be a text or a list of {role, content}, not 3"),
    ({"chosen": "b", "rejected": "c"}, "no column 'prompt'"),
    ({"chosen": [USER, USER], "rejected": [USER, USER]}, "column 'chosen' does not end with an assistant turn"),
    ({"chosen": [USER], "rejected": [USER]}, "the prompt must be a text or a list"),
    (
        {"chosen": [USER, {"role": "assistant", "content": "x"}], "rejected": [{"role": "assistant", "content": "y"}]},
        "'chosen' and 'rejected' do not answer the same prompt",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), PAIRS)
def test_a_pair_that_is_none(tmp_path, row, said):
    path = tmp_path / "p.jsonl"
    path.write_bytes(ROW + json.dumps(row).encode())
    refused(lambda: load_preferences(str(path), CONFIG), "1 of 2 rows", f"{path}, row 2: ", said, "bad_rows=skip")
    assert len(load_preferences(str(path), make_config(bad_rows="skip"))) == 1


MESSAGES = [
    ({"prompt": [{"role": "user", "content": None}]}, "message 1 must have content as a text"),
    ({"prompt": [{"role": "user", "content": 5}]}, "message 1 must have content as a text"),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "message 1 must have content"),
    ({"prompt": [{"role": "system", "content": None}, USER]}, "message 1 must have content as a text"),
    ({"prompt": [{"role": None, "content": "a"}, USER]}, "message 1 must have role as a text"),
    ({"prompt": [{"content": "a"}]}, "message 1 must have role as a text"),
    ({"prompt": [USER, "Hi"]}, "message 2 must have role as a text"),
    ({"prompt": [USER, {"role": "user", "content": " "}]}, "the prompt's last message is empty"),
    ({"prompt": [USER, {"role": "assistant", "content": "x"}]}, "the prompt ends with a turn of 'assistant'"),
    ({"prompt": []}, "the prompt must be a text or a list of {role, content}, not []"),
    ({"prompt": {"role": "user", "content": "x"}}, "the prompt must be a text or a list"),
    ({"prompt": True}, "the prompt must be a text or a list"),
    ({"text": "a"}, "no column 'prompt' or 'instruction'; it has 'text'"),
    ({}, "no column 'prompt' or 'instruction'; it has none"),
    ({"prompt": None}, "column 'prompt' is null"),
    ({"prompt": "a", "checks": []}, "column 'checks': checks must be a list"),
    ({"prompt": "a", "checks": "max_words"}, "column 'checks': checks must be a list"),
    ({"prompt": "a", "checks": [{"kind": "nonsense"}]}, "column 'checks': check {'kind': 'nonsense'}"),
    ({"prompt": "a", "checks": [{"kind": "max_words", "n": "8"}]}, "column 'checks'"),
    ({"prompt": "a", "checks": [{"kind": "max_words", "n": -1}]}, "column 'checks'"),
    ({"prompt": "a", "completions": 3}, "column 'completions' must be a list of texts or of {response}, not 3"),
    ({"prompt": "a", "completions": [{"response": None}]}, "column 'completions' must be a list of texts"),
    ({"prompt": "a", "completions": [{"text": "x"}]}, "column 'completions' must be a list of texts"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), MESSAGES)
def test_a_prompt_that_is_none(tmp_path, row, said):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + json.dumps(row))
    config = make_config(prompt_selection="responses_fit" if "completions" in row else "all")
    refused(lambda: load_prompts(str(path), config), f"prompts = '{path}': 1 of 2 rows", f"{path}, row 2: ", said)


def test_one_row_cannot_be_split(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    config = CONFIG.model_copy(update={"prompts": str(tmp_path / "p.jsonl"), "eval_prompts_source": ""})
    refused(lambda: train_and_heldout_prompts(config), "prompts: 1 row cannot be split", "eval_prompts_source")


@pytest.mark.parametrize("source", ["nothing.jsonl", "embeded", "a/b/c", "x.gz", "no-such-owner/no-such-data"])
def test_bad_sources_are_named(source):
    said = "could not be loaded from the hub" if source.startswith("no-such") else "no such file, and not a hub id"
    refused(lambda: load_preferences(source, CONFIG), f"preferences = {source!r}", said)


def test_prompt_selection_with_the_worlds_own_policy_asks_no_hub(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "completions": ["is really nice"]}\n')
    config = make_config(policy_model="embedded", prompt_selection="responses_fit")
    assert [p.text for p in load_prompts(str(tmp_path / "p.jsonl"), config)] == ["a"]


# scores, judgments and annotations, one field broken at a time; a text is put into the file as it is

GONE = object()


def broken(path, good, field, value):
    """A file of three good rows of which the second has another value in a field (or in one below, as a.b)."""
    rows = [json.loads(json.dumps(good(i))) for i in range(3)]
    at, (*above, last) = rows[1], field.split(".")
    for name in above:
        at = at[int(name) if isinstance(at, list) else name]
    if value is GONE:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(i):
    return {
        "pair_id": f"p{i}", "source": "mmlu-pro-law", "question": "Hi", "response_A": "a", "response_B": "b",
        "label": "A>B",
    }  # fmt: skip


def style_pair(i):
    return {"id": i, "prompt": "Hi", "chosen": ["a"] * 3, "rejected": ["b"] * 3, "domain": "chat"}


def question_of_k(i):
    return {
        "question_id": f"q{i}", "prompt": "Hi", "response_1": "a", "response_2": "b", "scores": [1.0, 0.0],
        "sampled_conflict_pairs": [[0, 1]],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "good", "field", "value", "said"), [
    ("judgebench", pair, "pair_id", GONE, "no column 'pair_id'"),
    ("judgebench", pair, "pair_id", ["a"], "column 'pair_id' is ['a'], not a text"),
    ("judgebench", pair, "source", 3, "column 'source' is 3, not a text"),
    ("judgebench", pair, "question", None, "column 'question' is null"),
    ("judgebench", pair, "response_A", " ", "column 'response_A' is empty"),
    ("judgebench", pair, "label", ["A>B"], "column 'label' = ['A>B'] must be one of A>B, B>A"),
    ("rmbench", style_pair, "id", True, "column 'id' is True, not a text"),
    ("rmbench", style_pair, "chosen", "abc", "column 'chosen' must be a list of 3 texts"),
    ("rmbench", style_pair, "rejected.2", {}, "column 'rejected[2]' is {}, not a text"),
    ("rmbench", style_pair, "domain", 7, "no column 'domain' that begins with chat"),
    ("ppe_correctness", question_of_k, "scores", 1, "column 'scores' must be a list"),
    ("ppe_correctness", question_of_k, "scores.1", None, "column 'scores[1]' is None, not a finite number"),
    ("ppe_correctness", question_of_k, "scores.0", "1", "column 'scores[0]' is '1', not a finite number"),
    ("ppe_correctness", question_of_k, "scores.0", float("nan"), "column 'scores[0]' is nan"),
    ("ppe_correctness", question_of_k, "response_2", GONE, "no column 'response_2'"),
    ("ppe_correctness", question_of_k, "sampled_conflict_pairs.0", 3, "column 'sampled_conflict_pairs': 3 is no pair"),
    ("ppe_correctness", question_of_k, "sampled_conflict_pairs.0.1", "1", "[0, '1'] is no pair"),
    ("ppe_correctness", question_of_k, "sampled_conflict_pairs.0.1", -1, "[0, -1] is no pair"),
    ("ppe_correctness", question_of_k, "question_id", 1.5, "column 'question_id' is 1.5, not a text"),
])  # fmt: skip
def test_a_benchmark_with_a_broken_field(tmp_path, name, good, field, value, said):
    path = broken(tmp_path / "gpqa.jsonl", good, field, value)
    refused(lambda: BENCHMARKS[name].rows(str(path)), f"{name} = ", f"{path}, row 2: ", said)


def score(i):
    return {"pair_id": f"p{i}", "scores": [1.0, 0.5]}


@pytest.mark.parametrize(("field", "value", "said"), [
    ("pair_id", GONE, "no field 'pair_id'"),
    ("pair_id", None, "column 'pair_id' is null"),
    ("pair_id", {"a": 1}, "column 'pair_id' is {'a': 1}, not a text"),
    ("scores", GONE, "no field 'scores'"),
    ("scores", {"A": 1}, "scores must be a list"),
    *(("scores.1", value, "'scores[1]' is ") for value in (float("nan"), float("-inf"), "2", None, True, [1])),
    ("scores.1", 10**400, "'scores[1]' is 1000"),
])  # fmt: skip
def test_a_score_file_with_a_broken_field(tmp_path, field, value, said):
    data = broken(tmp_path / "data.jsonl", pair, "label", "B>A")
    path = broken(tmp_path / "scores.jsonl", score, field, value)
    refused(lambda: score_file("judgebench", str(data), str(path)), f"scores = '{path}'", "row 2: ", said)


def annotation(i):
    row = {"instruction": f"do {i}", "output_1": "a" * i, "output_2": "b", "generator_1": "base", "generator_2": "m"}
    return row | {"preference": 1.25 + i / 4}


@pytest.mark.parametrize(("field", "value", "said"), [
    *((field, GONE, f"no column {field!r}") for field in ("instruction", "output_1", "output_2", "generator_2")),
    *((field, None, f"column {field!r} is null") for field in ("instruction", "output_1", "generator_1")),
    *((field, 3, f"column {field!r} is 3, not a text") for field in ("instruction", "output_2", "generator_1")),
    ("output_2", ["x"], "column 'output_2' is ['x'], not a text"),
    *(("preference", value, "column 'preference' is ") for value in (2.5, 0.5, -1, "1.5", True, [1], float("inf"))),
])  # fmt: skip
def test_annotations_with_a_broken_field(tmp_path, field, value, said):
    path = broken(tmp_path / "annotations.jsonl", annotation, field, value)
    refused(lambda: alpaca_json(path, instructions=3), f"annotations = '{path}': 1 of 3 rows", "row 2: ", said)


@pytest.mark.parametrize(("text", "said"), [
    ("", "cannot be read as CSV"),
    ("index\n0\n1\n2\n", "has no column instruction_difficulty"),
    ("index,instruction_difficulty\n0,1\n1,hard\n2,3\n", "no number in instruction_difficulty, .* row 2: hard"),
    ("index,instruction_difficulty\n0,1\n1,inf\n2,3\n", "no number in instruction_difficulty, .* row 2: inf"),
    ("index,instruction_difficulty\n0,1\n1,2,3,4\n", "cannot be read as CSV: Error tokenizing data"),
    ("\0\0\0", "has no column|cannot be read as CSV"),
])  # fmt: skip
def test_a_difficulty_that_is_none(tmp_path, text, said):
    path = broken(tmp_path / "annotations.jsonl", annotation, "preference", 1.5)
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(ConfigError, match=f"d.csv.*({said})"):
        alpaca_json(path, tmp_path / "d.csv", instructions=3)


def test_weights_that_are_no_numbers(tmp_path):
    (tmp_path / "d.csv").write_text("index,instruction_difficulty\n0,1\n1,2\n2,3\n")
    (tmp_path / "w.csv").write_text(f"model,{LENGTH},{DIFFICULTY},{OWN}\nm,1,x,2\n")
    refused(
        lambda: alpaca_json(weights=tmp_path / "w.csv", model="m", difficulty=tmp_path / "d.csv", instructions=3),
        "w.csv", f"no number in {DIFFICULTY}, the first is row 1: x",
    )  # fmt: skip


def judgment(i):
    named = {"uid": f"q{i}", "model": "m", "category": "hard_prompt", "judge": "j", "baseline": "b"}
    return named | {"games": [{"score": "A>B"}, {"judgment": {"answer": "[[A>B]]"}}]}


@pytest.mark.parametrize(("field", "value", "said"), [
    ("uid", GONE, "no column 'uid'"),
    ("uid", 3, "column 'uid' is 3, not a text"),
    ("model", None, "column 'model' is null"),
    ("model", ["m"], "column 'model' is ['m'], not a text"),
    *((field, {"x": 1}, f"column {field!r} is {{'x': 1}}, not a text") for field in ("category", "judge", "baseline")),
    ("games", GONE, "no column 'games'"),
    *(("games", value, "column 'games' must be a list of two games") for value in ([], [{}], {"a": 1}, "A>B", 2)),
    ("games.1", "A>B", "column 'games[1]': it is 'A>B', not an object with score or judgment"),
    *(("games.0.score", value, "column 'games[0]': score is ") for value in (1, "win", ["A>B"], float("nan"), True)),
    ("games.1.judgment", 7, "column 'games[1]': judgment is 7, not a text"),
    ("games.1.judgment.answer", ["[[A>B]]"], "column 'games[1]': judgment is ['[[A>B]]'], not a text"),
])  # fmt: skip
def test_judgments_with_a_broken_field(tmp_path, field, value, said):
    path = broken(tmp_path / "judgments.jsonl", judgment, field, value)
    refused(lambda: arena_json(path), f"judgments = '{path}': 1 of 3 rows", "row 2: ", said)


@pytest.mark.parametrize(("field", "value", "said"), [
    *((field, GONE, f"no column {field!r}") for field in ("uid", "category", "prompt")),
    *((field, 3, f"column {field!r} is 3, not a text") for field in ("uid", "category", "prompt")),
    ("category", " ", "column 'category' is empty"),
])  # fmt: skip
def test_questions_with_a_broken_field(tmp_path, field, value, said):
    judgments = broken(tmp_path / "judgments.jsonl", judgment, "judge", "j")
    path = broken(tmp_path / "q.jsonl", lambda i: judgment(i) | {"prompt": "p"}, field, value)
    refused(lambda: arena_json(judgments, path), f"questions = '{path}': 1 of 3 rows", "row 2: ", said)


def answer(i):
    counts = {"header_count": {"h1": 1}, "list_count": 2, "bold_count": {"**": 0}}
    return {"uid": f"q{i}", "model": "m", "metadata": {"token_len": 5} | counts}


@pytest.mark.parametrize(("field", "value", "said"), [
    ("uid", None, "column 'uid' is null"),
    ("model", 3, "column 'model' is 3, not a text"),
    ("metadata", "x", "column 'metadata' is 'x', not an object"),
    *(("metadata.token_len", value, "column 'metadata.token_len' is ") for value in ("5", -1, float("nan"), True, [5])),
    ("metadata.header_count.h1", "two", "column 'metadata.header_count' is 'two', not a finite number"),
    ("metadata.list_count", -2, "column 'metadata.list_count' is -2, below 0"),
    ("metadata.bold_count", [1], "column 'metadata.bold_count' is [1], not a finite number"),
])  # fmt: skip
def test_answers_with_a_broken_field(tmp_path, field, value, said):
    judgments = broken(tmp_path / "judgments.jsonl", judgment, "judge", "j")
    path = broken(tmp_path / "a.jsonl", answer, field, value)
    refused(lambda: arena_json(judgments, answers=path), f"answers = '{path}': 1 of 3 rows", "row 2: ", said)


def test_categories_and_answers_that_are_there_twice(tmp_path):
    judgments = broken(tmp_path / "judgments.jsonl", judgment, "judge", "j")
    refused(lambda: arena_json(judgments, category="nope"), "category = 'nope'", "hard_prompt")
    mixed = broken(tmp_path / "mixed.jsonl", judgment, "model", "other")
    mixed.write_text(mixed.read_text().replace('"q2", "model": "m", "category": "hard_prompt"',
                                               '"q2", "model": "third", "category": "own"'))  # fmt: skip
    refused(lambda: arena_json(mixed), "category = 'hard_prompt': of 'third' there are judgments of own")
    path = broken(tmp_path / "a.jsonl", answer, "uid", "q0")
    refused(lambda: arena_json(judgments, answers=path), "answers: 1 are there more than once", "('m', 'q0')")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(lambda: arena_json(empty), "judgments = ", "has no rows")
    refused(lambda: arena_json(judgments, empty), "questions = ", "has no rows")


# judges

GOOD = ("http://127.0.0.1:9/v1", "j")


@pytest.mark.parametrize(("field", "value"), [
    *(("timeout", value) for value in (float("inf"), float("nan"), 0, -1)),
    *((field, value) for field in ("price_in", "price_out") for value in (float("nan"), float("inf"), -0.1)),
])  # fmt: skip
def test_numbers_of_an_endpoint(field, value):
    refused(lambda: Endpoint(*GOOD, **{field: value}), f"{field} = {value}: give a number from 0")


@pytest.mark.parametrize("url", ["", "127.0.0.1/v1", "ftp://a/v1", "http://", "http://[::1/v1", "http://a:port/v1",
                                 "http://a:99999/v1", "http://a b/v1", "http://a/v1?key=x", "http://u:p@a/v1",
                                 "http://a\n/v1"])  # fmt: skip
def test_addresses_that_are_none(url):
    refused(lambda: Endpoint(url, "j").client(), "base_url must be http(s)://host[:port]/path")


@pytest.mark.parametrize("value", [0.5, 3.0, float("nan"), float("inf")])
def test_log_probabilities_that_no_judge_can_give(value):
    top = [SimpleNamespace(token="m", logprob=value), SimpleNamespace(token="M", logprob=-1.0)]
    with pytest.raises(ValueError, match="are no logarithms of probabilities"):  # the game has no verdict then
        read_preference("m", SimpleNamespace(content=[SimpleNamespace(top_logprobs=top)]))


# levels and percentages

TABLE, SAVE = "table1_rm_benchmarks", "Qwen3-4B-Instruct-2507, SAVE"


@pytest.mark.parametrize("level", [1.5, 1, 0, -0.1, float("nan"), float("inf"), "0.95", None, True])
def test_a_level_that_is_none(level):
    rows = statistics.Stratum("a", 1.0, ["x", "y", "z"], np.array([[1.0], [0.0], [0.5]]))
    made = statistics.Result([rows], {}, {})
    for call in (
        lambda: audit.compared(TABLE, SAVE, audit.rows_of(TABLE).index[0], level),
        lambda: audit.claims(level),
        lambda: audit.against_the_text(level),
        lambda: statistics.interval(made, level),
        lambda: statistics.compare(made, made, level),
        lambda: statistics.smallest_difference(350, 70, level=level),
        lambda: statistics.average_published([70], [350], level),
        lambda: statistics.interval_of_mean(pd.Series([1.0, 2.0]), level),
    ):
        refused(call, f"level = {level!r} must be a number above 0 and below 1")


@pytest.mark.parametrize(("percent", "n"), [(101, 50), (-1, 50), (float("nan"), 50), (70, 0), (70, float("nan")),
                                            (70, float("inf")), ([70, 60], [50]), ([], [])])  # fmt: skip
def test_percentages_and_sizes_that_are_none(percent, n):
    for call in (statistics.compare_published, lambda p, q, n: statistics.average_published(p, n)):
        refused(lambda call=call: call(percent, percent, n), "give as many percentages (0 to 100) as sizes (1 or more)")
    if not isinstance(percent, list):
        refused(lambda: statistics.smallest_difference(n, percent), "give as many percentages")


def test_labels_of_the_papers_tables():
    refused(lambda: audit.compared(TABLE, SAVE, "Initial"), "'Initial'", "valid names: ")
