"""SER, R2M and PRIME against transcriptions that share no code with them, and as short runs: what moves."""

import copy
import math

import pytest
import torch
from tiny_models import centre_rewards, make_reward_model, paper_run

from savelib.config import ConfigError, make_config
from savelib.data.pairs_and_prompts import Preference
from savelib.method import (
    group_reward_entropy,
    outcome_logits,
    outcomes,
    own_weight,
    prime_advantages,
    process_rewards,
    r2m_loss,
    self_labelled,
)
from savelib.models.compute import seed_everything
from savelib.models.rollout import sample
from savelib.runs.train import train
from savelib.training import prime, r2m
from savelib.training.algorithm import prepare, save_step
from savelib.training.engine import Engine, reward_optimizer
from savelib.training.scoring import encode_groups, encode_pairs
from savelib.training.stages import bradley_terry_step

NEW = {"ser": dict(rule="ser"), "r2m": dict(rule="r2m"), "prime": dict(rule="frozen", algo="prime")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    values = paper_run(folder)
    return values | dict(
        reward_model=centre_rewards(values["reward_model"], folder / "centred"),
        anchor_prompts=4, total_steps=3, batch_size=4, policy_lr=1e-3, reward_head_lr=1e-2, backbone_lr=1e-3,
        value_head_lr=1e-3, gradient_checkpointing=False, tracker="none", checkpoint_every=1, max_new_tokens=8,
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("folders")


def rollout_of(t):
    seed_everything("a rollout", 1)
    return sample(t.policy, t.tokenizer, t.data.prompts[8:11], t.config.group_size, t.config)  # prompts of two lengths


# SER


def test_ser_keeps_what_it_is_sure_of_and_labels_it():
    torch.manual_seed(0)
    first, second = torch.randn(2, 400, dtype=torch.float64) * 0.8
    better, worse = self_labelled(first, second)
    kept = []
    for x, y in zip(first.tolist(), second.tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(-y))
        if (p > 0.55 and q < 0.45) or (q > 0.55 and p < 0.45) or abs(p - q) > 0.3:
            kept.append((max(x, y), min(x, y)))
    assert 100 < len(kept) < 300
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == kept
    for a, b in zip(self_labelled(second, first), (better, worse), strict=True):
        assert torch.equal(a, b), "the order of a pair, which is its hidden label, says nothing"


@pytest.mark.parametrize(("scores", "kept"), [
    ((0.56, 0.44), True), ((0.54, 0.44), False), ((0.56, 0.46), False),  # on two sides of the middle
    ((0.95, 0.64), True), ((0.95, 0.66), False), ((0.04, 0.35), True),  # apart
])  # fmt: skip
def test_ser_s_thresholds(scores, kept):
    first, second = torch.tensor(scores, dtype=torch.float64).logit()
    better, worse = self_labelled(first[None], second[None])
    assert len(better) == len(worse) == kept and (better > worse).all()


def test_ser_learns_from_its_own_verdict_whatever_the_label(base):
    """Steps on the pairs and on the same pairs with their labels flipped are one; and they are that of a plain loop."""
    c = make_config(**base | NEW["ser"])
    t = prepare(c)
    pairs = t.data.pairs * 2
    flipped = [Preference(p.prompt, p.rejected, p.chosen) for p in pairs]
    weights, metrics = [], []
    for rows in (pairs, flipped):
        rm = copy.deepcopy(t.reward_model)
        engine = Engine("reward_model", reward_optimizer(rm, c, 1e-3, 1e-2), 1.0)
        metrics.append(bradley_terry_step(rm, encode_pairs(rm, rows), engine, c, self_labelled))
        weights.append(rm.model.score.weight.detach().clone())
    assert torch.equal(*weights) and metrics[0] == metrics[1]
    losses = []
    for p in pairs:
        encoded = t.reward_model.encode([(p.prompt, x) for x in (p.chosen, p.rejected)])
        a, b = (t.reward_model.score(encoded[i : i + 1]).rewards.item() for i in (0, 1))
        low, high = sorted(1 / (1 + math.exp(-x)) for x in (a, b))
        if (high > 0.55 and low < 0.45) or high - low > 0.3:
            losses.append(math.log(1 + math.exp(-abs(a - b))))
    assert 0 < len(losses) == metrics[0]["rm/pairs"] < len(pairs)
    assert metrics[0]["rm/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_ser_without_a_sure_pair_moves_nothing(base):
    t = prepare(make_config(**base | NEW["ser"]))
    with torch.no_grad():
        t.reward_model.model.score.weight.zero_()  # all scores are .5
    before = copy.deepcopy(t.reward_model.model.state_dict())
    metrics, _ = save_step(t, 1)
    assert metrics["rm/pairs"] == 0 and "rm/loss" not in metrics
    assert all(torch.equal(v, before[k]) for k, v in t.reward_model.model.state_dict().items())


# R2M


@pytest.mark.parametrize(("step", "weight"), [(0, 1), (20, 0.75), (24, 0.5 + 0.5 * math.cos(0.4 * math.pi)), (60, 0.6)])
def test_r2m_mixes_less_and_less_of_the_embedding(step, weight):
    assert own_weight(step, 60) == pytest.approx(weight)
    assert min(own_weight(t, 60) for t in range(61)) == 0.6


def naive_entropy(rewards):
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    weights = [math.exp((r - mean) / std if std else 0.0) for r in rewards]
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)


def test_r2m_loss_against_loops():
    torch.manual_seed(1)
    rewards = torch.randn(5, 6, dtype=torch.float64)
    rewards[2] = 0.7  # a group of equals
    eligible = torch.tensor([[1] * 6, [1, 0, 1, 1, 0, 1], [1] * 6, [0, 1, 0, 0, 0, 0], [0] * 6], dtype=torch.bool)
    expected, entropies = [], []
    for row, ok in zip(rewards.tolist(), eligible.tolist(), strict=True):
        used = [r for r, e in zip(row, ok, strict=True) if e]
        if len(used) >= 2:
            entropies.append(naive_entropy(used))
            expected.append(0.7 * math.log(1 + math.exp(min(used) - max(used))) + 0.3 * entropies[-1])
    found = group_reward_entropy(rewards[:3], eligible[:3])
    assert found.tolist() == pytest.approx(entropies) and found[2].item() == pytest.approx(math.log(6))
    assert r2m_loss(rewards, eligible).item() == pytest.approx(sum(expected) / len(expected))
    rewards.requires_grad_()
    (gradient,) = torch.autograd.grad(r2m_loss(rewards, eligible), rewards)
    assert torch.isfinite(gradient).all() and not gradient[~eligible].any() and gradient[0].all()
    assert gradient.sum(1).abs().max() < 1e-12, "only differences within a group count"
    apart = rewards[:1] - 1e-3 * gradient[:1].sign()
    assert r2m_loss(apart, eligible[:1]) < r2m_loss(rewards[:1], eligible[:1])
    nobody = r2m_loss(rewards, torch.zeros_like(eligible))
    assert nobody.item() == 0 and nobody.requires_grad


def test_r2m_gradient_is_that_of_finite_differences():
    torch.manual_seed(2)
    rewards = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    eligible = torch.tensor([[1] * 5, [1, 1, 0, 1, 1], [0, 1, 0, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda r: r2m_loss(r, eligible), rewards)


def test_cross_attention_against_loops_and_torch():
    torch.manual_seed(3)
    attention = r2m.PolicyFeedback(5, 4).double()
    embedding, states = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    found = attention(embedding, states, mask)
    for n in range(3):
        q = attention.query.weight @ embedding[n]
        here = [s for s in range(6) if mask[n, s]]
        scores = [math.exp((q @ (attention.key.weight @ states[n, s])).item() / 2) for s in here]  # sqrt(4) = 2
        mixed = sum(w * (attention.value.weight @ states[n, s]) for w, s in zip(scores, here, strict=True))
        torch.testing.assert_close(found[n], attention.out.weight @ mixed / sum(scores))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        attention.query(embedding)[:, None], attention.key(states), attention.value(states), attn_mask=mask[:, None]
    )
    torch.testing.assert_close(found, attention.out(theirs).squeeze(1))


def test_r2m_scores_are_those_of_each_response_alone(base):
    """The mixed reward, written down for one response at a time, without padding; gradients where they should be."""
    t = prepare(make_config(**base | NEW["r2m"], micro_batch_responses=5))
    rollout = rollout_of(t)
    groups = encode_groups(t.reward_model, rollout)
    found = t.score(groups, rollout, slice(1, 3), 2).rewards
    found.sum().backward()
    w = max(0.5 * math.cos(math.pi * 2 / 3) + 0.5, 0.6)
    for b in (1, 2):
        for g in range(t.config.group_size):
            length = int(rollout.completion_lengths[b, g])
            prompt = rollout.prompt_ids[b][-int(rollout.prompt_lengths[b]) :]
            ids = torch.cat([prompt, rollout.completion_ids[b, g, :length]])
            with torch.no_grad():
                states = t.policy(ids[None], output_hidden_states=True).hidden_states[-1]
                own = t.reward_model.model.model(torch.tensor([groups[b].ids[g]])).last_hidden_state[:, -1]
                answer = t.extras["policy_feedback"](own, states, torch.ones(1, len(ids), dtype=torch.bool))
                expected = t.reward_model.model.score(w * own + (1 - w) * answer)
            assert found[b - 1, g].item() == pytest.approx(expected.item(), abs=1e-4)
    assert t.reward_model.model.score.weight.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in t.extras["policy_feedback"].parameters())
    assert all(p.grad is None for m in (t.policy, t.reward_model.model.model) for p in m.parameters())


def test_r2m_at_the_start_is_the_reward_model_itself(base):
    t = prepare(make_config(**base | NEW["r2m"] | dict(total_steps=100_000)))
    rollout = rollout_of(t)
    groups = encode_groups(t.reward_model, rollout)
    with torch.no_grad():
        mixed = t.score(groups, rollout, slice(0, 3), 1).rewards
        for b, group in enumerate(groups):
            torch.testing.assert_close(mixed[b], t.reward_model.score(group).rewards, atol=1e-4, rtol=1e-4)


# PRIME


def test_prime_formulas_against_loops():
    torch.manual_seed(4)
    psi, ref = -torch.rand(2, 4, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    q = process_rewards(psi, ref)
    logits = outcome_logits(q, mask)
    for n in range(4):
        total = sum(0.05 * (psi[n, t] - ref[n, t]).item() for t in range(5) if mask[n, t])
        assert logits[n].item() == pytest.approx(total)
    rewards = torch.tensor([[1.0, 2, 3, 10], [1, 1, 1, 1]])
    kept = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert outcomes(rewards, kept)[0, :3].tolist() == [0, 0, 1], "the mean is that of the kept ones"
    assert not outcomes(rewards, kept)[1].any()


def improve_psi(t, *arguments):
    name = "process_reward"
    return prime.improve_process_reward(t.extras[name], t.engines[name], *arguments, t.config)


def test_prime_trains_psi_by_cross_entropy_and_rewards_with_what_it_became(base):
    """One step against a plain transcription: each response alone, one AdamW step, then the process rewards."""
    c = make_config(**base | NEW["prime"], micro_batch_responses=3)
    t = prepare(c)
    psi, ref = copy.deepcopy(t.extras["process_reward"]), t.reference
    rollout = rollout_of(t)
    rows = torch.tensor([0, 1, 3, 4, 5, 10])
    wanted = torch.tensor([1.0, 0, 1, 0, 1, 1])

    def sequence_logprobs(model, n):
        b, g = divmod(n, c.group_size)
        size, length = int(rollout.prompt_lengths[b]), int(rollout.completion_lengths[b, g])
        ids = torch.cat([rollout.prompt_ids[b][-size:], rollout.completion_ids[b, g, :length]])
        logits = model(ids[None]).logits[0, size - 1 : -1] / c.temperature
        return logits.log_softmax(-1).gather(-1, ids[size:, None]).squeeze(-1)

    losses = []
    for n, o in zip(rows.tolist(), wanted.tolist(), strict=True):
        with torch.no_grad():
            fixed = sequence_logprobs(ref, n)
        p = torch.sigmoid(0.05 * (sequence_logprobs(psi, n) - fixed).sum())
        losses.append(-(o * p.log() + (1 - o) * (1 - p).log()))
    loss = sum(losses) / len(losses)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5), "at the start psi is the reference"
    loss.backward()
    torch.nn.utils.clip_grad_norm_(psi.parameters(), c.max_grad_norm)
    torch.optim.AdamW(psi.parameters(), lr=c.policy_lr, weight_decay=0).step()

    with torch.no_grad():
        padded = torch.zeros(len(rows), rollout.completion_ids.shape[-1])
        for i, n in enumerate(rows.tolist()):
            fixed = sequence_logprobs(ref, n)
            padded[i, : len(fixed)] = fixed
    metrics = improve_psi(t, rollout, rows, wanted, padded)
    assert metrics["process/loss"] == pytest.approx(loss.item(), abs=1e-5)
    with torch.no_grad():
        for n in rows.tolist():
            ours, theirs = (sequence_logprobs(m, n) for m in (t.extras["process_reward"], psi))
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
    later = improve_psi(t, rollout, rows, wanted, padded)
    assert later["process/loss"] < metrics["process/loss"]


def test_prime_learns_the_outcome_and_gives_it_back_as_process_reward(base):
    t = prepare(make_config(**base | NEW["prime"]))
    rollout = rollout_of(t)
    rows, size = torch.arange(12), rollout.completion_ids.shape[-1]
    mask = rollout.completion_mask.flatten(0, 1)
    wanted = (rollout.completion_ids[..., 0].flatten() % 2).float()  # of the first token alone
    from savelib.models.rollout import completion_logprobs

    with torch.no_grad():
        ref = completion_logprobs(t.reference, rollout, rows, t.config)
    for _ in range(40):
        metrics = improve_psi(t, rollout, rows, wanted, torch.nn.functional.pad(ref, (0, size - ref.shape[1])))
    assert metrics["process/accuracy"] == 1
    with torch.no_grad():
        process = process_rewards(completion_logprobs(t.extras["process_reward"], rollout, rows, t.config), ref)
    kept = torch.ones(3, 4, dtype=torch.bool)
    advantages = prime_advantages(process, torch.zeros(3, 4), kept, mask)  # from the process rewards alone
    for group in range(3):
        good = wanted.view(3, 4)[group].bool()
        if 0 < good.sum() < 4:
            first = advantages[:, 0].view(3, 4)[group]
            assert first[good].min() > first[~good].max()


# runs


@pytest.mark.parametrize("name", NEW)
def test_three_steps_move_what_they_should(base, name):
    t = prepare(make_config(**base | NEW[name]))
    models = dict(reward=t.reward_model.model, policy=t.policy, ref=t.reference, value=t.reward_model.value_head)
    models |= t.extras
    before = {k: {n: p.detach().clone() for n, p in m.named_parameters()} for k, m in models.items()}
    seen = [save_step(t, step) for step in (1, 2, 3)]
    moved = {k: {n for n, p in m.named_parameters() if not torch.equal(p, before[k][n])} for k, m in models.items()}
    assert moved["policy"] and not moved["ref"] and not moved["value"]
    for metrics, samples in seen:
        assert all(math.isfinite(v) for v in metrics.values()) and samples
    if name == "ser":
        assert not t.extras and "model.layers.0.mlp.up_proj.weight" in moved["reward"]
        assert sum(m["rm/pairs"] for m, _ in seen) > 0 and "rm/groups" not in seen[0][0]
    if name == "r2m":
        assert moved["reward"] == {"score.weight"}, "only the head and the attention are trained"
        assert moved["policy_feedback"] == {f"{x}.weight" for x in ("query", "key", "value", "out")}
    if name == "prime":
        assert not moved["reward"] and moved["process_reward"]
        assert seen[0][0]["process/loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert seen[0][0]["process/accuracy"] == 0.5, "it is the reference still"


def test_r2m_with_adapters_leaves_those_of_the_reward_model_alone(base):
    t = prepare(make_config(**base | NEW["r2m"] | dict(lora_rank=4)))
    before = {n: p.detach().clone() for n, p in t.reward_model.model.named_parameters()}
    for step in (1, 2):
        metrics, _ = save_step(t, step)
    moved = {n for n, p in t.reward_model.model.named_parameters() if not torch.equal(p, before[n])}
    assert len(moved) == 1 and "score" in moved.pop() and metrics["policy/kl"] != 0
    assert t.engines["policy_feedback"].checked, "the attention was trained too"


def test_the_policy_is_trained_with_the_mixed_rewards(base):
    t = prepare(make_config(**base | NEW["r2m"]))
    metrics, samples = save_step(t, 3)
    with torch.no_grad():
        for p in t.extras["policy_feedback"].parameters():
            p.mul_(3)
    again, _ = save_step(t, 3)
    assert metrics["reward/mean"] != again["reward/mean"] and samples[0]["value"] is None


def test_the_attention_lies_beside_the_reward_model_and_can_be_read(base):
    from safetensors.torch import load_file

    run = train(make_config(**base | NEW["r2m"], run_id="run"))
    kept = load_file(run / "reward_model/policy_feedback.safetensors")
    assert set(kept) == {f"{x}.weight" for x in ("query", "key", "value", "out")}
    again = train(make_config(**base | dict(rule="frozen", run_id="again", reward_model=str(run / "reward_model"))))
    assert (again / "metrics.jsonl").is_file()
    with pytest.raises(ConfigError, match="has no process_reward, which rule = 'r2m' or algo = 'prime' trains"):
        train(make_config(**base | NEW["r2m"] | dict(algo="prime", resume=str(run / "checkpoints/step_000002"))))


@pytest.mark.parametrize(("values", "said"), [
    (dict(algo="prime", lora_rank=8), r"algo = 'prime' trains a third model, .* lora_rank=0"),
    (dict(algo="prime", backend="deepspeed_zero2"), r"algo = 'prime' trains .* backend=ddp"),
    (dict(algo="prime", advantages_over="all"), r"advantages_over=all: algo 'prime' has no statistics"),
    (dict(rule="ser", preferences="", bt_epochs=0), "rule 'ser' needs pairs"),
    (dict(rule="r2m", policy_groups="both_signs"), "both_signs needs a rule with an anchor"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_starts(base, values, said):
    with pytest.raises(ConfigError, match=said):
        make_config(**base | values)


def test_r2m_needs_a_head_that_reads_one_embedding(base, tmp_path):
    values = base | NEW["r2m"] | dict(reward_model=str(make_reward_model(tmp_path / "bert", kind="bert")))
    with pytest.raises(ConfigError, match="rule = 'r2m' needs a causal reward model"):
        prepare(make_config(**values))
