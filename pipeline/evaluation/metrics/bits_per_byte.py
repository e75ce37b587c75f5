"""Bits per byte: how many bits the model needs for a byte of held-out text. Independent of the tokenizer."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate

from pipeline.evaluation import intervals


class BitsPerByte(evaluate.Metric):
    """Total negative log-likelihood over total bytes: a long document weighs more than a short one."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: loss of each document in nats; references: the documents.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[str], seed: int = 0) -> dict[str, Any]:
        """The interval is bootstrapped over documents."""
        sizes = [len(text.encode()) for text in references]
        bits = [loss / math.log(2) for loss in predictions]
        values = [total / size if size else 0.0 for total, size in zip(bits, sizes, strict=True)]
        return {**intervals.ratio(bits, sizes, seed), "values": values}
