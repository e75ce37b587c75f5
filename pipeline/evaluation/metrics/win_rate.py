"""Win rate: how often the annotators prefer a model's answer to another model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from pipeline.evaluation import intervals
from pipeline.rewards.annotators import judge_match


class WinRate(evaluate.Metric):
    """The mean outcome: 1 for a win, 0 for a loss, 0.5 for a tie. The judge sees pairs in random order."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: answers; references: the opponent's; rows: what is judged.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        rows: Sequence[Mapping[str, Any]],
        seed: int = 0,
    ) -> dict[str, Any]:
        values = judge_match(predictions, references, rows, seed)
        return {**intervals.outcome_mean(values, seed), "values": values}
