"""PAR, ensembles, MetaRM, RAFT and the oracle against transcriptions in plain Python."""

import copy
import math
import statistics

import pytest
import torch
from tiny_models import checkable_prompts, paper_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from savelib.config import ConfigError, make_config
from savelib.experiments.cells import Study
from savelib.experiments.remedies_runs import RESPONSES, cost_of_steps, final_kl
from savelib.method import (
    best_of_group,
    combined_rewards,
    metarm_difference,
    oracle_loss,
    par_rewards,
    policy_advantages,
)
from savelib.models.compute import seed_everything
from savelib.models.loading import load_policy
from savelib.models.rollout import completion_logprobs, sample
from savelib.training.algorithm import prepare, save_step
from savelib.training.evaluation import evaluate
from savelib.training.scoring import encode_groups
from savelib.training.trainer import load_data


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def rewards():
    return torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def test_par(rewards):
    references = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shaped = par_rewards(rewards, references)
    for b in range(3):
        for g in range(5):
            by_hand = [sigmoid(rewards[b, g].item() - r) for r in references[b].tolist()]
            assert shaped[b, g].item() == pytest.approx(sum(by_hand) / 4, rel=1e-12)
    torch.testing.assert_close(par_rewards(rewards + 7, references + 7), shaped)  # the level says nothing
    assert par_rewards(torch.tensor([[1.5]]), torch.tensor([[1.5]])).item() == 0.5


def test_ensembles(rewards):
    members = torch.stack([rewards, rewards.flip(1), rewards * 0.5])
    for b in range(3):
        for g in range(5):
            of = members[:, b, g].tolist()
            assert combined_rewards(members, "mean")[b, g].item() == pytest.approx(sum(of) / 3)
            assert combined_rewards(members, "wco")[b, g].item() == min(of)
            assert combined_rewards(members, "uwo")[b, g].item() == pytest.approx(
                sum(of) / 3 - 0.5 * statistics.variance(of)
            )
    with pytest.raises(ValueError, match="how 'max': choose one of mean, wco, uwo"):
        combined_rewards(members, "max")


def test_metarm_difference_and_its_gradient(rewards):
    by_hand = 0.0
    for row in rewards.tolist():
        by_hand += 2 / 25 * sum(sigmoid(abs(row[i] - row[j])) for i in range(5) for j in range(i + 1, 5)) / 3
    assert metarm_difference(rewards).item() == pytest.approx(by_hand, rel=1e-12)
    assert torch.autograd.gradcheck(metarm_difference, rewards.clone().requires_grad_())
    apart = rewards.clone().requires_grad_()
    metarm_difference(apart).backward()
    assert metarm_difference(rewards + 0.1 * apart.grad) > metarm_difference(rewards), "ascent widens the differences"


def test_oracle_takes_one_right_and_one_wrong_response_of_each_group(rewards):
    right = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    losses = [
        math.log1p(math.exp(-(rewards[0, 1] - rewards[0, 0]))),
        math.log1p(math.exp(-(rewards[2, 4] - rewards[2, 0]))),
    ]
    assert oracle_loss(rewards, right, ~right).item() == pytest.approx(sum(losses) / 2, rel=1e-12)
    nothing = oracle_loss(rewards.requires_grad_(), right[1:2].expand(3, 5), ~right[1:2].expand(3, 5))
    assert nothing.item() == 0 and nothing.requires_grad


def test_raft_takes_the_best_kept_response_of_each_group(rewards):
    kept = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    best = best_of_group(rewards, kept)
    for row, mask, found in zip(rewards.tolist(), kept.tolist(), best.tolist(), strict=True):
        among = [i for i, m in enumerate(mask) if m]
        assert [i for i, f in enumerate(found) if f] == ([max(among, key=row.__getitem__)] if among else [])
    tie = best_of_group(torch.ones(1, 3), torch.tensor([[False, True, True]]))
    assert tie.tolist() == [[False, True, False]]


# in a step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("base")) | dict(
        anchor_prompts=4, total_steps=4, batch_size=4, group_size=6, precision="float32", gradient_checkpointing=False,
        backbone_lr=0.0, reward_head_lr=1e-2, policy_lr=1e-3, tracker="none", rule="frozen",
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("folders")


def test_raft_s_gradient_is_that_of_cross_entropy_on_the_best_responses(base):
    t = prepare(make_config(**base | dict(algo="raft", beta=0.0)))
    seed_everything("step", t.config.seed, 1)
    rollout = t.sample(1)
    rewards = t.scores(encode_groups(t.reward_model, rollout), rollout, 1).rewards
    expected = 0.0
    for b, row in enumerate(rewards.tolist()):
        best = b * 6 + row.index(max(row))
        logprobs = completion_logprobs(t.policy, rollout, torch.tensor([best]), t.config)[0]
        expected = expected - logprobs[: rollout.completion_lengths.flatten()[best]].mean() / 4
    parameter = t.policy.model.layers[0].mlp.up_proj.weight
    (wanted,) = torch.autograd.grad(expected, parameter)
    found = {}
    t.engines["policy"].step = lambda divisor: found.update(gradient=parameter.grad / divisor) or 0.0
    metrics, _ = save_step(t, 1)
    assert metrics["policy/responses"] == 4
    torch.testing.assert_close(found["gradient"], wanted, atol=1e-6, rtol=1e-4)


def test_metarm_step_equals_a_plain_transcription(base):
    """theta' = theta + eta grad J; then Adam's step on Bradley-Terry's gradient at theta', from theta."""
    t = prepare(make_config(**base | dict(rule="metarm", meta_lr=5.0, max_grad_norm=1e9)))
    rm, c = t.reward_model, t.config
    copied = copy.deepcopy(rm)
    head = copied.model.score.weight
    seed_everything("step", c.seed, 1)
    rollout = t.sample(1)

    def scored(conversations):
        return copied.score(copied.encode(conversations)).rewards

    rows = list(zip(rollout.prompts, rollout.texts, rollout.finished, strict=True))
    total = 0.0
    for prompt, texts, finished in rows:
        rewards = scored([(prompt.messages, text) for text in texts])[finished]
        k = len(rewards)
        for i in range(k):
            for j in range(i + 1, k):
                total = total + 2 / k**2 * torch.sigmoid((rewards[i] - rewards[j]).abs()) / len(rows)
    (ascent,) = torch.autograd.grad(total, head)
    start = head.detach().clone()
    with torch.no_grad():
        head += c.meta_lr * ascent
    losses = []
    for pair in t.batch(t.data.pairs, 1):
        chosen, rejected = scored([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)])
        losses.append(-torch.nn.functional.logsigmoid(chosen - rejected))
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), head)
    expected = start - c.reward_head_lr * gradient / (gradient.abs() + 1e-8)  # Adam's first step

    metrics, _ = save_step(t, 1)
    assert metrics["rm/difference"] == pytest.approx(total.item(), rel=1e-4)
    assert metrics["rm/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    clear = gradient.abs() > 1e-5  # elsewhere Adam's first step is a sign of rounding
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(rm.model.score.weight[clear], expected[clear], atol=1e-5, rtol=1e-3)


def test_par_shapes_the_policy_s_rewards_alone(base, monkeypatch):
    t = prepare(make_config(**base | dict(reward_shaping="par", par_references=3)))
    seen = []
    monkeypatch.setattr(
        "savelib.training.policy_update.policy_advantages",
        lambda algo, rewards, *rest: seen.append(rewards) or policy_advantages(algo, rewards, *rest),
    )
    plain = prepare(make_config(**base | dict(par_references=3)))
    metrics, rows = save_step(t, 1)
    shaped = seen.pop()
    other, same_rows = save_step(plain, 1)
    assert rows == same_rows and metrics["reward/mean"] == other["reward/mean"], "R itself is what is logged"
    references, rm = plain.references(1), plain.reward_model
    assert references.completion_ids.shape[:2] == (4, 3)
    for b, (prompt, texts) in enumerate(zip(references.prompts, references.texts, strict=True)):
        of = rm.score(rm.encode([(prompt.messages, text) for text in texts])).rewards.tolist()
        for g, reward in enumerate(seen[-1][b].tolist()):
            assert shaped[b, g].item() == pytest.approx(sum(sigmoid(reward - r) for r in of) / 3, rel=1e-4)
    again = plain.references(1)
    assert torch.equal(again.completion_ids, references.completion_ids), "whatever was drawn between"


@pytest.mark.parametrize("how", ["mean", "wco", "uwo"])
def test_an_ensemble_scores_with_all_its_members(base, how):
    stage = dict(bt_epochs=2, bt_batch_size=2, bt_head_lr=1e-2, bt_backbone_lr=1e-3, ensemble=3, ensemble_reward=how)
    t = prepare(make_config(**base | stage))
    alone = [prepare(t.config)] + [prepare(m) for m in t.config.members]
    for a in alone:
        a.reward_model = a.reward_model.members[0]
    prompt = t.data.prompts[0].messages
    encoded = t.reward_model.encode([(prompt, text) for text in ("Yes", "No", "Perhaps")])
    each = []
    for a in alone:
        level = [
            a.reward_model.score(a.reward_model.encode([(p.prompt, r)])).rewards.item()
            for p in t.data.pairs
            for r in (p.chosen, p.rejected)
        ]
        each.append(a.reward_model.score(encoded).rewards - sum(level) / len(level))
    assert not torch.allclose(each[0], each[1], atol=1e-4), "the members differ"
    each = torch.stack(each)
    by_hand = {"mean": each.mean(0), "wco": each.min(0).values, "uwo": each.mean(0) - 0.5 * each.var(0)}[how]
    torch.testing.assert_close(t.reward_model.score(encoded).rewards, by_hand, atol=1e-4, rtol=1e-3)
    assert evaluate(t).keys() == evaluate(alone[0]).keys()
    save_step(t, 1)


def test_an_ensemble_with_one_backbone_runs_it_once(base):
    stage = dict(bt_epochs=2, bt_batch_size=2, bt_head_lr=1e-2, bt_backbone_lr=0.0, ensemble=3)
    encoded, rewards, forwards = None, [], []
    for shared in (True, False):
        t, runs = prepare(make_config(**base | stage | dict(backbone_lr=0.0 if shared else 1e-6))), []
        rm = t.reward_model
        encoded = encoded or rm.encode([(t.data.prompts[0].messages, text) for text in ("Yes", "No", "Perhaps")])
        backbones = {id(m.model.base_model): m.model.base_model for m in rm.members}
        assert len(backbones) == (1 if shared else 3) and rm.fixed == shared
        for backbone in backbones.values():
            backbone.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        rewards.append(rm.score(encoded).rewards)
        forwards.append(len(runs))
        assert torch.equal(rm.score(rm.embed(encoded)).rewards, rewards[-1])
    assert forwards[1] == 3 * forwards[0] > 0
    assert torch.equal(*rewards), "the heads are trained alike, on one backbone or three equal ones"


def test_oracle_needs_gold_and_learns_from_it(base, tmp_path):
    with pytest.raises(ConfigError, match="rule = 'oracle' needs prompts whose right answers are known"):
        prepare(make_config(**base | dict(rule="oracle")))
    t = prepare(make_config(**base | dict(rule="oracle", prompts=str(checkable_prompts(tmp_path)))))
    seed_everything("step", t.config.seed, 1)
    rollout = t.sample(1)
    gold, finished = rollout.gold(), rollout.finished
    usable = [((g > 0.5) & f).any() and ((g <= 0.5) & f).any() for g, f in zip(gold, finished, strict=True)]
    metrics, _ = save_step(t, 1)
    assert 0 < metrics["rm/groups"] == sum(map(bool, usable))


@pytest.mark.parametrize(("values", "said"), [
    (dict(algo="raft", kl="reward"), "algo 'raft' learns from the best response alone: use kl=loss"),
    (dict(algo="raft", advantages_over="all"), "algo 'raft' learns from the best response alone"),
    (dict(rule="metarm", backend="deepspeed_zero2"), "rule 'metarm' moves weights back and forth: use backend=ddp"),
    (dict(rule="r2m", reward_shaping="par"), "reward_shaping=par: rule 'r2m' rewards the current responses only"),
    (dict(rule="save", ensemble=3, bt_epochs=1), "ensemble = 3 needs rule=frozen"),
    (dict(ensemble=3, bt_epochs=0), "ensemble = 3 needs rule=frozen and a preference stage"),
])  # fmt: skip
def test_what_cannot_be_combined_is_refused(base, values, said):
    with pytest.raises(ConfigError, match=said):
        make_config(**base | values)


@pytest.mark.parametrize("values", [
    dict(reward_shaping="par", par_references=2), dict(rule="metarm", meta_lr=1.0), dict(algo="raft"),
    dict(ensemble=2, ensemble_reward="uwo", bt_epochs=1, bt_batch_size=2, bt_head_lr=1e-2),
], ids=["par", "metarm", "raft", "ensemble"])  # fmt: skip
def test_the_paper_s_architectures_run_each_remedy(qwen3, values):
    t = prepare(make_config(**qwen3 | values))
    policy, head = (copy.deepcopy(m.state_dict()) for m in (t.policy, t.reward_model.model.score))
    metrics, _ = save_step(t, 1)
    assert t.policy.config.model_type == "qwen3" and t.reward_model.model.config.model_type == "llama"
    assert math.isfinite(metrics["policy/loss"]) and metrics["policy/responses"] >= 2
    assert any(not torch.equal(policy[name], now) for name, now in t.policy.state_dict().items())
    moved = not torch.equal(head["weight"], t.reward_model.model.score.weight)
    assert moved == (values.get("rule") == "metarm"), "the others leave the reward model as it is"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("qwen3"), "qwen3") | dict(
        anchor_prompts=2, total_steps=4, batch_size=2, precision="float32", gradient_checkpointing=False,
        reward_head_lr=1e-2, policy_lr=1e-3, tracker="none", rule="frozen",
    )  # fmt: skip


def test_final_kl_is_that_of_all_fresh_responses(qwen3, tmp_path):
    """Against transformers alone: a response's sum of log pi - log pi_init at the paper's temperature, their mean."""
    run, config = tmp_path / "run", make_config(**qwen3 | dict(max_new_tokens=5, run_id="run"))
    model = AutoModelForCausalLM.from_pretrained(config.policy_model)
    initial = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.add_(0.2 * torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(0)))
    model.save_pretrained(run / "policy")
    AutoTokenizer.from_pretrained(config.policy_model).save_pretrained(run / "policy")
    (run / "config.yaml").write_text(config.to_yaml())
    found = final_kl(run)

    policy, tokenizer = load_policy(str(run / "policy"), torch.device("cpu"))
    seed_everything("final_kl", config.seed)
    rollout = sample(policy, tokenizer, load_data(config).heldout_prompts[: config.eval_prompts], RESPONSES, config)
    each = []
    for b, row in enumerate(rollout.completion_ids):
        prompt = rollout.prompt_ids[b, -rollout.prompt_lengths[b] :]
        for ids, n in zip(row, rollout.completion_lengths[b].tolist(), strict=True):
            whole = torch.cat([prompt, ids[:n]])[None]
            logits = [(m(whole).logits[0, -n - 1 : -1] / 0.7).log_softmax(-1) for m in (model, initial)]
            each.append(sum((logits[0] - logits[1])[i, ids[i]].item() for i in range(n)))
    assert found["kl"] == pytest.approx(statistics.mean(each), rel=1e-3) and found["kl"] > 0.1
    assert found["standard_error"] == pytest.approx(statistics.stdev(each) / len(each) ** 0.5, rel=1e-3)


def test_cells_take_turns_where_cost_is_measured(qwen3):
    cells = [{"name": "frozen"}, {"name": "PAR", "set": {"reward_shaping": "par", "par_references": 8}}]
    table = cost_of_steps(Study(title="made", reference="frozen", common=qwen3, cells=cells), steps=3)
    assert table["cell"].tolist() == ["frozen", "PAR"] * 3 and table["step"].tolist() == [1, 1, 2, 2, 3, 3]
    assert (table["seconds"] > 0).all()
