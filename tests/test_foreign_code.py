"""Code that lies beside a model never runs, even where stdin answers transformers' question with yes."""

import ast
import io
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from tiny_models import make_policy, paper_run
from typer.testing import CliRunner

from savelib.cli import app
from savelib.data.chat import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class EvilConfig(PretrainedConfig):
    model_type = "evil"
class EvilModel(PreTrainedModel):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast): ...
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """(a folder whose config and tokenizer ask for code that lies beside them, the file which that would create)."""
    folder, mark = make_policy(tmp_path / "evil"), tmp_path / "ran"
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    models = {f"Auto{kind}": "evil.EvilModel" for kind in ("ModelForCausalLM", "ModelForSequenceClassification")}
    asked = {"config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"} | models}}
    tokenizer = {"AutoTokenizer": ["evil.EvilTokenizer"] * 2}
    asked["tokenizer_config.json"] = {"tokenizer_class": "EvilTokenizer", "auto_map": tokenizer}
    for file, values in asked.items():
        made = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(made | values))
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    return folder, mark


@pytest.mark.parametrize("words", [
    ["train", "--set", "policy_model=EVIL"],
    ["train", "--set", "reward_model=EVIL"],
    ["plan", "--set", "policy_model=EVIL"],
    ["plan", "--set", "reward_model=EVIL"],
    ["evaluate", "--model", "EVIL", "--benchmarks", "judgebench", "--data-dir", "DATA", "--out", "OUT"],
    ["respond", "--policy", "EVIL", "--benchmark", "alpaca", "--prompts", "PROMPTS", "--out", "OUT.json"],
], ids=lambda words: " ".join(words[:3]).replace("--set ", ""))  # fmt: skip
def test_a_yes_on_stdin_runs_nothing(evil, tmp_path, words):
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Say hi.", "dataset": "x"}]))
    (tmp_path / "data").mkdir()
    row = {
        "pair_id": "1",
        "source": "mmlu-pro-x",
        "question": "q",
        "response_A": "a",
        "response_B": "b",
        "label": "A>B",
    }
    (tmp_path / "data" / "judgebench.jsonl").write_text(json.dumps(row) + "\n")
    names = {"EVIL": evil[0], "DATA": tmp_path / "data", "OUT": tmp_path / "out", "PROMPTS": tmp_path / "alpaca.json"}
    if words[0] in ("train", "plan"):
        given = [word.split("=")[0] for word in words] + ["profile"]
        values = {k: v for k, v in paper_run(tmp_path).items() if k not in given}
        words = words + [w for k, v in values.items() for w in ("--set", f"{k}={v}")]
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    done = CliRunner().invoke(app, words, input="y\n" * 100)
    assert not evil[1].exists(), "the code ran"
    assert done.exit_code == 2 and done.stderr.count("error:") == 1 and str(evil[0]) in done.stderr, done.output
    assert "code from its repository, which is never run" in done.stderr


def test_nor_does_the_code_of_a_tokenizer_alone(evil, tmp_path):
    folder, mark = evil
    shutil.copy(make_policy(tmp_path / "plain") / "config.json", folder / "config.json")
    load_tokenizer(str(folder), "policy_model")
    assert not mark.exists(), "the code ran"


def calls(source: str) -> list[ast.Call]:
    """The calls x.from_pretrained(...) and x.from_config(...) in a source."""
    every = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    return [n for n in every if n.func.attr in ("from_pretrained", "from_config")]


def refuses(call: ast.Call) -> bool:
    """Whether the call says trust_remote_code=False itself; PEFT, which has no such word, loads no code."""
    said = {k.arg: k.value for k in call.keywords}
    word = said.get("trust_remote_code")
    return ast.unparse(call.func.value) == "PeftModel" or (isinstance(word, ast.Constant) and word.value is False)


def test_every_model_goes_through_one_door():
    for file in sorted((ROOT / "savelib").rglob("*.py")):
        found = [c for c in calls(file.read_text()) if ast.unparse(c.func.value) != "PeftModel"]
        assert (file.name == "hub.py" and all(map(refuses, found))) or not found, file
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [c.source for c in nbformat.read(file, 4).cells if c.cell_type == "code"]
        assert all(refuses(c) for source in cells for c in calls(source)), file
    assert calls("A.from_pretrained(x)") and not refuses(calls("A.from_pretrained(x, trust_remote_code=True)")[0])
