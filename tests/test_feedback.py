"""Feedback formulas against naive float64 loops, closed forms and the paper's own numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from savelib.method import (
    Partition,
    bradley_terry_loss,
    contrastive_terms,
    curriculum_threshold,
    hl_bt_loss,
    mirrored_save_loss,
    net_forces,
    partition,
    rm_advantages,
    save_loss,
    skewness,
    value_loss,
)

TABLE_7 = torch.tensor([[7.469, 7.719, 3.0]], dtype=torch.float64), torch.tensor([5.375], dtype=torch.float64)


def random_batch(seed=0, prompts=6, group=5):
    generator = torch.Generator().manual_seed(seed)
    rewards = 2 * torch.randn(prompts, group, generator=generator, dtype=torch.float64)
    values = torch.randn(prompts, generator=generator, dtype=torch.float64)
    rewards[0] = values[0] + 3  # no negative: not valid
    return rewards.requires_grad_(), values.requires_grad_()


def naive_partition(rewards, values, threshold):
    sides = []
    for row, value in zip(rewards.tolist(), values.tolist(), strict=True):
        gaps = [reward - value for reward in row]
        kept = [g for g in range(len(row)) if 1 / (1 + math.exp(-abs(gaps[g]))) >= threshold]
        sides.append(([g for g in kept if gaps[g] >= 0], [g for g in kept if gaps[g] < 0]))
    return sides


def naive_terms(row, value, positive, negative):
    """Eq. 18 and 19 as printed, for one prompt."""
    denominator = math.exp(value) + sum(math.exp(row[g]) for g in positive)
    plus = -sum(math.log(math.exp(row[g]) / denominator) for g in positive) / len(positive)
    minus = -math.log(math.exp(value) / (math.exp(value) + sum(math.exp(row[g]) for g in negative)))
    return plus, minus


# --- eq. 4 and 14 to 17 ------------------------------------------------------------------------------------------


def test_rm_advantages():
    assert rm_advantages(torch.tensor([[1.0, 4.0]]), torch.tensor([3.0])).tolist() == [[-2.0, 1.0]]


@pytest.mark.parametrize("values", [torch.zeros(2, 1), torch.zeros(3), torch.zeros(())])
def test_rm_advantages_refuses_values_that_would_broadcast(values):
    with pytest.raises(ValueError, match="values: shape"):
        rm_advantages(torch.zeros(2, 3), values)


def test_curriculum_threshold_is_equation_14():
    for margin in (0.0, 0.3, 0.5, 0.7, 1.0):
        for step in range(1, 321):
            p = min(1 - margin + step / 320, 1)
            assert curriculum_threshold(step, 320, margin) == pytest.approx((2 - p) / 2, abs=1e-15)


@pytest.mark.parametrize("margin", [0.3, 0.5, 0.7])
def test_curriculum_is_exactly_open_from_margin_times_total(margin):
    first_open = round(margin * 10)
    assert curriculum_threshold(first_open - 1, 10, margin) > 0.5
    assert [curriculum_threshold(t, 10, margin) for t in range(first_open, 11)] == [0.5] * (11 - first_open)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 10, 0.5), "step 0"), ((11, 10, 0.5), "step 11"), ((1, 10, -0.1), "-0.1"), ((1, 10, math.nan), "nan")],
)
def test_curriculum_threshold_refuses(arguments, named):
    with pytest.raises(ValueError, match=named):
        curriculum_threshold(*arguments)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.75, 0.95])
def test_partition_is_equations_15_to_17(threshold):
    rewards, values = random_batch()
    result = partition(rm_advantages(rewards, values), threshold)
    for b, (positive, negative) in enumerate(naive_partition(rewards, values, threshold)):
        assert result.positive[b].nonzero().flatten().tolist() == positive
        assert result.negative[b].nonzero().flatten().tolist() == negative
        assert result.valid[b].item() == bool(positive and negative)
    assert torch.equal(result.kept, result.positive | result.negative)
    assert {x.dtype for x in (result.positive, result.negative, result.valid, result.kept)} == {torch.bool}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_partition_at_one_half_keeps_all(dtype):
    advantages = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, -1e-9, 50.0]], dtype=dtype)
    result = partition(advantages, 0.5)
    assert result.kept.all()
    assert result.positive.tolist() == [[True, True, True, False, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_threshold_asks_for_ln_3(dtype):
    ln3 = math.log(3)
    advantages = torch.tensor([[ln3, -ln3, ln3 - 1e-6, 1e-6 - ln3]], dtype=dtype)
    assert partition(advantages, 0.75).kept.tolist() == [[True, True, False, False]]


def test_partition_leaves_out_what_is_not_eligible():
    advantages = torch.tensor([[2.0, -2.0, -3.0], [2.0, -2.0, 1.0]])
    eligible = torch.tensor([[1, 0, 1], [1, 0, 1]])  # lengths give integer masks too
    result = partition(advantages, 0.5, eligible)
    assert result.kept.tolist() == [[True, False, True], [True, False, True]]
    assert result.valid.tolist() == [True, False]


@pytest.mark.parametrize("threshold", [0.4, 1.0, math.nan])
def test_partition_refuses_a_threshold_outside_its_range(threshold):
    with pytest.raises(ValueError, match="threshold"):
        partition(torch.zeros(1, 2), threshold)


# --- eq. 18 to 20 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_save_loss_is_equations_18_to_20(threshold):
    rewards, values = random_batch()
    parts = partition(rm_advantages(rewards, values), threshold)
    plus, minus = contrastive_terms(rewards, values, parts)
    expected = []
    for b, (positive, negative) in enumerate(naive_partition(rewards, values, threshold)):
        terms = (0.0, 0.0)
        if positive and negative:
            terms = naive_terms(rewards[b].tolist(), values[b].item(), positive, negative)
            expected.append(sum(terms))
        assert (plus[b].item(), minus[b].item()) == pytest.approx(terms, abs=1e-12)
    assert 0 < len(expected) < len(values)
    assert save_loss(rewards, values, parts).item() == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_save_gradient_is_the_closed_form():
    rewards, values = random_batch()
    parts = partition(rm_advantages(rewards, values), 0.5)
    save_loss(rewards, values, parts).backward()
    expected = torch.zeros_like(rewards)
    for b in parts.valid.nonzero().flatten().tolist():
        positive, negative = parts.positive[b], parts.negative[b]
        anchored = torch.cat([rewards[b, positive], values[b, None]]).softmax(0)[:-1]
        expected[b, positive] = anchored - 1 / positive.sum()
        expected[b, negative] = torch.cat([rewards[b, negative], values[b, None]]).softmax(0)[:-1]
    torch.testing.assert_close(rewards.grad, expected.detach() / parts.valid.sum())
    assert values.grad is None


def test_save_gradcheck():
    rewards, values = random_batch(seed=3)
    parts = partition(rm_advantages(rewards, values), 0.6)
    assert parts.valid.any() and not parts.valid.all()
    assert torch.autograd.gradcheck(lambda r: save_loss(r, values.detach(), parts), rewards)


def test_save_loss_ignores_a_common_shift():
    rewards, values = random_batch()
    parts = partition(rm_advantages(rewards, values), 0.6)
    torch.testing.assert_close(save_loss(rewards + 1e3, values + 1e3, parts), save_loss(rewards, values, parts))


def test_one_positive_is_softplus_and_the_floor_is_log_count():
    values = torch.tensor([0.5, 0.5], dtype=torch.float64)
    rewards = torch.tensor([[2.0, -1.0, -2.0], [60.0, 60.0, -2.0]], dtype=torch.float64)
    plus, minus = contrastive_terms(rewards, values, partition(rm_advantages(rewards, values), 0.5))
    torch.testing.assert_close(plus[0], F.softplus(values[0] - rewards[0, 0]))
    torch.testing.assert_close(minus[0], torch.log(1 + (rewards[0, 1:] - values[0]).exp().sum()))
    torch.testing.assert_close(plus[1], torch.tensor(math.log(2), dtype=torch.float64))


def test_the_floor_of_the_positive_term_is_never_passed():
    rewards, values = random_batch(seed=5, prompts=64)
    parts = partition(rm_advantages(rewards, values), 0.5)
    plus, _ = contrastive_terms(rewards, values, parts)
    assert (plus >= parts.positive.sum(1).clamp(min=1).log())[parts.valid].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_valid_prompt_gives_a_zero_with_a_graph(dtype):
    rewards = torch.tensor([[1e38, 1e38, 1e38]], dtype=dtype, requires_grad=True)
    loss = save_loss(rewards, torch.zeros(1, dtype=dtype), partition(rewards.detach(), 0.5))
    loss.backward()
    assert loss.item() == 0 and rewards.grad.tolist() == [[0, 0, 0]]


def test_large_rewards_and_empty_sides_stay_finite():
    rewards = torch.tensor([[3e4, -3e4, 2e4], [5.0, 6.0, 7.0], [-5.0, -6.0, -7.0]], requires_grad=True)
    values = torch.tensor([0.0, 0.0, 0.0])
    parts = partition(rm_advantages(rewards, values), 0.75)
    loss = save_loss(rewards, values, parts)
    loss.backward()
    assert parts.valid.tolist() == [True, False, False]
    assert loss.item() == pytest.approx(5e3)  # log-sum-exp 3e4, mean of the positives 2.5e4
    torch.testing.assert_close(rewards.grad, torch.tensor([[0.5, 0, -0.5], [0, 0, 0], [0, 0, 0]]))


def test_save_pulls_table_7_together_and_hl_bt_tears_it_apart():
    rewards, values = TABLE_7[0].clone().requires_grad_(), TABLE_7[1]
    parts = partition(rm_advantages(rewards, values), 0.75)
    assert parts.positive.tolist() == [[True, True, False]] and parts.negative.tolist() == [[False, False, True]]
    (save,) = torch.autograd.grad(save_loss(rewards, values, parts), rewards)
    pair = rewards[:, :2]
    (hl_bt,) = torch.autograd.grad(hl_bt_loss(pair), rewards)
    moved_by_save, moved_by_hl_bt = -save[0], -hl_bt[0]  # gradient descent
    assert moved_by_save[0] > moved_by_save[1]  # 7.469 rises more than 7.719: the gap closes
    assert moved_by_save[0] > 0 and moved_by_save[2] < 0
    assert moved_by_hl_bt[1] > 0 > moved_by_hl_bt[0]  # 7.719 up, 7.469 down: the gap opens
    assert moved_by_hl_bt[1].item() == pytest.approx(1 / (1 + math.exp(0.25)))
    denominator = math.exp(5.375) + math.exp(7.469) + math.exp(7.719)
    assert moved_by_save[0].item() == pytest.approx(0.5 - math.exp(7.469) / denominator)


# --- eq. 11, 21, HL-BT ---------------------------------------------------------------------------------------------


def test_value_loss_is_equation_21():
    rewards, values = random_batch()
    loss = value_loss(values, rewards)
    means = [sum(row) / len(row) for row in rewards.tolist()]
    gaps = [value - mean for value, mean in zip(values.tolist(), means, strict=True)]
    assert loss.item() == pytest.approx(sum(gap**2 for gap in gaps) / len(gaps))
    loss.backward()
    assert values.grad.tolist() == pytest.approx([2 * gap / len(gaps) for gap in gaps])
    assert rewards.grad is None


def test_bradley_terry_loss_is_equation_11():
    chosen = torch.tensor([1.0, 0.0, 1e4, -1e4], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, 2.0, -1e4, 1e4], dtype=torch.float64)
    loss = bradley_terry_loss(chosen, rejected)
    expected = math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(2)) + 0 + 2e4
    assert loss.item() == pytest.approx(expected / 4)
    loss.backward()
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(0.5)) / 4, -1 / (1 + math.exp(-2)) / 4, 0, -1 / 4])


@pytest.mark.parametrize("shapes", [((3,), (3, 1)), ((0,), (0,))])
def test_bradley_terry_refuses_what_is_not_pairs(shapes):
    with pytest.raises(ValueError, match="chosen"):
        bradley_terry_loss(*(torch.zeros(shape) for shape in shapes))


def test_hl_bt_takes_highest_and_lowest_of_the_eligible():
    rewards = torch.tensor([[1.0, 9.0, 3.0, -9.0], [2.0, 1.0, 0.0, 4.0], [8.0, 7.0, 6.0, 5.0]], requires_grad=True)
    eligible = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    loss = hl_bt_loss(rewards, eligible)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-4))) / 2)
    loss.backward()
    assert (rewards.grad != 0).tolist() == [[True, False, True, False], [False, False, True, True], [False] * 4]
    torch.testing.assert_close(
        hl_bt_loss(rewards), bradley_terry_loss(torch.tensor([9.0, 4, 8]), torch.tensor([-9.0, 0, 5]))
    )


def test_hl_bt_without_a_pair_is_a_zero_with_a_graph():
    rewards = torch.full((2, 3), 3e38, requires_grad=True)
    loss = hl_bt_loss(rewards, torch.eye(3, dtype=torch.bool)[:2])
    loss.backward()
    assert loss.item() == 0 and not rewards.grad.any()


# --- forces --------------------------------------------------------------------------------------------------------


def test_net_forces_are_the_summed_gradients():
    rewards, values = random_batch()
    parts = partition(rm_advantages(rewards, values), 0.5)
    pull, push = net_forces(rewards, values, parts)
    for b, (positive, negative) in enumerate(naive_partition(rewards, values, 0.5)):
        plus = sum(math.exp(rewards[b, g].item()) for g in positive)
        minus = sum(math.exp(rewards[b, g].item()) for g in negative)
        anchor = math.exp(values[b].item())
        expected = (anchor / (anchor + plus), minus / (anchor + minus)) if positive and negative else (0, 0)
        assert (pull[b].item(), push[b].item()) == pytest.approx(expected, abs=1e-12)
    (save_loss(rewards, values, parts) * parts.valid.sum()).backward()
    torch.testing.assert_close(-(rewards.grad * parts.positive).sum(1), pull)
    torch.testing.assert_close((rewards.grad * parts.negative).sum(1), push)
    assert not pull.requires_grad and not push.requires_grad


def test_net_forces_stay_finite():
    rewards, values = torch.tensor([[3e4, -3e4], [3e4, 3e4 - 2]]), torch.tensor([0.0, 3e4 - 1])
    pull, push = net_forces(rewards, values, partition(rm_advantages(rewards, values), 0.5))
    torch.testing.assert_close(pull, torch.tensor([0.0, 1 / (1 + math.e)]))
    torch.testing.assert_close(push, torch.tensor([0.0, 1 / (1 + math.e)]))


def test_skewness_is_scipys_of_rewards_about_their_groups_mean():
    rewards = torch.randn(3, 5, 6).exp() + 10 * torch.arange(15.0).view(3, 5, 1)
    away = rewards - rewards.mean(2, keepdim=True)
    expected = stats.skew(away.flatten(1).numpy(), axis=1)
    assert skewness(rewards).tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert skewness(torch.ones(2, 3)) == 0 and skewness(torch.tensor([[1.0, 1.0, 1.0, -2.0]])) < -1


@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_mirrored_save_loss_is_equations_18_to_20_with_signs_and_sides_exchanged(threshold):
    rewards, values = random_batch()
    parts = partition(rm_advantages(rewards, values), threshold)
    terms = []
    for b, (positive, negative) in enumerate(naive_partition(rewards, values, threshold)):
        if positive and negative:
            row, value = [-r for r in rewards[b].tolist()], -values[b].item()
            terms.append(sum(naive_terms(row, value, negative, positive)))
    loss = mirrored_save_loss(rewards, values, parts)
    assert terms and loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)
    (down,) = torch.autograd.grad(save_loss(rewards, values, parts), rewards)
    (up,) = torch.autograd.grad(loss, rewards)
    below = partition(rm_advantages(-rewards, -values), threshold)  # the mirror image of the world, the paper's loss
    (image,) = torch.autograd.grad(save_loss(-rewards, -values, below), rewards)
    torch.testing.assert_close(up, image)
    assert down.sum() > 0 > up.sum(), "gradient descent lowers the group's rewards, or raises them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype):
    rewards, values = (x.detach().to(dtype) for x in random_batch())
    parts = partition(rm_advantages(rewards, values), 0.6)
    assert isinstance(parts, Partition)
    results = [
        save_loss(rewards, values, parts),
        value_loss(values, rewards),
        hl_bt_loss(rewards),
        mirrored_save_loss(rewards, values, parts),
        *net_forces(rewards, values, parts),
    ]
    assert {result.dtype for result in results} == {dtype}
