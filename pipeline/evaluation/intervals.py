"""Estimates with 95% confidence intervals: Wilson for proportions, Student's t over seeds, bootstrap otherwise.

The sampling unit is the problem, the document or the prompt, never the sample, the token or the pair: eight samples of
one problem are not eight problems. The bootstrap is seeded, so the same values always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Bootstrap samples of a ratio or a mean; of any other statistic, `resample` draws 500."""
MOST_COUNTS = 4_000_000
"""Largest number of entries in an array that says how often each unit is drawn."""
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
            ValueError: If the "value" is missing or not a finite number.
        """
        content = entry if isinstance(entry, dict) else {}
        value = finite(content.get("value"))
        if value is None:
            raise ValueError('no number under "value"')
        kinds = {kind: cls.from_json(inner) for kind, inner in content.get("by_kind", {}).items()}
        low, high = content.get("ci95") or (None, None)
        return cls(value, low, high, content.get("n"), kinds)


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None if it is not a finite number of usable size."""
    # With larger ones, differences and squares would overflow.
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


def _draw_counts(n: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each of `n` units is drawn, a row for each resample: so the units need not be copied.

    However many units there are, an array has at most `MOST_COUNTS` entries.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, MOST_COUNTS // n)
    for start in range(0, RESAMPLES, rows):
        yield generator.multinomial(n, np.full(n, 1 / n), size=min(rows, RESAMPLES - start)).astype(np.int16)


# A report needs few numbers of units, many times.
_keep_counts = lru_cache(maxsize=16)(lambda n, seed: list(_draw_counts(n, seed)))


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
    # sum(totals) of a resample is (how often each unit is drawn) @ totals, for all resamples in one product.
    parts = _keep_counts(n, seed) if n * RESAMPLES <= MOST_COUNTS else _draw_counts(n, seed)
    sums = [(counts @ numerator, counts @ denominator) for counts in parts]
    total, weight = map(np.concatenate, zip(*sums, strict=True))
    # A resample may happen to draw only units without weight.
    low, high = np.quantile(total[weight > 0] / weight[weight > 0], TAILS)
    return Estimate(float(numerator.sum() / denominator.sum()), low, high, n)


def mean(values: Sequence[float], seed: int = 0, units: Sequence[Hashable] | None = None) -> Estimate:
    """Estimate a mean, with a bootstrap interval over the unit of each value; by default, each is a unit of its own."""
    n = len(values)
    number = np.arange(n) if units is None else _numbered(units)
    estimate = ratio(np.bincount(number, values), np.bincount(number), seed)
    value = float(np.mean(values)) if n else math.nan
    return replace(estimate, value=value, n=n)


def outcome_mean(outcomes: Sequence[float], seed: int = 0, units: Sequence[Hashable] | None = None) -> Estimate:
    """Estimate the mean of outcomes between 0 and 1: Wilson's interval if all are 0 or 1, else the bootstrap's.

    Each outcome belongs to one of the `units`, by default its own. If units have several, Wilson's interval uses the
    number of independent outcomes with the same variance (Kish 1965).
    """
    if not all(value in (0, 1) for value in outcomes):
        return mean(outcomes, seed, units)
    n = len(outcomes)
    if n == 0:
        return Estimate(math.nan, *wilson(0, 0), 0)
    successes = float(sum(outcomes))
    if units is None:
        return Estimate(successes / n, *wilson(successes, n), n)
    # Eight answers to one prompt are worth between one and eight independent ones, depending on how alike they are. The
    # effect is the variance of the grouped outcomes' mean, divided by the variance if all were independent.
    number = _numbered(units)
    groups = int(number.max()) + 1
    deviations = np.asarray(outcomes, dtype=np.float64) - successes / n
    alone = np.square(deviations).sum()
    # If all outcomes are equal, the similarity within a unit is unknown: assume that they are always the same.
    effect = n / groups
    if alone > 0 and groups > 1:
        grouped = np.square(np.bincount(number, deviations)).sum()
        effect = (grouped * groups / (groups - 1)) / (alone * n / (n - 1))
    independent = n / max(1.0, effect)
    return Estimate(successes / n, *wilson(successes / n * independent, independent), n)


def _numbered(units: Sequence[Hashable]) -> np.ndarray:
    """Number the units from 0, in the order of their first occurrence."""
    number = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    return np.array([number[unit] for unit in units])


def mean_difference(differences: Sequence[float], weights: Sequence[float], of_share: bool = False) -> Estimate:
    """Estimate the weighted mean of paired differences, one per unit, with a bootstrap interval.

    With `of_share`, they lie between -1 and 1. If they are all equal, or are all -1, 0 or 1, the interval is the one of
    Bonett and Price (2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data"): the normal one after one more gain and one more loss. A bootstrap of 24 zeros would have no width.
    """
    n = len(differences)
    are_counts = set(differences) <= {-1.0, 0.0, 1.0} or len(set(differences)) == 1
    if n < 2 or not of_share or not are_counts or len(set(weights)) > 1:
        totals = [difference * weight for difference, weight in zip(differences, weights, strict=True)]
        return ratio(totals, weights)
    centre = sum(differences) / (n + 2)
    spread = (sum(difference * difference for difference in differences) + 2) / (n + 2) - centre**2
    half = Z * (spread / (n + 2)) ** 0.5
    return Estimate(fmean(differences), max(centre - half, -1.0), min(centre + half, 1.0), n)


def resample(function: Callable[[np.ndarray], float], units: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """Return a statistic of rows for each of 500 bootstrap samples of their units.

    Unlike a `ratio`, which needs no more than how often each unit is drawn, it is computed from the rows.

    Args:
        function: Returns the statistic of the rows with the given indices, in which a row may occur several times.
        units: The unit of each row.
        seed: Seed of the resampling.
    """
    number = _numbered(units)
    # The rows of a unit are next to each other: unit u has rows[ends[u] - sizes[u] : ends[u]].
    rows = np.argsort(number, kind="stable")
    sizes = np.bincount(number)
    ends = np.cumsum(sizes)

    def rows_of(drawn: np.ndarray) -> np.ndarray:
        # In the sample, the rows of a unit follow the rows of the units drawn before:
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
    """Estimate any statistic of rows, with a percentile interval over their units; arguments as for `resample`."""
    value = function(np.arange(len(units)))
    if len(set(units)) < 2:
        return Estimate(value, n=len(units))
    low, high = np.quantile(resample(function, units, seed), TAILS)
    return Estimate(value, low, high, len(units))


def simultaneous(estimate: Estimate, tests: int, lowest: float = -math.inf, highest: float = math.inf) -> Estimate:
    """Widen the interval over rows of one of several estimates, so that all hold together with 95% (Bonferroni).

    Each interval then holds with 1 - 0.05 / tests. It is widened as much as a normal one would be, because 2000
    bootstrap samples say too little about ends so far out.

    Args:
        estimate: An estimate with a 95% interval.
        tests: The number of estimates.
        lowest, highest: The bounds of the value.
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
    """Estimate the mean of a metric, which lies between `lowest` and `highest`, over runs of different seeds.

    The interval is Student's over the runs' values, which vary with the training and with the test rows. `n` is the
    number of runs. The estimate of a single run is returned as it is: its interval is over rows only. If the mean is
    one of several `tests`, the interval is as wide as by `simultaneous`, which the caller applies to each run.
    """
    if len(runs) == 1:
        return runs[0]
    # A few runs can agree by chance, so the interval is at least as wide as the widest of the runs' own. Those are over
    # rows and do not shrink with the number of runs, because seeds often share their test rows.
    n = len(runs)
    value = fmean(run.value for run in runs)
    half = student_t(n - 1, confidence_of_each(tests)) * stdev(run.value for run in runs) / n**0.5
    below = max([half, *(run.value - run.low for run in runs if run.low is not None)])
    above = max([half, *(run.high - run.value for run in runs if run.high is not None)])
    return Estimate(value, max(value - below, lowest), min(value + above, highest), n)


@cache
def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return half the width of Student's interval in standard errors, with at least one degree of freedom."""
    # The density of t = sqrt(degrees) * tan(angle), as one of the angle, is proportional to cos(angle)^(degrees - 1).
    # 100,000 strips give more exact digits than are ever printed, without SciPy.
    edges = np.linspace(0, np.pi / 2, 100_001)
    covered = np.cumsum(np.cos((edges[:-1] + edges[1:]) / 2) ** (degrees - 1))
    return float(degrees**0.5 * np.tan(np.interp(confidence, covered / covered[-1], edges[1:])))
