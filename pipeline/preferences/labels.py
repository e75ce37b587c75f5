"""Labels for pairs of answers: which one the simulated annotators, or a judge, prefer."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from pipeline.data.messages import labelled_pair
from pipeline.preferences.judges import ANNOTATORS, Judge, load_annotators
from pipeline.rewards.functions import read_texts

T = TypeVar("T")
R = TypeVar("R")
JUDGED_AT_ONCE = 64
"""Number of prompts whose answers a judge gets in one call."""


@dataclass
class Counts:
    """Counts of the prompts, answers and pairs of one split.

    `dropped` answers were empty or duplicates. `compared` pairs of the others were shown to an annotator, and `ties`
    were judged equally good. `agreement` is the share (0 to 1) of labels that agree with the noise-free taste, unless
    that is indifferent: the accuracy of a perfect reward model. It is None without such pairs.
    """

    prompts: int = 0
    answers: int = 0
    dropped: int = 0
    compared: int = 0
    ties: int = 0
    pairs: int = 0
    agreement: float | None = None

    def texts(self) -> dict[str, str]:
        """Return every count as text, by name."""
        texts = {}
        for name, value in asdict(self).items():
            texts[name] = f"{value:.3f}" if isinstance(value, float) else str(value)
        return texts


@dataclass
class Comparison:
    """Two answers to a prompt, and which one is preferred.

    Attributes:
        index: Number of the prompt.
        answers: The answers, in the order in which they are shown.
        annotator: Name of who compares them.
        choice: Place of the preferred answer, 0 or 1; None for a tie.
        tastes: The noise-free taste of each answer; None with a judge.
    """

    index: int
    answers: list[str]
    annotator: str
    choice: int | None = None
    tastes: tuple[float, float] | None = None


def label_answers(
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[Sequence[str]],
    *,
    pairs_per_prompt: int,
    seed: int | str = 0,
    keep_taste: bool = False,
    judge: Judge = ANNOTATORS,
    read: Callable[[str], Any] = str,
) -> tuple[list[dict[str, Any]], Counts]:
    """Let the simulated annotators, or a judge, compare the answers to each prompt.

        prompt     answers             comparisons           labels
        "fox?"     A, B, "", A, C  ->  A or B, C or A   ->   chosen B, rejected A; the second is a tie, and dropped

    Args:
        rows: The prompts: `prompt`, and `kind`, `require`, `reject` and `test` where they exist.
        answers: The answers to each prompt. Empty and repeated ones are dropped.
        pairs_per_prompt: Maximum number of pairs of the other answers that are compared.
        seed: Seed of the pairs, annotators, order and noise.
        keep_taste: Whether to keep the noise-free taste. Otherwise, and with a judge, its columns are None.
        judge: Who compares the answers. One with a `preferred_column` compares its answer with each of the others.
        read: Turns an answer into what a judge gets and the rows contain: its text or, if the answer is JSON, the
            messages of a dialogue.

    Returns:
        The labelled pairs, as rows of the data set, and the counts.
    """
    counts = Counts(prompts=len(rows), answers=sum(map(len, answers)))
    comparisons: list[Comparison] = []
    for index, (row, candidates) in enumerate(zip(rows, answers, strict=True)):
        distinct = _distinct_answers(candidates)
        counts.dropped += len(candidates) - len(distinct)
        components = {}
        if judge is ANNOTATORS:
            components = _components_of(distinct, row, read)
        pairs = list(itertools.combinations(distinct, 2))
        if judge.preferred_column is not None:
            preferred = row[judge.preferred_column].strip()
            pairs = [(preferred, answer) for answer in distinct if answer != preferred]
        # Each row has its own generator, so that the answers to one prompt do not influence the labels of another.
        rng = random.Random(f"{seed}/{index}")
        comparisons += _draw_comparisons(index, pairs, components, pairs_per_prompt, rng)
    if judge is not ANNOTATORS:
        _let_judge_choose(judge, comparisons, rows, read)

    labelled = []
    for comparison in comparisons:
        if comparison.choice is not None:
            labelled.append(_as_row(comparison, comparison.choice, rows[comparison.index], keep_taste, read))
    counts.compared = len(comparisons)
    counts.pairs = len(labelled)
    counts.ties = counts.compared - counts.pairs
    counts.agreement = _agreement(comparisons)
    return labelled, counts


def _distinct_answers(answers: Sequence[str]) -> list[str]:
    """Return the different answers without the white space around them, in order; not the empty one."""
    stripped = [answer.strip() for answer in answers]
    return list(dict.fromkeys(answer for answer in stripped if answer))


def _components_of(answers: Sequence[str], row: Mapping[str, Any], read: Callable[[str], Any]) -> dict[str, Any]:
    """Return how the annotators see each answer to the prompt of a row."""
    annotators = load_annotators()
    texts, _ = read_texts([read(answer) for answer in answers], {})
    components = {}
    for answer, text in zip(answers, texts, strict=True):
        components[answer] = annotators.judge_components(text, row)
    return components


def _draw_comparisons(
    index: int, pairs: Sequence[tuple[str, str]], components: Mapping[str, Any], most: int, rng: random.Random
) -> list[Comparison]:
    """Draw some of the pairs of answers to a prompt, at most this many, and the annotator who compares each.

    With the `components` of the answers, the annotator chooses; otherwise a judge will, and gets the same pairs.
    """
    annotators = load_annotators()
    comparisons = []
    for pair in rng.sample(pairs, min(most, len(pairs))):
        in_order = rng.sample(pair, 2)
        annotator = rng.choice(annotators.PANEL)
        if not components:
            comparisons.append(Comparison(index, in_order, "judge"))
            continue
        first, second = (components[answer] for answer in in_order)
        choice = annotators.choose(annotator, annotator.weigh(first), annotator.weigh(second), rng)
        tastes = annotators.mean_taste(first), annotators.mean_taste(second)
        comparisons.append(Comparison(index, in_order, annotator.name, choice, tastes))
    return comparisons


def _let_judge_choose(
    judge: Judge, comparisons: Sequence[Comparison], rows: Sequence[Mapping[str, Any]], read: Callable[[str], Any]
) -> None:
    """Set the choice of each comparison, on every process."""

    def match(_: int, group: Sequence[Comparison]) -> Sequence[float | None]:
        first = [read(comparison.answers[0]) for comparison in group]
        second = [read(comparison.answers[1]) for comparison in group]
        return judge.match(first, second, [rows[comparison.index] for comparison in group])

    # The calls are independent of the number of processes.
    groups = itertools.groupby(comparisons, key=lambda comparison: comparison.index // JUDGED_AT_ONCE)
    outcomes = take_turns([list(group) for _, group in groups], match)
    # Place of the preferred answer, by the outcome for the one that was shown first.
    places: dict[float | None, int] = {1.0: 0, 0.0: 1}
    for comparison, outcome in zip(comparisons, outcomes, strict=True):
        comparison.choice = places.get(outcome)


def _as_row(
    comparison: Comparison, chosen: int, row: Mapping[str, Any], keep_taste: bool, read: Callable[[str], Any]
) -> dict[str, Any]:
    """Return a comparison as a row of the data set; `chosen` is its choice, and `row` has the prompt."""
    tastes: tuple[float | None, float | None] = (None, None)
    if keep_taste and comparison.tastes is not None:
        tastes = comparison.tastes[chosen], comparison.tastes[1 - chosen]
    return labelled_pair(
        row["prompt"],
        read(comparison.answers[chosen]),
        read(comparison.answers[1 - chosen]),
        annotator=comparison.annotator,
        chosen_first=chosen == 0,
        kind=row.get("kind") or "",
        tastes=tastes,
    )


def _agreement(comparisons: Sequence[Comparison]) -> float | None:
    """Return `Counts.agreement`."""
    indifference = load_annotators().INDIFFERENCE
    agreements = []
    for comparison in comparisons:
        if comparison.choice is None or comparison.tastes is None:
            continue
        taste_chosen = comparison.tastes[comparison.choice]
        taste_rejected = comparison.tastes[1 - comparison.choice]
        if abs(taste_chosen - taste_rejected) >= indifference:
            agreements.append(taste_chosen > taste_rejected)
    if not agreements:
        return None
    return sum(agreements) / len(agreements)


def take_turns(batches: Sequence[T], work: Callable[[int, T], Sequence[R]]) -> list[R]:
    """Let the processes take turns at batches, and return the results in order on every process.

    `work` gets the number of a batch and the batch. The second of three processes works on the batches 1, 4, 7, …
    """
    state = PartialState()
    results = []
    for number in range(state.process_index, len(batches), state.num_processes):
        results.append((number, list(work(number, batches[number]))))
    in_order = sorted(gather_object(results))
    return list(itertools.chain.from_iterable(result for _, result in in_order))
