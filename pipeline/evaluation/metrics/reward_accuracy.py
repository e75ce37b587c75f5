"""Reward accuracy: how often a reward model scores the preferred of two answers higher."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from pipeline.evaluation import intervals


def expected_calibration_error(margins: np.ndarray, agrees: np.ndarray, bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence, weighted by their size.

    Args:
        margins: score of the preferred answer minus that of the other. The model's confidence in its own
            choice
            is sigmoid(|margin|), 0.5 to 1, as in the Bradley-Terry model that it was trained as.
        agrees: 1 where its choice is the preferred answer, 0 where not, 0.5 where it has none.
        bins: number of bins of confidence between 0.5 and 1.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    index = np.clip(((confidence - 0.5) * 2 * bins).astype(int), 0, bins - 1)
    gaps = np.bincount(index, weights=confidence - agrees, minlength=bins)
    return float(np.abs(gaps).sum() / len(margins))


class RewardAccuracy(evaluate.Metric):
    """The share of pairs in order; equal scores count one half."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: scores of preferred answers; references: of the others.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float], seed: int = 0) -> dict[str, Any]:
        """Also `margin`, the mean difference of the scores, and `calibration_error`."""
        margins = [chosen - rejected for chosen, rejected in zip(predictions, references, strict=True)]
        values = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
        return {
            **intervals.outcome_mean(values, seed),
            "values": values,
            "margin": intervals.mean(margins, seed),
            "calibration_error": intervals.statistic(
                lambda index: expected_calibration_error(np.take(margins, index), np.take(values, index)),
                len(values),
                seed,
            ),
        }
