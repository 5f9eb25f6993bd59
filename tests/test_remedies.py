"""PAR, ensembles, MetaRM, RAFT and the oracle against transcriptions in plain Python."""

import math
import statistics

import pytest
import torch

from savelib.method import (
    best_of_group,
    combined_rewards,
    metarm_difference,
    oracle_loss,
    par_rewards,
)


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
