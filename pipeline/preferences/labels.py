"""Labels of pairs of answers: which of two answers the simulated annotators, or a judge, prefer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from pipeline.data.messages import labelled_pair
from pipeline.preferences.judges import ANNOTATORS, Judge
from pipeline.rewards.annotators import INDIFFERENCE, PANEL, choose, judge_components, mean_taste

JUDGED_AT_ONCE = 64
"""Prompts whose answers a judge is given in one call."""

CHOICES: dict[float | None, int] = {1.0: 0, 0.0: 1}
"""The outcome of a match for the answer shown first -> the answer that is preferred."""


@dataclass
class Counts:
    """Counts of the prompts, answers and pairs of one split.

    Attributes:
        prompts: Prompts sampled from.
        answers: Answers sampled.
        dropped: Answers that were empty or repeated another one to the same prompt.
        compared: Pairs of the remaining answers that were shown to an annotator.
        ties: Pairs that the annotator found equally good.
        pairs: Pairs that got a label.
        agreement: Share (0 to 1) of the labels that agree with the noise-free taste, among pairs on which the taste is
            not indifferent: the accuracy of a perfect reward model. None if there are no such pairs.
    """

    prompts: int = 0
    answers: int = 0
    dropped: int = 0
    compared: int = 0
    ties: int = 0
    pairs: int = 0
    agreement: float | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {text}" for name, text in self.texts().items())

    def texts(self) -> dict[str, str]:
        """Return every count as text, by name."""
        return {k: f"{value:.3f}" if isinstance(value, float) else str(value) for k, value in asdict(self).items()}


@dataclass
class Comparison:
    """Two answers to a prompt that somebody compares.

    Attributes:
        row: Index of the prompt's row.
        shown: The answers, in the order in which they are shown.
        annotator: Name of who compares them.
        choice: Index of the preferred answer in `shown`; None is a tie.
    """

    row: int
    shown: list[str]
    annotator: str = "judge"
    choice: int | None = None


def label_answers(
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[Sequence[str]],
    *,
    pairs_per_prompt: int,
    seed: int | str = 0,
    keep_taste: bool = False,
    judge: Judge = ANNOTATORS,
) -> tuple[list[dict[str, Any]], Counts]:
    """Let the simulated annotators, or a judge, compare the answers to each prompt.

    Args:
        rows: Rows of the prompts: `prompt`, and `kind`, `require`, `reject` and `test` where they exist.
        answers: The answers to each prompt; empty and repeated ones are dropped.
        pairs_per_prompt: Maximum number of pairs compared per prompt.
        seed: Seed of the pairs, annotators, order and noise. Every row has a generator of its own, so that the answers
            to one prompt do not influence the labels of another.
        keep_taste: Whether to keep the noise-free taste; its columns are None otherwise, and for a judge.
        judge: Who compares them, the answers to many prompts at once; processes take turns.

    Returns:
        The labelled pairs, as rows of the data set to write, and what became of the answers.
    """
    # prompt     answers             comparisons           labels
    # "fox?"     A, B, "", A, C  ->  A or B, C or A   ->   chosen B, rejected A; the second is a tie, and dropped
    counts = Counts(prompts=len(rows), answers=sum(map(len, answers)))
    comparisons: list[Comparison] = []
    # What the annotators see in each answer to a prompt; nothing if a judge compares.
    seen: list[dict[str, Any]] = []
    for index, (row, candidates) in enumerate(zip(rows, answers, strict=True)):
        distinct = list(dict.fromkeys(text for answer in candidates if (text := answer.strip())))
        counts.dropped += len(candidates) - len(distinct)
        seen.append({answer: judge_components(answer, row) for answer in distinct if judge is ANNOTATORS})

        # The draws come in the same order with and without a judge, who so compares the same pairs.
        rng = random.Random(f"{seed}/{index}")
        pairs = list(itertools.combinations(distinct, 2))
        for pair in rng.sample(pairs, min(pairs_per_prompt, len(pairs))):
            shown = rng.sample(pair, 2)
            annotator = rng.choice(PANEL)
            comparison = Comparison(index, shown)
            if judge is ANNOTATORS:
                first, second = (annotator.weigh(seen[index][answer]) for answer in shown)
                comparison.annotator = annotator.name
                comparison.choice = choose(annotator, first, second, rng)
            comparisons.append(comparison)
    if judge is not ANNOTATORS:
        _judge(judge, rows, comparisons)

    labelled: list[dict[str, Any]] = []
    agreements: list[bool] = []
    for comparison in comparisons:
        if comparison.choice is None:
            counts.ties += 1
            continue
        row, components = rows[comparison.row], seen[comparison.row]
        chosen, rejected = comparison.shown[comparison.choice], comparison.shown[1 - comparison.choice]
        tastes = [mean_taste(components[answer]) for answer in (chosen, rejected) if components]
        if tastes and abs(tastes[0] - tastes[1]) >= INDIFFERENCE:
            agreements.append(tastes[0] > tastes[1])
        labelled.append(
            labelled_pair(
                row["prompt"],
                chosen,
                rejected,
                annotator=comparison.annotator,
                chosen_first=comparison.choice == 0,
                kind=row.get("kind") or "",
                tastes=tastes if tastes and keep_taste else (None, None),
            )
        )
    counts.compared = len(comparisons)
    counts.pairs = len(labelled)
    counts.agreement = sum(agreements) / len(agreements) if agreements else None
    return labelled, counts


def _judge(judge: Judge, rows: Sequence[Mapping[str, Any]], comparisons: Sequence[Comparison]) -> None:
    """Let a judge make the choice of each comparison. The calls do not depend on the number of processes."""
    state = PartialState()
    judged: list[tuple[int, list[float | None]]] = []
    groups = itertools.groupby(comparisons, key=lambda comparison: comparison.row // JUDGED_AT_ONCE)
    for number, (_, group) in enumerate(groups):
        if number % state.num_processes != state.process_index:
            continue
        asked = list(group)
        first, second = ([comparison.shown[side] for comparison in asked] for side in (0, 1))
        judged.append((number, list(judge.match(first, second, [rows[comparison.row] for comparison in asked]))))

    # In the order of the groups, whichever process judged them.
    choices = [CHOICES.get(outcome) for _, outcomes in sorted(gather_object(judged)) for outcome in outcomes]
    for comparison, choice in zip(comparisons, choices, strict=True):
        comparison.choice = choice
