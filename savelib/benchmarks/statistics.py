"""What a figure's size resolves: intervals, paired comparisons, averages. Percent and points; 95% unless said.

Rows are taken as independent draws of what a benchmark asks; a judge's own noise is not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.stats import binomtest, norm
from statsmodels.stats.proportion import proportion_confint

from savelib.config import ConfigError

Interval = tuple[float, float]
RESAMPLES = 2000


def half_up(value: float, decimals: int = 1) -> str:
    """77.25 -> '77.3', where binary rounding gives 77.2. A float's error below 1e-9 is taken off first."""
    return str(Decimal(f"{value:.9f}").quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP))


def possible_counts(percent: str, n: int) -> list[int]:
    """The k for which k of n prints as `percent`, a text because its decimals count: ('69.2', 350) -> []."""
    decimals = len(percent.partition(".")[2])
    return [k for k in range(n + 1) if half_up(100 * k / n, decimals) == percent]


def between(value: float, name: str) -> float:
    """A level or a power. Raises ConfigError unless it is a number above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConfigError(f"{name} = {value!r} must be a number above 0 and below 1")
    return float(value)


# ---- figures whose rows are at hand


def interval(figure: Result | list[Stratum], level: float = 0.95) -> Interval:
    """(low, high) of an overall figure, or of the weighted mean of strata.

    Wilson for a plain accuracy (credits 0 or 1, each row of the same weight), else a stratified percentile bootstrap.
    """
    level, strata = between(level, "level"), figure.strata if isinstance(figure, Result) else figure
    total = sum(s.weight for s in strata)
    strata = [replace(s, weight=s.weight / total) for s in strata]
    if not _plain(strata):
        return percentiles(bootstrap(strata)[0], level)
    credit = np.concatenate([s.credit[:, 0] for s in strata])
    low, high = proportion_confint(credit.sum(), len(credit), alpha=1 - level, method="wilson")
    return 100 * float(low), 100 * float(high)


def bootstrap(*models: list[Stratum], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """[models, resamples] resampled overall figures; models have the same rows, of which each draw is the same.

    Each stratum is drawn by itself, as many rows as it has. Pitfall: a stratum without a single error never varies.
    """
    rng = np.random.default_rng(seed)
    return 100 * sum(_draws(same, rng, resamples) for same in zip(*models, strict=True))


def percentiles(draws: np.ndarray, level: float = 0.95) -> Interval:
    """(low, high) of draws: the share `level` of them lies between."""
    level = between(level, "level")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def average(results: Mapping[str, Result]) -> Result:
    """The plain mean of benchmarks as one Result, for `interval` and `compare`; its parts are the benchmarks."""
    strata = [
        replace(s, name=f"{name}/{s.name}", weight=s.weight / len(results), ids=[f"{name}/{i}" for i in s.ids])
        for name, result in results.items()
        for s in result.strata
    ]
    return Result(strata, {k: r.overall for k, r in results.items()}, {k: r.n for k, r in results.items()})


@dataclass(frozen=True)
class Comparison:
    """a minus b in points, with its interval. Rows: both right (credit 1), a's credit higher, b's higher, of n."""

    difference: float
    low: float
    high: float
    p: float
    resolved: bool
    both: int
    only_a: int
    only_b: int
    n: int


def compare(a: Result, b: Result, level: float = 0.95) -> Comparison:
    """Two models on the same rows: paired stratified bootstrap; p by exact McNemar where both are plain accuracies.

    resolved: McNemar's p < 1 - level; for composites, the interval leaves out 0 (and p is the bootstrap's, two-sided,
    at least 2 / (RESAMPLES + 1)). Raises ConfigError unless both have the same rows with the same weights.
    """
    if [s.name for s in a.strata] != [s.name for s in b.strata]:
        raise ConfigError(
            f"strata differ: {[s.name for s in a.strata]} and {[s.name for s in b.strata]}; compare "
            "results of one benchmark"
        )
    theirs = [_aligned(s, t) for s, t in zip(a.strata, b.strata, strict=True)]
    draws = np.subtract(*bootstrap(a.strata, theirs))
    low, high = percentiles(draws, level)
    ours, other = (np.concatenate([s.credit[:, 0] for s in strata]) for strata in (a.strata, theirs))
    only_a, only_b = int((ours > other).sum()), int((ours < other).sum())
    if _plain(a.strata) and _plain(theirs):
        p = _mcnemar(only_a, only_b)
        resolved = p < 1 - level
    else:
        p = min(1.0, 2 * (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / (1 + len(draws)))
        resolved = not low <= 0 <= high
    both = int(((ours == 1) & (other == 1)).sum())
    return Comparison(a.overall - b.overall, low, high, float(p), bool(resolved), both, only_a, only_b, len(ours))


def _plain(strata: list[Stratum]) -> bool:
    """Whether the figure is the share of right rows."""
    n = sum(len(s.credit) for s in strata)
    return all(
        s.statistic is mean_credit and np.isclose(s.weight, len(s.credit) / n) and np.isin(s.credit[:, 0], (0, 1)).all()
        for s in strata
    )


def _draws(same: tuple[Stratum, ...], rng: np.random.Generator, resamples: int) -> np.ndarray:
    """[models, resamples] weighted values of one stratum. Rows that are alike are drawn together, by their counts."""
    n = len(same[0].credit)
    if all(s.statistic is mean_credit for s in same):
        kinds, counts = np.unique(np.stack([s.credit[:, 0] for s in same], 1), axis=0, return_counts=True)
        drawn = rng.multinomial(n, counts / n, size=resamples) @ kinds / n
    else:
        rows = (rng.integers(n, size=n) for _ in range(resamples))
        drawn = np.array([[s.value(r) for s in same] for r in rows])
    return same[0].weight * drawn.T


def _aligned(a: Stratum, b: Stratum) -> Stratum:
    """b with its rows in a's order."""
    place = {i: k for k, i in enumerate(b.ids)}
    missing, extra = [i for i in a.ids if i not in place], sorted(place.keys() - set(a.ids))
    if missing or extra or len(a.ids) != len(set(a.ids)) or len(b.ids) != len(place):
        raise ConfigError(
            f"rows of {a.name!r} differ: {len(a.ids)} and {len(b.ids)}, {len(missing)} only in the first "
            f"{missing[:1]}, {len(extra)} only in the second {extra[:1]}; score both models on the same rows"
        )
    if not np.isclose(a.weight, b.weight):
        raise ConfigError(f"weights of {a.name!r} differ: {a.weight} and {b.weight}; compare results of one benchmark")
    return replace(b, ids=a.ids, credit=b.credit[[place[i] for i in a.ids]])


def _mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar: the rows that only one has right are a fair coin's."""
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


# ---- what a size can resolve, and figures of which only percentages are published


def standard_error(percent: float, n: int) -> float:
    """Points: 100 sqrt(p (1 - p) / n). JudgeBench, 350 rows at 70%: 2.4."""
    return float(np.sqrt(percent * (100 - percent) / n))


def smallest_difference(
    n: int, percent: float, discordant: float | None = None, power: float = 0.8, level: float = 0.95
) -> float:
    """The smallest true difference, in points, that n rows find with this power at about this accuracy.

    Unpaired: d = (z + z') sqrt(2 p (1 - p) / n), z and z' the normal quantiles of (1 + level) / 2 and of power.
    Paired: d sqrt(n) = z sqrt(q) + z' sqrt(q - d^2), q = `discordant`, the percentage of rows that exactly one of the
    two has right = 100 - agreement (Connor 1987, for McNemar's test). inf where d would have to exceed q.
    """
    z, z_power = norm.ppf([(1 + between(level, "level")) / 2, between(power, "power")])
    _published(percent, n)
    if discordant is None:
        return float((z + z_power) * np.sqrt(2) * standard_error(percent, n))
    q, most = discordant / 100, 2 * min(percent, 100 - percent)
    if not 0 < discordant <= most:
        raise ConfigError(f"discordant = {discordant}: at {percent}% it lies above 0 and up to {most:g} percent")
    d = z * np.sqrt(q * n) + np.sqrt(z**2 * q * n - (n + z_power**2) * (z**2 - z_power**2) * q)
    d /= n + z_power**2
    return float(100 * d) if d <= q else float("inf")


@dataclass(frozen=True)
class Published:
    """First minus second in points, with the intervals that its margins allow; `resolved`: yes, no or cannot tell.

    unpaired: as if on different rows. narrowest, widest: on the same rows, the two agreeing as much or as little as
    the percentages allow: the rows that one alone has right are between |d| and min(p1 + p2, 200 - p1 - p2).
    """

    difference: float
    unpaired: Interval
    narrowest: Interval
    widest: Interval
    resolved: str


def compare_published(
    p1: float | Sequence[float], p2: float | Sequence[float], n: int | Sequence[int], level: float = 0.95
) -> Published:
    """Two percentages of right rows among the same n, of which no row is published; or plain means of several such.

    Intervals are Wald's: d +- z sqrt((q - d^2) / n), q the share of discordant rows. `resolved` is what holds at both
    ends of q: exact McNemar for one pair, for means whether 0 lies outside. For a composite the answer is that of an
    accuracy with n rows.
    """
    (a, n), (b, _) = _published(p1, n), _published(p2, n)
    a, b = a / 100, b / 100
    d, z = a - b, norm.ppf((1 + between(level, "level")) / 2)

    def around(variance: np.ndarray) -> Interval:
        half = z * np.sqrt(np.maximum(variance, 0).sum()) / len(d)
        return float(100 * (d.mean() - half)), float(100 * (d.mean() + half))

    least, most = abs(d), np.minimum(a + b, 2 - a - b)
    narrowest, widest = (around((q - d**2) / n) for q in (least, most))
    if len(d) == 1:
        k, one = round(abs(d[0]) * n[0]), round(min(a[0], b[0], 1 - a[0], 1 - b[0]) * n[0])
        found = [_mcnemar(k + extra, extra) < 1 - level for extra in (0, one)]
    else:
        found = [not low <= 0 <= high for low, high in (narrowest, widest)]
    return Published(
        float(100 * d.mean()),
        around((a * (1 - a) + b * (1 - b)) / n),
        narrowest,
        widest,
        {(True, True): "yes", (False, False): "no"}.get(tuple(found), "cannot tell"),
    )


def _published(percents: float | Sequence[float], n: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Both as vectors. Raises ConfigError unless they are as many percentages as sizes."""
    found, sizes = (np.atleast_1d(np.asarray(x, float)) for x in (percents, n))
    fit = ((found >= 0) & (found <= 100)).all() and ((sizes >= 1) & np.isfinite(sizes)).all()
    if not fit or not len(found) == len(sizes) > 0:
        raise ConfigError(f"{percents} of n = {n}: give as many percentages (0 to 100) as sizes (1 or more)")
    return found, sizes


def average_published(percents: Sequence[float], n: Sequence[int], level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of independent accuracies' plain mean: its standard error is sqrt(sum of squares) / count."""
    (percents, n), z = _published(percents, n), norm.ppf((1 + between(level, "level")) / 2)
    errors = [standard_error(p, size) for p, size in zip(percents, n, strict=True)]
    mean, half = np.mean(percents), z * np.linalg.norm(errors) / len(errors)
    return float(mean), float(mean - half), float(mean + half)


def interval_of_mean(values: pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean; (nan, nan) from fewer than two values or from equal ones."""
    level = between(level, "level")
    if len(values) < 2 or not values.std() > 0:
        return float("nan"), float("nan")
    return tuple(map(float, stats.t.interval(level, len(values) - 1, values.mean(), values.sem())))


def mean_credit(credit: np.ndarray) -> float:
    """The mean of the first column of [n, k]."""
    return float(credit[:, 0].mean())


@dataclass(frozen=True)
class Stratum:
    """Rows that one part of the overall figure is made of; they are what a bootstrap draws from.

    weight: the part's share of the overall figure; the weights of a benchmark sum to 1.
    credit [n, k]: what each row gives, 0 to 1 in the first column; more columns where the statistic needs them.
    statistic: [n, k] -> 0 to 1.
    """

    name: str
    weight: float
    ids: list[str]
    credit: np.ndarray
    statistic: Callable[[np.ndarray], float] = mean_credit

    def value(self, rows: np.ndarray | slice = slice(None)) -> float:
        return self.statistic(self.credit[rows])


@dataclass(frozen=True)
class Result:
    """A benchmark's figures for one reward model, in percent and unrounded; `counts` are rows.

    missing: parts of the benchmark that the data lack; `overall` is then of the parts that they have.
    rows: the number of rows, where a stratum's ids are something else.
    """

    strata: list[Stratum]
    parts: dict[str, float]
    counts: dict[str, int]
    more: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    rows: int = 0

    @property
    def overall(self) -> float:
        return 100 * sum(s.weight * s.value() for s in self.strata)

    @property
    def n(self) -> int:
        return self.rows or len({i for s in self.strata for i in s.ids})
