"""The metrics of reward models: whether the preferred answers score higher, and how well the scores are calibrated.

`pairs: {dataset_name: allenai/reward-bench, dataset_test_split: filtered}` in evaluate.yaml uses the pairs of
RewardBench; docs/tools.md says how the tool `rewardbench` itself loads a model.
"""

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features

from pipeline.data.votes import VOTES_FILE, as_pairs, read_votes, split_of, valid_votes
from pipeline.evaluation import intervals
from pipeline.evaluation.evaluate_yaml import VOTES
from pipeline.evaluation.metrics import NUMBER, Metric
from pipeline.evaluation.parts import Rows
from pipeline.evaluation.results import StageResult
from pipeline.files import as_list, read_json
from pipeline.preferences.judges import load_annotators

Rate = Callable[[Sequence[Sequence[dict[str, str]]]], Sequence[float]]
"""Conversations that end with an answer -> a score for each."""

BINS = 10
"""Bins of confidence between 0.5 and 1."""


def squared_calibration_error(margins: np.ndarray, *, debiased: bool = True) -> float:
    """Return the mean squared gap between confidence and accuracy over equal bins of confidence, weighted by size.

    The accuracy in a bin of a few pairs is off by chance, so even a calibrated model shows a gap. The debiased estimate
    subtracts what chance adds to the square (Kumar et al. 2019, "Verified Uncertainty Calibration", arXiv:1909.10155),
    and may be negative.

    Args:
        margins: Score of the preferred answer minus the score of the other, shape (pairs,).
        debiased: Whether to subtract the effect of chance. Bins of one pair do not count then.
    """
    # A choice is right, wrong or, with equal scores, half right; its confidence is sigmoid(|margin|) (Bradley-Terry).
    agrees = (np.sign(margins) + 1) / 2
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    index = np.clip(((confidence - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    sizes = np.bincount(index, minlength=BINS)
    used = sizes > int(debiased)
    n = sizes[used]
    if not len(n):
        return 0.0
    expected = np.bincount(index, confidence, BINS)[used] / n
    accuracy = np.bincount(index, agrees, BINS)[used] / n
    # Chance inflates the square of a bin's gap by the variance of its accuracy: subtract that.
    squares = np.square(accuracy - expected)
    if debiased:
        squares -= (np.bincount(index, np.square(agrees), BINS)[used] / n - np.square(accuracy)) / (n - 1)
    return float((squares * n).sum() / n.sum())


def calibration_error(margins: np.ndarray, units: Sequence[Hashable], seed: int = 0) -> intervals.Estimate:
    """Estimate the root of `squared_calibration_error`, from 0 to about 0.5, with a bootstrap interval over units.

    `margins` has shape (pairs,), and `units` the unit of each pair, such as its prompt.
    """
    squared = squared_calibration_error(margins)
    if len(set(units)) < 2:
        return intervals.Estimate(max(squared, 0.0) ** 0.5, n=len(margins))
    resampled = intervals.resample(lambda index: squared_calibration_error(margins[index], debiased=False), units, seed)
    # Bootstrap samples vary around the sample as the sample varies around the truth, including the effect of chance. So
    # the interval is the spread of the plain estimate around its own mean, moved to the debiased estimate.
    ends = squared + np.quantile(resampled, intervals.TAILS) - resampled.mean()
    value, low, high = np.sqrt(np.maximum([squared, *ends], 0.0))
    return intervals.Estimate(value, low, high, len(margins))


def reward_accuracy(
    predictions: Sequence[float],
    references: Sequence[float],
    units: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The share of pairs whose preferred answer scores higher; equal scores count one half.

    Predictions are the scores of the preferred answers, references the scores of the others. `margin`, the mean
    difference, and `calibration_error` are returned as well. The intervals are over `units`, such as the prompts, which
    several pairs may share. Default: each pair is its own unit.
    """
    if units is None:
        units = range(len(predictions))
    margins = np.subtract(predictions, references)
    values = ((np.sign(margins) + 1) / 2).tolist()
    return intervals.outcome_mean(values, seed, units).to_json() | {
        "values": values,
        "margin": intervals.mean(margins.tolist(), seed, units).to_json(),
        "calibration_error": calibration_error(margins, units, seed).to_json(),
    }


class RewardAccuracy(Metric):
    columns = Features(predictions=NUMBER, references=NUMBER)
    measure = staticmethod(reward_accuracy)


def measure_pairs(result: StageResult, rate: Rate, pairs: Rows) -> None:
    """Record the accuracy of a reward model, its margin, its calibration error and its correlation with length.

    `reward_accuracy_noise_free` is against the annotators' taste (`taste_chosen`, `taste_rejected`, if known), on the
    pairs between which they are not indifferent. All intervals are over prompts, which may have several pairs.
    """
    scores = _score_both(rate, pairs)
    labelled = _record_accuracy(result, "reward_accuracy", scores, pairs)
    for name in ("margin", "calibration_error"):
        result.metrics[f"reward_{name}"] = intervals.Estimate.from_json(labelled[name])

    # Labels are a noisy sample of the annotators' taste. Here, the better answer is what they prefer on average.
    gaps = np.array([(row.get("taste_chosen") or 0.0) - (row.get("taste_rejected") or 0.0) for row in pairs])
    different: list[int] = []
    # Without tastes, there is no need to load the annotators.
    if gaps.any():
        different = np.flatnonzero(np.abs(gaps) >= load_annotators().INDIFFERENCE).tolist()
    if different:
        better_first = np.where(gaps[:, None] > 0, scores, scores[:, ::-1])
        rows = [pairs[index] for index in different]
        _record_accuracy(result, "reward_accuracy_noise_free", better_first[different], rows)

    lengths = np.array([[_words(row["chosen"]), _words(row["rejected"])] for row in pairs])

    def correlation(index: np.ndarray) -> float:
        """Return Pearson's correlation of the lengths and scores of some pairs, 0 if either is constant."""
        x = lengths[index].ravel()
        y = scores[index].ravel()
        if np.std(x) == 0 or np.std(y) == 0:
            return 0.0
        return float(np.corrcoef(x, y)[0, 1])

    units = [json.dumps(row["prompt"]) for row in pairs]
    result.metrics["reward_length_correlation"] = intervals.statistic(correlation, units, result.seed)


def _words(answer: Sequence[dict[str, str]]) -> int:
    """Return the number of words in the last message of an answer."""
    return len(answer[-1]["content"].split())


def measure_people(result: StageResult, rate: Rate, run: Path) -> None:
    """Record `reward_accuracy_people`, the accuracy against the votes of people that the model was not trained on.

    Nothing is recorded if nobody has voted.
    """
    names = as_list(read_json(run / result.name / "arguments.json").get("dataset_name") or [])
    is_trained = any((Path(name) / VOTES_FILE).is_file() or Path(name).name == VOTES for name in names)
    # If it was trained on votes, only their test split remains; prompts are split by content, alike on every machine.
    votes = valid_votes(read_votes(run / VOTES / VOTES_FILE))
    held_out = [vote for vote in votes if not is_trained or split_of(vote["prompt"]) == "test"]
    pairs = [{**pair, "id": number} for number, pair in enumerate(as_pairs(held_out))]
    if pairs:
        _record_accuracy(result, "reward_accuracy_people", _score_both(rate, pairs), pairs)


def _record_accuracy(result: StageResult, name: str, scores: np.ndarray, pairs: Rows) -> dict[str, Any]:
    """Record under `name` how often the first answer of a pair scores higher. Return what `reward_accuracy` returns.

    `scores` has shape (pairs, 2).
    """
    units = [json.dumps(row["prompt"]) for row in pairs]
    better, worse = scores.T.tolist()
    measured = reward_accuracy(better, worse, units, result.seed)
    result.record(name, measured, pairs, units=units)
    return measured


def _score_both(rate: Rate, pairs: Rows) -> np.ndarray:
    """Return the scores of both answers of each pair, shape (pairs, 2), the preferred one first."""
    conversations = [[*row["prompt"], *row["chosen"]] for row in pairs]
    conversations += [[*row["prompt"], *row["rejected"]] for row in pairs]
    return np.array(rate(conversations)).reshape(2, -1).T
