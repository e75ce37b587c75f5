"""pass@k: the probability that at least one of k sampled answers to a problem is right."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import datasets
import evaluate

from pipeline.evaluation import intervals


def estimate_pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of pass@k from `n` samples of which `correct` are right (Chen et al. 2021, eq. 1).

    It is the share of all sets of k of the n samples that hold at least one right one. The plug-in estimate,
    1 - (1 - correct / n)^k, is too low on average.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= correct <= n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@{k} of {correct} right out of {n} samples")
    return 1 - comb(n - correct, k) / comb(n, k)


class PassAtK(evaluate.Metric):
    """The estimate averaged over problems; final answers only are compared."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv:2107.03374",
            inputs_description="predictions: sampled answers to each problem; references: final answers; k.",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("string")),
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[str]], references: list[str], k: int = 1, seed: int = 0
    ) -> dict[str, Any]:
        """The interval is over problems, never over samples."""
        flat = [answer for answers in predictions for answer in answers]
        repeated = [ref for answers, ref in zip(predictions, references, strict=True) for _ in answers]
        verdicts = iter(grade_final_answers(flat, repeated))
        right = [sum(next(verdicts) for _ in answers) for answers in predictions]
        values = [
            estimate_pass_at_k(len(answers), correct, k) for answers, correct in zip(predictions, right, strict=True)
        ]
        return {**intervals.outcome_mean(values, seed), "values": values}


def grade_final_answers(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each text's final answer is the reference: as a number, as words, or else mathematically."""
    from pipeline.rewards.answers import number
    from pipeline.rewards.functions import exact_answer, math_answer

    correct = [reward == 1.0 for reward in exact_answer(answers, references)]
    # "1/2" and "\frac{1}{2}" are the same; a plain number has been compared as one already.
    formulas = [i for i, right in enumerate(correct) if not right and number(references[i]) is None]
    if formulas:
        rewards = math_answer([answers[i] for i in formulas], [references[i] for i in formulas])
        for i, reward in zip(formulas, rewards, strict=True):
            correct[i] = reward == 1.0
    return correct
