"""Whole runs on a simulated CUDA device: nothing mixes devices, and in float32 every figure is the CPU's, bit for bit.

The device is believed because it refuses what CUDA refuses: the misuses below, and, once, a `device=` or `.to(device)`
of savelib dropped at a time.
"""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from simulated_cuda import DeviceError, simulated_cuda
from tiny_models import centre_rewards, checkable_prompts, paper_run
from typer.testing import CliRunner

from savelib.benchmarks.evaluate import evaluate
from savelib.cli import app
from savelib.config import make_config
from savelib.experiments import gpu_check
from savelib.method import ALGORITHMS, RULES
from savelib.runs.folder import read_metrics
from savelib.runs.train import train

# the device


def adam(fused):
    p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW([p], fused=fused)
    optimizer.step()
    return p, optimizer


def fused_with_its_step_on_the_cpu():
    p, optimizer = adam(True)
    optimizer.state[p]["step"] = optimizer.state[p]["step"].cpu()
    optimizer.step()


def backward_through_a_cpu_weight():
    w = torch.ones(3, requires_grad=True)
    (w @ torch.ones(3, device="cuda")).backward()


def write(target, where, value):
    target[where] = value


MISUSES = {
    "add": lambda x, y: x + y,
    "add in place": lambda x, y: x.add_(y),
    "add in place to a number on the CPU": lambda x, y: torch.tensor(1.0).add_(x.sum()),
    "number on the device in a CPU tensor": lambda x, y: y * x.sum(),
    "matmul": lambda x, y: x @ y,
    "linear": lambda x, y: F.linear(x, y[None]),
    "backward": lambda x, y: backward_through_a_cpu_weight(),
    "cat": lambda x, y: torch.cat([x, y]),
    "stack": lambda x, y: torch.stack([x, y]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "isin": lambda x, y: torch.isin(x, y),
    "gather": lambda x, y: x.gather(0, torch.tensor([0])),
    "index_select": lambda x, y: x.index_select(0, torch.tensor([0])),
    "index_copy": lambda x, y: x.index_copy(0, torch.tensor([0], device="cuda"), y[:1]),
    "embedding": lambda x, y: F.embedding(torch.tensor([0]), x[:, None]),
    "searchsorted": lambda x, y: torch.searchsorted(x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0.0),
    "index on the device into a CPU tensor": lambda x, y: y[torch.tensor([0], device="cuda")],
    "mask on the device into a CPU tensor": lambda x, y: y[x > 0],
    "values on the CPU": lambda x, y: write(x, torch.tensor([0, 1, 2]), y),
    "attention": lambda x, y: F.scaled_dot_product_attention(*(t.view(1, 1, 3, 1) for t in (x, y, x))),
    "mask of attention": lambda x, y: F.scaled_dot_product_attention(
        *(x.view(1, 1, 3, 1),) * 3, attn_mask=torch.ones(3, 3, dtype=torch.bool)
    ),
    "numpy": lambda x, y: x.numpy(),
    "gradient": lambda x, y: setattr(x, "grad", y),
    "equal": lambda x, y: torch.equal(x, y),
    "generator": lambda x, y: torch.rand(3, device="cuda", generator=torch.Generator()),
    "fused Adam": lambda x, y: fused_with_its_step_on_the_cpu(),
    "two devices": lambda x, y: x + torch.ones(3, device="cuda:1"),
    "new tensor": lambda x, y: x + x.new_tensor([1.0, 2.0, 3.0], device="cpu"),
    "like": lambda x, y: x + torch.zeros_like(x, device="cpu"),
    "module": lambda x, y: torch.nn.Linear(3, 1).to("cuda")(y),
    "deep copy": lambda x, y: copy.deepcopy(x) + y,
    "foreach": lambda x, y: torch._foreach_mul_([x], y.sum()),
}  # fmt: skip
ALLOWED = {
    "number on the CPU": lambda x, y: x * torch.tensor(2.0) + torch.where(x > 0, x, torch.tensor(0.0)),
    "CPU index": lambda x, y: x[torch.tensor([0])] + x[:1],
    "CPU mask": lambda x, y: x[y > 0] + x,
    "number put at an index": lambda x, y: write(x, torch.tensor([0]), torch.tensor(1.0)),
    "copy_": lambda x, y: x.copy_(y) + y.copy_(x).to("cuda"),
    "there and back": lambda x, y: x.cpu() + y + x.to(y) + x.to("cpu", torch.float64) + y.cuda().cpu(),
    "item": lambda x, y: y * x.sum().item() + y * float(x[0]) + x.tolist()[0],
    "new_zeros": lambda x, y: x + x.new_zeros(3) + x.new_tensor([1.0, 2.0, 3.0]) + torch.zeros_like(x),
    "factories": lambda x, y: x + torch.arange(3, device=x.device) + torch.as_tensor(y, device="cuda"),
    "view": lambda x, y: x[1:].view(2) + x.detach()[:2].clone(),
    "module": lambda x, y: torch.nn.Linear(3, 1).to("cuda")(x),
    "Adam": lambda x, y: (adam(True), adam(False)),
    "clipping": lambda x, y: torch.nn.utils.clip_grad_norm_([adam(True)[0]], 0.1),
    "gradient through a move": lambda x, y: (y.requires_grad_().to("cuda") * x).sum().backward() or y.grad + y,
    "Tensor.data": lambda x, y: setattr(x, "data", x.data.double().float()) or x + x,
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_what_cuda_refuses_is_refused(misuse):
    with simulated_cuda(2), pytest.raises(DeviceError):
        misuse(torch.ones(3, device="cuda"), torch.ones(3))


@pytest.mark.parametrize("use", ALLOWED.values(), ids=ALLOWED)
def test_what_cuda_allows_is_allowed(use):
    with simulated_cuda():
        use(torch.ones(3, device="cuda"), torch.ones(3))


def test_random_numbers_of_the_device_are_counted():
    with simulated_cuda() as device:
        torch.rand(3).to("cuda").sort()
        assert device.drawn == 0
        torch.rand(3, device="cuda"), torch.multinomial(torch.ones(3, device="cuda"), 1)
        assert device.drawn == 2


def test_nothing_is_left_behind():
    with simulated_cuda():
        x = torch.ones(3, device="cuda")
        assert x.is_cuda and x.device == torch.device("cuda:0") and torch.cuda.is_available()
    assert x.device.type == "cpu" and torch.equal(x + torch.ones(3), torch.full((3,), 2.0))
    assert torch.cuda.is_available() == (torch.version.cuda is not None and torch.cuda.device_count() > 0)


# whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("base")) | dict(
        total_steps=2, batch_size=2, anchor_prompts=2, anchor_responses=2, eval_every=0, checkpoint_every=1,
        tracker="none", precision="float32", gradient_checkpointing=False, max_new_tokens=4,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path / "cache"))


def figures(run):
    """Everything of metrics.jsonl that is no time and no memory."""
    left_out = ("time", "memory", "seconds")
    return [
        {k: v for k, v in row.items() if not k.startswith(left_out) and not (isinstance(v, float) and math.isnan(v))}
        for row in read_metrics(run).reset_index().to_dict("records")
    ]


def on_the_device(values, monkeypatch, tmp_path, **more):
    """A run on the simulated device with a cache of its own: stages 1 and 2 run there too."""
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path / "cache on the device"))
    with simulated_cuda() as device:
        run = train(make_config(**values | dict(device="cuda", run_id="device") | more))
    assert device.calls > 1000 and device.drawn == 0, "random numbers that another GPU would not give"
    return run


def settings(values, name, folder):
    """Config values of a rule, an algorithm or an option."""
    more = {
        "ser": dict(reward_model=centre_rewards(values["reward_model"], folder / "rm")) if name == "ser" else {},
        "oracle": dict(prompts=str(checkable_prompts(folder))) if name == "oracle" else {},
        "ensemble": dict(rule="frozen", ensemble=2, bt_epochs=1, bt_head_lr=1e-3),
        "save_checked": dict(guard_preferences=values["preferences"], guard_pairs=4, guard_every=1),
        "stage 1": dict(bt_epochs=1, bt_head_lr=1e-3),
        "checkpointing": dict(gradient_checkpointing=True),
        "LoRA": dict(lora_rank=4),
        "LoRA, checkpointing": dict(lora_rank=4, gradient_checkpointing=True),
        "last layer": dict(policy_layers=1, reward_layers=1),
        "fixed backbone": dict(backbone_lr=0.0, rm_steps=2, value_head="mlp", value_position="generation_prompt"),
        "in parts": dict(rollout_rows=3, micro_batch_groups=2, micro_batch_responses=3, top_k=0, top_p=1.0),
        "whole": dict(length_filter="both", policy_groups="both_signs", advantages_over="all", kl="reward"),
        "no policy": dict(freeze_policy=True, curriculum="linear"),
    }
    rule_or_algorithm = {"rule": name} if name in RULES else {"algo": name} if name in ALGORITHMS else {}
    return values | rule_or_algorithm | more.get(name, {})


OPTIONS = (
    "stage 1", "ensemble", "checkpointing", "LoRA", "LoRA, checkpointing", "last layer", "fixed backbone", "in parts",
    "whole", "no policy",
)  # fmt: skip
RESUMED = ("save", "save_checked", "r2m", "prime", "LoRA")


@pytest.mark.parametrize("name", [*RULES, *(a for a in ALGORITHMS if a != "grpo"), *OPTIONS])
def test_a_run_on_the_device_is_the_cpus(base, name, tmp_path, monkeypatch):
    """Stages, evaluations, a checkpoint, the loop, both final models; and step 2 again from the checkpoint."""
    values = settings(base, name, tmp_path)
    plain = train(make_config(**values, run_id="plain"))
    run = on_the_device(values, monkeypatch, tmp_path)
    assert figures(run) == figures(plain)
    for file in sorted(plain.rglob("*.safetensors")):
        assert (run / file.relative_to(plain)).read_bytes() == file.read_bytes(), file
    if name in RESUMED:
        again = dict(resume=str(run / "checkpoints/step_000001"), run_id="again")
        assert figures(on_the_device(values, monkeypatch, tmp_path, **again))[-1] == figures(plain)[-1]


@pytest.mark.parametrize("more", [{}, dict(lora_rank=4, gradient_checkpointing=True)], ids=["whole", "LoRA"])
def test_bfloat16_on_the_device(base, more, tmp_path, monkeypatch):
    """Every step is finite, rounded, and resumed as it was."""
    values = base | more
    exact = train(make_config(**values, run_id="exact"))
    half = values | dict(precision="bfloat16")
    run = on_the_device(half, monkeypatch, tmp_path)
    rounded, wanted = (figures(x)[0]["eval/reward"] for x in (run, exact))
    assert rounded != wanted and rounded == pytest.approx(wanted, abs=0.1)
    resumed = on_the_device(half, monkeypatch, tmp_path, resume=str(run / "checkpoints/step_000001"), run_id="again")
    assert figures(resumed)[-1] == figures(run)[-1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_benchmark_scorer_on_the_device(base, precision, tmp_path):
    (tmp_path / "rewardbench.jsonl").write_text(
        "".join(
            json.dumps(dict(id=i, subset="alpacaeval-easy", prompt=f"Say {i}.", chosen="Yes. " * i, rejected="No."))
            + "\n"
            for i in range(1, 9)
        )
    )
    scores = []
    for device in ("cpu", "cuda"):
        config = make_config(device=device, precision=precision)
        out = tmp_path / device
        with simulated_cuda():
            evaluate(base["reward_model"], ["rewardbench"], tmp_path, out, config=config, say=lambda _: None)
        lines = (out / "rewardbench.scores.jsonl").read_text().splitlines()
        scores.append([{k: v for k, v in json.loads(line).items() if k != "key"} for line in lines])
    assert len(scores[0]) == 8
    assert (scores[0] == scores[1]) == (precision == "float32")


# gpu-check


def test_gpu_check_on_the_device(base):
    """All but the paper's models, which no CPU holds."""
    with simulated_cuda():
        lines = gpu_check.about("cuda") + [gpu_check.attention(torch.device("cuda"))]
        lines += [*gpu_check.short_run("cuda", base), gpu_check.resumed("cuda", base)]
    assert [line.ok for line in lines] == [None, None, True, True, True, True, True]
    assert "simulated, 80 GiB" in gpu_check.as_table(lines)
    assert gpu_check.as_table(lines).endswith("5 of 5 checks passed")


def test_gpu_check_says_what_failed(base, monkeypatch):
    monkeypatch.setattr(gpu_check, "attention", lambda device: torch.zeros(2) @ torch.zeros(3))
    monkeypatch.setattr(gpu_check, "full_size", lambda size: [
        gpu_check.against("peak", found, 10.0, (0.6, 1.1), "cuda") for found in (5.0, 10.0, 12.0)
    ])  # fmt: skip
    monkeypatch.setattr(gpu_check, "short_run", lambda *_: 1 / 0)
    monkeypatch.setattr(gpu_check, "resumed", lambda *_: gpu_check.Line("nothing", "held against nothing"))
    assert gpu_check.furthest({"a": 9.0, "b": 1.0, "time/x": 9.0}, {"a": 6.0, "b": 1.1, "time/x": 1.0}) == ("a", 0.5)
    lines = gpu_check.check("cpu", "quick", base)
    assert [line.ok for line in lines[2:]] == [False, False, None, False, True, False]


def test_gpu_check_without_a_gpu_is_one_sentence():
    result = CliRunner().invoke(app, ["gpu-check"])
    assert result.exit_code == 2
    assert result.stderr == "error: gpu-check: PyTorch finds no GPU on this machine; run it where there is one\n"


@pytest.mark.grid
def test_gpu_check_on_the_cpu(base):
    lines = gpu_check.check("cpu", "quick", base)
    assert not [line for line in lines if line.ok is False]
    assert {"peak memory, GiB", "rollout, s", "RM update, s", "a step, s"} <= {line.what for line in lines}


@pytest.mark.grid
@pytest.mark.parametrize(("rule", "algo"), list(itertools.product(RULES, ALGORITHMS)))
def test_every_rule_with_every_algorithm(base, rule, algo, tmp_path, monkeypatch):
    values = settings(base, rule, tmp_path) | dict(algo=algo)
    plain = train(make_config(**values, run_id="plain"))
    assert figures(on_the_device(values, monkeypatch, tmp_path)) == figures(plain)
