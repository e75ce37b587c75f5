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
# Number of prompts whose answers a judge gets in one call.
JUDGED_AT_ONCE = 64


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
        return {k: f"{value:.3f}" if isinstance(value, float) else str(value) for k, value in asdict(self).items()}


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

    Rows have a `prompt`, and `kind`, `require`, `reject` and `test` where they exist. Empty and repeated answers are
    dropped, and at most `pairs_per_prompt` pairs of the others are compared. `seed` decides on pairs, annotators, order
    and noise. Without `keep_taste`, or with a judge, the columns of the taste are None. `read` turns an answer into
    what a judge gets and the rows contain: its text or, if the answer is JSON, the messages of a dialogue. Return the
    labelled pairs, as rows of the data set, and the counts.
    """
    # prompt     answers             comparisons           labels
    # "fox?"     A, B, "", A, C  ->  A or B, C or A   ->   chosen B, rejected A; the second is a tie, and dropped
    annotators = load_annotators()
    counts = Counts(prompts=len(rows), answers=sum(map(len, answers)))
    # Index of the prompt's row, two answers in the order shown, and who compares them.
    comparisons: list[tuple[int, list[str], str]] = []
    # For each comparison, the index of the preferred answer; None for a tie.
    choices: list[int | None] = []
    # How the annotators see each answer to a prompt; empty with a judge.
    seen: list[dict[str, Any]] = []
    for index, (row, candidates) in enumerate(zip(rows, answers, strict=True)):
        distinct = list(dict.fromkeys(text for answer in candidates if (text := answer.strip())))
        counts.dropped += len(candidates) - len(distinct)
        texts = zip(distinct, read_texts([read(answer) for answer in distinct], {})[0], strict=True)
        seen.append({answer: annotators.judge_components(text, row) for answer, text in texts if judge is ANNOTATORS})
        # Each row has its own generator, so that the answers to one prompt do not influence the labels of another. A
        # judge compares the same pairs, because the draws are the same with and without one.
        rng = random.Random(f"{seed}/{index}")
        pairs = list(itertools.combinations(distinct, 2))
        for pair in rng.sample(pairs, min(pairs_per_prompt, len(pairs))):
            shown = rng.sample(pair, 2)
            annotator = rng.choice(annotators.PANEL)
            comparisons.append((index, shown, annotator.name if judge is ANNOTATORS else "judge"))
            if judge is ANNOTATORS:
                first, second = (annotator.weigh(seen[index][answer]) for answer in shown)
                choices.append(annotators.choose(annotator, first, second, rng))
    if judge is not ANNOTATORS:

        def match(_: int, asked: Sequence[tuple[int, list[str], str]]) -> Sequence[float | None]:
            first, second = ([read(shown[side]) for _, shown, _ in asked] for side in (0, 1))
            return judge.match(first, second, [rows[index] for index, _, _ in asked])

        # The calls are independent of the number of processes.
        groups = itertools.groupby(comparisons, key=lambda comparison: comparison[0] // JUDGED_AT_ONCE)
        # Index of the preferred answer, by the outcome for the one that was shown first.
        preferred: dict[float | None, int] = {1.0: 0, 0.0: 1}
        choices = [preferred.get(outcome) for outcome in take_turns([list(group) for _, group in groups], match)]
    labelled: list[dict[str, Any]] = []
    agreements: list[bool] = []
    for (index, shown, name), choice in zip(comparisons, choices, strict=True):
        if choice is None:
            continue
        row, components = rows[index], seen[index]
        pair = shown[choice], shown[1 - choice]
        tastes = [annotators.mean_taste(components[answer]) for answer in pair if components]
        if tastes and abs(tastes[0] - tastes[1]) >= annotators.INDIFFERENCE:
            agreements.append(tastes[0] > tastes[1])
        kept = tastes if tastes and keep_taste else (None, None)
        about: dict[str, Any] = {"annotator": name, "kind": row.get("kind") or "", "chosen_first": choice == 0}
        labelled.append(labelled_pair(row["prompt"], read(pair[0]), read(pair[1]), **about, tastes=kept))
    counts.compared, counts.pairs = len(comparisons), len(labelled)
    counts.ties = counts.compared - counts.pairs
    counts.agreement = sum(agreements) / len(agreements) if agreements else None
    return labelled, counts


def take_turns(batches: Sequence[T], work: Callable[[int, T], Sequence[R]]) -> list[R]:
    """Let the processes take turns at batches, and return the results in order on every process.

    `work` takes the number of a batch and the batch. The second of three processes works on the batches 1, 4, 7, …
    """
    state = PartialState()
    turns = range(state.process_index, len(batches), state.num_processes)
    done = [(number, list(work(number, batches[number]))) for number in turns]
    return [result for _, results in sorted(gather_object(done)) for result in results]
