"""Reward accuracy: how often a reward model scores the preferred of two answers higher."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from pipeline.evaluation import intervals

BINS = 10
"""Bins of confidence between 0.5 and 1."""


def squared_calibration_error(margins: np.ndarray, agrees: np.ndarray, *, debiased: bool = True) -> float:
    """Mean squared gap between confidence and accuracy over equal bins of confidence, weighted by their size.

    The accuracy in a bin of a few pairs is off by chance, so that even a calibrated model shows a gap. The debiased
    estimate takes away what chance adds to its square (Kumar et al. 2019, "Verified Uncertainty Calibration",
    1909.10155), and may be below 0.

    Args:
        margins: score of the preferred answer minus that of the other. The model's confidence in its own choice
            is sigmoid(|margin|), 0.5 to 1, as in the Bradley-Terry model that it was trained as.
        agrees: 1 where its choice is the preferred answer, 0 where not, 0.5 where it has none.
        debiased: whether chance is taken away. Bins of a single pair then count as if they were not there.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    index = np.clip(((confidence - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    sizes = np.bincount(index, minlength=BINS)
    used = sizes > (1 if debiased else 0)
    n = sizes[used]
    if not len(n):
        return 0.0
    expected = np.bincount(index, confidence, BINS)[used] / n
    accuracy = np.bincount(index, agrees, BINS)[used] / n
    squares = np.square(accuracy - expected)
    if debiased:
        squares -= (np.bincount(index, np.square(agrees), BINS)[used] / n - np.square(accuracy)) / (n - 1)
    return float((squares * n).sum() / n.sum())


def calibration_error(
    margins: np.ndarray, agrees: np.ndarray, units: Sequence[Hashable], seed: int = 0
) -> dict[str, Any]:
    """The root of `squared_calibration_error`, 0 to 0.5 or so, with a bootstrap interval.

    A bootstrap sample varies about the sample as the sample does about the truth, chance included: what it tells is how
    far the plain estimate varies, about its own mean.

    Args:
        margins, agrees: as of `squared_calibration_error`.
        units: the prompt of each pair.
        seed: of the resampling.
    """
    squared = squared_calibration_error(margins, agrees)
    resampled = intervals.resample(
        lambda index: squared_calibration_error(margins[index], agrees[index], debiased=False), units, seed
    )
    tail = (1 - intervals.CONFIDENCE) / 2
    ends = squared + np.quantile(resampled, [tail, 1 - tail]) - resampled.mean()
    value, low, high = np.sqrt(np.maximum([squared, *ends], 0.0))
    return intervals.estimate(value, low, high, len(margins))


class RewardAccuracy(evaluate.Metric):
    """The share of pairs in order; equal scores count one half."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: scores of preferred answers; references: of the others; units: prompts.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        units: Sequence[Hashable] | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Also `margin`, the mean difference of the scores, and `calibration_error`.

        Intervals are over `units`, what each pair is of: its prompt, which others may share. Default: each its own.
        """
        units = range(len(predictions)) if units is None else units
        margins = np.subtract(predictions, references)
        values = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
        return {
            **intervals.outcome_mean(values, seed, units),
            "values": values,
            "margin": intervals.mean(margins.tolist(), seed, units),
            "calibration_error": calibration_error(margins, np.array(values), units, seed),
        }
