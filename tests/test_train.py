"""A run from config to folder, and its command line."""

import pytest
import torch
from tiny_models import paper_run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from savelib.cli import app, summary
from savelib.config import ConfigError, make_config
from savelib.runs.folder import read_config, read_manifest, read_metrics, read_samples
from savelib.runs.train import train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("base"), "qwen3") | dict(
        anchor_prompts=4, total_steps=6, batch_size=2, checkpoint_every=2, eval_every=3,
        policy_lr=1e-3, backbone_lr=1e-4, reward_head_lr=1e-3,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def folders(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def cli(*words):
    return CliRunner().invoke(app, words)


def test_a_run_is_a_folder_of_files(base):
    folder = train(make_config(**base, run_id="whole"))
    assert read_config(folder) == make_config(**base, run_id="whole")
    metrics, manifest = read_metrics(folder), read_manifest(folder)
    assert metrics["step"].tolist() == list(range(7))
    assert metrics["eval/rm_accuracy"].notna().tolist() == [True, False, False, True, False, False, True]
    assert (
        manifest["status"] == "done"
        and manifest["packages"]["torch"] == torch.__version__.split("+")[0]
        or manifest["packages"]["torch"]
    )
    samples = read_samples(folder)
    assert set(samples["side"]) <= {"positive", "negative", "left out"} and samples["gold"].isna().all()
    assert (samples["rm_advantage"] - (samples["reward"] - samples["value"])).abs().max() < 1e-6
    AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert AutoModelForSequenceClassification.from_pretrained(folder / "reward_model").config.num_labels == 1
    assert (folder / "reward_model" / "value_head.safetensors").is_file()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000002", "step_000004"]
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    with pytest.raises(ConfigError, match="already holds a run; choose another run_id"):
        train(make_config(**base, run_id="whole"))
    assert read_metrics(folder).equals(metrics)


def test_an_own_reward_model_needs_no_pairs(base):
    folder = train(make_config(**base | dict(preferences="", total_steps=1), run_id="no-pairs"))
    metrics = read_metrics(folder)
    assert "eval/rm_accuracy" not in metrics and metrics["eval/reward"].notna().all()
    assert "done" in summary(folder)


@pytest.mark.parametrize(("words", "said"), [
    (["--set", "algo=rlo"], "algo = 'rlo': not one of grpo, gspo, rloo, reinforce_pp"),
    (["--set", "alg=rloo"], "did you mean 'algo'"),
    (["--profile", "huge"], "profile = 'huge': not one of tiny, smol, single_gpu, paper"),
    (["--set", "rule=sav"], "rule = 'sav': not one of save"),
    (["--set", "prompts=none.jsonl"], "prompts = 'none.jsonl': no such file"),
    (["--set", "group_size=1"], "group_size = 1"),
    (["--config", "none.yaml"], "config file 'none.yaml' cannot be read"),
    (["--set", "device=cuda:99"], "device = 'cuda:99' cannot be used here"),
])  # fmt: skip
def test_bad_input_ends_with_one_sentence(words, said):
    done = cli("train", *words)
    assert done.exit_code == 2 and said in done.stderr
    assert done.stderr.count("error:") == 1


def test_config_prints_every_field_with_its_source():
    done = cli("config", "--profile", "paper")
    assert "initial_margin: 0.5  # table 8, m0: initial margin of eq. 14" in done.stdout
