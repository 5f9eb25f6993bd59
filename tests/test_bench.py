"""The bench: equal token counts, phases that add up, ratios within rounds, a floor that a flop counter confirms."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from test_notebooks import executed, text_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from savelib.cli import app
from savelib.config import ConfigError
from savelib.data.pairs_and_prompts import Prompt
from savelib.experiments import cost, cost_floor, cost_report, cost_sizes, cost_worker
from savelib.models.loading import load_policy, load_reward_model
from savelib.models.rollout import sample
from savelib.runs.sizes import model_sizes
from savelib.training.metrics import Clock

QUICK = cost_sizes.SIZES["quick"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    cost_sizes.save_models("quick", folder)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A quick run from the command line: its folder, with what it printed."""
    folder = tmp_path_factory.mktemp("bench") / "quick"
    done = subprocess.run(
        [sys.executable, "-m", "savelib", "bench", "--quick", "--out", str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed.txt").write_text(done.stdout)
    return folder


# equal work


def test_responses_have_exactly_the_tokens_asked_for(models):
    config = cost_sizes.bench_config(QUICK, models)
    policy, tokenizer = load_policy(config.policy_model, CPU, config)
    prompts = [
        Prompt(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(cost_sizes.prompts_of(QUICK))
    ]
    rollout = sample(policy, tokenizer, prompts, 8, config)
    assert rollout.prompt_lengths.tolist() == [QUICK.prompt] * len(prompts)
    assert rollout.completion_lengths.eq(QUICK.new).all() and not rollout.finished.any()
    rm = load_reward_model(config.reward_model, config, CPU)
    encoded = rm.encode([(p.messages, t) for p, texts in zip(prompts, rollout.texts, strict=True) for t in texts])
    assert {len(row) for row in encoded.ids} == {QUICK.prompt + QUICK.new + 1}, (
        "a word more or less on the way over text"
    )
    assert set(encoded.prompt_ends) == {QUICK.prompt - 2}, "V reads the end of the user's turn"


def test_without_the_constant_coordinate_responses_end_early(models):
    config = cost_sizes.bench_config(QUICK, models).model_copy(update={"top_k": 0, "top_p": 1.0, "max_new_tokens": 64})
    policy, tokenizer = load_policy(config.policy_model, CPU, config)
    prompts = [Prompt("0", [{"role": "user", "content": cost_sizes.prompts_of(QUICK)[0]}])]
    assert sample(policy, tokenizer, prompts, 64, config).completion_lengths.min() == 64
    with torch.no_grad():
        policy.get_output_embeddings().weight[:2, 0] = 1.0
    assert sample(policy, tokenizer, prompts, 64, config).completion_lengths.min() < 64


def test_a_system_with_other_token_counts_is_refused():
    class One:
        name = "trl"

    made = {"tokens": QUICK.new, "used": QUICK.batch * QUICK.group}
    cost._check(QUICK, One, made)
    with pytest.raises(ConfigError, match=r"TRL GRPOTrainer has \{'tokens': 7\}"):
        cost._check(QUICK, One, made | {"tokens": 7})


# what is counted


def test_a_phase_inside_another_counts_there_alone(monkeypatch):
    clock = Clock(CPU)
    ticks = iter([0.0, 1.0, 3.0, 4.0, 5.0, 10.0])
    monkeypatch.setattr(clock, "now", lambda: next(ticks))
    with clock.phase("other"):  # 0 to 10
        with clock.phase("rollout"):  # 1 to 3
            pass
        with clock.phase("optimizer"):  # 4 to 5
            pass
    assert {k: v for k, v in clock.seconds.items() if v} == {"other": 7.0, "rollout": 2.0, "optimizer": 1.0}


def test_reward_model_tokens_are_counted_where_they_enter_the_backbone(models):
    config = cost_sizes.bench_config(QUICK, models)
    model = load_reward_model(config.reward_model, config, CPU).model
    turn = cost_worker.Turn(None, CPU, 0.0)
    turn.watch(model.base_model)
    ids = torch.randint(2, 500, (3, 7))
    model(input_ids=ids)
    model.base_model(ids)
    model.base_model(inputs_embeds=model.get_input_embeddings()(ids[:1]))
    assert turn.rm_tokens == 21 + 21 + 7


def test_floor_is_that_of_a_flop_counter(models):
    """One row: shared prompts save nothing, so the floor's forward is the model's own, of attention the causal half."""
    size = cost_sizes.Size("quick", 1, 1, 16, 8, {})
    policy, reward = (model_sizes(str(models / kind), f"{kind}_model") for kind in ("policy", "reward"))
    model = AutoModelForCausalLM.from_pretrained(models / "policy", attn_implementation="eager")
    ids = torch.randint(2, 500, (1, size.prompt + size.new))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, logits_to_keep=size.new)
    counts = {module: {str(op): n for op, n in ops.items()} for module, ops in counter.get_flop_counts().items()}
    attention = sum(ops["aten.bmm"] for module, ops in counts.items() if module.endswith("self_attn"))
    linear = counts["Global"]["aten.mm"]
    rate = {"flops_per_second": 1.0, "bytes_per_second": 1.0}
    made = cost_floor.floor(size, policy, reward, rate, "save")
    expected = linear + attention / 2
    assert made["reference log-probs"] == pytest.approx(expected)
    assert made["policy forward/backward"] == pytest.approx(3 * expected)
    assert made["RM update"] == pytest.approx(3 * made["reward scoring"] + 28 * reward.total)  # and Adam's step
    assert cost_floor.floor(size, policy, reward, rate, "grpo")["RM update"] == 0
    assert made["optimizer"] == 28 * sum(p.numel() for p in model.parameters())
    # at a byte a second decoding reads the weights and all keys and values so far, for each token
    weights = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n and "embed" not in n)
    keys = [2 * 2 * 64 * (size.prompt + t + 0.5) for t in range(size.new)]  # two layers, 64 wide; half of a step's own
    prefill = cost_floor.floor(size, policy, reward, rate | {"bytes_per_second": 1e30}, "save")["rollout"]
    slow = cost_floor.floor(size, policy, reward, {"flops_per_second": 1e30, "bytes_per_second": 1.0}, "save")[
        "rollout"
    ]
    assert slow == pytest.approx(4 * (size.new * weights + sum(keys)))
    assert prefill == pytest.approx(expected, rel=1e-6), "prompt and response, each token once"


def test_floor_takes_a_prompt_once_a_group(models):
    policy, reward = (model_sizes(str(models / kind), f"{kind}_model") for kind in ("policy", "reward"))
    rate = {"flops_per_second": 1.0, "bytes_per_second": 1e30}
    one, four = (
        cost_floor.floor(cost_sizes.Size("quick", 1, g, 16, 8, {}), policy, reward, rate, "save")["reward scoring"]
        for g in (1, 4)
    )
    linear = 2 * sum(out * into for out, into in reward.linear)
    response = 8 * (linear + 4 * reward.layers * reward.queries * (16 + 4))
    assert four - one == pytest.approx(3 * response)


# verdicts


def steps_of(**seconds) -> pd.DataFrame:
    rows = [
        {"size": "a", "system": s, "repeat": i, "seconds": x, "peak_gb": 1.0, "rm_tokens": 10, "naive_rm_tokens": 40}
        for s, values in seconds.items()
        for i, x in enumerate(values, 1)
    ]
    return pd.DataFrame(rows)


def test_ratios_are_taken_within_a_round():
    """The machine is four times slower in the second round; SAVE costs 1.1 times TRL in each."""
    steps = steps_of(trl=[1.0, 4.0, 1.0], save=[1.1, 4.4, 1.1])
    np.testing.assert_allclose(cost_report.paired(steps, "a", "seconds", "save", "trl"), [1.1] * 3)
    np.testing.assert_allclose(cost_report.paired(steps, "a", "rm_tokens", "save", "naive"), [0.25] * 3)


@pytest.mark.parametrize("save, reached", [([0.9, 1.0, 5.0], True), ([0.5, 1.01, 1.2], False)])
def test_a_bar_is_judged_by_the_median_and_shows_the_spread(save, reached):
    (bar,) = cost_report.bars(steps_of(trl=[1.0, 1.0, 1.0], save=save), {})
    assert (bar["bar"], bar["size"], bar["reached"]) == ("step time, SAVE / TRL's GRPO", "a", reached)
    assert (bar["low"], bar["ratio"], bar["high"]) == pytest.approx(tuple(save))


def test_growth_of_memory_is_judged_against_batch_and_rollout():
    peaks = {"B=8": 2.0, "B=32": 2.5, "G=4": 1.0, "G=32": 1.4}
    rows = [steps_of(save=[1.0]).assign(size=size, peak_gb=peak) for size, peak in peaks.items()]
    by_batch, by_group = cost_report.bars(pd.concat(rows), {"G=4": 0.1, "G=32": 0.6})
    assert by_batch["ratio"] == pytest.approx(1.25) and not by_batch["reached"]
    assert by_group["ratio"] == pytest.approx(0.8) and by_group["reached"]


# whole runs


@pytest.mark.slow
def test_quick_run_times_all_four_on_the_same_work(results):
    made, steps = cost_report.load(results)
    assert made["systems"] == ["trl", "trl_save", "grpo", "save"]
    assert steps.groupby("system").size().to_dict() == dict.fromkeys(made["systems"], 2)
    np.testing.assert_allclose(steps[list(cost_sizes.PHASES)].sum(axis=1), steps["seconds"], rtol=1e-6)
    assert steps["tokens"].eq(QUICK.new).all() and steps["peak_gb"].gt(0.1).all()
    one_pass = QUICK.naive_rm_tokens / 3
    tokens = {system: rows.unique().tolist() for system, rows in steps.groupby("system")["rm_tokens"]}
    assert tokens["trl"] == [one_pass], "TRL scores every padded row once"
    assert 0 < tokens["grpo"][0] <= one_pass < tokens["save"][0] <= 2 * one_pass
    assert tokens["trl_save"] == tokens["save"]
    used = steps.set_index("system")[list(cost_sizes.PHASES)] > 0
    assert used.loc[["save", "trl_save"]].all(axis=None), "a phase of SAVE that is never entered"
    idle = {"RM update", "value update"}
    assert used.loc["trl"][[p for p in cost_sizes.PHASES if p not in idle]].all(axis=None)
    assert not used.loc["trl"][sorted(idle)].any(axis=None)
    groups = steps.groupby("system")["groups"].max()
    assert groups["save"] > 0 and groups["trl_save"] > 0, "the reward model learnt from no group"


@pytest.mark.slow
def test_quick_run_says_on_what_it_ran_and_marks_every_bar(results):
    made, steps = cost_report.load(results)
    assert {"torch", "transformers", "trl"} <= set(made["machine"]["versions"])
    assert made["machine"]["threads"] == torch.get_num_threads() and made["machine"]["cores"] >= 1
    assert made["rates"]["cpu"]["flops_per_second"] > 1e9 and made["rates"]["cpu"]["bytes_per_second"] > 1e8
    for system, floor in made["floors"]["quick"].items():
        assert sum(floor.values()) < steps.loc[steps["system"] == system, "seconds"].min()
    printed = (results / "printed.txt").read_text()
    assert printed.count("reached") == len(made["bars"]) == 4
    for system in cost_sizes.SYSTEMS.values():
        assert system in printed


@pytest.mark.slow
def test_without_trl_its_column_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "has_trl", lambda: False)
    said = []
    folder = cost.run(["quick"], 1, tmp_path, said.append)
    made, steps = cost_report.load(folder)
    assert made["systems"] == ["grpo", "save"] == steps["system"].tolist()
    assert "trl is not installed: its columns are left out" in said
    assert [b["bar"] for b in made["bars"]] == ["step time, SAVE / our GRPO", "RM tokens, SAVE / three padded passes"]
    assert "TRL GRPOTrainer" not in cost_report.report(folder)


def test_a_system_that_stops_says_why(models, tmp_path, monkeypatch):
    config = cost_sizes.bench_config(QUICK, models).model_copy(update={"policy_model": "./nowhere"})
    monkeypatch.setattr(cost, "bench_config", lambda *_: config)
    monkeypatch.setattr(cost, "has_trl", lambda: False)
    with pytest.raises(ConfigError, match=r"our GRPO \(frozen\) stopped: .*no such folder \(its log: "):
        cost.time_size("quick", QUICK, models, 1, tmp_path / "log.txt")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "a,z"], "sizes = 'z': valid names are quick, a, a256, b, c, "),
        (["--sizes", "quick", "--repeats", "0"], "repeats = 0: give at least 1"),
        (["--sizes", "paper512"], "the paper's shapes need CUDA"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    if "CUDA" in message and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2 and message in done.stderr


@pytest.mark.slow
def test_notebook_draws_given_results(results, tmp_path):
    notebook = executed("11_cost", tmp_path, results=str(results))
    text = text_of(notebook)
    assert "step time, SAVE / TRL's GRPO" in text
    bars = json.loads((results / "results.json").read_text())["bars"]
    assert f"{sum(b['reached'] for b in bars)} of {len(bars)} bars reached" in text
    assert not list(tmp_path.glob("bench-*")), "results were given, and it measured again"
