"""A run from config to folder, and its command line."""

import json
import re
from datetime import datetime

import pytest
import torch
from tiny_models import paper_run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from savelib.analysis.runs import runs_table
from savelib.cli import app, summary
from savelib.config import ConfigError, make_config
from savelib.paths import runs_dir, strict_json
from savelib.runs.folder import RunLog, new_run_id, read_config, read_manifest, read_metrics, read_samples
from savelib.runs.train import train
from savelib.training.finite import NonFiniteError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("base"), "qwen3") | dict(
        anchor_prompts=4, total_steps=6, batch_size=2, checkpoint_every=2, eval_every=3,
        policy_lr=1e-3, backbone_lr=1e-4, reward_head_lr=1e-3,
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("folders")


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


def test_a_run_ends_where_its_policy_is_too_far_from_the_start(base, capsys):
    values = base | dict(eval_every=0, checkpoint_every=0)
    whole = read_metrics(train(make_config(**values, run_id="no-limit")))
    far = whole["policy/kl_response"]
    longer = (far / whole["policy/kl"]).loc[2:]  # tokens of a response
    assert abs(far[1]) < 1e-6 and longer.between(1, base["max_new_tokens"]).all()
    end = int((far > far[3] / 2).idxmax())
    assert 1 < end < 6
    folder = train(make_config(**values, max_kl=far[3] / 2, run_id="limit"))
    assert read_metrics(folder)["step"].tolist() == list(range(end + 1)) and read_manifest(folder)["status"] == "done"
    assert read_metrics(folder)["eval/reward"].notna().tolist() == [True] + [False] * (end - 1) + [True]
    assert f"step {end} is the last: the policy is" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(folder / "policy")


def test_an_own_reward_model_needs_no_pairs(base):
    folder = train(make_config(**base | dict(preferences="", total_steps=1), run_id="no-pairs"))
    metrics = read_metrics(folder)
    assert "eval/rm_accuracy" not in metrics and metrics["eval/reward"].notna().all()
    assert "done" in summary(folder)


def test_a_run_that_left_the_numbers_names_the_checkpoint_to_go_on_from(base):
    train(make_config(**base | dict(total_steps=2, checkpoint_every=1, eval_every=0), run_id="good"))
    (checkpoint,) = (runs_dir() / "good" / "checkpoints").iterdir()
    values = base | dict(value_loss_weight=1e308, resume=str(checkpoint), run_id="bad")
    with pytest.raises(NonFiniteError, match=f"^step 2: L_V is not .* good checkpoint by resume={checkpoint}$"):
        train(make_config(**values))
    assert read_manifest("bad")["status"] == "failed" and str(checkpoint) in read_manifest("bad")["error"]
    assert len(train(make_config(**values | dict(value_loss_weight=1.0, run_id="again"))).name)


def test_a_clock_that_is_set_back_by_an_hour(monkeypatch):
    """Names stay apart, seconds and the time left go on, resuming too."""
    now = {"time": 1.8e9}

    class Clock(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.fromtimestamp(now["time"], zone)

    monkeypatch.setattr("savelib.runs.folder.datetime", Clock)
    monkeypatch.setattr("time.time", lambda: now["time"])
    config, names = make_config(tracker="none"), []
    for _ in range(3):
        names.append(new_run_id(config))
        with RunLog.create(make_config(run_id=names[-1], tracker="none")):
            now["time"] += 3600 if len(names) == 1 else -3600 * (len(names) == 2)
    again = new_run_id(config)
    assert len({*names, again}) == 4 and again.startswith(names[0])
    with RunLog.create(make_config(run_id="back", tracker="none")) as log:
        log.metrics(0, {})
        for step in (1, 2):
            now["time"] -= 3600
            log.metrics(step, {"time/tokens_per_second": 9.0})
        assert re.search(r"0:00:\d\d left", log.progress()), log.progress()
    now["time"] -= 3600
    with RunLog(make_config(run_id="back", tracker="none")) as log:
        log.begin(resuming=True, step=2)
        log.metrics(3, {})
    seconds = read_metrics("back")["seconds"].tolist()
    assert len(seconds) == 4 and seconds == sorted(seconds) and seconds[0] >= 0 and seconds[-1] < 60
    assert 0 <= read_manifest("back")["seconds"] < 60 and len(runs_table()) == 4


def test_metrics_stay_strict_json(tmp_path):
    with RunLog.create(make_config(run_id="odd", tracker="none")) as log:
        log.metrics(0, {"a": float("nan"), "b": float("-inf"), "c": 0.5, "d": 1, "eval/reward": 0.1})
        log.metrics(1, {"a": float("inf"), "b": 2.0, "c": 0.25, "d": 2})
        assert log.progress().startswith("step 1/60")
    lines = (runs_dir() / "odd" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines]
    assert [(row["a"], row["b"]) for row in rows] == [(None, None), (None, 2.0)]
    metrics = read_metrics("odd")
    assert {str(metrics[c].dtype) for c in "abc"} == {"float64"} and str(metrics["d"].dtype) == "int64"
    assert json.loads(strict_json({"x": [{"y": (1.5, float("nan"))}], "z": "NaN"})) == {
        "x": [{"y": [1.5, None]}],
        "z": "NaN",
    }
    assert metrics["a"].isna().all() and metrics["c"].tolist() == [0.5, 0.25] and "odd" in summary(runs_dir() / "odd")


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
