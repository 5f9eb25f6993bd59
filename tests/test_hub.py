"""The hub path for real: transformers, datasets and huggingface_hub against a local server, in processes of their own.

The repositories carry the paper's ids and the real schema; their models and rows are tiny.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from hub_server import Fault, Hub
from safetensors.torch import load as load_weights
from tiny_models import make_policy, make_reward_model

from savelib.config import ConfigError, make_config
from savelib.data.pairs_and_prompts import split_heldout
from savelib.models.loading import load_policy

ROOT = Path(__file__).resolve().parent.parent
PAPER = make_config(profile="paper")
TOKEN = "hf_aTokenThatNobodyMaySee"
VALUES = dict(
    profile="paper", anchor_responses=4, group_size=4, batch_size=4, total_steps=1, max_new_tokens=6, eval_prompts=2,
    device="cpu", curriculum="none", num_processes=1, backend="ddp", tracker="none",
)  # fmt: skip
# loads what is asked and prints what came of it; the client's waits between its retries are skipped
DRIVER = """
import json, sys, time
time.sleep = lambda seconds: None
import torch
from savelib.config import ConfigError, make_config
from savelib.data.pairs_and_prompts import train_and_heldout_preferences, train_and_heldout_prompts
from savelib.models.loading import load_policy, load_reward_model
said = {}
for name, call, values in json.loads(sys.argv[1]):
    config = make_config(**values)
    try:
        if call == "policy":
            said[name] = type(load_policy(config.policy_model, torch.device("cpu"))[0]).__name__
        elif call == "reward_model":
            model = load_reward_model(config.reward_model, config, torch.device("cpu"))
            said[name] = type(model.model).__name__
        elif call == "preferences":
            said[name] = [[p.prompt[0]["content"] for p in part] for part in train_and_heldout_preferences(config)]
        else:
            said[name] = [[p.text for p in part] for part in train_and_heldout_prompts(config)]
    except ConfigError as error:
        said[name] = str(error)
    except Exception as error:
        said[name] = f"no ConfigError but {type(error).__name__}: {error}"
print("said:" + json.dumps(said))
"""


def ultrafeedback(count: int = 24) -> dict[str, bytes]:
    """openbmb/UltraFeedback: one .jsonl a source, no split in any name. Every sixth row has a response too long."""
    rows = {"evol_instruct": [], "flan": [], "truthful_qa": []}
    for i in range(count):
        source = list(rows)[i % 3]
        texts = ["Yes.", "No.", "Maybe", "A long response" if i % 6 == 5 else "Fine"]
        rows[source].append(
            {
                "source": source,
                "instruction": f"Instruction {i}",
                "models": ["a", "b", "c", "d"],
                "completions": [_completion(text, i + k) for k, text in enumerate(texts)],
                "correct_answers": ["Yes"] if source == "truthful_qa" else ["None"],
                "incorrect_answers": ["No", "Maybe"] if source == "truthful_qa" else ["None"],
            }
        )
    files = {f"{s}.jsonl": "".join(json.dumps(r) + "\n" for r in found).encode() for s, found in rows.items()}
    return {"README.md": b"---\nlicense: mit\nlanguage:\n- en\n---\n# Rows\n", ".gitattributes": b""} | files


def _completion(response: str, i: int) -> dict:
    short = {"Rating": str(i % 5 + 1) if i % 7 else "N/A", "Rationale": "So."}
    return {
        "annotations": {
            "instruction_following": short,
            "honesty": short,
            "truthfulness": {"Type": ["1"], "Rationale": "So.", "Rating": "5", "Rationale For Rating": "So."},
            "helpfulness": {"Type": ["1"], "Rationale": "So.", "Rating": "4", "Rationale For Rating": "So."},
        },
        "custom_system_prompt": "Be honest.",
        "model": "abcd"[i % 4],
        "principle": "honesty",
        "response": response,
        "critique": "Good.",
        "fine-grained_score": 4.25 if i % 2 else 4,
        "overall_score": 7.5 if i % 3 else 8,
    }


def binarized(count: int = 20) -> dict[str, bytes]:
    """HuggingFaceH4/ultrafeedback_binarized: Parquet files, splits named in the README's header."""
    sizes = dict(train_prefs=count, train_sft=count, test_prefs=6, test_sft=6, train_gen=count, test_gen=6)
    files, infos = {}, []
    for split, rows in sizes.items():
        table = pd.DataFrame([_binarized_row(split, i) for i in range(rows)])
        buffer = io.BytesIO()
        table.to_parquet(buffer)
        files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        infos.append({"name": split, "num_bytes": len(buffer.getvalue()), "num_examples": rows})
    features = _strings("prompt", "prompt_id")
    features += [{"name": n, "list": _strings("content", "role")} for n in ("chosen", "rejected", "messages")]
    features += [{"name": n, "dtype": "float64"} for n in ("score_chosen", "score_rejected")]
    header = {
        "language": ["en"],
        "license": "mit",
        "configs": [{"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in sizes]}],
        "dataset_info": {"features": features, "splits": infos, "download_size": 1, "dataset_size": 1},
    }
    return {"README.md": f"---\n{yaml.safe_dump(header)}---\n# Pairs\n".encode()} | files


def _strings(*names: str) -> list[dict]:
    return [{"name": name, "dtype": "string"} for name in names]


def _binarized_row(split: str, i: int) -> dict:
    prompt = f"{split} {i}"
    chosen, rejected = (
        [{"content": prompt, "role": "user"}, {"content": text, "role": "assistant"}] for text in ("Good", "Bad")
    )
    return {
        "prompt": prompt,
        "prompt_id": f"{i:064x}",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.0,
        "score_rejected": 6.5,
    }


def environment(folder: Path, url: str, **more: str) -> dict[str, str]:
    """Of a process with this hub, a cache of its own and a token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))}
    own = dict(HF_ENDPOINT=url, HF_HOME=str(folder / "hf"), HF_TOKEN=TOKEN, SAVE_CACHE=str(folder / "cache"))
    return kept | own | dict(SAVE_RUNS=str(folder / "runs"), PYTHONPATH=str(ROOT), NO_PROXY="127.0.0.1") | more


def python(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    """A Python process with an empty standard input, run to its end."""
    return subprocess.run(
        [sys.executable, *words], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


def load(cases: list[tuple[str, str, dict]], env: dict[str, str]) -> dict[str, str | list]:
    """name -> what DRIVER loaded, or the error's text; nothing printed holds the token."""
    done = python("-c", DRIVER, json.dumps([(name, call, VALUES | values) for name, call, values in cases]), env=env)
    assert done.returncode == 0 and "said:" in done.stdout, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.split("said:")[1])


PAPER_CASES = [("policy", "policy", {}), ("reward_model", "reward_model", {})]
PAPER_CASES += [("pairs", "preferences", {}), ("prompts", "prompts", {})]
FIT = [f"Instruction {i}" for k in range(3) for i in range(k, 24, 3) if i % 6 != 5]  # a file after the other
PAIRS = [f"train_prefs {i}" for i in range(20)]


# the paper's models and data


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """(folder, environment, requests) after a run of one step with the paper's ids; the hub is gone by then."""
    folder = tmp_path_factory.mktemp("paper")
    with Hub() as hub:
        hub.add("models", PAPER.policy_model, make_policy(folder / "policy"))
        hub.add("models", PAPER.reward_model, make_reward_model(folder / "rm"))
        hub.add("datasets", PAPER.prompts, ultrafeedback())
        hub.add("datasets", PAPER.preferences, binarized())
        env = environment(folder, hub.url)
        train(folder, env, "online")
        assert f"Bearer {TOKEN}" in hub.tokens
        return folder, env, hub.requests


def train(folder: Path, env: dict[str, str], run_id: str) -> None:
    """`python -m savelib train` with the paper's ids, to the end."""
    file = folder / f"{run_id}.yaml"
    file.write_text(yaml.safe_dump(VALUES | {"run_id": run_id}))
    done = python("-m", "savelib", "train", "--config", str(file), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / f"{run_id}.log").write_text(done.stdout + done.stderr)


def metrics(folder: Path, run_id: str) -> list[dict]:
    """metrics.jsonl without what the clock and the process say."""
    rows = [json.loads(line) for line in (folder / "runs" / run_id / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds" and not k.startswith(("time/", "memory/"))} for r in rows]


def test_a_run_with_the_papers_ids_comes_from_the_hub(paper):
    folder, _, requests = paper
    assert json.loads((folder / "runs/online/manifest.json").read_text())["status"] == "done"
    assert metrics(folder, "online")[-1]["step"] == 1
    for got in (
        f"/{PAPER.policy_model}/resolve/",
        f"/{PAPER.reward_model}/resolve/",
        f"/datasets/{PAPER.prompts}/resolve/",
        f"/datasets/{PAPER.preferences}/resolve/",
    ):
        assert any(r.startswith(f"GET {got}") for r in requests), got


def test_the_token_is_sent_and_written_nowhere(paper):
    folder = paper[0]
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert folder / "online.log" in files and folder / "runs/online/config.yaml" in files
    assert not [p for p in files if TOKEN.encode() in p.read_bytes()]


def test_offline_the_same_run_comes_from_the_cache(paper):
    folder, env, _ = paper
    train(folder, env | {"HF_HUB_OFFLINE": "1"}, "offline")
    assert metrics(folder, "offline") == metrics(folder, "online")


def test_with_the_hub_gone_the_cache_serves(paper):
    _, env, _ = paper
    said = load(PAPER_CASES, env)
    assert (said["policy"], said["reward_model"]) == ("Qwen2ForCausalLM", "LlamaForSequenceClassification")
    assert said["pairs"] == list(split_heldout(PAIRS, "preferences")) and said["prompts"] == list(
        split_heldout(FIT, "prompts")
    )


# errors


def without(files: dict[str, bytes], *parts: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not any(p in name for p in parts)}


NO_SUCH, PRIVATE = ["the hub has no such model", "check the id"], ["or it is private", "HF_TOKEN"]
GATED = ["it is gated: accept its licence on its page, {url}/", "`hf auth login`", "HF_TOKEN"]
BUSY, BROKEN = ["HTTP 429", "wait"], ["HTTP 500", "again later"]
CUT, NO_CODE = ["the download broke off", "start again"], ["code from its repository, which is never run"]
NO_WEIGHTS = ["no model.safetensors", "pickle", "convert it"]
# (field, id, what the error says)
WRONG = [
    ("policy_model", "lab/none", NO_SUCH + PRIVATE),
    ("reward_model", "lab/none", NO_SUCH + PRIVATE),
    ("preferences", "lab/none", ["the hub has no such dataset", *PRIVATE]),
    ("prompts", "lab/none", ["the hub has no such dataset", *PRIVATE]),
    ("eval_preferences", "lab/aggregated", ["the hub has no such dataset", *PRIVATE]),
    ("policy_model", "lab/unauthorized", NO_SUCH + PRIVATE),
    ("preferences", "lab/unauthorized", ["the hub has no such dataset", *PRIVATE]),
    ("policy_model", "lab/gated", [*GATED, "/lab/gated"]),
    ("reward_model", "lab/not_authorized", [*GATED, "/lab/not_authorized"]),
    ("prompts", "lab/gated", [*GATED, "/datasets/lab/gated"]),
    ("preferences", "lab/not_authorized", [*GATED, "/datasets/lab/not_authorized"]),
    ("policy_model", "lab/bad_token", ["refused the token", "HF_TOKEN"]),
    ("preferences", "lab/bad_token", ["refused the token", "HF_TOKEN"]),
    ("policy_model", "lab/forbidden", ["HTTP 403", "Not for you (Bearer <token>)", "what HF_TOKEN may read"]),
    ("policy_model", "lab/busy", BUSY),
    ("preferences", "lab/busy", BUSY),
    ("reward_model", "lab/broken", BROKEN),
    ("prompts", "lab/broken", BROKEN),
    ("policy_model", "lab/cut_weights", CUT),
    ("reward_model", "lab/cut_tokenizer", CUT),
    ("preferences", "lab/cut", CUT),
    ("policy_model", "lab/no_tokenizer", ["no tokenizer", "tokenizer.json"]),
    ("reward_model", "lab/no_tokenizer_rm", ["no tokenizer", "tokenizer.json"]),
    ("policy_model", "lab/no_weights", NO_WEIGHTS),
    ("policy_model", "lab/bin_weights", NO_WEIGHTS),
    ("reward_model", "lab/bin_weights_rm", NO_WEIGHTS),
    ("policy_model", "lab/half_a_file", ["no whole safetensors file", "models--lab--half_a_file and get it again"]),
    ("policy_model", "lab/no_config", ["config.json"]),
    ("reward_model", "lab/no_config", ["config.json"]),
    ("policy_model", "lab/own_code", NO_CODE),
    ("reward_model", "lab/own_code", NO_CODE),
    ("preferences", "lab/own_code", NO_CODE),
    ("preferences", "lab/empty", ["doesn't contain any data files"]),
    ("preferences", "lab/odd_row", ["lab/odd_row, row 2: column 'rejected' is empty", "bad_rows=skip"]),
]
CALLS = {"policy_model": "policy", "reward_model": "reward_model", "prompts": "prompts"}
RIGHT = [
    ("qwen3", "policy", {"policy_model": "Qwen/Qwen3-4B-Instruct-2507"}),
    ("heldout", "preferences", {"preferences": "lab/pairs", "eval_preferences": "lab/pairs"}),
    ("fit", "prompts", {"policy_model": "lab/policy"}),
    ("exceed", "prompts", {"policy_model": "lab/policy", "prompt_selection": "responses_exceed"}),
    ("all", "prompts", {"prompt_selection": "all"}),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What loading the sources of RIGHT and WRONG gave, all in one process; errors of the hub repeat the token."""
    folder = tmp_path_factory.mktemp("answers")
    with Hub(echo_token=True) as hub:
        models = {
            "policy": make_policy(folder / "policy"),
            "rm": make_reward_model(folder / "rm"),
            "qwen3": make_policy(folder / "qwen3", "qwen3"),
        }
        policy, rm, qwen3 = (hub.add("models", f"lab/{name}", path).files for name, path in models.items())
        hub.add("models", "Qwen/Qwen3-4B-Instruct-2507", qwen3)
        pairs = hub.add("datasets", "lab/pairs", binarized()).files
        hub.add("datasets", PAPER.prompts, ultrafeedback())
        for what in ("unauthorized", "gated", "not_authorized", "bad_token", "forbidden", "busy", "broken"):
            hub.add("models", f"lab/{what}", policy, Fault(what))
            hub.add("datasets", f"lab/{what}", pairs, Fault(what))
        hub.add("models", "lab/cut_weights", policy, Fault("cut", "*.safetensors"))
        hub.add("models", "lab/cut_tokenizer", rm, Fault("cut", "tokenizer.json"))
        hub.add("datasets", "lab/cut", pairs, Fault("cut", "*.parquet"))
        hub.add("models", "lab/no_tokenizer", without(policy, "tokenizer"))
        hub.add("models", "lab/no_tokenizer_rm", without(rm, "tokenizer"))
        hub.add("models", "lab/no_weights", without(policy, "safetensors"))
        for name, files in (("", policy), ("_rm", rm)):
            bin_weights = {"pytorch_model.bin": pickled(files["model.safetensors"])}
            hub.add("models", f"lab/bin_weights{name}", without(files, "safetensors") | bin_weights)
        hub.add("models", "lab/no_config", {k: v for k, v in policy.items() if k != "config.json"})
        half = {"model.safetensors": policy["model.safetensors"][:5000]}
        hub.add("models", "lab/half_a_file", policy | half)
        code = f"open({str(folder / 'ran')!r}, 'w')".encode()
        own = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.C", "AutoModelForCausalLM": "odd.M"}}
        hub.add("models", "lab/own_code", policy | {"config.json": json.dumps(own).encode(), "odd.py": code})
        hub.add("datasets", "lab/own_code", {"own_code.py": code})
        hub.add("datasets", "lab/empty", {"README.md": b"# Nothing\n"})
        odd = [{"prompt": "Hi", "chosen": "a", "rejected": r} for r in ("b", " ")]
        hub.add("datasets", "lab/odd_row", {"train.jsonl": "".join(json.dumps(r) + "\n" for r in odd).encode()})
        wrong = [(f"{f} {s}", CALLS.get(f, "preferences"), {"preferences": "lab/pairs", f: s}) for f, s, _ in WRONG]
        said = load(RIGHT + wrong, environment(folder, hub.url))
        return said | {"url": hub.url, "code ran": (folder / "ran").exists()}


def pickled(safetensors: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(load_weights(safetensors), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(("field", "source", "words"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_an_error_names_field_id_cause_and_remedy(answers, field, source, words):
    said = answers[f"{field} {source}"]
    assert isinstance(said, str), said
    assert source in said and said.startswith(f"{field} = '{source}'")
    for word in words:
        assert word.format(url=answers["url"]) in said, said
    assert "\n" not in said and TOKEN not in said


def test_a_local_folder_without_safetensors_is_refused(tmp_path):
    folder = make_policy(tmp_path / "policy")
    weights = folder / "model.safetensors"
    (folder / "pytorch_model.bin").write_bytes(pickled(weights.read_bytes()))
    weights.unlink()
    with pytest.raises(ConfigError, match="could not be loaded: it has no model.safetensors"):
        load_policy(str(folder), torch.device("cpu"))


def test_code_of_a_repository_is_never_run(answers):
    assert not answers["code ran"]


def test_the_other_policy_of_the_paper(answers):
    assert answers["qwen3"] == "Qwen3ForCausalLM"


def test_heldout_pairs_of_a_hub_dataset_are_its_test_split(answers):
    assert answers["heldout"] == [PAIRS, [f"test_prefs {i}" for i in range(6)]]


def test_prompt_selection_reads_the_datasets_responses(answers):
    long = [f"Instruction {i}" for k in range(3) for i in range(k, 24, 3) if i % 6 == 5]
    assert answers["fit"] == list(split_heldout(FIT, "prompts")) and answers["exceed"] == list(
        split_heldout(long, "prompts")
    )
    assert sorted(sum(answers["all"], [])) == sorted(FIT + long)


@pytest.mark.parametrize(("more", "words"), [
    ({"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE", "or give a local"]),
    ({}, ["cannot be reached", "check the connection", "or give a local"]),
])  # fmt: skip
def test_without_cache_and_without_hub(tmp_path, more, words):
    with Hub() as hub:
        pass
    said = load(PAPER_CASES, environment(tmp_path, hub.url, **more))
    fields = {"policy": "policy_model", "reward_model": "reward_model", "pairs": "preferences", "prompts": "prompts"}
    for name, field in fields.items():
        assert said[name].startswith(f"{field} = {getattr(PAPER, field)!r} could not be loaded from the hub: ")
        assert all(word in said[name] for word in words), said[name]
