"""Files that cannot be used: each gives one sentence that names the file, and the row and column where there is one."""

import gzip
import json

import pandas as pd
import pytest

from savelib.benchmarks.judged.answers import read_rows
from savelib.config import ConfigError, make_config
from savelib.data.pairs_and_prompts import load_preferences, load_prompts, train_and_heldout_prompts

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
