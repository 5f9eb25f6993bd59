"""The plan: memory against what PyTorch, PEFT and bitsandbytes allocate, time against measured steps."""

import json
import math
import socketserver
import threading
import weakref

import pytest
import torch
from huggingface_hub import constants
from tiny_models import byte_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from savelib.config import ConfigError, make_config
from savelib.data.pairs_and_prompts import Prompt
from savelib.experiments.cost_report import load, phases
from savelib.experiments.cost_sizes import SHAPES as BENCH_SHAPES
from savelib.experiments.cost_sizes import SIZES as BENCH_SIZES
from savelib.models.adapters import with_adapters
from savelib.models.compute import recomputing
from savelib.models.reward_model import Encoded, RewardModel
from savelib.models.rollout import Rollout, completion_logprobs, sample
from savelib.paths import project_root
from savelib.runs import hours, memory, plan
from savelib.runs import sizes as counted

KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
POLICY, REWARD = "policy_model", "reward_model"
MEASURED = project_root() / "data" / "results" / "cost_cpu"
BASE = dict(
    vocab_size=320, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
# [rows, prompt, new] and model: logits weigh most; long rows; many rows of a wide model
SHAPES = [
    ((4, 24, 40), dict(vocab_size=5000)),
    ((2, 100, 28), dict(hidden_size=128, intermediate_size=344)),
    ((16, 8, 24), dict(hidden_size=96, intermediate_size=512)),
]


def made(folder, kind="llama", field=POLICY, rank=0, half=False, **sizes):
    """(Sizes from the config alone, the real model as the program holds it)."""
    values = BASE | sizes
    config = KINDS[kind](head_dim=values["hidden_size"] // 8, num_labels=1, **values)
    config.save_pretrained(folder)
    auto = AutoModelForCausalLM if field == POLICY else AutoModelForSequenceClassification
    model = auto.from_config(config).eval()
    if rank:
        model = model.to(torch.bfloat16) if half else model
        task = "CAUSAL_LM" if field == POLICY else "SEQ_CLS"
        model = with_adapters(model, settings(lora_rank=rank), task)
    return counted.model_sizes(str(folder), field), model


def memory_of(config, gpus, memory_gb):
    return memory.memory_plan(config, counted.models_of(config), gpus, memory_gb)


def settings(**values):
    return make_config(**dict(profile="paper", num_processes=1, backend="ddp") | values)


class Live(TorchDispatchMode):
    """Bytes of the storages that are made inside and alive: `now`, and at most `peak`."""

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (t for t in tree_iter(out) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes and key not in self.known:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key):
        self.now -= self.sizes.pop(key)


def held(model):
    """Parameters with their gradients (of an earlier micro-batch), and buffers."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return [t for p in model.parameters() for t in (p, p.grad) if t is not None] + list(model.buffers())


def in_half(on):
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def rollout_of(rows, prompt, new):
    """Random tokens; a prompt shorter than its width, so that there is a padding mask."""
    return Rollout(
        prompts=[], prompt_ids=torch.randint(1, 300, (1, prompt)), prompt_lengths=torch.tensor([prompt - 3]),
        completion_ids=torch.randint(1, 300, (1, rows, new)), completion_lengths=torch.full((1, rows), new),
        finished=torch.ones(1, rows, dtype=torch.bool), texts=[],
    )  # fmt: skip


# counts


@pytest.mark.parametrize("field", [POLICY, REWARD])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_real_model(tmp_path, kind, field):
    sizes, model = made(tmp_path, kind, field)
    assert sizes.total == sum(p.numel() for p in model.parameters())
    assert (sizes.hidden, sizes.layers, sizes.inner, sizes.heads) == (64, 4, 176, 8)
    assert (sizes.queries, sizes.keys, sizes.qk_norm) == (64, 16, kind == "qwen3")
    _, model = made(tmp_path, kind, field, rank=4)
    trained = sum(p.numel() for n, p in model.named_parameters() if "lora" in n and p.requires_grad)
    assert sum(sizes.adapters(4)) == trained


@pytest.mark.parametrize(
    "name, field, millions",
    [
        ("Skywork/Skywork-Reward-V2-Llama-3.2-3B", REWARD, 3212.8),
        ("Qwen/Qwen2.5-3B-Instruct", POLICY, 3085.9),
        ("Qwen/Qwen3-4B-Instruct-2507", POLICY, 4022.5),
    ],
)
def test_the_papers_models_have_their_published_size(monkeypatch, name, field, millions):
    def unreachable(*_, **__):
        raise OSError("no hub")

    monkeypatch.setattr(counted.AutoConfig, "from_pretrained", unreachable)
    sizes = counted.model_sizes(name, field)
    assert sizes.published
    assert sizes.total / 1e6 == pytest.approx(millions, abs=0.05)
    with pytest.raises(ConfigError, match="policy_model = 'some/other' could not be loaded from the hub: no hub"):
        counted.model_sizes("some/other", POLICY)


# weights and optimizer


def test_adam_holds_what_the_plan_says(tmp_path):
    import bitsandbytes

    sizes, model = made(tmp_path)
    for kind, eight_bit in ((torch.optim.AdamW, False), (bitsandbytes.optim.AdamW8bit, True)):
        held(model)
        optimizer = kind(model.parameters(), lr=1e-3)
        optimizer.step()
        states = [
            t for s in optimizer.state.values() for k, t in s.items() if isinstance(t, torch.Tensor) and "qmap" not in k
        ]
        assert sum(t.nbytes for t in states if t.numel() > 1) == memory.adamw_bytes(sizes.tensors, eight_bit)


def test_a_step_of_adamw_takes_all_roots_at_once(tmp_path):
    sizes, model = made(tmp_path)
    known = held(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)  # the default on CUDA
    optimizer.step()
    with Live(*known, *(t for s in optimizer.state.values() for t in s.values())) as live:
        optimizer.step()
    expected = memory.training_bytes(sizes, settings(), 1)["step"]
    assert live.peak == pytest.approx(expected, rel=0.05)


def test_nf4_is_what_bitsandbytes_stores(tmp_path):
    from bitsandbytes.nn import Params4bit

    sizes, model = made(tmp_path)
    inside = {m.weight for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)}
    stored = sum(2 * p.numel() for p in model.parameters() if p not in inside)
    for weight in inside:
        four_bit = Params4bit(weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
        state = four_bit.quant_state
        parts = [four_bit.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        stored += sum(t.nbytes for t in parts)
    assert sizes.nf4() == pytest.approx(stored, rel=0.002)


# activations, cache


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_autograd_keeps_of_a_block(tmp_path, kind, half, rank):
    rows, seq, kept = 3, 40, []
    mask = torch.ones(rows, seq, dtype=torch.long)
    mask[0, :5] = 0
    for layers in (2, 3):
        sizes, model = made(tmp_path, kind, rank=rank, half=half, num_hidden_layers=layers)
        inner = model.get_base_model() if rank else model
        own, stored = {t.untyped_storage().data_ptr() for t in held(model)}, {}

        def pack(t, own=own, stored=stored):
            if t.untyped_storage().data_ptr() not in own:
                stored[t.untyped_storage().data_ptr()] = t.untyped_storage()  # alive, so no address comes twice
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), in_half(half):
            out = inner.base_model(torch.ones(rows, seq, dtype=torch.long), attention_mask=mask, use_cache=False)
        kept.append(sum(s.nbytes() for s in stored.values()))
        del out
    of_weights = (memory.copy_bytes(sizes, half, rank) - (0 if rank else 2 * half * sizes.vocab * sizes.hidden)) / 3
    expected = memory.layer_bytes(sizes, seq, half, rank) * rows * seq  # but for one number a head in Qwen3's norms
    assert kept[1] - kept[0] - of_weights == pytest.approx(expected, rel=0.015 if kind == "qwen3" else 1e-9)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_peak_of_an_update(tmp_path, monkeypatch, kind, half):
    """Policy and reward model, whole and LoRA, with and without checkpointing, at three shapes: within 20%."""
    monkeypatch.setattr("savelib.models.rollout.autocast", lambda *_: in_half(half))
    for (rows, prompt, new), more in SHAPES:
        data, seq = rollout_of(rows, prompt, new), prompt + new
        encoded = Encoded([[1] * (seq - i % 2) for i in range(rows)], [prompt - 1] * rows)
        for rank in (0, 4):
            sizes, policy = made(tmp_path, kind, rank=rank, half=half, **more)
            reward_sizes, classifier = made(tmp_path, kind, REWARD, rank=rank, half=half, **more)
            rm = RewardModel(classifier, byte_tokenizer("llama"))
            peaks = {}
            for again in (False, True):
                c = settings(gradient_checkpointing=again, lora_rank=rank)
                with Live(*held(policy)) as live:
                    completion_logprobs(policy, data, torch.arange(rows), c).sum().backward()
                expected = memory.activation_bytes(sizes, rows, prompt - 3, new, half, rank, again, logits=True)
                assert live.peak == pytest.approx(expected, rel=0.2)
                with Live(*held(rm)) as scoring:
                    with in_half(half), recomputing(rm.model, again):
                        scored = rm.score(encoded)
                    scored.rewards.sum().backward()
                expected = memory.activation_bytes(reward_sizes, rows, prompt, new, half, rank, again)
                assert scoring.peak == pytest.approx(expected, rel=0.2)
                peaks[again] = scoring.peak
            assert peaks[True] < 0.65 * peaks[False]


def test_logits_of_the_policy_take_twelve_bytes_each(tmp_path):
    peaks = []
    for vocab in (4000, 8000):
        _, model = made(tmp_path, num_hidden_layers=1, hidden_size=16, vocab_size=vocab)
        with Live(*held(model)) as live:
            completion_logprobs(model, rollout_of(4, 6, 30), torch.arange(4), settings()).sum().backward()
        peaks.append(live.peak)
    assert (peaks[1] - peaks[0]) / (4 * 30 * 4000) == pytest.approx(12, rel=0.05)


def test_update_of_the_papers_policy_at_full_size():
    """Storages without memory: 16 rows of 512 + 1024 tokens through Qwen2.5-3B, in float32."""
    name, rows, prompt, new = "Qwen/Qwen2.5-3B-Instruct", 16, 512, 1024
    seq = prompt + new
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(counted.PAPER_MODELS[name]()).eval()
        ids, mask = torch.ones(rows, seq, dtype=torch.long), torch.ones(rows, 1, seq, seq, dtype=torch.bool)
    with Live(*held(model), ids, mask) as live:
        with recomputing(model, True):
            out = model(input_ids=ids, attention_mask=mask, logits_to_keep=new + 1, use_cache=False).logits
        scores = out[:, :-1].float() / 0.7
        logprobs = torch.log_softmax(scores, -1).gather(-1, ids[:, prompt:, None])
        del out, scores  # as they are when completion_logprobs has returned
        logprobs.sum().backward()
    sizes = counted.model_sizes(name, POLICY)
    assert live.peak == pytest.approx(
        memory.activation_bytes(sizes, rows, prompt, new, False, 0, True, logits=True), rel=0.02
    )


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("half", [False, True])
def test_cache_is_that_of_a_real_forward(tmp_path, half, rank):
    sizes, model = made(tmp_path, rank=rank, half=half)
    with torch.no_grad(), in_half(half):
        cache = model(input_ids=torch.ones(3, 17, dtype=torch.long), use_cache=True).past_key_values
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert memory.cache_bytes(sizes, 3, 17, half, rank) == real


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "words, new, more",  # logits weigh most; the prompts' forward; the cache
    [(1, 8, dict(vocab_size=9000)), (80, 4, {}), (2, 100, dict(num_key_value_heads=8, intermediate_size=64))],
)
@pytest.mark.parametrize("cut", [(20, 0.8), (0, 0.8), (0, 1.0)])
def test_peak_of_a_rollout(tmp_path, monkeypatch, half, rank, words, new, more, cut):
    monkeypatch.setattr("savelib.models.rollout.autocast", lambda *_: in_half(half))
    sizes, model = made(tmp_path, rank=rank, half=half, **more)
    tokenizer = byte_tokenizer("chatml")
    model.generation_config.eos_token_id = 10**6  # never sampled: all rows go on to the end
    prompts = [Prompt(str(i), [{"role": "user", "content": "x" * (words + i)}]) for i in range(4)]
    c = settings(max_new_tokens=new, rollout_rows=8, top_k=cut[0], top_p=cut[1])
    with Live(*model.parameters(), *model.buffers()) as live:
        out = sample(model, tokenizer, prompts, 4, c)
    assert out.completion_ids.shape[-1] == new
    width = out.prompt_ids.shape[1]
    expected = memory.rollout_bytes(sizes, 2, 8, width, new, half, rank, (cut[0] > 0, cut[1] < 1))
    assert live.peak == pytest.approx(expected, rel=0.3 if half and cut[0] else 0.2)  # bfloat16 logits take half


# the plan


def test_the_papers_profile_on_its_gpus():
    paper = make_config(profile="paper")
    frame = memory_of(paper, 4, 80)
    assert frame["fits"].any()
    assert "First that fits" in plan.describe_plan(paper, 4, 80)
    assert list(frame["setting"].unique()) == list(memory.SETTINGS)
    assert plan.describe_plan(paper, 4, 72).endswith("with profile paper as it is")
    one = plan.describe_plan(paper, 1, 40)
    said = " ".join(one.split())
    assert "single_gpu" in said and "--set lora_rank=64" in said and "--set num_processes=1" in said
    assert max(map(len, one.splitlines())) <= 112
    assert one.count("sizes are those published") == 2
    assert "3,085.9 M" in one and "3,212.8 M" in one
    assert "Nothing fits" in plan.describe_plan(paper, 1, 4)


def test_memory_falls_where_it_must():
    paper = make_config(profile="paper")
    frame = memory_of(paper, 4, 80).set_index(["setting", "checkpointing"])
    weights = frame["policy weights"].xs(True, level="checkpointing")
    assert weights["ddp"] == weights["deepspeed_zero2"] > weights["LoRA"]
    assert weights["deepspeed_zero3"] == pytest.approx(weights["ddp"] / 4)
    peaks = frame["peak"].xs(True, level="checkpointing")
    assert peaks["ddp"] > peaks["deepspeed_zero2"] > peaks["deepspeed_zero2_offload"]
    assert peaks["deepspeed_zero2"] > peaks["deepspeed_zero3"]
    assert peaks["ddp"] > peaks["LoRA"] > peaks["LoRA, 8-bit AdamW"] > peaks["QLoRA, 8-bit AdamW"]
    assert (frame["activations"].xs(True, level=1) < frame["activations"].xs(False, level=1)).all()
    assert frame["CPU memory"].gt(0).sum() == 2
    assert frame["CPU memory"].max() == pytest.approx(24 * (3085.9 + 3212.8) * 1e6 / 4 / 2**30, rel=1e-3)
    reference = frame["reference"].xs(True, level=1)
    assert reference["ddp"] == weights["ddp"] and reference["LoRA"] == 0
    more = memory_of(paper, 8, 80).set_index(["setting", "checkpointing"])
    assert (more["peak"] <= frame["peak"]).all()
    assert more["peak"]["deepspeed_zero2", True] < peaks["deepspeed_zero2"]


def test_members_of_an_ensemble_count_unless_they_share_a_backbone():
    three = dict(profile="paper", rule="frozen", bt_epochs=1, backbone_lr=0.0, ensemble=3)
    alone = make_config(**three | dict(ensemble=1))
    models = counted.models_of(alone)
    for lr, more in ((1e-6, 2), (0.0, 0)):
        config = make_config(**three, bt_backbone_lr=lr)
        peaks = [memory.memory_plan(c, models, 4, 80)["peak"] for c in (alone, config)]
        assert (peaks[1] - peaks[0]).to_numpy() == pytest.approx(more * 4 * models[1].total / 2**30)
        frames = [hours.hours_plan(c, models, "h100") for c in (alone, config)]
        assert (frames[1][hours.SCORING] / frames[0][hours.SCORING]).to_numpy() == pytest.approx(1 + more)


def test_the_peak_is_of_one_phase_and_no_sum(tmp_path):
    """A rollout and an update are never alive together."""
    made(tmp_path, vocab_size=64)
    local = dict(policy_model=str(tmp_path), reward_model=str(tmp_path), rule="frozen", batch_size=64, group_size=8)
    local |= dict(max_prompt_tokens=16, micro_batch_responses=8)
    one, many = (memory_of(settings(**local, max_new_tokens=1000, rollout_rows=n), 1, 80).iloc[0] for n in (1, 512))
    assert (one["peak in"], many["peak in"]) == ("policy", "rollout")
    assert many["peak"] < one["peak"] + many["KV cache"]
    parts = ["policy weights", "reference", "reward weights", "optimizer"]
    assert one["peak"] == pytest.approx(one[[*parts, "gradients", "activations"]].sum(), rel=1e-4)
    assert many["peak"] > many[[*parts, "KV cache"]].sum()


def test_flags_choose_the_setting():
    paper = make_config(profile="paper")
    frame = memory_of(paper, 4, 400)
    first = frame[frame["fits"]].iloc[0]
    assert first["setting"] == "ddp" and not first["checkpointing"]
    said = " ".join(plan.describe_plan(paper, 4, 400).split())
    assert said.endswith("ddp, with --set backend=ddp --set gradient_checkpointing=false")


@pytest.mark.parametrize("bad, said", [((0, 80), "gpus = 0"), ((4, 0), "memory_gb = 0"), ((3, 80), "batch_size = 32")])
def test_impossible_machines_are_refused(bad, said):
    with pytest.raises(ConfigError, match=said):
        memory_of(make_config(profile="paper"), *bad)


def test_bucket_sizes_are_those_of_the_deepspeed_files(tmp_path, monkeypatch):
    paper = make_config(profile="paper")
    before = memory_of(paper, 4, 80).set_index("setting")["gradients"]
    (tmp_path / "env" / "deepspeed").mkdir(parents=True)
    for stage in ("zero2", "zero2_offload", "zero3"):
        file = memory.project_root() / "env" / "deepspeed" / f"{stage}.json"
        values = json.loads(file.read_text())
        values["zero_optimization"] |= {"reduce_bucket_size": 600_000_000}
        (tmp_path / "env" / "deepspeed" / file.name).write_text(json.dumps(values))
    monkeypatch.setattr(memory, "project_root", lambda: tmp_path)
    after = memory_of(paper, 4, 80).set_index("setting")["gradients"]
    assert (after.filter(like="deepspeed") > before.filter(like="deepspeed") + 1).all()
    assert (after["ddp"] == before["ddp"]).all()


# time


def shape(folder, name):
    """(Sizes of a size of the bench, its work, its measured seconds by phase)."""
    size, sizes = BENCH_SIZES[name], []
    for field, kind in zip((POLICY, REWARD), BENCH_SHAPES[size.shape], strict=True):
        kind(num_labels=1).save_pretrained(folder / field)
        sizes.append(counted.model_sizes(str(folder / field), field))
    work = hours.Work(size.batch, size.group, size.prompt, size.new, width=4, rm_steps=1)
    return sizes, work, phases(load(MEASURED)[1], name)["save"]


def test_seconds_are_those_measured_on_a_cpu(tmp_path):
    """Sizes b and c within 30%, from that CPU's two rates and the shares of them that sizes a and a256 reached."""
    rate = load(MEASURED)[0]["rates"]["cpu"]
    timed = hours.STEP_PHASES[:-1]  # one process has no transfers

    def seconds(name, shares):
        (policy, reward), work, measured = shape(tmp_path, name)
        machine = hours.Machine(
            rate["flops_per_second"], rate["flops_per_second"], rate["bytes_per_second"], efficiency=shares
        )
        return hours.step_seconds(work, policy, reward, machine), measured

    reached = {}
    for phase in timed:
        pairs = [seconds(name, dict.fromkeys(hours.STEP_PHASES, 1.0)) for name in ("a", "a256")]
        reached[phase] = math.prod(floor[phase] / measured[phase] for floor, measured in pairs) ** 0.5
    assert all(0.2 < share < 0.8 for share in reached.values())
    for name in ("b", "c"):
        expected, measured = seconds(name, reached)
        assert sum(expected.values()) == pytest.approx(measured["step"], rel=0.3)
        for phase in timed[1:]:
            if measured[phase] > 0.1:
                assert expected[phase] == pytest.approx(measured[phase], rel=0.35), phase


@pytest.mark.parametrize("again", [False, True])
def test_work_of_an_update_is_what_a_flop_counter_sees(tmp_path, monkeypatch, again):
    sizes, policy = made(tmp_path)
    rows, prompt, new = 6, 20, 12
    with FlopCounterMode(display=False) as counter:
        data = rollout_of(rows, prompt, new)
        completion_logprobs(policy, data, torch.arange(rows), settings(gradient_checkpointing=again)).sum().backward()
    work = hours.Work(1, rows, prompt - 3, new, width=4, checkpointing=again)
    expected = work.passes * hours.forward_flops(sizes, work, shared=not again, head=True)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.15)  # padding; attention to the future


def test_the_papers_hours_and_the_length_that_explains_them(monkeypatch):
    paper = make_config(profile="paper", policy_model="Qwen/Qwen3-4B-Instruct-2507")
    models = counted.models_of(paper)
    hours_of = lambda c: hours.hours_plan(c, models, "a100").set_index("GPUs")["hours"][4]  # noqa: E731
    assert hours_of(paper) == pytest.approx(43, abs=0.5)
    assert hours_of(paper.model_copy(update={"max_new_tokens": 730})) == pytest.approx(29, abs=0.5)
    said = " ".join(plan.describe_plan(paper, 4, 80, "a100").split())
    assert "43 hours here" in said and "29 with 730" in said and "No GPU has confirmed these numbers" in said
    assert max(map(len, plan.describe_plan(paper, 4, 80, "h200").splitlines())) <= 112


def test_time_falls_where_it_must():
    one = make_config(profile="single_gpu", batch_size=24)
    models = counted.models_of(one)
    frame = hours.hours_plan(one, models, "h100").set_index("GPUs")
    assert list(frame.index) == [1, 2, 3, 4, 6, 8]
    assert frame["step"].is_monotonic_decreasing and frame["hours"][1] == pytest.approx(frame["step"][1] * 320 / 3600)
    assert frame["step"][1] < 1.05 * 8 * frame["step"][8], "nothing but transfers grows"
    assert hours.hours_plan(one, models, "h200")["rollout"][0] < frame["rollout"][1]
    for changed, phase in (
        (dict(rule="frozen"), "RM update"), (dict(freeze_policy=True), "policy forward/backward"),
        (dict(gradient_checkpointing=False), "policy forward/backward"), (dict(max_new_tokens=512), "rollout"),
        (dict(rule="ser"), "RM update"),
    ):  # fmt: skip
        less = hours.hours_plan(one.model_copy(update=changed), models, "h100").set_index("GPUs")
        assert (less[phase] < frame[phase]).all(), changed
    backends = {
        b: hours.hours_plan(one.model_copy(update=dict(backend=b, lora_rank=0)), models, "h100").set_index("GPUs")
        for b in ("ddp", "deepspeed_zero2", "deepspeed_zero2_offload", "deepspeed_zero3")
    }
    assert backends["ddp"]["transfers"][1] == 0 and (frame["transfers"] < backends["ddp"]["transfers"])[1:].all()
    transfers = [frame["transfers"][8] for frame in backends.values()]
    assert transfers == sorted(transfers)
    assert backends["deepspeed_zero2"]["optimizer"][8] < backends["ddp"]["optimizer"][8]
    assert backends["deepspeed_zero2_offload"]["optimizer"][8] > backends["ddp"]["optimizer"][8]
    with pytest.raises(ConfigError, match="gpu = 'v100': not one of a100, h100, h200"):
        hours.hours_plan(one, models, "v100")


def test_a_hub_out_of_reach_is_asked_once(monkeypatch, tmp_path, caplog):
    """A server that hangs up stands for a network that is down; offline, nobody is asked at all."""
    asked = []

    class HangsUp(socketserver.BaseRequestHandler):
        def handle(self):
            asked.append(self.request.recv(1000).split()[:2])

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        for offline in (True, False):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
            assert plan.describe_plan(settings(profile="paper")).count("sizes are those published") == 2
            with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set" if offline else "cannot be reached"):
                counted.model_sizes("lab/other", POLICY)
            assert offline == constants.HF_HUB_OFFLINE
            assert asked == ([] if offline else [[b"HEAD", b"/"]])
        server.shutdown()
    assert not caplog.records
