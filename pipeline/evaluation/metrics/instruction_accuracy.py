"""Instruction accuracy: the share of answers that are right by their row's own rule."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from pipeline.evaluation import intervals
from pipeline.rewards.grading import grade


class InstructionAccuracy(evaluate.Metric):
    """Answers judged by the words that they must and must not hold, their length, and tests of their code.

    The text is judged as it stands, whether or not the model ended its turn: an answer that runs on until the
    limit of tokens counts if it meets the rule. Whether answers end is what the stop rate says.
    """

    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.List(datasets.Value("string"))
        rule = {
            "require": datasets.List(strings),
            "reject": strings,
            "max_words": datasets.Value("int64"),
            "test": datasets.Value("string"),
        }
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: answers; references: rules, see pipeline.rewards.grading.",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": rule}),
        )

    def _compute(self, predictions: list[str], references: list[dict[str, Any]]) -> dict[str, Any]:
        values = [float(correct) for correct in grade(predictions, references)]
        return {**intervals.proportion(values), "values": values}
