"""Measuring a reward model: does it score the answer higher that people prefer?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation import intervals
from pipeline.evaluation.measurements import record
from pipeline.evaluation.metrics.reward_accuracy import RewardAccuracy
from pipeline.evaluation.results import StageResult
from pipeline.rewards.annotators import INDIFFERENCE


@torch.inference_mode()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict[str, str]]]
) -> list[float]:
    """The model's score of each conversation, which ends with the assistant's answer.

    Each is scored by itself. In a batch the sums of a matrix multiplication are made in another order, and a score
    would depend, in its last bits, on what else is scored and on where the padding is.
    """
    model.eval()
    scores = []
    for conversation in conversations:
        ids = tokenizer.apply_chat_template(list(conversation), return_dict=False)
        scores.append(float(model(input_ids=torch.tensor([ids], device=model.device)).logits[0, 0]))
    return scores


def measure(
    result: StageResult,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[dict[str, Any]],
    seed: int = 0,
) -> None:
    """Add accuracy against labels and against the noise-free taste, margin, calibration, the pull of length.

    The accuracy against the taste is over the pairs between which the annotators are not indifferent. All intervals are
    over prompts, which may have several pairs.

    Args:
        result: what the metrics are added to.
        model: a sequence classifier with one label.
        tokenizer: its tokenizer, with a chat template.
        pairs: `prompt`, `chosen`, `rejected`, and `taste_chosen`, `taste_rejected` where they are known.
        seed: of the intervals.
    """
    chosen = score(model, tokenizer, [[*row["prompt"], *row["chosen"]] for row in pairs])
    rejected = score(model, tokenizer, [[*row["prompt"], *row["rejected"]] for row in pairs])
    prompts = [json.dumps(row["prompt"]) for row in pairs]
    labelled = RewardAccuracy().compute(predictions=chosen, references=rejected, units=prompts, seed=seed)
    result.metrics["reward_margin"] = labelled["margin"]
    result.metrics["reward_calibration_error"] = labelled["calibration_error"]
    record(result, "reward_accuracy", labelled, pairs, units=prompts)

    tasted = [i for i, row in enumerate(pairs) if abs(_taste_gap(row)) >= INDIFFERENCE]
    if tasted:
        # Labels may be noise: here the better answer is the one that is better by the annotators' taste.
        better = [chosen[i] if _taste_gap(pairs[i]) > 0 else rejected[i] for i in tasted]
        worse = [rejected[i] if _taste_gap(pairs[i]) > 0 else chosen[i] for i in tasted]
        units = [prompts[i] for i in tasted]
        noise_free = RewardAccuracy().compute(predictions=better, references=worse, units=units, seed=seed)
        record(result, "reward_accuracy_noise_free", noise_free, [pairs[i] for i in tasted], units=units)

    # (pairs, 2): both answers of a pair.
    lengths = np.array([[len(row[side][-1]["content"].split()) for side in ("chosen", "rejected")] for row in pairs])
    scores = np.array([chosen, rejected]).T
    result.metrics["reward_length_correlation"] = intervals.statistic(
        lambda index: correlation(lengths[index].ravel(), scores[index].ravel()), prompts, seed
    )


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of them does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) > 0 and np.std(y) > 0 else 0.0


def _taste_gap(row: dict[str, Any]) -> float:
    chosen, rejected = row.get("taste_chosen"), row.get("taste_rejected")
    return 0.0 if chosen is None or rejected is None else chosen - rejected
