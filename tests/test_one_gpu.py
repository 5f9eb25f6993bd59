"""What fits a model on one GPU: adapters, 4 bits, 8-bit Adam, recomputed activations, samples in chunks."""

import json
import math
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from safetensors import safe_open
from scipy import stats
from tiny_models import paper_run
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from savelib.analysis import METRICS
from savelib.config import PROFILES, ConfigError, make_config
from savelib.models.adapters import plain
from savelib.models.compute import pick_device, recomputing, seed_everything
from savelib.models.loading import load_policy, load_reward_model
from savelib.models.rollout import completion_logprobs, draw, sample, shared_sample
from savelib.runs.train import train
from savelib.training.algorithm import prepare, save_step
from savelib.training.engine import Engine, connect

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small run of `paper` whose layers are wide enough for blocks of 64 and 256 weights."""
    with pytest.MonkeyPatch.context() as patch:
        wide = tiny_models.SIZES | dict(hidden_size=128, intermediate_size=192)
        patch.setattr(tiny_models, "SIZES", wide)
        values = paper_run(tmp_path_factory.mktemp("base"))
    return values | dict(
        total_steps=2, batch_size=2, anchor_prompts=4, precision="float32", eval_every=0, checkpoint_every=1,
        policy_lr=1e-3, backbone_lr=1e-3, reward_head_lr=1e-3, gradient_checkpointing=False,
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("folders")


def state(model):
    return {k: v.detach().clone() for k, v in model.named_parameters()}


def moved(model, before):
    return {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}


# adapters


def test_lora_trains_adapters_and_the_reward_head_and_nothing_else(base):
    t = prepare(make_config(**base, lora_rank=8))
    assert t.reference is None
    before = {"policy": state(t.policy), "reward_model": state(t.reward_model.model)}
    save_step(t, 1), save_step(t, 2)
    policy, reward = moved(t.policy, before["policy"]), moved(t.reward_model.model, before["reward_model"])
    assert policy and all("lora_" in name for name in policy)
    assert {"lora_" in name or "score.modules_to_save" in name for name in reward} == {True}
    assert any("score" in name for name in reward) and any("lora_B" in name for name in reward)
    trained = [p for m in (t.policy, t.reward_model.model) for p in m.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


def test_the_reference_is_the_policy_without_adapters(base):
    config = make_config(**base, lora_rank=8)
    t = prepare(config)
    rollout = sample(t.policy, t.tokenizer, t.data.prompts[:2], 4, config)
    save_step(t, 1)
    untrained, _ = load_policy(config.policy_model, CPU)
    rows = torch.arange(8)
    with torch.no_grad():
        expected = completion_logprobs(untrained, rollout, rows, config)
        with t.as_reference() as reference:
            torch.testing.assert_close(completion_logprobs(reference, rollout, rows, config), expected)
        assert (completion_logprobs(t.policy, rollout, rows, config) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("more", [
    dict(optimizer="adamw_8bit"), dict(load_in_4bit=True, optimizer="paged_adamw_8bit"),
], ids=["lora", "qlora"])  # fmt: skip
def test_a_run_with_adapters_ends_in_whole_models(base, more):
    config = make_config(**base | dict(total_steps=3), **more, lora_rank=8, run_id="adapters")
    folder = train(config)
    checkpoint = folder / "checkpoints" / "step_000002"
    with safe_open(checkpoint / "policy" / "adapter_model.safetensors", "pt") as f:
        assert all("lora_" in key for key in f.keys())  # noqa: SIM118
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    t = prepare(config, checkpoint)
    save_step(t, 3)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    rm = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    assert {p.dtype for m in (policy, rm) for p in m.parameters()} == {torch.float32}
    for whole, adapted in ((policy, t.policy), (rm, t.reward_model.model)):
        for name, module in plain(adapted).named_modules():
            if hasattr(module, "lora_A") and not config.load_in_4bit:
                merged = module.base_layer.weight + module.get_delta_weight("default")
                torch.testing.assert_close(whole.get_submodule(name).weight, merged, atol=2e-3, rtol=1e-2)
    start = AutoModelForCausalLM.from_pretrained(config.policy_model)
    assert not torch.equal(start.model.layers[0].mlp.up_proj.weight, policy.model.layers[0].mlp.up_proj.weight)


def test_gradients_flow_through_a_base_in_4_bits(base):
    """Against the same adapters on the base as its 4 bits say it is."""
    config = make_config(**base, lora_rank=8, load_in_4bit=True)
    torch.manual_seed(0)
    t = prepare(config)
    other = prepare(make_config(**base, lora_rank=8))
    import bitsandbytes

    for mine, theirs in ((t.policy, other.policy), (t.reward_model.model, other.reward_model.model)):
        weights = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, p in mine.named_parameters():
                if hasattr(p, "quant_state"):
                    p = bitsandbytes.functional.dequantize_4bit(p.data, p.quant_state)
                elif "lora_B" in name:
                    p.normal_(std=0.05)
                weights[name].copy_(p)
    rollout = sample(t.policy, t.tokenizer, t.data.prompts[:2], 4, config)
    gradients = []
    for x in (t, other):
        encoded = x.reward_model.encode(
            [(p.messages, s) for p, row in zip(rollout.prompts, rollout.texts, strict=True) for s in row]
        )
        x.reward_model.score(encoded).rewards.sum().backward()
        mask = rollout.completion_mask.flatten(0, 1)
        (completion_logprobs(x.policy, rollout, torch.arange(8), x.config) * mask).sum().backward()
        gradients.append(
            {n: p.grad for m in (x.policy, x.reward_model.model) for n, p in m.named_parameters() if p.requires_grad}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradients[1][name].abs().max() + 1e-9
        assert (gradient - gradients[1][name]).abs().max() / scale < 2e-2, name


def test_single_gpu_is_the_papers_run_but_for_what_it_names():
    one, paper = make_config(profile="single_gpu"), make_config(profile="paper")
    assert one.lora_rank and one.optimizer == "adamw_8bit" and one.gradient_checkpointing
    assert {k for k in paper.model_dump() if getattr(one, k) != getattr(paper, k)} == {
        "profile",
        *PROFILES["single_gpu"],
    }


# recomputed activations


@pytest.mark.parametrize("rank", [0, 8])
def test_recomputing_changes_no_number(base, rank, monkeypatch):
    """Bit for bit, where prompts are computed for each response in both; test_prefix compares with once for all."""
    for module in ("reward_model", "rollout"):
        monkeypatch.setattr(f"savelib.models.{module}.shares_prefixes", lambda model: False)
    results = []
    for on in (False, True):
        t = prepare(make_config(**base | dict(gradient_checkpointing=on), lora_rank=rank))
        metrics, _ = save_step(t, 1)
        results.append((metrics, state(t.policy), state(t.reward_model.model)))
    (a, *x), (b, *y) = results
    assert {k: v for k, v in a.items() if "time" not in k} == {k: v for k, v in b.items() if "time" not in k}
    for before, after in zip(x, y, strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_recomputing_keeps_less_and_leaves_dropout_off(base):
    config = make_config(**base)
    rm = load_reward_model(config.reward_model, config, CPU)
    encoded = rm.encode([([{"role": "user", "content": "Hello"}], "x" * 100)] * 4)
    kept = []
    for on in (False, True):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x)
        with hooks, recomputing(rm.model, on):
            assert not any(m.training for m in rm.model.modules() if isinstance(m, torch.nn.Linear))
            rm.score(encoded)
        kept.append(sum(sizes))
        assert not any(m.training for m in rm.model.modules())
    assert kept[1] < kept[0] / 3


def test_logits_of_all_tokens_are_never_made_by_the_reward_model(base):
    config = make_config(**base)
    rm = load_reward_model(config.reward_model, config, CPU)
    seen = []
    rm.model.score.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    rm.score(rm.encode([([{"role": "user", "content": "Hello"}], "x" * 50)] * 3))
    assert seen == [(3, 1)]


def test_recomputing_does_not_keep_the_generators_states(base, monkeypatch):
    rm = load_reward_model(base["reward_model"], make_config(**base), CPU)
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a generator's state was read"))
    with recomputing(rm.model, True):
        rm.score(rm.encode([([{"role": "user", "content": "Hello"}], "x")])).rewards.sum().backward()


# CUDA's ways, on the CPU; tests/test_simulated_cuda.py runs whole runs on a device that refuses what CUDA refuses


@pytest.mark.parametrize("fused", [True, False])
def test_adams_step_returns_to_the_device_that_its_kernel_reads_it_from(fused):
    p = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.AdamW([p])
    optimizer.param_groups[0]["fused"] = fused
    Engine("policy", optimizer, 1.0).load_state({"0.step": torch.tensor(7.0), "0.exp_avg": torch.zeros(3)})
    assert {k: v.device.type for k, v in optimizer.state[p].items()} == {
        "step": "meta" if fused else "cpu", "exp_avg": "meta",
    }  # fmt: skip


def test_a_reward_head_over_a_bfloat16_base_is_never_rounded(base, tmp_path, monkeypatch):
    """Not when it is first loaded, and not when a checkpoint is."""
    monkeypatch.setattr("savelib.models.adapters.in_bfloat16", lambda *_: True)
    config = make_config(**base, lora_rank=8)
    rm = load_reward_model(base["reward_model"], config, CPU)
    source = AutoModelForSequenceClassification.from_pretrained(base["reward_model"])
    assert torch.equal(rm.reward_head_parameters()[0], source.score.weight)
    assert plain(rm.model).model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    assert plain(rm.model).model.rotary_emb.inv_freq.dtype == torch.float32
    for p in rm.model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    rm.model.save_pretrained(tmp_path)
    again = load_reward_model(base["reward_model"], config, CPU, tmp_path)
    before, after = ({k: p for k, p in m.model.named_parameters() if p.requires_grad} for m in (rm, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_cudnn_attention_is_off_on_cuda(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    pick_device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_decoding_uses_no_mask_as_an_index(base):
    """Each would make the CPU wait for the device."""
    policy, tokenizer = load_policy(base["policy_model"], CPU)
    prompts = prepare(make_config(**base)).data.prompts[:2]

    class Masks(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "index" in func.name() and isinstance(args[1], list | tuple):
                self.found += any(i is not None and i.dtype == torch.bool for i in args[1])
            return func(*args, **(kwargs or {}))

    with Masks() as masks:
        sample(policy, tokenizer, prompts, 4, make_config(**base))
    assert masks.found == 0


def test_one_gpu_for_several_processes_is_refused(base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="device = 'cuda:1' puts all 2 processes on one GPU; use device=cuda"):
        connect(make_config(**base | dict(device="cuda:1", num_processes=2)))


# samples


def test_samples_do_not_depend_on_the_chunks(base):
    policy, tokenizer = load_policy(make_config(**base).policy_model, CPU)
    t = prepare(make_config(**base))
    said = []
    for rows in (1, 3, 100):
        config = make_config(**base, rollout_rows=rows)
        seed_everything("chunks")
        said.append(shared_sample(policy, tokenizer, t.data.prompts[:3], 4, config).texts)
    assert said[0] == said[1] == said[2]


def test_tokens_are_drawn_with_their_probabilities():
    n = 200_000
    scores = torch.tensor([[1.0, -math.inf, 0.3, -1.0, -math.inf, 2.0]])
    tokens = draw(scores.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(3)))
    counts = torch.bincount(tokens, minlength=6)
    expected = scores[0].double().softmax(0) * n
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_the_ends_of_the_interval_give_possible_tokens(u):
    scores = torch.full((1, 50_000), -math.inf)
    scores[0, 7], scores[0, 40_000] = 0.1, 0.2
    token = draw(scores, torch.tensor([u])).item()
    assert token == (7 if u < 0.4 else 40_000)


def test_sampling_cuts_as_transformers_do(base):
    """top-k 1 is greedy; a nucleus and a temperature leave the tokens that transformers' own sampling can give."""
    t = prepare(make_config(**base))
    greedy = make_config(**base | dict(top_k=1))
    texts = sample(t.policy, t.tokenizer, t.data.prompts[:2], 3, greedy).texts
    assert all(len(set(row)) == 1 for row in texts)


# trackers, metrics


def test_metrics_go_to_tensorboard_too(base):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(make_config(**base, run_id="tracked"))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = {e.step: e.value for e in events.Scalars("reward/mean")}
    assert rewards == pytest.approx({r["step"]: r["reward/mean"] for r in rows if r["step"]})
    assert {k for row in rows for k in row} - {"step"} <= set(METRICS), "every metric is in the glossary"
    assert all(row["memory/peak_gb"] > 0 and row["time/tokens_per_second"] > 0 for row in rows[1:])


def test_a_tracker_that_is_not_installed_is_named(base, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.is_trackio_available", lambda: False)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ConfigError, match="tracker = 'trackio': not installed; pip install trackio"):
        train(make_config(**base, tracker="trackio", run_id="none"))
