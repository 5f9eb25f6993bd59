"""The step of algorithms 1 and 2 on models of the paper's architectures: what runs, what moves, and by how much."""

import copy
import re
import statistics
from pathlib import Path

import pytest
import torch
from tiny_models import centre_rewards, checkable_prompts, paper_run

from savelib import method as F
from savelib.config import ConfigError, make_config
from savelib.method import ALGORITHMS, RULES
from savelib.models.compute import seed_everything
from savelib.models.reward_model import VALUE_HEAD_FILE
from savelib.models.rollout import completion_logprobs, sample
from savelib.training.algorithm import prepare, save_step
from savelib.training.finite import NonFiniteError
from savelib.training.scoring import encode_groups
from savelib.training.stages import anchor_stage, preference_stage
from savelib.training.trainer import load_data


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("world")) | dict(anchor_prompts=8, total_steps=4, batch_size=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def trainer(world, **values):
    return prepare(make_config(**(world | values)))


def state(module):
    return {k: v.detach().clone() for k, v in module.named_parameters()}


def moved(module, before):
    return {k for k, v in module.named_parameters() if not torch.equal(v, before[k])}


def test_one_forward_with_gradients_one_without_and_backward_only_where_there_is_contrast(world):
    t = trainer(world, curriculum="linear")
    calls, backwards = [], []
    t.reward_model.scorer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    t.reward_model.model.score.register_full_backward_hook(lambda *_: backwards.append(1))
    metrics, _ = save_step(t, 1)
    assert calls == [True] * 4 + [False] * 4  # B = 4 groups, one micro-batch each
    assert len(backwards) == metrics["rm/groups"] == round(4 * metrics["filter/valid_prompts"])
    calls.clear()
    t.config = make_config(**(world | {"curriculum": "linear", "micro_batch_groups": 4}))
    save_step(t, 2)
    assert calls == [True, False]


def test_a_group_without_contrast_gets_no_backward(world):
    t = trainer(world)
    with torch.no_grad():
        t.reward_model.value_head[-1].bias.fill_(100.0)  # every response is far below its anchor
    backwards = []
    t.reward_model.model.score.register_full_backward_hook(lambda *_: backwards.append(1))
    before = state(t.reward_model.model)
    metrics, _ = save_step(t, 1)
    assert metrics["rm/groups"] == 0 and not backwards and not moved(t.reward_model.model, before)
    assert metrics["value/loss"] > 1000  # the value sub-step is not skipped (appendix B)


@pytest.mark.parametrize("rule", RULES)
def test_only_what_should_move_moves(world, rule, tmp_path):
    """Table 8's learning rates: 1e-7 on backbone and reward head really moves float32 weights."""
    more = {
        "ser": dict(reward_model=centre_rewards(world["reward_model"], tmp_path / "rm")),
        "save_checked": dict(guard_preferences=world["preferences"], guard_pairs=4),
        "oracle": dict(prompts=str(checkable_prompts(tmp_path))),
    }.get(rule, {})
    t = trainer(world, rule=rule, value_head_lr=1e-5, **more)
    models = {
        "reward": t.reward_model.model,
        "value": t.reward_model.value_head,
        "policy": t.policy,
        "ref": t.reference,
    }
    assert all(p.dtype == torch.float32 for m in models.values() for p in m.parameters())
    before = {k: state(m) for k, m in models.items()}
    save_step(t, 1)
    changed = {k: moved(m, before[k]) for k, m in models.items()}
    weights = {k for k, v in t.reward_model.model.named_parameters() if v.dim() == 2 and "embed" not in k}
    frozen = rule in ("frozen", "frozen_filtered")
    if RULES[rule].backbone:
        assert changed["reward"] == set() if frozen else weights <= changed["reward"]
    else:
        assert changed["reward"] == {"score.weight"}
    assert changed["value"] == ({"0.weight", "0.bias"} if RULES[rule].anchor == "value" else set())
    assert {k for k, v in t.policy.named_parameters() if v.dim() == 2 and "embed" not in k} <= changed["policy"]
    assert changed["ref"] == set()
    assert all(p.dtype == torch.float32 for m in models.values() for p in m.parameters())
    if not frozen and RULES[rule].backbone:
        name = "model.layers.0.mlp.up_proj.weight"
        step = (dict(t.reward_model.model.named_parameters())[name] - before["reward"][name]).abs().max()
        assert 2e-8 < step < 3e-7


def test_lag_is_how_far_v_lies_above_the_rewards_in_spreads_of_a_group(world):
    t = trainer(world, batch_size=2)  # so the logged groups are all of the batch
    with torch.no_grad():
        t.reward_model.value_head[-1].bias.add_(0.3)
    metrics, samples = save_step(t, 1)
    groups = [[row["reward"] for row in samples if row["value"] == v] for v in {row["value"] for row in samples}]
    above = sum(row["value"] - row["reward"] for row in samples) / len(samples)
    spreads = [statistics.stdev(group) for group in groups]
    assert len(groups) == 2 and metrics["value/lag"] == pytest.approx(above / statistics.mean(spreads), rel=1e-4)


def test_frozen_backbone_and_frozen_policy(world):
    t = trainer(world, backbone_lr=0.0, freeze_policy=True)
    before, policy = state(t.reward_model.model), state(t.policy)
    save_step(t, 1)
    assert moved(t.reward_model.model, before) == {"score.weight"}
    assert moved(t.policy, policy) == set()


@pytest.mark.parametrize("rule", ["save", "mean_reward", "hl_bt"])
def test_reward_model_update_equals_a_plain_transcription(world, rule):
    """One AdamW step on the whole batch's loss, written down naively: separate passes, no micro-batches."""
    values = world | dict(rule=rule, backbone_lr=1e-3, reward_head_lr=1e-2, curriculum="linear", initial_margin=0.1)
    t = prepare(make_config(**values))
    copied = copy.deepcopy(t.reward_model)
    metrics, _ = save_step(t, 1)

    c = t.config
    seed_everything("step", c.seed, 1)
    again = prepare(c)
    seed_everything("step", c.seed, 1)
    rollout = sample(again.policy, again.tokenizer, again.batch(again.data.prompts, 1), 4, c)
    rows = [
        [copied.encode([(p.messages, text)]) for text in texts]
        for p, texts in zip(rollout.prompts, rollout.texts, strict=True)
    ]
    losses = []
    for b, group in enumerate(rows):
        R = torch.stack([copied.score(one).rewards[0] for one in group])
        ok = rollout.finished[b].tolist()
        V = copied.values(copied.score(group[0]).prompt_hidden)[0].detach()
        if rule == "mean_reward":
            V = (
                torch.stack([r for r, e in zip(R, ok, strict=True) if e]).mean().detach()
                if any(ok)
                else torch.tensor(0.0)
            )
        if rule == "hl_bt":
            usable = sorted((r for r, e in zip(R, ok, strict=True) if e), key=lambda r: r.item())
            if len(usable) >= 2:
                losses.append(-torch.log(torch.sigmoid(usable[-1] - usable[0])))
            continue
        mu = F.curriculum_threshold(1, c.total_steps, c.initial_margin)
        keep = [e and torch.sigmoid((r - V).abs()) >= mu for r, e in zip(R, ok, strict=True)]
        good = [r for r, k in zip(R, keep, strict=True) if k and r >= V]
        bad = [r for r, k in zip(R, keep, strict=True) if k and r < V]
        if good and bad:
            top = V.exp() + sum(r.exp() for r in good)
            losses.append(
                -sum((r.exp() / top).log() for r in good) / len(good)
                - (V.exp() / (V.exp() + sum(r.exp() for r in bad))).log()
            )
    assert len(losses) == metrics["rm/groups"] >= 1
    sum(losses).div(len(losses)).backward()
    assert metrics["rm/loss"] == pytest.approx(sum(x.item() for x in losses) / len(losses), abs=1e-5)
    parameters = [p for p in copied.model.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, c.max_grad_norm)
    assert metrics["rm/grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    heads = [p for n, p in copied.model.named_parameters() if n.startswith("score")]
    body = [p for n, p in copied.model.named_parameters() if not n.startswith("score")]
    torch.optim.AdamW([{"params": heads, "lr": 1e-2}, {"params": body, "lr": 1e-3}], weight_decay=0).step()
    encoded = copied.encode(
        [(p.messages, t_) for p, ts in zip(rollout.prompts, rollout.texts, strict=True) for t_ in ts]
    )
    with torch.no_grad():
        expected, found = copied.score(encoded).rewards, t.reward_model.score(encoded).rewards
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_micro_batches_do_not_change_the_step(world, algo):
    """The same step in small and in large portions: the same metrics and the same updated models."""
    values = world | dict(algo=algo, rule="save", backbone_lr=1e-4, reward_head_lr=1e-3, policy_lr=1e-4)
    small, large = (prepare(make_config(**values, micro_batch_groups=n, micro_batch_responses=3 * n)) for n in (1, 4))
    a, b = save_step(small, 1)[0], save_step(large, 1)[0]
    for name in a:
        if not name.startswith("time/"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    rollout = sample(small.policy, small.tokenizer, small.data.prompts[:3], 4, small.config)
    with torch.no_grad():
        groups = [encode_groups(t.reward_model, rollout) for t in (small, large)]
        rewards = [t.reward_model.score(g[0]).rewards for t, g in zip((small, large), groups, strict=True)]
        logprobs = [completion_logprobs(t.policy, rollout, torch.arange(12), t.config) for t in (small, large)]
    torch.testing.assert_close(*rewards, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(*logprobs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", [
    dict(kl="reward"), dict(kl="loss", algo="rloo"), dict(kl="loss", algo="reinforce_pp"),
    dict(kl="reward", algo="prime"),
    dict(advantages_over="all", algo="rloo"),
    dict(policy_groups="both_signs"), dict(length_filter="both"), dict(rm_steps=3), dict(value_head="mlp"),
    dict(value_init="random"), dict(value_position="generation_prompt"), dict(curriculum="fixed"),
    dict(beta=0.0, algo="rloo"),
])  # fmt: skip
def test_every_open_point_can_be_flipped(world, options):
    t = trainer(world, **options)
    base = trainer(world, **({"algo": options["algo"]} if "algo" in options else {}))
    ours, theirs = save_step(t, 2)[0], save_step(base, 2)[0]
    same = {
        k
        for k in ours.keys() & theirs.keys()
        if not k.startswith("time/") and ours[k] == pytest.approx(theirs[k], rel=1e-6)
    }
    assert same < set(theirs), f"{options} changed nothing"
    assert all(torch.isfinite(p).all() for m in (t.policy, t.reward_model) for p in m.parameters())


def test_logprobs_equal_those_of_one_row_without_padding(world):
    t = trainer(world)
    t.config = make_config(**(world | {"temperature": 0.7}))
    torch.manual_seed(3)
    rollout = sample(t.policy, t.tokenizer, t.data.prompts[8:12], 4, t.config)  # prompts of 16 and 17 bytes
    assert len(set(rollout.prompt_lengths.tolist())) > 1
    with torch.no_grad():
        together = completion_logprobs(t.policy, rollout, torch.arange(16), t.config)
        for row in range(16):
            b, g = divmod(row, 4)
            n, m = int(rollout.completion_lengths[b, g]), int(rollout.prompt_lengths[b])
            ids = torch.cat([rollout.prompt_ids[b][-m:], rollout.completion_ids[b, g, :n]])
            logits = t.policy(ids[None]).logits[0, m - 1 : -1] / 0.7
            alone = logits.log_softmax(-1).gather(-1, ids[m:, None]).squeeze(-1)
            torch.testing.assert_close(together[row, :n], alone, atol=1e-4, rtol=1e-4)


def test_rollout_lengths_come_from_end_tokens(world):
    t = trainer(world)
    rollout = sample(t.policy, t.tokenizer, t.data.prompts[:4], 8, t.config)
    ends = set(t.policy.generation_config.eos_token_id)
    for b in range(4):
        for g in range(8):
            n = int(rollout.completion_lengths[b, g])
            ids = rollout.completion_ids[b, g, :n].tolist()
            assert (ids[-1] in ends) == bool(rollout.finished[b, g])
            assert not set(ids[:-1]) & ends
            assert rollout.finished[b, g] or n == t.config.max_new_tokens
    assert 0 < rollout.finished.float().mean() < 1  # both kinds were seen


def test_a_reward_that_is_no_number_stops_before_anything_moves(world):
    t = trainer(world)
    with torch.no_grad():
        t.reward_model.model.score.weight.fill_(float("nan"))
    policy, head = state(t.policy), state(t.reward_model.value_head)
    with pytest.raises(NonFiniteError, match=r"step 3: .*prompts: p\d+"):
        save_step(t, 3)
    assert not moved(t.policy, policy) and not moved(t.reward_model.value_head, head)


@pytest.mark.parametrize(("values", "said"), [
    (dict(value_loss_weight=1e308), r"^step 1: L_V is not a finite number; prompts: p\d+.*; lower value_head_lr"),
    (dict(reward_head_lr=1e30), "^step 1: L_V is not .*; lower value_head_lr, .* or reward_head_lr, and start again$"),
    (dict(value_head_lr=1e30), "^step 2: L_V is not a finite number; prompts: p"),
    (dict(policy_lr=1e30), "^step 2: the policy loss is not .*; lower policy_lr or beta, and start again$"),
    (dict(anchor_lr=1e30, anchor_epochs=2), "^L_V of stage 2 is not a finite number; lower .* anchor_lr"),
])  # fmt: skip
def test_a_loss_that_is_no_number_stops_with_advice(world, values, said):
    with pytest.raises(NonFiniteError) as caught:
        t = trainer(world, **values)
        save_step(t, 1)
        save_step(t, 2)
    assert re.search(said, str(caught.value)), caught.value


def test_a_value_a_gradient_or_a_policy_loss_that_is_no_number_stops_before_it_moves_anything(world):
    t = trainer(world)
    with torch.no_grad():
        t.reward_model.value_head[-1].bias.fill_(float("inf"))
    policy, rewards = state(t.policy), state(t.reward_model.model)
    with pytest.raises(NonFiniteError, match=r"step 2: V of a prompt is not a finite number; prompts: p\d+"):
        save_step(t, 2)
    assert not moved(t.policy, policy) and not moved(t.reward_model.model, rewards)
    t = trainer(world, rule="frozen")
    with torch.no_grad():
        t.reference.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 2: the policy loss is not .*; prompts: p\d+.*; lower policy_lr"):
        save_step(t, 2)
    engine = t.engines["policy"]
    engine.parameters[0].grad = torch.full_like(engine.parameters[0], float("inf"))
    with pytest.raises(NonFiniteError, match="the norm of policy's gradient is not a finite number"):
        engine.step()
    t = trainer(world, rule="frozen")
    t.engines["policy"].optimizer.param_groups[0]["lr"] = 1e300
    with pytest.raises(NonFiniteError, match="step 3: a weight of policy, after its update, is not a finite number"):
        save_step(t, 3)


def test_prompts_that_do_not_fit_are_named(world):
    for values, said in [
        (dict(max_prompt_tokens=20), "prompt 'p0' has .* tokens, more than max_prompt_tokens = 20"),
        (dict(max_new_tokens=500), "with max_new_tokens = 500 that exceeds the policy's context of 512"),
    ]:
        t = trainer(world, rule="frozen")
        with pytest.raises(ConfigError, match=said):
            sample(t.policy, t.tokenizer, t.data.prompts[:1], 2, make_config(**(world | values)))


def test_data_order_is_epochs_of_permutations(world):
    t = trainer(world)
    seen = [p.id for step in range(1, 6) for p in t.batch(t.data.prompts[:10], step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(p.id for p in t.data.prompts[:10])
    assert seen[:10] != seen[10:]


def test_value_head_starts_at_the_mean_and_learns(world):
    config = make_config(**world)
    rm = prepare(config).reward_model
    assert rm.value_head[-1].bias.item() != 0
    assert rm.value_head[-1].weight.abs().max() > 0


def test_a_random_value_head_is_the_seeds(world, tmp_path, monkeypatch):
    heads = []
    for cache in ("a", "b"):
        monkeypatch.setenv("SAVE_CACHE", str(tmp_path / cache))
        torch.manual_seed(len(heads))  # whatever the process drew before
        config = make_config(**world | dict(value_head="mlp", value_init="random"))
        data = load_data(config)
        folder = anchor_stage(config, preference_stage(config, data.pairs), data.prompts)
        heads.append((Path(folder) / VALUE_HEAD_FILE).read_bytes())
    assert heads[0] == heads[1]
