"""Evaluating a reward model: scores against plain forwards, files, interruption, hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hub_server import Hub
from tiny_models import make_policy, make_reward_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from savelib.benchmarks import BENCHMARKS, scoring
from savelib.benchmarks.evaluate import evaluate, find_data
from savelib.benchmarks.scores import score_file
from savelib.config import ConfigError, make_config
from savelib.models.loading import load_reward_model

CONFIG = make_config(device="cpu")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {kind: str(make_reward_model(folder / kind, kind=kind)) for kind in ("llama", "bert")}
    bert = AutoModelForSequenceClassification.from_pretrained(made["bert"])
    for parameter in bert.parameters():
        parameter.data *= 10 if parameter.dim() > 1 else 1  # as it is made, it hardly tells texts apart
    bert.save_pretrained(made["bert"])
    return made


def judgebench(count=8) -> list[dict]:
    """Pairs in the real schema, from all categories, of different lengths."""
    sources = ["mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench"]
    return [
        {
            "pair_id": f"p{i}", "original_id": i, "source": sources[i % 4], "question": f"Question {i}?",
            "response_model": "m", "label": "A>B" if i % 3 else "B>A",
            "response_A": " ".join(WORDS[: 1 + i % 7]), "response_B": " ".join(WORDS[-1 - i % 4 :]),
        }
        for i in range(count)
    ]  # fmt: skip


def rewardbench2() -> list[dict]:
    """Prompts in the real schema, of all subsets; Ties with pairs."""
    rows = []
    for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        rows.append(
            {"id": subset, "prompt": f"Ask {subset}", "chosen": ["Good"], "rejected": WORDS[:3], "subset": subset}
        )
    for kind, right in (("ref", 1), ("tied", 3)):
        rows.append(
            {
                "id": f"{kind}:1",
                "prompt": "Name a colour",
                "chosen": WORDS[:right],
                "rejected": ["x", "y"],
                "subset": "Ties",
            }
        )
    return [r | {"num_correct": len(r["chosen"]), "total_completions": len(r["chosen"] + r["rejected"])} for r in rows]


def data_folder(folder: Path, **data: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def data(tmp_path):
    return data_folder(tmp_path / "data", judgebench=judgebench(), rewardbench2=rewardbench2())


def run(model, data, out, names=("judgebench",), **more):
    return evaluate(
        model, names, data, out, config=more.pop("config", CONFIG), say=more.pop("say", lambda _: None), **more
    )


def lines(out, name="judgebench") -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.scores.jsonl").read_text().splitlines()]


@torch.no_grad()
def plain_scores(folder, rows, cut=lambda ids: ids):
    """Each conversation alone, by transformers itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    out = {}
    for row in rows:
        for response in row.responses:
            talk = [*row.prompt, {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(talk, tokenize=False, date_string="26 Jul 2024")
            ids = cut(tokenizer(text, add_special_tokens=False)["input_ids"])
            assert tokenizer.bos_token_id not in ids[1:]
            out.setdefault(row.id, []).append(model(torch.tensor([ids])).logits.item())
    return out


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_scores_are_those_of_plain_forwards_whatever_the_batches(models, data, tmp_path, kind):
    rows = BENCHMARKS["rewardbench2"].rows(str(data / "rewardbench2.jsonl"))
    expected = plain_scores(models[kind], rows)
    assert len({round(s, 3) for scores in expected.values() for s in scores}) > 10  # the model tells texts apart
    folder = tmp_path / "left"
    folder.mkdir()
    for file in Path(models[kind]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    reverse = data_folder(tmp_path / "reverse", rewardbench2=rewardbench2()[::-1])
    results = []
    for name, model, source, sizes in (
        ("ones", models[kind], data, {"batch_rows": 1}),
        ("tokens", models[kind], data, {"batch_tokens": 300}),
        ("all", models[kind], data, {}),
        ("left", str(folder), data, {}),
        ("reverse", models[kind], reverse, {"batch_rows": 5}),
    ):
        results.append(run(model, source, tmp_path / f"of {name}", ["rewardbench2"], **sizes)["rewardbench2"].overall)
        found = {line["id"]: line["scores"] for line in lines(tmp_path / f"of {name}", "rewardbench2")}
        order = [r["id"] for r in rewardbench2()]
        assert list(found) == (order[::-1] if name == "reverse" else order)
        for i, scores in expected.items():
            assert found[i] == pytest.approx(scores, abs=1e-5), (name, i)
    assert results == pytest.approx([results[0]] * 5)


def test_tokens_are_those_of_training_with_one_bos(models):
    rm = load_reward_model(models["llama"], CONFIG, torch.device("cpu"))
    bos = (rm.tokenizer.bos_token, rm.tokenizer.bos_token_id)
    rm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert rm.tokenizer("a")["input_ids"][0] == bos[1]  # a Llama tokenizer would add a second one
    row = scoring.Row("a", [{"role": "user", "content": "Hi there"}], ["Yes", "No, never."])
    found, counts = scorer(rm)._tokens([row])
    assert [ids.tolist() for ids in found["a"]] == rm.encode([(row.prompt, r) for r in row.responses]).ids
    assert all(
        ids.tolist().count(rm.tokenizer.bos_token_id) == 1 and ids[0] == rm.tokenizer.bos_token_id for ids in found["a"]
    )
    assert counts == {"responses": 2, "tokens": sum(map(len, found["a"])), "truncated": 0, "responses_cut": 0}


def scorer(rm, limit=512, truncation="left"):
    return scoring.Scorer(rm, "f", "float32", limit, truncation, 1000, 8)


def test_truncation_takes_the_beginning_and_keeps_the_end(models, tmp_path):
    long = {"question": "x" * 300, "response_A": "short", "response_B": "y" * 300}
    data = data_folder(tmp_path / "data", judgebench=[judgebench(1)[0] | long])
    rows = BENCHMARKS["judgebench"].rows(str(data / "judgebench.jsonl"))
    run(models["llama"], data, tmp_path / "left", max_length=200)
    expected = plain_scores(models["llama"], rows, lambda ids: ids[:1] + ids[-199:] if len(ids) > 200 else ids)
    assert lines(tmp_path / "left")[0]["scores"] == pytest.approx(expected["p0"], abs=1e-5)
    made = json.loads((tmp_path / "left" / "judgebench.json").read_text())["made_with"]
    assert (made["max_length"], made["truncation"], made["truncated"], made["responses_cut"]) == (200, "left", 2, 1)
    run(models["llama"], data, tmp_path / "right", max_length=200, truncation="right")
    expected = plain_scores(models["llama"], rows, lambda ids: ids[:200])
    assert lines(tmp_path / "right")[0]["scores"] == pytest.approx(expected["p0"], abs=1e-5)
    made = json.loads((tmp_path / "right" / "judgebench.json").read_text())["made_with"]
    assert (made["truncated"], made["responses_cut"]) == (2, 2)
    with pytest.raises(ConfigError, match="row 'p0': a conversation of .* tokens exceeds 200; raise max_length"):
        run(models["llama"], data, tmp_path / "refuse", max_length=200, truncation="refuse")
    with pytest.raises(ConfigError, match="max_length = 600: the model's context is 512 tokens"):
        run(models["llama"], data, tmp_path / "more", max_length=600)
    with pytest.raises(ConfigError, match="truncation = 'middle': choose from left, right, refuse"):
        run(models["llama"], data, tmp_path / "middle", truncation="middle")


def test_how_much_of_a_response_is_cut_is_told_exactly(models):
    rm = load_reward_model(models["llama"], CONFIG, torch.device("cpu"))
    prompt = [{"role": "user", "content": "x" * 50}]
    row = scoring.Row("a", prompt, ["Z" * 100])
    whole = scorer(rm)._tokens([row])[0]["a"][0].tolist()
    kept = len(whole) - whole.index(
        rm.tokenizer("Z", add_special_tokens=False)["input_ids"][0]
    )  # the response, its end
    for limit, cut in ((kept + 1, 0), (kept, 1)):  # BOS stays besides
        assert scorer(rm, limit)._tokens([row])[1]["responses_cut"] == cut


# interruption and the cache


class Counted:
    """Counts conversations scored; raises after `most` of them."""

    def __init__(self, monkeypatch, most=10**9):
        self.count, self.padded, real = 0, [], scoring.RewardModel.score

        def score(rm, batch):
            if self.count + len(batch) > most:
                raise KeyboardInterrupt
            self.count += len(batch)
            self.padded.append(len(batch) * max(map(len, batch.ids)) if len(batch) > 1 else 0)
            return real(rm, batch)

        monkeypatch.setattr(scoring.RewardModel, "score", score)


def test_an_interrupted_evaluation_goes_on(models, data, tmp_path, monkeypatch):
    names, small = ["judgebench", "rewardbench2"], {"batch_tokens": 64}
    whole = run(models["llama"], data, tmp_path / "whole", names, **small)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Counted(patch, 7)
        run(models["llama"], data, out, names, **small)
    before = len(lines(out))
    assert 0 < before < 8 and not list(out.glob("*bench*.json")), "no figures of a part"
    assert json.loads((out / "manifest.json").read_text())["status"] == "stopped"
    with pytest.raises(ConfigError, match="missing, the first .*no total is given"):
        score_file("judgebench", str(data / "judgebench.jsonl"), str(out / "judgebench.scores.jsonl"))
    with open(out / "judgebench.scores.jsonl", "a") as file:
        file.write('{"pair_id": "p7", "scores": [0.1')  # a writer that was killed
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        again = run(models["llama"], data, out, names, **small)
    assert counted.count == 2 * (8 - before) + sum(r["total_completions"] for r in rewardbench2())
    for name in names:
        assert again[name].overall == whole[name].overall
        assert lines(out, name) == lines(tmp_path / "whole", name)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        run(models["llama"], data, out, names)
    assert counted.count == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Counted(patch, 7)
        run(models["bert"], data, out, names, **small)
    assert not list(out.glob("*bench*.json")), "no figures of the model before"


def test_what_changed_is_scored_again(models, tmp_path, monkeypatch):
    pairs, out, said = judgebench(), tmp_path / "out", []
    data = data_folder(tmp_path / "data", judgebench=pairs)
    run(models["llama"], data, out)
    first = {line["pair_id"]: line["scores"] for line in lines(out)}
    counted = Counted(monkeypatch)
    data_folder(data, judgebench=[pairs[0] | {"response_A": "another"}, pairs[1] | {"label": "B>A"}, *pairs[2:]])
    run(models["llama"], data, out)
    assert counted.count == 2  # a label is no text
    second = {line["pair_id"]: line["scores"] for line in lines(out)}
    assert [i for i in first if first[i] != second[i]] == ["p0"]
    run(models["llama"], data, out, max_length=60)
    assert counted.count == 2 + 2 * 8  # every conversation is longer
    other = make_reward_model(tmp_path / "other")
    model = AutoModelForSequenceClassification.from_pretrained(other)
    model.model.norm.weight.data[3] += 1e-3
    model.save_pretrained(other)
    run(models["llama"], data, out)
    counted.count = 0
    run(str(other), data, out, say=said.append)
    assert counted.count == 2 * 8 and "8 scores in" in said[0] and "of another model, setting or text" in said[0]
    assert {line["pair_id"]: line["scores"] for line in lines(out)} != second
    assert set(pd.read_csv(out / "summary.csv")["model"]) == {str(other)}
    run(models["llama"], data_folder(data, rewardbench2=rewardbench2()), out, ["rewardbench2"])
    assert set(pd.read_csv(out / "summary.csv")["benchmark"]) == {"rewardbench2"}  # the other is not this model's


def test_a_copy_of_the_model_elsewhere_is_the_same_model(models, tmp_path, data, monkeypatch):
    run(models["llama"], data, tmp_path / "out")
    copy = make_reward_model(tmp_path / "copy")
    counted = Counted(monkeypatch)
    run(str(copy), data, tmp_path / "out")
    assert counted.count == 0


def test_a_forward_has_at_most_batch_tokens(models, data, tmp_path, monkeypatch):
    counted = Counted(monkeypatch)
    run(models["llama"], data, tmp_path / "out", batch_tokens=400)
    assert 200 < max(counted.padded) <= 400 and counted.count == 16


# files


def test_files_tell_how_figures_were_made(models, data, tmp_path):
    said, out = [], tmp_path / "out"
    results = run(models["llama"], data, out, ["judgebench", "rewardbench2"], say=said.append)
    figures = json.loads((out / "judgebench.json").read_text())
    again = score_file("judgebench", str(data / "judgebench.jsonl"), str(out / "judgebench.scores.jsonl"))
    made = figures.pop("made_with")
    assert figures == again and figures["overall"] == results["judgebench"].overall
    assert (
        made["dtype"] == "float32" and made["batch_rows"] == 64 and made["device"] == "cpu" and made["responses"] == 16
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "done" and manifest["model"] == models["llama"] and manifest["transformers"]
    assert manifest["benchmarks"]["rewardbench2"]["rows"] == 7 and manifest["started"] <= manifest["finished"]
    summary = pd.read_csv(out / "summary.csv")
    overall = summary[summary.figure == "overall"].set_index("benchmark")
    assert overall.loc["rewardbench2", "percent"] == results["rewardbench2"].overall
    assert overall.loc["judgebench", "low"] == figures["ci95"][0] and overall.loc["judgebench", "n"] == 8
    assert {"macro", "knowledge", "Ties"} <= set(summary.figure)
    assert said[0] == "judgebench: 8 rows, 0 of 16 conversations cut to 512 tokens, 0 rows scored before"
    assert any(line.startswith(f"judgebench: {figures['overall']:.2f} (") for line in said)


def test_a_part_of_a_benchmark_is_not_called_overall(models, tmp_path):
    data, said = data_folder(tmp_path / "data", judgebench=judgebench()[:1]), []
    run(models["llama"], data, tmp_path / "out", say=said.append)
    assert "judgebench (in part): " in said[-1] and "the data lack reasoning, math, coding" in said[-1]
    assert set(pd.read_csv(tmp_path / "out/summary.csv").figure) == {"overall of a part", "macro", "knowledge"}


def test_missing_or_bad_data_stop_all_before_the_model_is_loaded(data, tmp_path):
    with open(data / "rewardbench2.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(ConfigError) as error:
        run("/no/such/model", data, tmp_path / "out", ["judgebench", "rewardbench2", "rmbench", "x"])
    for words in (
        "rewardbench2.jsonl: row 8 is not valid JSON", "rmbench.jsonl (or .jsonl.gz, .json, .json.gz, .parquet)",
        "take THU-KEG/RM-Bench from the hub", "benchmark = 'x'", "nothing was scored",
    ):  # fmt: skip
        assert words in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="benchmarks: none named; choose from"):
        run("/no/such/model", data, tmp_path / "out", [])


def test_data_folders_in_the_layout_of_the_hub(tmp_path):
    (tmp_path / "judgebench" / "data").mkdir(parents=True)
    pd.DataFrame(judgebench()).to_parquet(tmp_path / "judgebench/data/gpt-00000-of-00001.parquet")
    pd.DataFrame(judgebench(3)).to_parquet(tmp_path / "judgebench/data/claude-00000-of-00001.parquet")
    benchmark = BENCHMARKS["judgebench"]
    for folder in (tmp_path, tmp_path / "judgebench" / "data"):
        assert len(benchmark.rows(find_data(benchmark, folder))) == 8


def test_models_that_are_no_reward_models_are_refused(data, tmp_path, models):
    with pytest.raises(ConfigError, match="has no reward head"):
        run(str(make_policy(tmp_path / "policy")), data, tmp_path / "out")
    broken = make_reward_model(tmp_path / "broken")
    model = AutoModelForSequenceClassification.from_pretrained(broken)
    model.score.weight.data = model.score.weight.data.sign() * 3e38
    model.save_pretrained(broken)
    with pytest.raises(ConfigError, match="judgebench, row 'p.': the model's score is no finite number"):
        run(str(broken), data, tmp_path / "out")


def test_a_value_head_beside_the_model_does_not_matter(models, data, tmp_path):
    folder = make_reward_model(tmp_path / "rm")
    other = make_config(device="cpu", value_head="mlp", value_position="generation_prompt")
    load_reward_model(str(folder), other, torch.device("cpu")).save_value_head(folder)
    run(str(folder), data, tmp_path / "with")
    run(models["llama"], data, tmp_path / "without")
    assert lines(tmp_path / "with") == lines(tmp_path / "without")


# the hub

DRIVER = """
import json, sys, time
time.sleep = lambda seconds: None
from savelib.benchmarks.evaluate import evaluate
from savelib.config import ConfigError, make_config
names, out = json.loads(sys.argv[1])
said = {}
for wanted in names:
    try:
        found = evaluate("lab/rm", wanted, None, out, config=make_config(device="cpu"), say=lambda line: None)
        said[wanted[0]] = {name: result.n for name, result in found.items()}
    except ConfigError as error:
        said[wanted[0]] = str(error)
print("said:" + json.dumps(said))
"""


def test_models_and_data_from_the_hub(models, tmp_path):
    def jsonl(rows):
        return "".join(json.dumps(r) + "\n" for r in rows).encode()

    splits = [{"split": s, "path": f"{s}.jsonl"} for s in ("claude", "gpt")]
    header = json.dumps({"configs": [{"config_name": "default", "data_files": splits}]})
    pd.DataFrame(rewardbench2()).to_parquet(tmp_path / "test.parquet")
    question = {"question_id": "1", "prompt": "Hi", "scores": [1.0, 0.0], "sampled_conflict_pairs": [[0, 1]]}
    question |= {"response_1": "a", "response_2": "b"}
    with Hub() as hub:
        hub.add("models", "lab/rm", Path(models["llama"]))
        files = {"README.md": f"---\n{header}\n---\n".encode(), "gpt.jsonl": jsonl(judgebench(5))}
        hub.add("datasets", "ScalerLab/JudgeBench", files | {"claude.jsonl": jsonl(judgebench(2))})
        hub.add(
            "datasets", "allenai/reward-bench-2", {"data/test-0-of-1.parquet": (tmp_path / "test.parquet").read_bytes()}
        )
        for name in ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval"):
            hub.add("datasets", f"lmarena-ai/PPE-{name}-Best-of-K", {"train.jsonl": jsonl([question])})
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        wanted = [["judgebench", "rewardbench2", "ppe_correctness"], ["rewardbench"]]
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps([wanted, str(tmp_path / "out")])], text=True, timeout=100,
            capture_output=True, env=kept | own | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
    assert "said:" in done.stdout, done.stderr
    said = json.loads(done.stdout.split("said:")[1])
    assert said["judgebench"] == {"judgebench": 5, "rewardbench2": 7, "ppe_correctness": 5}
    assert "'allenai/reward-bench' could not be loaded from the hub" in said["rewardbench"]
    assert "nothing was scored" in said["rewardbench"]
    assert json.loads((tmp_path / "out/judgebench.json").read_text())["made_with"]["data"] == "ScalerLab/JudgeBench"
