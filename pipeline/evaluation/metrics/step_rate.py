"""Step rate: the share of answers that show worked steps before the final answer."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from pipeline.evaluation import intervals
from pipeline.rewards.grading import has_steps


class StepRate(evaluate.Metric):
    """Answers with a sentence or an equation before "The answer is"; right or wrong does not matter."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: answers.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str]) -> dict[str, Any]:
        values = [float(has_steps(answer)) for answer in predictions]
        return {**intervals.proportion(values), "values": values}
