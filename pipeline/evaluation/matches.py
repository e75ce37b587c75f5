"""The metrics of preference: answers of two models to the same prompts, judged by the annotators."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import evaluate

from pipeline.evaluation import intervals
from pipeline.evaluation.held_out import Example
from pipeline.evaluation.metrics import STRING, ChatModel, info, output
from pipeline.evaluation.results import StageResult
from pipeline.rewards.annotators import judge_match

Matches = dict[str, tuple[list[str], list[str]]]
"""`win_rate` (sampled) and `win_rate_greedy` -> answers to the same prompts by a model and by its opponent."""


class WinRate(evaluate.Metric):
    """The mean outcome: 1 for a win, 0 for a loss, 0.5 for a tie."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = "predictions: answers; references: the opponent's; rows: what the answers are judged by."
        return info(self, inputs, predictions=STRING, references=STRING)

    def _compute(
        self, predictions: list[str], references: list[str], rows: Sequence[Mapping[str, Any]], seed: int = 0
    ) -> dict[str, Any]:
        values = judge_match(predictions, references, rows)
        return output(intervals.outcome_mean(values, seed), values)


class LastSentenceShare(evaluate.Metric):
    """The share of answers that end in their most frequent last sentence: 1 if all end in the same one."""

    def _info(self) -> evaluate.MetricInfo:
        return info(self, "predictions: answers.", predictions=STRING)

    def _compute(self, predictions: list[str]) -> dict[str, Any]:
        last = [re.split(r"[.!?]\s+", answer.strip())[-1].rstrip(".!?").casefold() for answer in predictions]
        ((most, _),) = Counter(last).most_common(1)
        values = [float(sentence == most) for sentence in last]
        return output(intervals.proportion(values), values)


def answer_both(
    chat: ChatModel, opponent: ChatModel | Mapping[str, list[str]], rows: Sequence[Example], seed: int = 0
) -> Matches:
    """Answer the prompts by both models, at temperature 1 and greedily; the opponent's answers may be given.

    The opponent samples with a different seed, so that a model against itself does not tie every time.
    """
    prompts = [row["prompt"] for row in rows]
    ours = [c[0].text for c in chat.sample(prompts, temperature=1.0, seed=2 * seed)]
    greedy = [completion.text for completion in chat.greedy(prompts)]
    if isinstance(opponent, Mapping):
        return {"win_rate": (ours, opponent["win_rate"]), "win_rate_greedy": (greedy, opponent["win_rate_greedy"])}
    theirs = [c[0].text for c in opponent.sample(prompts, temperature=1.0, seed=2 * seed + 1)]
    other = greedy if opponent is chat else [completion.text for completion in opponent.greedy(prompts)]
    return {"win_rate": (ours, theirs), "win_rate_greedy": (greedy, other)}


def measure_matches(result: StageResult, matches: Matches, rows: Sequence[Example], seed: int = 0) -> None:
    """Record `win_rate` and `win_rate_greedy`, judged by the annotators, and how many answers end alike in both."""
    for name, (ours, theirs) in matches.items():
        record_wins(result, name, ours, theirs, rows, seed)
        ends = LastSentenceShare().compute(predictions=ours)
        result.record(name.replace("win_rate", "last_sentence_share"), ends, rows, by_kind=None)


def record_wins(
    result: StageResult, name: str, ours: Sequence[str], theirs: Sequence[str], rows: Sequence[Example], seed: int
) -> None:
    """Record under `name` how often `ours` win against `theirs`."""
    wins = WinRate().compute(predictions=ours, references=theirs, rows=rows, seed=seed)
    extras = [{"answer": a, "opponent": b} for a, b in zip(ours, theirs, strict=True)]
    result.record(name, wins, rows, extras=extras)
