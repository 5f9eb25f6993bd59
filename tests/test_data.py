"""Pairs and prompts from files: formats, and errors that name file, line and column."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from savelib.config import ConfigError, make_config
from savelib.data.pairs_and_prompts import load_preferences, load_prompts, split_heldout, train_and_heldout_preferences

CONFIG = make_config()
HH = Path(__file__).parent.parent.parent / "shared/benchdata/hh_rlhf/harmless-base_test.jsonl.gz"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_texts_messages_and_transcripts_give_the_same_pair(tmp_path):
    user = {"role": "user", "content": "Hi"}
    answer = [{"role": "assistant", "content": a} for a in ("Hello", "Go")]
    rows = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        {"prompt": "Hi", "chosen": [user, answer[0]], "rejected": [user, answer[1]]},
        {"chosen": [user, answer[0]], "rejected": [user, answer[1]]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"},
    ]
    pairs = load_preferences(jsonl(tmp_path / "p.jsonl", rows), CONFIG)
    assert len(pairs) == 4 and all(p == pairs[0] for p in pairs)
    assert (pairs[0].prompt, pairs[0].chosen, pairs[0].rejected) == ([user], "Hello", "Go")


def test_several_turns_stay_a_conversation(tmp_path):
    text = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: "
    (pair,) = load_preferences(jsonl(tmp_path / "p.jsonl", [{"chosen": text + "D", "rejected": text + "E"}]), CONFIG)
    assert [m["content"] for m in pair.prompt] == ["A", "B", "C"] and pair.rejected == "E"


def test_parquet_and_gzip(tmp_path):
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}] * 3
    pd.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    assert load_preferences(str(tmp_path / "p.parquet"), CONFIG) == load_preferences(
        str(tmp_path / "p.jsonl.gz"), CONFIG
    )


def test_prompts_with_checks_have_a_gold(tmp_path):
    rows = [{"id": "a", "prompt": "Hi"}, {"instruction": "Ho"}]
    plain = load_prompts(jsonl(tmp_path / "p.jsonl", rows), CONFIG)
    assert (
        [p.text for p in plain] == ["Hi", "Ho"] and not plain[0].has_gold and plain[0].gold("x") != plain[0].gold("x")
    )


def test_prompt_selection_counts_the_policys_tokens(tmp_path):
    from tiny_models import make_policy

    policy = str(make_policy(tmp_path / "policy"))  # one token a byte
    rows = [
        {"prompt": "short", "completions": [{"response": "x" * 10}]},
        {"prompt": "long", "completions": [{"response": "x" * 11}]},
    ]
    path = jsonl(tmp_path / "p.jsonl", rows)
    for selection, left in [("responses_fit", ["short"]), ("responses_exceed", ["long"]), ("all", ["short", "long"])]:
        config = make_config(policy_model=policy, prompt_selection=selection, max_new_tokens=10)
        assert [p.text for p in load_prompts(path, config)] == left
    with pytest.raises(ConfigError, match="none left by prompt_selection"):
        load_prompts(jsonl(tmp_path / "q.jsonl", rows[1:]), make_config(policy_model=policy, max_new_tokens=10))


def test_heldout_is_the_last_tenth():
    assert split_heldout(list(range(20)), "prompts") == ([*range(9), *range(10, 19)], [9, 19])
    assert split_heldout([1, 2], "prompts") == ([1], [2])
    with pytest.raises(ConfigError, match="prompts: 1 row cannot be split.*give 2 or more, or eval_prompts_source"):
        split_heldout([1], "prompts")


def test_the_embedded_world_and_its_heldout_pairs():
    train, heldout = train_and_heldout_preferences(CONFIG)
    assert len(train) == 40 and len(heldout) > 100
    assert not {p.prompt[0]["content"] for p in train} & {p.prompt[0]["content"] for p in heldout}


@pytest.mark.skipif(not HH.exists(), reason="the hh-rlhf file is not at hand beside the checkout")
def test_real_pairs_of_hh_rlhf(capsys):
    with pytest.raises(ConfigError, match="9 of 2312 rows.*row 87: column 'chosen' is empty.*bad_rows=skip"):
        load_preferences(str(HH), CONFIG)
    pairs = load_preferences(str(HH), make_config(bad_rows="skip"))
    assert len(pairs) == 2303 and all(p.prompt[-1]["role"] == "user" for p in pairs)
    assert "left out 9 of 2312 rows" in capsys.readouterr().out
