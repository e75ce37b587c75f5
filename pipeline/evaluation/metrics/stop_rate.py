"""Stop rate: the share of answers that the model ends itself, before the limit of tokens."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from pipeline.evaluation import intervals
from pipeline.models.generation import stopped


class StopRate(evaluate.Metric):
    """Answers that hold an end-of-turn token."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: token ids of each answer; eos_token_id: what ends one.",
            features=datasets.Features({"predictions": datasets.List(datasets.Value("int64"))}),
        )

    def _compute(self, predictions: list[list[int]], eos_token_id: int | list[int]) -> dict[str, Any]:
        values = [float(stopped(tokens, eos_token_id)) for tokens in predictions]
        return {**intervals.proportion(values), "values": values}
