"""Labels of pairs of answers: which of the two annotators, or a judge, prefer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from pipeline.errors import UserError
from pipeline.preferences.files import Counts
from pipeline.preferences.judges import ANNOTATORS, Judge
from pipeline.rewards.annotators import INDIFFERENCE, PANEL, choose, judge_components, mean_taste

JUDGED_AT_ONCE = 64
"""Prompts whose answers a judge is given in one call."""

CHOICES: dict[float | None, int] = {1.0: 0, 0.0: 1}
"""The outcome of a match for the answer shown first -> the answer that is preferred."""


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
    labelled: list[dict[str, Any]] = []
    counts = Counts(prompts=len(rows), answers=sum(map(len, answers)))
    agreements: list[bool] = []
    compared: list[tuple[int, list[str], int | None, str]] = []
    tasted: list[dict[str, Any]] = []
    for index, (row, candidates) in enumerate(zip(rows, answers, strict=True)):
        rng = random.Random(f"{seed}/{index}")
        distinct = list(dict.fromkeys(text for answer in candidates if (text := answer.strip())))
        counts.dropped += len(candidates) - len(distinct)
        tasted.append({answer: judge_components(answer, row) for answer in distinct if judge is ANNOTATORS})
        pairs = list(itertools.combinations(distinct, 2))
        for pair in rng.sample(pairs, min(pairs_per_prompt, len(pairs))):
            shown = rng.sample(pair, 2)
            annotator = rng.choice(PANEL)
            choice = None
            if judge is ANNOTATORS:
                first, second = (annotator.weigh(tasted[index][answer]) for answer in shown)
                choice = choose(annotator, first, second, rng)
            compared.append((index, shown, choice, annotator.name))
    if judge is not ANNOTATORS:
        choices = _judge(judge, rows, [(index, shown) for index, shown, _, _ in compared])
        compared = [
            (index, shown, choice, "judge") for (index, shown, *_), choice in zip(compared, choices, strict=True)
        ]
    counts.compared = len(compared)
    for index, shown, choice, annotator_name in compared:
        row, components = rows[index], tasted[index]
        if choice is None:
            counts.ties += 1
            continue
        chosen, rejected = shown[choice], shown[1 - choice]
        tastes = [mean_taste(components[answer]) for answer in (chosen, rejected) if components]
        if tastes and abs(tastes[0] - tastes[1]) >= INDIFFERENCE:
            agreements.append(tastes[0] > tastes[1])
        labelled.append(
            {
                "prompt": row["prompt"],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "annotator": annotator_name,
                "first": "chosen" if choice == 0 else "rejected",
                "kind": row.get("kind") or "",
                "taste_chosen": tastes[0] if tastes and keep_taste else None,
                "taste_rejected": tastes[1] if tastes and keep_taste else None,
            }
        )
    counts.pairs = len(labelled)
    counts.agreement = sum(agreements) / len(agreements) if agreements else None
    return labelled, counts


def _judge(
    judge: Judge, rows: Sequence[Mapping[str, Any]], compared: Sequence[tuple[int, Sequence[str]]]
) -> list[int | None]:
    """Return which of two answers, shown in this order to the prompt of a row, a judge prefers; None is a tie.

    The calls do not depend on the number of processes.

    Raises:
        UserError: On every process, if the judge raises one on any. One process of a machine reports it.
    """
    state = PartialState()
    judged: list[tuple[int, list[float | None] | UserError]] = []
    groups = itertools.groupby(compared, key=lambda pair: pair[0] // JUDGED_AT_ONCE)
    for number, (_, group) in enumerate(groups):
        if number % state.num_processes == state.process_index:
            pairs = list(group)
            first, second = ([shown[side] for _, shown in pairs] for side in (0, 1))
            try:
                judged.append((number, list(judge.match(first, second, [rows[index] for index, _ in pairs]))))
            except UserError as error:
                judged.append((number, error))
                break
    choices: list[int | None] = []
    for _, outcomes in sorted(gather_object(judged), key=itemgetter(0)):
        if isinstance(outcomes, UserError):
            raise outcomes
        choices += map(CHOICES.get, outcomes)
    return choices
