"""95% confidence intervals: Wilson's for proportions, the bootstrap for everything else.

The sampling unit is the problem, the document or the prompt, never the sample, the token or the pair: eight samples of
one problem are not eight problems. The bootstrap is seeded, so that the same values always give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


def estimate(value: float, low: float, high: float, n: int) -> dict[str, Any]:
    """A measured value as it is written to disk: `{"value", "ci95": [low, high], "n"}`, plain floats."""
    return {"value": float(value), "ci95": [float(low), float(high)], "n": n}


def wilson(successes: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): honest near 0 and 1, where the normal one has no width.

    Args:
        successes: how many of the `n` independent trials succeeded, 0 to `n`.
        n: number of trials; with none, nothing is known and the interval is (0, 1).
        confidence: coverage, 0.95 by default.
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    # At 0 and n the ends are 0 and 1 exactly; rounding must not push them past the value.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def bootstrap(
    totals: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """Percentile interval of the ratio sum(totals) / sum(weights), resampling whole units with replacement.

    Args:
        totals: shape (units,), for instance the bits of each document, or each problem's estimate.
        weights: shape (units,), for instance the bytes of each document; 1 each by default, a plain mean.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        confidence: coverage, 0.95 by default.

    Returns:
        (low, high); the value itself twice where there are fewer than two units.
    """
    numerator = np.asarray(totals, dtype=np.float64)
    denominator = np.ones_like(numerator) if weights is None else np.asarray(weights, dtype=np.float64)
    n = len(numerator)
    if n < 2:
        value = float(numerator.sum() / denominator.sum()) if n else float("nan")
        return value, value
    # How often each unit is drawn, a row for each resample: no copy of the units is made.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    ratios = (counts @ numerator) / (counts @ denominator)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def proportion(outcomes: Sequence[float]) -> dict[str, Any]:
    """The share of `outcomes` (zeros and ones, or bools) that are 1, with Wilson's interval."""
    n = len(outcomes)
    successes = float(sum(outcomes))
    return estimate(successes / n if n else float("nan"), *wilson(successes, n), n)


def mean(values: Sequence[float], seed: int = 0, units: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """The mean of some values, with a bootstrap interval.

    Args:
        values: one a unit, or several.
        seed: of the bootstrap.
        units: what each value is of, by default a unit of its own.
    """
    n = len(values)
    value = float(np.mean(values)) if n else float("nan")
    if units is None:
        return estimate(value, *bootstrap(values, seed=seed), n)
    number = _numbered(units)
    return estimate(value, *bootstrap(np.bincount(number, values), np.bincount(number), seed=seed), n)


def outcome_mean(outcomes: Sequence[float], seed: int = 0, units: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """The mean of outcomes from 0 to 1: Wilson's interval if each is 0 or 1, else the bootstrap's.

    Args:
        outcomes: one a unit, or several.
        seed: of the bootstrap.
        units: what each outcome is of, by default a unit of its own. If some have several, Wilson's interval is that of
            as many independent outcomes as would vary as much (Kish 1965).
    """
    if not all(value in (0, 1) for value in outcomes):
        return mean(outcomes, seed, units)
    if units is None or not outcomes:
        return proportion(outcomes)
    n, share = len(outcomes), float(np.mean(outcomes))
    independent = min(n, n / _design_effect(np.asarray(outcomes, dtype=np.float64), _numbered(units)))
    return estimate(share, *wilson(share * independent, independent), n)


def _design_effect(outcomes: np.ndarray, number: np.ndarray) -> float:
    """How many times the variance of independent outcomes' mean that of grouped ones' has."""
    n, groups = len(outcomes), int(number.max()) + 1
    deviations = outcomes - outcomes.mean()
    alone = float(np.square(deviations).sum())
    if alone == 0 or groups < 2:
        return n / groups  # nothing tells how alike those of a group are: as alike as can be
    grouped = float(np.square(np.bincount(number, deviations)).sum())
    return (grouped * groups / (groups - 1)) / (alone * n / (n - 1))


def _numbered(units: Sequence[Hashable]) -> np.ndarray:
    """Units by numbers from 0, in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(unit, len(numbers)) for unit in units])


def ratio(totals: Sequence[float], weights: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """sum(totals) / sum(weights) over units such as documents, with a bootstrap interval."""
    n = len(totals)
    value = float(np.sum(totals) / np.sum(weights)) if n else float("nan")
    return estimate(value, *bootstrap(totals, weights, seed=seed), n)


def resample(
    function: Callable[[np.ndarray], float], units: Sequence[Hashable], seed: int = 0, resamples: int = 500
) -> np.ndarray:
    """Any statistic of rows, of bootstrap samples of their units.

    Args:
        function: gives the statistic of the rows with these indices; one may occur several times.
        units: the unit of each row.
        seed: of the resampling.
        resamples: number of bootstrap samples.

    Returns:
        (`resamples`,) values.
    """
    number = _numbered(units)
    by_unit = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(by_unit), len(by_unit)) for _ in range(resamples))
    return np.array([function(np.concatenate([by_unit[unit] for unit in sample])) for sample in drawn])


def statistic(function: Callable[[np.ndarray], float], units: Sequence[Hashable], seed: int = 0) -> dict[str, Any]:
    """Any statistic of rows, with a percentile bootstrap interval over their units; arguments as of `resample`."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resample(function, units, seed), [tail, 1 - tail])
    return estimate(function(np.arange(len(units))), low, high, len(units))


def paired_difference(
    before: Mapping[Hashable, float], after: Mapping[Hashable, float], seed: int = 0
) -> dict[str, Any]:
    """How much the mean rose on the same examples: mean(after - before), bootstrapped over the examples.

    Args:
        before: value of each example in the earlier measurement, by example id.
        after: the same for the later one. Examples that only one of the two holds do not count.
        seed: of the bootstrap.

    Returns:
        `{"value", "ci95", "n"}`. Where all differences are alike the interval has no width.
    """
    shared = [key for key in before if key in after]
    return mean([after[key] - before[key] for key in shared], seed=seed)
