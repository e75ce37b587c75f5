"""Labels of pairs of answers: which of the two annotators, or a judge, prefer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.preferences.files import Counts
from pipeline.preferences.judges import ANNOTATORS, Judge
from pipeline.rewards.annotators import INDIFFERENCE, PANEL, choose, judge_components, mean_taste

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
        judge: Who compares them; several answers to a prompt are judged at once.

    Returns:
        The labelled pairs, as rows of the data set to write, and what became of the answers.
    """
    labelled: list[dict[str, Any]] = []
    counts = Counts(prompts=len(rows), answers=sum(map(len, answers)))
    agreements: list[bool] = []
    for index, (row, candidates) in enumerate(zip(rows, answers, strict=True)):
        rng = random.Random(f"{seed}/{index}")
        distinct = list(dict.fromkeys(text for answer in candidates if (text := answer.strip())))
        counts.dropped += len(candidates) - len(distinct)
        components = {answer: judge_components(answer, row) for answer in distinct if judge is ANNOTATORS}
        pairs = list(itertools.combinations(distinct, 2))
        for pair in rng.sample(pairs, min(pairs_per_prompt, len(pairs))):
            shown = rng.sample(pair, 2)
            annotator = rng.choice(PANEL)
            counts.compared += 1
            if judge is ANNOTATORS:
                first, second = (annotator.weigh(components[answer]) for answer in shown)
                choice = choose(annotator, first, second, rng)
            else:
                (outcome,) = judge.match(shown[:1], shown[1:], [row])
                choice = CHOICES.get(outcome)
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
                    "annotator": annotator.name if components else "judge",
                    "first": "chosen" if choice == 0 else "rejected",
                    "kind": row.get("kind") or "",
                    "taste_chosen": tastes[0] if tastes and keep_taste else None,
                    "taste_rejected": tastes[1] if tastes and keep_taste else None,
                }
            )
    counts.pairs = len(labelled)
    counts.agreement = sum(agreements) / len(agreements) if agreements else None
    return labelled, counts
