"""Lemma 1's derivatives: exact on a policy that can be enumerated, against gradients one by one on a small model."""

import itertools

import pytest
import torch
from tiny_models import make_policy

from savelib.config import ConfigError, make_config
from savelib.data.pairs_and_prompts import Prompt
from savelib.experiments import theory, theory_tables
from savelib.experiments.theory import derivative, gold_scale, pair_derivative
from savelib.experiments.theory_tables import CONDITIONS, TABLES, conditions, verdict
from savelib.models.loading import load_policy
from savelib.models.rollout import completion_logprobs, sample
from savelib.training.algorithm import prepare
from savelib.training.trainer import Trainer

LOGITS, ALONG = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([0.7, 0.2], dtype=torch.float64)
REWARD = torch.tensor([1.5, -0.4], dtype=torch.float64)  # of each token
PAIR = torch.tensor([[0.3, 2.0], [-1.0, 0.8]], dtype=torch.float64)  # h of two independent responses


def probabilities(shift: float) -> torch.Tensor:
    return (LOGITS + shift * ALONG).softmax(0)


def slope(of) -> float:
    """Central difference of an expectation along ALONG."""
    return ((of(probabilities(1e-5)) - of(probabilities(-1e-5))) / 2e-5).item()


def expected_estimate(estimate, n: int, sign: float = 1.0) -> float:
    """The mean of an estimator over every group of n responses (2^n), each at its probability."""
    p = probabilities(0)
    scores = sign * (ALONG - (p * ALONG).sum())  # d log p / d shift of each token
    total = 0.0
    for group in itertools.product((0, 1), repeat=n):
        tokens = torch.tensor([group])  # [1, n]
        total += p[tokens].prod().item() * estimate(tokens, scores[tokens]).item()
    return total


def single(tokens, scores):
    return derivative(REWARD[tokens], scores)


def pairs(tokens, scores):
    values = PAIR[tokens[:, :, None], tokens[:, None, :]] * (1 - torch.eye(tokens.shape[1], dtype=torch.float64))
    return pair_derivative(values, scores)


@pytest.mark.parametrize("n", [3, 5])
def test_estimators_are_unbiased_on_a_policy_of_two_tokens(n):
    assert expected_estimate(single, n) == pytest.approx(slope(lambda p: p @ REWARD), rel=1e-8)
    assert expected_estimate(pairs, n) == pytest.approx(slope(lambda p: p @ PAIR @ p), rel=1e-8)


def test_a_wrong_sign_is_seen():
    truth = slope(lambda p: p @ REWARD)
    assert truth > 0.1 and expected_estimate(single, 3, sign=-1.0) == pytest.approx(-truth)


def test_forward_mode_is_each_responses_own_gradient(tmp_path):
    config = make_config(temperature=0.9, max_new_tokens=5, device="cpu")
    model, tokenizer = load_policy(str(make_policy(tmp_path)), torch.device("cpu"), config)
    prompts = [Prompt(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(("Say hi.", "Count, now."))]
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, prompts, 3, config)
    assert rollout.completion_lengths.unique().numel() > 1
    parameters = list(model.parameters())
    direction = torch.randn(sum(p.numel() for p in parameters)) / 100
    scores = theory.directional_scores(model, rollout, direction, config)
    for row in range(6):
        length = rollout.completion_lengths.flatten()[row]
        logprob = completion_logprobs(model, rollout, torch.tensor([row]), config)[0, :length].sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(logprob, parameters)])
        assert scores.flatten()[row].item() == pytest.approx((gradient @ direction).item(), rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return prepare(make_config(rule="frozen"))


def test_on_its_own_samples_the_reward_rises_by_the_gradients_length(trainer):
    torch.manual_seed(0)
    drawn = theory.draw(trainer, trainer.data.prompts[:6], 8)
    gradient, kl = theory.gradients(trainer, drawn)
    scores = theory.directional_scores(trainer.policy, drawn.rollout, gradient / gradient.norm(), trainer.config)
    assert derivative(drawn.rewards, scores).mean().item() == pytest.approx(gradient.norm().item(), rel=1e-3)
    assert kl.norm() == 0 and drawn.log_ratios.abs().max() == 0, "the policy is still the reference"


def test_on_other_samples_it_rises_too_and_kl_does_away_from_the_reference(trainer):
    torch.manual_seed(0)
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p += 0.02 * torch.randn_like(p)
    table = theory.measure(trainer, (1.0, 0.0), prompts=24, responses=24).set_index(["quantity", "along"])
    with torch.no_grad():
        for p, old in zip(trainer.policy.parameters(), before, strict=True):
            p.copy_(old)
    for quantity, along in (("reward", "reward"), ("reward", "both"), ("kl", "kl")):
        assert verdict(*table.loc[(quantity, along)]) == "holds", (quantity, along)
    assert table.loc[("kl", "level"), "value"] > 0
    derivatives = table.drop(["level"], level="along")["value"].unstack()
    for quantity in ("reward", "squared_error", "risk", "misranked"):
        parts = derivatives.loc[quantity]
        assert parts["both"] == pytest.approx(parts["reward"] - parts["kl"], abs=1e-4)
    assert table.loc[("sensitivity", "both"), "value"] == pytest.approx(
        derivatives.loc["risk", "both"] / derivatives.loc["squared_error", "both"], rel=1e-4
    )


def test_pairs_are_right_against_wrong_and_their_share_is_no_change(trainer):
    torch.manual_seed(0)
    drawn = theory.draw(trainer, trainer.data.prompts[:2], 5)
    terms, there = theory.pair_terms(drawn)
    losses = [
        torch.nn.functional.softplus(b - a).item()
        for rewards, gold in zip(drawn.rewards, drawn.gold, strict=True)
        for a, right in zip(rewards, gold, strict=True)
        for b, wrong in zip(rewards, 1 - gold, strict=True)
        if right and wrong
    ]
    assert len(losses) == there.sum() > 0
    assert terms["risk"].sum().item() == pytest.approx(sum(losses), rel=1e-5)
    assert ((terms["misranked"] == 1) == (terms["risk"] > torch.log(torch.tensor(2.0)))).all()


def test_gold_scale_is_the_class_means():
    rewards, gold = torch.tensor([[2.0, 4.0, -1.0], [0.0, 0.0, 3.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    a, b = gold_scale(rewards, gold)
    assert (a, b) == (pytest.approx(3 + 1 / 3), pytest.approx(-1 / 3))
    assert gold_scale(rewards, torch.zeros(2, 3)) == (0, pytest.approx(8 / 6))


def test_cut_sampling_is_refused(trainer):
    config, trainer.config = trainer.config, trainer.config.model_copy(update={"top_p": 0.8})
    with pytest.raises(ConfigError, match="top_p = 0.8"):
        theory.draw(trainer, trainer.data.prompts[:1], 2)
    trainer.config = config


@pytest.mark.parametrize("value, said", [(0.3, "holds"), (-0.3, "fails"), (0.1, "not resolved"), (float("nan"),) * 2])
def test_verdicts(value, said):
    assert verdict(value, 0.1) == (said if said == said else "not resolved")


def test_means_of_k_vary_by_one_over_k():
    rewards = torch.randn(400, 256, generator=torch.Generator().manual_seed(0)) * 3 + torch.arange(400.0)[:, None]
    for count in (1, 4, 32):
        assert theory_tables.variance_of_means(rewards, count).mean().item() == pytest.approx(9 / count, rel=0.1)
    by_hand = rewards[0].view(64, 4).mean(1)
    expected = (by_hand - rewards[0].mean()).square().sum() / 63
    assert theory_tables.variance_of_means(rewards[:1], 4).item() == pytest.approx(expected.item(), rel=1e-4)


def test_shipped_lemma_table_is_whole_and_consistent():
    table = TABLES.table("lemma1")
    places = table.groupby(["rule", "world", "seed", "step"]).size()
    assert len(places) == 2 * 5 * 2 * 4 and places.nunique() == 1
    start = table[table["step"] == 0].set_index(["world", "seed", "quantity", "along"])["value"]
    save, frozen = (start[table[table["step"] == 0]["rule"].to_numpy() == rule] for rule in ("save", "frozen"))
    assert save.to_numpy() == pytest.approx(frozen[save.index].to_numpy(), nan_ok=True), "both start alike"
    assert start.xs("kl", level="quantity").abs().max() < 1e-6, "the policy is the reference"
    assert set(conditions(table)["condition"]) == set(CONDITIONS)
    assert len(conditions(table, refit=True)) == len(CONDITIONS) * len(places)


def test_shipped_remark_table_falls_as_one_over_k():
    table = TABLES.table("remark1")
    assert (table["target_variance"] / table["predicted"]).between(0.7, 1.4).all()
    assert table["responses"].unique().tolist() == list(theory_tables.RESPONSES)
