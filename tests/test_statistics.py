"""Intervals and comparisons against formulas, other libraries, simulation and enumeration."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep

from savelib.benchmarks import statistics
from savelib.benchmarks.statistics import Result, Stratum
from savelib.config import ConfigError


def result(*credits, weights=None, statistic=None, names=None):
    """A Result with one stratum for each list of credits, of equal weights."""
    more = {"statistic": statistic} if statistic else {}
    strata = [
        Stratum(f"s{k}", (weights or [1 / len(credits)] * len(credits))[k], [f"{k}-{i}" for i in range(len(c))],
                np.asarray(c, float).reshape(len(c), -1), **more)
        for k, c in enumerate(credits)
    ]  # fmt: skip
    return Result(strata, {s.name: 100 * s.value() for s in strata}, {})


def right(k, n):
    return [1.0] * k + [0.0] * (n - k)


def own_mean(credit):
    return float(credit[:, 0].mean())


def test_half_up():
    assert [statistics.half_up(v) for v in (77.25, 77.35, 74.6666, -0.25, 1.05)] == [
        "77.3",
        "77.4",
        "74.7",
        "-0.3",
        "1.1",
    ]
    assert statistics.half_up(77.24999999999999) == "77.3"  # 77.25 after a float sum
    assert (
        statistics.half_up(77.249) == "77.2"
        and statistics.half_up(0.5, 0) == "1"
        and statistics.half_up(2.345, 2) == "2.35"
    )


def test_possible_counts():
    assert statistics.possible_counts("69.2", 350) == []
    assert statistics.possible_counts("67.7", 350) == [237]
    assert statistics.possible_counts("67.71", 350) == [237]
    assert statistics.possible_counts("50.0", 2000) == [999, 1000]  # 49.95 is printed as 50.0
    assert statistics.possible_counts("50", 2000) == list(range(990, 1010))


def test_accuracy_has_wilsons_interval():
    k, n, z = 246, 350, 1.959963984540054
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert statistics.interval(result(right(k, n))) == pytest.approx((100 * (middle - half), 100 * (middle + half)))
    # a micro average over categories is the same figure
    parts = result(right(200, 250), right(46, 100), weights=[250 / 350, 100 / 350])
    assert statistics.interval(parts) == pytest.approx(statistics.interval(result(right(k, n))))
    assert statistics.interval(parts.strata[1:]) == pytest.approx(statistics.interval(result(right(46, 100))))
    # other weights make it a composite
    low, high = statistics.interval(replace(parts, strata=[replace(s, weight=0.5) for s in parts.strata]))
    error = 100 * math.sqrt((0.8 * 0.2 / 250 + 0.46 * 0.54 / 100) / 4)
    assert (low, high) == pytest.approx((63 - 1.96 * error, 63 + 1.96 * error), abs=0.3)


def test_bootstrap_of_kinds_is_that_of_rows():
    """Rows that are alike are drawn together; a statistic of its own is computed from drawn rows."""
    rng = np.random.default_rng(1)
    values = rng.choice([0, 1 / 3, 0.5, 1], size=120)
    fast, slow = (statistics.bootstrap(result(values, values[:60], statistic=f).strata)[0] for f in (None, own_mean))
    error = 100 * math.sqrt((values.var() / 120 + values[:60].var() / 60) / 4)
    for drawn in (fast, slow):
        assert drawn.shape == (2000,)
        assert drawn.std() == pytest.approx(error, rel=0.06)
        assert drawn.mean() == pytest.approx(50 * (values.mean() + values[:60].mean()), abs=4 * error / math.sqrt(2000))
    again = statistics.bootstrap(result(values, values[:60]).strata)[0]
    assert (again == fast).all()


def test_ratio_of_columns():
    """Sum over sum, against the delta method."""
    rng = np.random.default_rng(2)
    size = rng.integers(1, 7, 400)
    share = rng.random(400)
    drawn = statistics.bootstrap(
        result(np.stack([share, size], 1), statistic=lambda c: float((c[:, 0] * c[:, 1]).sum() / c[:, 1].sum())).strata
    )[0]
    ratio = (share * size).sum() / size.sum()
    error = 100 * np.std((share - ratio) * size) / size.mean() / math.sqrt(400)
    assert drawn.std() == pytest.approx(error, rel=0.06)


def test_interval_covers_the_truth():
    """Two strata of unequal sizes and weights: 95% intervals hold the true figure in about 95% of samples."""
    rng = np.random.default_rng(3)
    truth, held = 0.7 * 60 + 0.3 * 85, 0
    for _ in range(400):
        drawn = result(rng.random(150) < 0.6, rng.random(80) < 0.85, weights=[0.7, 0.3])
        low, high = statistics.interval(drawn)
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.975


def paired(both, only_a, only_b, neither):
    a = np.repeat([1, 1, 0, 0], [both, only_a, only_b, neither])
    b = np.repeat([1, 0, 1, 0], [both, only_a, only_b, neither])
    return a, b


@pytest.mark.parametrize("cells", [(200, 30, 14, 106), (200, 24, 14, 112), (5, 6, 0, 1), (5, 5, 0, 2), (3, 0, 0, 4)])
def test_compare_accuracies(cells):
    a, b = paired(*cells)
    n = len(a)
    found = statistics.compare(result(a), result(b))
    expected = mcnemar([[cells[0], cells[1]], [cells[2], cells[3]]], exact=True).pvalue if sum(cells[1:3]) else 1
    assert found.p == pytest.approx(expected)
    assert found.resolved == (expected < 0.05)
    assert (found.both, found.only_a, found.only_b, found.n) == (*cells[:3], n)
    d, q = (cells[1] - cells[2]) / n, (cells[1] + cells[2]) / n
    assert found.difference == pytest.approx(100 * d)
    if n > 100:
        half = 196 * math.sqrt((q - d * d) / n)
        assert (found.low, found.high) == pytest.approx((100 * d - half, 100 * d + half), abs=0.6)


def test_compare_pairs_rows_by_id():
    a, b = paired(100, 20, 10, 70)
    ours, theirs = result(a), result(b)
    order = np.random.default_rng(0).permutation(len(b))
    s = theirs.strata[0]
    shuffled = replace(theirs, strata=[replace(s, ids=[s.ids[i] for i in order], credit=s.credit[order])])
    assert statistics.compare(ours, shuffled) == statistics.compare(ours, theirs)
    for bad, said in (
        (replace(s, ids=["other", *s.ids[1:]]), "1 only in the first .*'0-0'.* 1 only in the second .*'other'"),
        (replace(s, ids=[s.ids[1], *s.ids[1:]]), "1 only in the first"),
        (replace(s, ids=s.ids[1:], credit=s.credit[1:]), "200 and 199"),
        (replace(s, name="x"), "strata differ"),
        (replace(s, weight=0.4), "weights"),
    ):
        with pytest.raises(ConfigError, match=said):
            statistics.compare(ours, replace(theirs, strata=[bad]))


def test_compare_composites_is_paired_and_stratified():
    rng = np.random.default_rng(5)
    a1, b1 = paired(120, 30, 12, 38)
    a2 = rng.choice([0, 0.5, 1], 90)
    b2 = np.where(rng.random(90) < 0.8, a2, rng.choice([0, 0.5, 1], 90))
    weights = [0.25, 0.75]
    for statistic in (None, own_mean):
        found = statistics.compare(result(a1, a2, weights=weights, statistic=statistic),
                                   result(b1, b2, weights=weights, statistic=statistic))  # fmt: skip
        d = 100 * (0.25 * (a1 - b1).mean() + 0.75 * (a2 - b2).mean())
        error = 100 * math.sqrt(0.25**2 * (a1 - b1).var() / 200 + 0.75**2 * (a2 - b2).var() / 90)
        assert found.difference == pytest.approx(d)
        assert (found.low, found.high) == pytest.approx((d - 1.96 * error, d + 1.96 * error), abs=0.25 * error)
        assert found.p == pytest.approx(2 * norm.sf(abs(d) / error), abs=0.05)
        assert found.resolved == (not found.low <= 0 <= found.high)
        assert (found.only_a, found.only_b) == (30 + (a2 > b2).sum(), 12 + (a2 < b2).sum())
    same = statistics.compare(result(a1, a2), result(a1, a2))
    assert (same.difference, same.low, same.high, same.p, same.resolved) == (0, 0, 0, 1, False)


def test_comparison_is_wrong_as_often_as_it_says():
    """Two composites of equal truth: resolved in about 5% of samples."""
    rng = np.random.default_rng(6)
    found = 0
    for _ in range(300):
        kinds = rng.choice(4, size=(2, 120), p=[0.5, 0.12, 0.12, 0.26])
        a, b = np.isin(kinds, (0, 1)), np.isin(kinds, (0, 2))
        found += statistics.compare(result(*a, weights=[0.3, 0.7]), result(*b, weights=[0.3, 0.7])).resolved
    assert 0.02 <= found / 300 <= 0.09


def test_standard_error_of_judgebench():
    assert statistics.standard_error(70, 350) == pytest.approx(2.449, abs=5e-4)


@pytest.mark.parametrize("discordant", [None, 20.0])
def test_smallest_difference_has_its_power(discordant):
    n, p, rng = 350, 0.7, np.random.default_rng(7)
    d = statistics.smallest_difference(n, 70, discordant) / 100
    if discordant is None:
        a, b = rng.binomial(n, p + d / 2, 40000), rng.binomial(n, p - d / 2, 40000)
        pooled = (a + b) / (2 * n)
        z = (a - b) / n / np.sqrt(2 * pooled * (1 - pooled) / n)
    else:
        q = discordant / 100
        cells = rng.multinomial(n, [(q + d) / 2, (q - d) / 2, 1 - q], 40000)
        z = (cells[:, 0] - cells[:, 1]) / np.sqrt(cells[:, 0] + cells[:, 1])
    assert (abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.012)


def test_smallest_difference_at_its_edges():
    assert statistics.smallest_difference(350, 70) == pytest.approx(9.70, abs=0.01)
    assert statistics.smallest_difference(350, 70, 20) < statistics.smallest_difference(350, 70, 42) < 9.71
    d, z, z_power = statistics.smallest_difference(40, 70, 30) / 100, 1.959964, 0.841621
    assert d * math.sqrt(40) == pytest.approx(z * math.sqrt(0.3) + z_power * math.sqrt(0.3 - d * d))
    assert statistics.smallest_difference(10, 50, 5) == float("inf")
    for bad in (0, 61):
        with pytest.raises(ConfigError, match="discordant"):
            statistics.smallest_difference(350, 70, bad)


def test_published_verdict_is_that_of_every_possible_table():
    n, verdicts = 40, set()
    for k1 in range(0, 41, 2):
        for k2 in range(0, 41, 2):
            found = []
            errors = []
            for both in range(max(0, k1 + k2 - n), min(k1, k2) + 1):
                a, b = k1 - both, k2 - both
                pvalue = mcnemar([[both, a], [b, n - both - a - b]], exact=True).pvalue if a + b else 1
                found.append(pvalue < 0.05)
                errors.append(100 * math.sqrt(max(0, (a + b) / n - ((a - b) / n) ** 2) / n))
            said = statistics.compare_published(100 * k1 / n, 100 * k2 / n, n)
            assert said.resolved == ("yes" if all(found) else "cannot tell" if any(found) else "no"), (k1, k2)
            assert said.difference == pytest.approx(100 * (k1 - k2) / n)
            for (low, high), error in ((said.narrowest, min(errors)), (said.widest, max(errors))):
                half = 1.959964 * error
                assert (low, high) == pytest.approx((said.difference - half, said.difference + half))
            verdicts.add(said.resolved)
    assert verdicts == {"yes", "no", "cannot tell"}


def test_published_unpaired_interval_and_averages():
    said = statistics.compare_published(71.4, 67.4, 350)
    low, high = confint_proportions_2indep(0.714 * 350, 350, 0.674 * 350, 350, method="wald", compare="diff")
    assert said.unpaired == pytest.approx((100 * low, 100 * high))
    assert said.resolved == "cannot tell"
    # means of several: errors add in squares
    mean = statistics.compare_published([71.4, 90], [67.4, 89], [350, 1000])
    half = 1.959964 * math.hypot((high - low) / 2 / 1.959964, math.sqrt((0.9 * 0.1 + 0.89 * 0.11) / 1000)) / 2
    assert mean.difference == pytest.approx(2.5)
    assert mean.unpaired == pytest.approx((2.5 - 100 * half, 2.5 + 100 * half))
    assert statistics.compare_published([90, 90], [50, 50], [350, 350]).resolved == "yes"
    assert statistics.compare_published([70, 80], [70, 80], [350, 350]).resolved == "no"
    for bad in (([70], [60, 70], [350]), (101, 50, 350), (70, 60, 0)):
        with pytest.raises(ConfigError, match="percentages"):
            statistics.compare_published(*bad)


def test_average_of_benchmarks():
    rng = np.random.default_rng(8)
    first = {"x": result(rng.random(300) < 0.7), "y": result(rng.random(500) < 0.9)}
    second = {"x": result(rng.random(300) < 0.6), "y": result(rng.random(500) < 0.9)}
    mean = statistics.average(first)
    assert mean.overall == pytest.approx((first["x"].overall + first["y"].overall) / 2) and mean.n == 800
    low, high = statistics.interval(mean)
    published = statistics.average_published([first["x"].overall, first["y"].overall], [300, 500])
    assert published[0] == pytest.approx(mean.overall)
    assert (low, high) == pytest.approx(published[1:], abs=0.35)
    errors = [statistics.standard_error(r.overall, n) for r, n in ((first["x"], 300), (first["y"], 500))]
    assert (published[2] - published[1]) / 2 == pytest.approx(1.959964 * math.hypot(*errors) / 2)
    found = statistics.compare(mean, statistics.average(second))
    assert found.difference == pytest.approx(mean.overall - statistics.average(second).overall) and found.n == 800
