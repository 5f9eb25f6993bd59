"""SAVE inside TRL: its steps are those of our own loop on the same responses. As a program: one of two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_models import paper_run
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import GRPOConfig, RLOOConfig

from savelib.config import ConfigError, make_config
from savelib.method import kl_k3
from savelib.models.rollout import Rollout, completion_logprobs, end_tokens
from savelib.processes import rank
from savelib.training.algorithm import prepare, save_step
from savelib.training.trainer import load_data
from savelib.trl import SaveGRPOTrainer, SaveRLOOTrainer, grpo_args, rloo_args, save_config
from savelib.trl.settings import OF_TRL

HERE = Path(__file__).parent
STEPS = 2
SHARED = dict(anchor_prompts=6, anchor_batch_size=4, curriculum="fixed", initial_margin=0.6, backbone_lr=1e-4,
              reward_head_lr=1e-3, value_head_lr=1e-2, gradient_checkpointing=False, precision="float32")  # fmt: skip
OURS = dict(batch_size=4, total_steps=STEPS, policy_lr=1e-3, micro_batch_responses=5, tracker="none", beta=0.3)
OWN = dict(
    seed=0, max_steps=STEPS, num_generations=4, per_device_train_batch_size=16, gradient_accumulation_steps=1,
    max_completion_length=6, learning_rate=1e-3, beta=0.3, gradient_checkpointing=False, use_cpu=True, bf16=False,
    report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, per_device_eval_batch_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Values of a small run on tiny models, for both sides."""
    return paper_run(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    os.environ["SAVE_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


def dataset(base: dict) -> Dataset:
    rows = load_data(make_config(**base)).prompts
    return Dataset.from_list([{"id": p.id, "prompt": p.messages} for p in rows])


def trainer_of(base: dict, out: Path, algo: str = "grpo", save: dict | None = None, peft: bool = False, **own):
    """SAVE's trainer of an algorithm, away from the reference, so that the KL is not 0."""
    config = save_config(base["reward_model"], anchor_responses=4, **SHARED | (save or {}))
    own = OWN | {"output_dir": str(out)} | own
    more = {"eval_dataset": dataset(base).select(range(4))} if own.get("eval_strategy") else {}
    if peft:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    kind, args = SaveGRPOTrainer, (lambda: GRPOConfig(**grpo_args(algo) | own))
    if algo == "rloo":
        kind, args = SaveRLOOTrainer, (lambda: RLOOConfig(**rloo_args() | own))
    trainer = kind(base["policy_model"], config, args(), dataset(base), **more)
    move_away(trainer.model)
    return trainer


def move_away(policy: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)


def recorded(trainer) -> list[Rollout]:
    """From now on: the batches that TRL samples, as our rollouts."""
    rollouts, generate = [], trainer._generate_and_score_completions
    ends = end_tokens(trainer.model, trainer.processing_class)

    def wrapped(inputs):
        out = generate(inputs)
        shape = (len(inputs) // 4, 4)
        ids, lengths = out["completion_ids"], out["completion_mask"].sum(1)
        rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
        texts = trainer.processing_class.batch_decode(rows, skip_special_tokens=True)
        rollouts.append(
            Rollout(
                prompts=[{"id": row["id"]} for row in inputs[::4]],
                texts=[texts[i : i + 4] for i in range(0, len(texts), 4)],
                completion_lengths=lengths.view(shape),
                finished=torch.tensor([row[-1] in ends for row in rows]).view(shape),
                prompt_ids=out["prompt_ids"][::4],
                prompt_lengths=out["prompt_mask"].sum(1)[::4],
                completion_ids=ids.view(*shape, -1),
            )
        )
        return out

    trainer._generate_and_score_completions = wrapped
    return rollouts


def state_of(reward_model, policy, optimizer) -> dict[str, torch.Tensor]:
    """Both models, and the first moment of the policy's Adam: what its gradients were."""
    out = {f"rm.{k}": v for k, v in reward_model.state_dict().items()}
    out |= {f"policy.{k}": v for k, v in policy.state_dict().items() if "lm_head" not in k}
    states = getattr(optimizer, "state", {})
    out |= {f"gradient.{name}": states[p]["exp_avg"] for name, p in policy.named_parameters() if p in states}
    return {k: v.detach().clone().contiguous() for k, v in out.items()}


def our_steps(base: dict, algo: str, rollouts: list[Rollout], save: dict | None = None) -> tuple[dict, list[dict]]:
    """The same steps by our own loop: (state, metrics of each step)."""
    t = prepare(make_config(**base | SHARED | OURS | {"algo": algo} | (save or {})))
    move_away(t.policy)
    prompts = {p.id: p for p in t.data.prompts}
    metrics = []
    for step, rollout in enumerate(rollouts, 1):
        given = {**vars(rollout), "prompts": [prompts[p["id"]] for p in rollout.prompts]}
        t.sample = lambda _, given=given: Rollout(**given)
        metrics.append(save_step(t, step)[0])
    return state_of(t.reward_model, t.policy, t.engines["policy"].optimizer), metrics


def compared(trls: dict, ours: dict, exact: bool = True) -> None:
    assert trls.keys() == ours.keys()
    for name, mine in ours.items():
        if name.startswith("rm."):
            assert torch.equal(trls[name], mine) if exact else (trls[name] - mine).abs().max() < 1e-8, name
        elif name.startswith("gradient."):
            assert (trls[name] - mine).abs().max() < 2e-5 * max(mine.abs().max(), 1e-3), name
        else:  # Adam turns a gradient near 0 into a step of lr
            assert (trls[name] - mine).abs().mean() < 1e-5, name


@pytest.mark.parametrize(("algo", "accumulation"), [("grpo", 1), ("grpo", 4), ("gspo", 2), ("rloo", 2)])
def test_steps_are_those_of_our_own_loop(base, tmp_path, algo, accumulation):
    trainer = trainer_of(
        base, tmp_path, algo, gradient_accumulation_steps=accumulation, per_device_train_batch_size=16 // accumulation
    )
    rollouts = recorded(trainer)
    trainer.train()
    ours, metrics = our_steps(base, algo, rollouts)
    compared(state_of(trainer.reward_side.reward_model, trainer.model, trainer.optimizer), ours)
    used = [m["policy/responses"] for m in metrics]
    assert any(2 <= n < 16 for n in used) and any(m["rm/groups"] for m in metrics), "some are left out"
    logged = [row for row in trainer.state.log_history if "rm/groups" in row]
    for said, own in zip(logged, metrics, strict=True):
        for name in ("rm/groups", "value/loss", "filter/kept", "policy/kept", "reward/mean"):
            assert said[name] == pytest.approx(own[name], rel=1e-6), name


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "luspo", "dapo"])
def test_loss_is_that_of_the_kept_rows_alone(base, tmp_path, loss_type):
    """At the policy that sampled the ratio is 1, so a token's loss is -A + beta * k3; a naive loop over kept rows."""
    halves = dict(gradient_accumulation_steps=2, per_device_train_batch_size=8)
    trainer = trainer_of(base, tmp_path, loss_type=loss_type, max_steps=1, **halves)
    trainer.reward_side.threshold = lambda step: 0.6
    rollouts, losses, advantages = recorded(trainer), [], {}
    compute_loss, policy = trainer.compute_loss, trainer.model

    def wrapped(model, inputs, *more, **others):
        losses.append(compute_loss(model, inputs, *more, **others).item())
        rows = zip(inputs["completion_ids"].tolist(), inputs["completion_mask"].sum(1), strict=True)
        advantages.update(zip((tuple(ids[:n]) for ids, n in rows), inputs["advantages"].tolist(), strict=True))
        return compute_loss(model, inputs, *more, **others)

    trainer.compute_loss = wrapped
    initial = {k: v.clone() for k, v in policy.state_dict().items()}
    trainer.train()
    policy.load_state_dict(initial)
    ((rollout,), kept), config = (rollouts, trainer._learned.tolist()), make_config(**base | OURS)
    assert 2 <= sum(kept) < 16
    logprobs, ref = (completion_logprobs(m, rollout, torch.arange(16), config) for m in (policy, trainer.ref_model))
    k3, ids = kl_k3(logprobs, ref), rollout.completion_ids.flatten(0, 1).tolist()
    tokens = []
    for n, length in enumerate(rollout.completion_lengths.flatten().tolist()):
        if kept[n]:
            advantage = advantages[tuple(ids[n][:length])]
            tokens.append([-advantage + 0.3 * k3[n, t].item() for t in range(length)])
    expected = {
        "grpo": sum(sum(row) / len(row) for row in tokens) / len(tokens),
        "dr_grpo": sum(map(sum, tokens)) / (len(tokens) * 6),
        "luspo": sum(map(sum, tokens)) / len(tokens),
        "dapo": sum(map(sum, tokens)) / sum(map(len, tokens)),
    }[loss_type]
    assert sum(losses) == pytest.approx(expected, rel=1e-4)


def test_nobody_kept_is_no_optimizer_step(base, tmp_path):
    """With gradients of zero Adam's moments would still move the policy."""
    trainer = trainer_of(base, tmp_path)
    trainer.reward_side.threshold = lambda step: 0.55 if step == 1 else 0.999
    policies = []
    trainer.add_callback(type("Keep", (TrainerCallback,), {
        "on_step_end": lambda *_, **__: policies.append(state_of(trainer.reward_side.reward_model, trainer.model, {})),
    })())  # fmt: skip
    trainer.train()
    first, second = ({k: v for k, v in p.items() if k.startswith("policy.")} for p in policies)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(policies[0]["rm.value_head.0.bias"], policies[1]["rm.value_head.0.bias"])
    assert trainer.optimizer.state[next(trainer.model.parameters())]["step"] == 1


# files

CHECKED = dict(rule="save_checked", guard_pairs=4, guard_every=1, lora_rank=4, initial_margin=0.3)


@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_resumed_run_is_the_uninterrupted_one(base, tmp_path, kind):
    """Two steps, then two from a checkpoint; `adapters`: PEFT on both sides, and the guard's state too."""
    save, peft, own = dict(initial_margin=0.3), False, dict(max_steps=4, save_strategy="steps", save_steps=2)
    if kind == "adapters":
        peft, save = True, CHECKED | {k: base["preferences"] for k in ("preferences", "guard_preferences")}
    whole = trainer_of(base, tmp_path, save=save, peft=peft, **own)
    source, before = whole.reward_source, whole.reward_side.reward_model
    whole.train()
    whole.save_model(str(tmp_path / "final"))
    again = trainer_of(base, tmp_path, save=save, peft=peft, **own)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ended = [state_of(t.reward_side.reward_model, t.model, t.optimizer) for t in (whole, again)]
    assert ended[0].keys() == ended[1].keys() and any(k.startswith("gradient.") for k in ended[0])
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])
    for name in ("reward/mean", "rm/loss", "value/loss", "loss"):
        rows = [[row.get(name) for row in t.state.log_history if row["step"] > 2] for t in (whole, again)]
        assert rows[0] == rows[1] and (name == "rm/loss" or any(rows[0])), name

    for folder in ("final", "checkpoint-4") if kind == "whole" else ("final",):
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder / "reward_model")
        row = torch.tensor([[1, 2, 3, 4]])
        (mine,) = before.model(input_ids=row).logits[0]
        torch.testing.assert_close(plain(input_ids=row).logits[0, 0], mine)
        first = AutoModelForSequenceClassification.from_pretrained(source)
        moved = any((a != b).any() for a, b in zip(plain.parameters(), first.parameters(), strict=True))
        assert moved == (kind == "whole"), "the guard undid all steps"

    (tmp_path / "checkpoint-2" / "reward_model" / "save.json").unlink()
    with pytest.raises(ConfigError, match="no checkpoint of SAVE"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluation_only_scores(base, tmp_path):
    trainer = trainer_of(base, tmp_path, eval_strategy="steps", eval_steps=1)
    before = state_of(trainer.reward_side.reward_model, trainer.model, {})
    rollouts = recorded(trainer)
    found = trainer.evaluate()
    after = state_of(trainer.reward_side.reward_model, trainer.model, {})
    assert all(torch.equal(before[name], after[name]) for name in before)
    rm = trainer.reward_side.reward_model
    prompts = {p.id: p.messages for p in load_data(make_config(**base)).prompts}
    rewards = [
        rm.score(rm.encode([(prompts[p["id"]], text)])).rewards.item()
        for r in rollouts
        for p, texts in zip(r.prompts, r.texts, strict=True)
        for text in texts
    ]
    assert found["eval_reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-4)
    trainer.train()
    assert {"eval_reward"} <= trainer.state.log_history[1].keys()


# refusals


@pytest.mark.parametrize(("own", "said"), [
    (dict(num_iterations=2), "num_iterations = 2"),
    (dict(steps_per_generation=2), "steps_per_generation = 2"),
    (dict(max_steps=-1), "max_steps = -1"),
    (dict(loss_type="bnpo"), "loss_type = 'bnpo'"),
    (dict(entropy_coef=0.1), "entropy_coef = 0.1"),
    (dict(use_adaptive_entropy=True), "use_adaptive_entropy = True"),
    (dict(mask_truncated_completions=True), "mask_truncated_completions = True"),
])  # fmt: skip
def test_arguments_that_cannot_be_exact(base, tmp_path, own, said):
    with pytest.raises(ConfigError, match=said):
        trainer_of(base, tmp_path, **own)


def test_rows_that_are_no_whole_groups(base, tmp_path, monkeypatch):
    """Two processes with 6 rows each, groups of 4; world_size is all that is asked of the second one."""
    monkeypatch.setattr(GRPOConfig, "world_size", 2)
    with pytest.raises(ConfigError, match="num_generations = 4: each of 2 process\\(es\\) takes 6 rows"):
        trainer_of(base, tmp_path, per_device_train_batch_size=6)


@pytest.mark.parametrize(("fields", "said"), [
    (dict(rule="r2m"), "rule = 'r2m'"),
    (dict(algo="prime"), "algo = 'prime'"),
    (dict(reward_shaping="par"), "reward_shaping = 'par'"),
    (dict(profile="tiny", rule="frozen", ensemble=2), "ensemble = 2"),
    (dict(policy_lr=1e-5), "policy_lr = 1e-05: in TRL this is learning_rate"),
    (dict(rewrad_head_lr=1), "did you mean 'reward_head_lr'"),
    (dict(rule="ser"), "preferences is empty"),
])  # fmt: skip
def test_settings_of_the_wrong_side(fields, said):
    with pytest.raises(ConfigError, match=said):
        save_config("rm", **fields)


def test_other_refusals(base, tmp_path):
    with pytest.raises(ConfigError, match="algo = 'reinforce_pp'"):
        grpo_args("reinforce_pp")
    config, args = save_config(base["reward_model"]), GRPOConfig(**grpo_args() | OWN | dict(output_dir=str(tmp_path)))
    for name in ("reward_funcs", "tools"):
        with pytest.raises(ConfigError, match=name):
            SaveGRPOTrainer(base["policy_model"], config, args, dataset(base), **{name: [len]})
    with pytest.raises(ConfigError, match="is not a list of messages"):
        SaveGRPOTrainer(base["policy_model"], config, args, Dataset.from_dict({"prompt": ["Hi"]}))
    with pytest.raises(ConfigError, match="anchor_prompts = 0"):
        SaveGRPOTrainer(base["policy_model"], config, args, dataset(base).to_iterable_dataset())


def test_arguments_are_table_8(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    c, args = make_config(profile="paper"), grpo_args("gspo")
    rows = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * 4
    assert (
        rows == c.batch_size * c.group_size == 512 and args["beta"] == c.beta and args["learning_rate"] == c.policy_lr
    )
    assert args["importance_sampling_level"] == "sequence" and args["use_bias_correction_kl"] is False
    assert set(OF_TRL) <= set(type(c).model_fields)
    monkeypatch.setenv("WORLD_SIZE", "1")
    made = GRPOConfig(**grpo_args() | dict(use_cpu=True, bf16=False))
    assert made.generation_batch_size == 512 and made.steps_per_generation == made.gradient_accumulation_steps
    assert RLOOConfig(**rloo_args() | dict(use_cpu=True, bf16=False)).beta == c.beta


# several processes, other versions


def by_torchrun(base: dict, out: Path, **own) -> tuple[list[dict], list[Rollout]]:
    """(the state of each of two processes, the batches of both)."""
    (out / "job.json").write_text(json.dumps([base, own]))
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]
    done = subprocess.run([*words, __file__, str(out)], env=os.environ | {"PYTHONPATH": str(HERE.parent)},
                          capture_output=True, text=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stderr[-12000:]
    parts = [torch.load(out / f"rollouts{i}.pt", weights_only=True) for i in range(2)]
    return [load_file(out / f"state{i}.safetensors") for i in range(2)], [
        joined(*both) for both in zip(*parts, strict=True)
    ]


def joined(first: dict, second: dict) -> Rollout:
    """The two processes' parts of a batch as one."""
    out = {"prompts": first["prompts"] + second["prompts"], "texts": first["texts"] + second["texts"]}
    for name, left in (("prompt_ids", 1), ("completion_ids", 0)):
        tensors = first[name], second[name]
        missing = [max(t.shape[-1] for t in tensors) - t.shape[-1] for t in tensors]
        sides = [(n * left, n * (1 - left)) for n in missing]
        out[name] = torch.cat([torch.nn.functional.pad(t, n) for t, n in zip(tensors, sides, strict=True)])
    for name in ("completion_lengths", "finished", "prompt_lengths"):
        out[name] = torch.cat([first[name], second[name]])
    return Rollout(**out)


def test_two_processes(base, tmp_path):
    states, rollouts = by_torchrun(base, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    compared(states[0], our_steps(base, "grpo", rollouts)[0], exact=False)


@pytest.mark.slow_trl
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_with_deepspeed(base, tmp_path, stage):
    """ZeRO: the reward model is whole in each process, also where the policy is sharded."""
    settings = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}  # fmt: skip
    own = dict(deepspeed=settings, use_cpu=False, accelerator_config={"use_configured_state": True})
    states, rollouts = by_torchrun(base, tmp_path, per_device_train_batch_size=8, **own)
    ours = our_steps(base, "grpo", rollouts)[0]
    names = [n for n in states[0] if n.startswith("rm.") or stage == 2]
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)
    compared({n: states[0][n] for n in names}, {n: v for n, v in ours.items() if n in names}, exact=False)


@pytest.mark.slow_trl
def test_oldest_trl(tmp_path):
    """This file, with the oldest TRL that is supported, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "trl==1.6.0"], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "ours.pth").write_text("".join(f"{p}\n" for p in sys.path if p.endswith("site-packages")))
    words = [python, "-m", "pytest", "-q", __file__, "-k", "our_own_loop or kept_rows_alone or nobody or resumed"]
    said = "import trl; assert trl.__version__ == '1.6.0'"
    subprocess.run([python, "-c", said], check=True)
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(HERE.parent)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    values, own_of_it = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    if "deepspeed" in own_of_it:  # without a GPU transformers would let each process believe that it is alone
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    trainer_of_mine = trainer_of(values, folder / "trl", **own_of_it)
    batches_of_mine = recorded(trainer_of_mine)
    trainer_of_mine.train()
    state = state_of(
        trainer_of_mine.reward_side.reward_model,
        trainer_of_mine.model,
        {} if "deepspeed" in own_of_it else trainer_of_mine.optimizer,
    )
    save_file(state, folder / f"state{rank()}.safetensors")
    torch.save([vars(r) for r in batches_of_mine], folder / f"rollouts{rank()}.pt")
