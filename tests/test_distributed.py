"""Two processes give what one gives on the same batch: metrics and the gradients of all three losses; each backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import centre_rewards, paper_run

from savelib.config import ConfigError, make_config
from savelib.processes import gathered, share, summed
from savelib.training.engine import Engine, FrozenWeightsError, connect

HERE = Path(__file__).parent
RUNS = {  # what differs between processes: groups without contrast, kept responses, lengths
    "grpo": dict(algo="grpo", initial_margin=0.45),
    "sparse": dict(algo="grpo", initial_margin=0.6),
    "gspo": dict(algo="gspo", max_grad_norm=0.01),
    "rloo": dict(algo="rloo", advantages_over="all", micro_batch_responses=3),
    "reinforce_pp": dict(algo="reinforce_pp", rm_steps=2, length_filter="both"),
    "hl_bt": dict(rule="hl_bt"),
    "offline_bt": dict(rule="offline_bt"),
    "ser": dict(rule="ser"),
    "r2m": dict(rule="r2m"),
    "prime": dict(rule="frozen", algo="prime"),
    "mean_reward": dict(rule="mean_reward", value_head="mlp"),
    "frozen_backbone": dict(backbone_lr=0.0),
    "save_checked": dict(rule="save_checked", guard_pairs=4, total_steps=9),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    values = paper_run(tmp_path_factory.mktemp("base"))
    return values | dict(
        guard_preferences=values["preferences"],
        total_steps=4, batch_size=4, anchor_prompts=6, anchor_batch_size=4, curriculum="fixed", initial_margin=0.5,
        precision="float32", gradient_checkpointing=False, policy_lr=1e-3, backbone_lr=1e-4, reward_head_lr=1e-3,
        max_new_tokens=12, micro_batch_responses=5, tracker="none",
    )  # fmt: skip


@pytest.fixture(scope="module")
def first_steps(base, tmp_path_factory):
    """(num_processes, backend, names) -> folder with what the first steps of RUNS gave."""
    folder = tmp_path_factory.mktemp("steps")

    def run(processes: int, backend: str, names: tuple[str, ...]) -> Path:
        out = folder / f"{backend}-{processes}"
        if out.is_dir():
            return out
        jobs = {name: base | RUNS[name] | dict(num_processes=processes, backend=backend) for name in names}
        if "ser" in jobs:
            jobs["ser"]["reward_model"] = centre_rewards(base["reward_model"], folder / "centred")
        (folder / f"{out.name}.jobs").write_text(json.dumps(jobs))
        words = [sys.executable, str(HERE / "first_step.py"), str(folder / f"{out.name}.jobs"), str(out)]
        if processes > 1:
            words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
        # the caches of stages 1 and 2 are each one's own: these too are shared over the processes
        env = os.environ | {"SAVE_CACHE": str(folder / f"cache-{out.name}"), "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    return run


def compared(one: Path, two: Path, name: str) -> dict:
    """Assert that a step gave the same metrics and gradients; returns the metrics."""
    a, b = (json.loads((folder / f"{name}.json").read_text()) for folder in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        if not key.startswith("time/"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=2e-5), key
    x, y = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
    assert x and x.keys() <= y.keys()
    for key, gradient in x.items():
        scale = gradient.abs().max().clamp(min=1e-12)
        assert (y[key] - gradient).abs().max() / scale < 2e-4, key
    assert not any(y[key].any() for key in y.keys() - x.keys())  # zeros where one process has no gradient at all
    return a


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_metrics_and_gradients_of_one(first_steps, name):
    one, two = first_steps(1, "ddp", tuple(RUNS)), first_steps(2, "ddp", tuple(RUNS))
    metrics = compared(one, two, name)
    kinds = {key.partition(".")[0] for key in load_file(two / f"{name}.safetensors")}
    if name == "grpo":
        assert kinds == {"policy", "reward_model", "value_head"}
        assert metrics["rm/groups"] == 3 and metrics["policy/responses"] < 16, "the processes' shares differ"
        said = [json.loads((folder / "grpo.rank0.json").read_text()) for folder in (one, two)]
        assert said[0] == said[1], "the same responses, whoever samples them"
    if name == "sparse":
        assert metrics["rm/groups"] == 1, "only one process has a group with contrast"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")
@pytest.mark.parametrize("backend", ["deepspeed_zero2", "deepspeed_zero2_offload", "deepspeed_zero3"])
def test_deepspeed_gives_the_metrics_and_gradients_of_one_process(first_steps, backend):
    one = first_steps(1, "ddp", tuple(RUNS))
    names = ("grpo", "sparse", "ser", "r2m") + (("save_checked",) if backend != "deepspeed_zero3" else ())
    for name in names:
        compared(one, first_steps(2, backend, names), name)


def test_one_process_is_everybody(base):
    assert share([1, 2, 3]) == [1, 2, 3] and summed(1, 2.5) == [1.0, 2.5]
    assert gathered(torch.arange(3), 2).tolist() == [0, 1]
    with pytest.raises(ConfigError, match="num_processes = 2, but 1 process"):
        connect(make_config(**base | dict(num_processes=2)))


@pytest.mark.parametrize(("size", "rank", "mine"), [
    (2, 0, [1, 2, 3]), (2, 1, [4, 5, 5]), (4, 3, [5, 5]), (5, 4, [5]), (1, 0, [1, 2, 3, 4, 5]),
])  # fmt: skip
def test_shares_are_of_one_length_and_in_order(monkeypatch, size, rank, mine):
    monkeypatch.setattr("savelib.processes.world_size", lambda: size)
    monkeypatch.setattr("savelib.processes.rank", lambda: rank)
    assert share([1, 2, 3, 4, 5]) == mine


@pytest.mark.parametrize(("values", "said"), [
    (dict(batch_size=3), "batch_size = 3 must be a multiple of num_processes = 2"),
    (dict(backend="deepspeed_zero2", lora_rank=8), "lora_rank"),
    (dict(backend="deepspeed_zero2", optimizer="adamw_8bit"), "optimizer"),
    (dict(load_in_4bit=True), "set lora_rank"),
    (dict(backend="zero2"), "backend = 'zero2'"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_starts(base, values, said):
    with pytest.raises(ConfigError, match=said):
        make_config(**base | dict(num_processes=2) | values)


def engine(weights: list[torch.Tensor], lr: float) -> Engine:
    return Engine("policy", torch.optim.AdamW(weights, lr=lr, weight_decay=0.0), 1.0)


def test_weights_at_the_papers_learning_rate_move():
    weight = torch.nn.Parameter(torch.randn(100, 100) * 0.02)
    before = weight.detach().clone()
    e = engine([weight], 1e-7)
    weight.square().sum().backward()
    e.step()
    assert (weight != before).float().mean() > 0.95 and e.checked


def test_weights_below_float32_are_refused():
    with pytest.raises(FrozenWeightsError, match="policy: trained weights are torch.bfloat16"):
        engine([torch.nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))], 1e-7)


def test_a_step_that_moves_nothing_is_an_error():
    weight = torch.nn.Parameter(torch.full((10, 10), 1000.0))  # float32 has no number within 1e-7 of 1000
    e = engine([weight], 1e-7)
    weight.sum().backward()
    with pytest.raises(FrozenWeightsError, match="moved no weight"):
        e.step()
