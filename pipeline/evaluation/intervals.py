"""Estimates with 95% confidence intervals: Wilson for proportions, Student's t over seeds, bootstrap otherwise.

The sampling unit is the problem, the document or the prompt, never the sample, the token or the pair: eight samples of
one problem are not eight problems. The bootstrap is seeded, so the same values always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Number of bootstrap samples of a ratio or a mean; of any other statistic, `resample` draws 500."""
MOST_COUNTS = 4_000_000
"""Largest number of entries in an array of `_bootstrap_counts`, which then has 8 MB."""
TAILS = ((1 - CONFIDENCE) / 2, 1 - (1 - CONFIDENCE) / 2)
"""Quantiles at which a percentile interval ends."""
Z = NormalDist().inv_cdf(TAILS[1])
"""Half the width of a normal interval, in standard errors."""


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95% interval, as evaluation writes it to disk and the report reads it.

    The interval always contains the value: ends that rounding, or a bootstrap of a skewed statistic, puts on the wrong
    side of it are moved to the value.

    Attributes:
        value: The measured value.
        low, high: The ends of the interval, None if they are not known.
        n: Number of examples, None if it is not known.
        by_kind: The estimate for each kind of example; empty if it is not broken down.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    by_kind: Mapping[str, Estimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))
        if self.low is not None:
            object.__setattr__(self, "low", min(float(self.low), self.value))
        if self.high is not None:
            object.__setattr__(self, "high", max(float(self.high), self.value))

    def to_json(self) -> dict[str, Any]:
        """Return `{"value", "ci95": [low, high], "n"}`, and `by_kind` if there are kinds; unknown entries are null."""
        interval = None
        if self.low is not None and self.high is not None:
            interval = [self.low, self.high]
        entry: dict[str, Any] = {"value": self.value, "ci95": interval, "n": self.n}
        if self.by_kind:
            entry["by_kind"] = {kind: estimate.to_json() for kind, estimate in self.by_kind.items()}
        return entry

    @classmethod
    def from_json(cls, entry: object) -> Estimate:
        """Read what `to_json` returns.

        Raises:
            ValueError: If the "value" is missing or not a finite number, or another entry has another type.
        """
        content = entry if isinstance(entry, dict) else {}
        value = finite(content.get("value"))
        if value is None:
            raise ValueError('no number under "value"')
        low = high = None
        interval = content.get("ci95")
        if interval:
            ends: list[float | None] = []
            if isinstance(interval, list | tuple):
                ends = list(map(finite, interval))
            if len(ends) != 2 or None in ends:
                raise ValueError('no two numbers under "ci95"')
            low, high = ends
        n = content.get("n")
        if n is not None and finite(n) is None:
            raise ValueError('no number under "n"')
        kinds = content.get("by_kind") or {}
        if not isinstance(kinds, dict):
            raise ValueError('no object under "by_kind"')
        return cls(value, low, high, n, {kind: cls.from_json(inner) for kind, inner in kinds.items()})


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None if it is not a number, or not finite, or at least 1e100."""
    # Differences and squares of larger numbers would overflow.
    if isinstance(value, int | float) and abs(value) < 1e100:
        return float(value)
    return None


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Return the score interval of a proportion of `n` trials (Wilson 1927), which keeps its coverage near 0 and 1.

    Without trials, it is (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    # The ends are the shares p that are exactly Z standard errors of p away from the measured share.
    centre = share + Z * Z / (2 * n)
    half = Z * (share * (1 - share) / n + Z * Z / (4 * n * n)) ** 0.5
    scale = 1 + Z * Z / n
    # At 0 and n the ends are exactly 0 and 1.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def _bootstrap_counts(n: int, seed: int) -> Iterator[np.ndarray]:
    """Draw bootstrap samples of `n` units, and yield how often each sample has each unit.

    With these counts, the sums over a sample are a product of matrices, and the units need not be copied. For three
    units, a sample of the second one, the third one and the third one again is [0, 1, 2].

    Yields:
        Counts of the next samples, shape (samples, n). There are `RESAMPLES` in all. An array has as many of them as
        `MOST_COUNTS` entries have room for, at least one.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, MOST_COUNTS // n)
    for start in range(0, RESAMPLES, rows):
        yield generator.multinomial(n, np.full(n, 1 / n), size=min(rows, RESAMPLES - start)).astype(np.int16)


@lru_cache(maxsize=16)
def _cached_counts(n: int, seed: int) -> list[np.ndarray]:
    """Return all arrays of `_bootstrap_counts`. A report needs the same few numbers of units many times."""
    return list(_bootstrap_counts(n, seed))


def ratio(totals: Sequence[float], weights: Sequence[float], seed: int = 0) -> Estimate:
    """Estimate sum(totals) / sum(weights), with a percentile interval from resampling whole units with replacement.

    Both have shape (units,), for instance the bits and the bytes of each document. Fewer than two units have no
    interval, because the variation between units is unknown.
    """
    n = len(totals)
    numerator = np.asarray(totals, dtype=np.float64)
    denominator = np.asarray(weights, dtype=np.float64)
    if n == 0:
        return Estimate(float("nan"), n=0)
    if n == 1:
        return Estimate(float(numerator[0] / denominator[0]), n=1)
    arrays: Iterable[np.ndarray]
    if n * RESAMPLES <= MOST_COUNTS:
        arrays = _cached_counts(n, seed)
    else:
        arrays = _bootstrap_counts(n, seed)
    sums = [(counts @ numerator, counts @ denominator) for counts in arrays]
    # The sums of each bootstrap sample, shape (RESAMPLES,).
    total, weight = map(np.concatenate, zip(*sums, strict=True))
    # A sample may happen to have only units without weight.
    low, high = np.quantile(total[weight > 0] / weight[weight > 0], TAILS)
    return Estimate(float(numerator.sum() / denominator.sum()), low, high, n)


def mean(values: Sequence[float], seed: int = 0, units: Sequence[Hashable] | None = None) -> Estimate:
    """Estimate a mean, with a bootstrap interval over units.

    Args:
        values: The values.
        seed: Seed of the bootstrap.
        units: The unit of each value, such as its prompt. Default: each value is its own unit.
    """
    n = len(values)
    if units is None:
        numbers = np.arange(n)
    else:
        numbers = _number_units(units)
    # The sum of the values of each unit, and how many it has.
    estimate = ratio(np.bincount(numbers, values), np.bincount(numbers), seed)
    value = math.nan
    if n:
        value = float(np.mean(values))
    return replace(estimate, value=value, n=n)


def outcome_mean(outcomes: Sequence[float], seed: int = 0, units: Sequence[Hashable] | None = None) -> Estimate:
    """Estimate the mean of outcomes between 0 and 1, such as the share of right answers.

    If all outcomes are 0 or 1, the interval is Wilson's; otherwise, it is bootstrapped over units. For units with
    several outcomes, Wilson's interval is the one of as many independent outcomes as have the same variance.

    Args:
        outcomes: The outcomes.
        seed: Seed of the bootstrap.
        units: The unit of each outcome, such as its prompt. Default: each outcome is its own unit.
    """
    if not all(value in (0, 1) for value in outcomes):
        return mean(outcomes, seed, units)
    n = len(outcomes)
    if n == 0:
        return Estimate(math.nan, *wilson(0, 0), 0)
    successes = float(sum(outcomes))
    if units is None:
        return Estimate(successes / n, *wilson(successes, n), n)
    independent = _independent_outcomes(outcomes, units)
    return Estimate(successes / n, *wilson(successes / n * independent, independent), n)


def _independent_outcomes(outcomes: Sequence[float], units: Sequence[Hashable]) -> float:
    """Return the number of independent outcomes whose mean varies as much as the mean of these (Kish 1965).

    Eight answers to one prompt are worth between one and eight independent answers, depending on how alike they are.
    """
    n = len(outcomes)
    numbers = _number_units(units)
    groups = int(numbers.max()) + 1
    deviations = np.asarray(outcomes, dtype=np.float64) - sum(outcomes) / n
    sum_of_squares = np.square(deviations).sum()
    # The design effect is the variance of the mean, divided by the variance if all outcomes were independent. If all
    # outcomes are equal, it cannot be estimated: assume that the outcomes of a unit are always the same.
    design_effect = n / groups
    if sum_of_squares > 0 and groups > 1:
        sum_of_unit_squares = np.square(np.bincount(numbers, deviations)).sum()
        design_effect = (sum_of_unit_squares * groups / (groups - 1)) / (sum_of_squares * n / (n - 1))
    return n / max(1.0, design_effect)


def _number_units(units: Sequence[Hashable]) -> np.ndarray:
    """Return a number for each unit, from 0 in the order of first occurrence: [0, 1, 0] for ["b", "a", "b"]."""
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    return np.array([numbers[unit] for unit in units])


def mean_difference(differences: Sequence[float], weights: Sequence[float], is_share: bool = False) -> Estimate:
    """Estimate the weighted mean of paired differences, such as between two models' outcomes on the same problems.

    The interval is bootstrapped, except where that could give one without width: 24 zeros are 24 zeros in each
    bootstrap sample.

    Args:
        differences: The difference of each unit.
        weights: The weight of each unit.
        is_share: Whether the mean is the difference of two shares, so that it lies between -1 and 1.
    """
    n = len(differences)
    distinct = set(differences)
    has_few_values = distinct <= {-1.0, 0.0, 1.0} or len(distinct) == 1
    is_weighted = len(set(weights)) > 1
    if is_share and n >= 2 and has_few_values and not is_weighted:
        return _difference_of_shares(differences)
    totals = [difference * weight for difference, weight in zip(differences, weights, strict=True)]
    return ratio(totals, weights)


def _difference_of_shares(differences: Sequence[float]) -> Estimate:
    """Estimate the difference of two shares from paired differences: 1 for a gain, -1 for a loss, 0 for no change.

    The interval is the normal one after one more gain and one more loss (Bonett and Price 2012, "Adjusted Wald
    confidence interval for a difference of binomial proportions based on paired data").
    """
    n = len(differences)
    centre = sum(differences) / (n + 2)
    variance = (sum(difference * difference for difference in differences) + 2) / (n + 2) - centre**2
    half = Z * (variance / (n + 2)) ** 0.5
    return Estimate(fmean(differences), max(centre - half, -1.0), min(centre + half, 1.0), n)


def resample(function: Callable[[np.ndarray], float], units: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """Return a statistic of rows for each of 500 bootstrap samples of their units, shape (500,).

    This is for statistics that are no `ratio` of sums over units, such as a correlation.

    Args:
        function: Returns the statistic of the rows with the indices in an array. An index may occur several times.
        units: The unit of each row. A sample has all rows of a unit, as often as the unit is drawn.
        seed: Seed of the bootstrap.
    """
    numbers = _number_units(units)
    # The indices of the rows, unit by unit: unit u has rows[ends[u] - sizes[u] : ends[u]].
    rows = np.argsort(numbers, kind="stable")
    sizes = np.bincount(numbers)
    ends = np.cumsum(sizes)

    def rows_of(drawn: np.ndarray) -> np.ndarray:
        """Return the indices of all rows of the units that were drawn, one unit after the other."""
        # For three units with 2, 1 and 3 rows, of which the last one and then the first one are drawn:
        #
        #   sizes                 2  1  3
        #   drawn                 2        0     2
        #   rows of the sample    3  4  5  0  1  3  4  5
        lengths = sizes[drawn]
        return rows[np.arange(lengths.sum()) + np.repeat(ends[drawn] - np.cumsum(lengths), lengths)]

    generator = np.random.default_rng(seed)
    values = []
    for _ in range(500):
        drawn = generator.integers(0, len(sizes), len(sizes))
        values.append(function(rows_of(drawn)))
    return np.array(values)


def statistic(function: Callable[[np.ndarray], float], units: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Estimate any statistic of rows, with a bootstrap interval over their units; arguments as for `resample`.

    The rows of a single unit have no interval.
    """
    value = function(np.arange(len(units)))
    if len(set(units)) < 2:
        return Estimate(value, n=len(units))
    low, high = np.quantile(resample(function, units, seed), TAILS)
    return Estimate(value, low, high, len(units))


def simultaneous(estimate: Estimate, tests: int, lowest: float = -math.inf, highest: float = math.inf) -> Estimate:
    """Widen the interval of one of several estimates, so that all hold together with 95% (Bonferroni).

    Each interval then holds with 1 - 0.05 / tests. It is widened by the same factor as a normal interval, because 2000
    bootstrap samples say too little about ends so far out.

    Args:
        estimate: An estimate with a 95% interval over rows. Without an interval, it is returned as it is.
        tests: The number of estimates.
        lowest, highest: The bounds of the value, beyond which the interval does not reach.
    """
    if tests == 1 or estimate.low is None or estimate.high is None:
        return estimate
    scale = NormalDist().inv_cdf((1 + confidence_of_each(tests)) / 2) / Z
    low = estimate.value - scale * (estimate.value - estimate.low)
    high = estimate.value + scale * (estimate.high - estimate.value)
    return replace(estimate, low=max(low, lowest), high=min(high, highest))


def confidence_of_each(tests: int) -> float:
    """Return the confidence of each of several intervals that hold together with 95% (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / tests


def over_seeds(
    runs: Sequence[Estimate], lowest: float = -math.inf, highest: float = math.inf, *, tests: int = 1
) -> Estimate:
    """Estimate the mean of a metric over runs of different seeds.

    The interval is Student's over the values of the runs, which vary with the training and with the test rows. It is at
    least as wide as the widest interval of a run. `n` is the number of runs. The estimate of a single run is returned
    as it is: its interval is over rows only.

    Args:
        runs: The estimate of each run.
        lowest, highest: The bounds of the metric, beyond which the interval does not reach.
        tests: The number of estimates that are to hold together with 95%, for which Student's interval is widened. The
            caller widens the intervals of the runs by `simultaneous`.
    """
    if len(runs) == 1:
        return runs[0]
    # A few runs can agree by chance, which would make Student's interval too narrow. The intervals of the runs are over
    # rows, and averaging does not narrow them, because seeds often share their test rows.
    n = len(runs)
    value = fmean(run.value for run in runs)
    half = student_t(n - 1, confidence_of_each(tests)) * stdev(run.value for run in runs) / n**0.5
    below = max([half, *(run.value - run.low for run in runs if run.low is not None)])
    above = max([half, *(run.high - run.value for run in runs if run.high is not None)])
    return Estimate(value, max(value - below, lowest), min(value + above, highest), n)


@cache
def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return half the width of Student's interval in standard errors: 12.7 for one degree of freedom, 1.96 for many.

    `degrees` is at least 1.
    """
    # With t = sqrt(degrees) * tan(angle), the density of the angle is proportional to cos(angle)^(degrees - 1). It is
    # summed over 100,000 strips, which is exact to more digits than are ever printed, and needs no SciPy.
    edges = np.linspace(0, np.pi / 2, 100_001)
    covered = np.cumsum(np.cos((edges[:-1] + edges[1:]) / 2) ** (degrees - 1))
    return float(degrees**0.5 * np.tan(np.interp(confidence, covered / covered[-1], edges[1:])))
