"""Simulated annotators: people with a hidden taste who say which of two answers they prefer.

Their taste is the sum of three bounded components, each weighted differently by each annotator:

`right`, 0 or 1: the answer is correct by the row's own rule (`require`, `reject`, `test`).

`kind`, -1 to 1: 1 with a kind remark, -1 with a blunt one (which no kindness makes up for), else 0. One kind
remark is enough: more of them add nothing, they only make the answer longer.

`brief`, -1.5 to 0: 0 up to a comfortable length, then lower with each further word; a repeated sentence costs
as much as `REPEAT_WORDS` further words.

An answer that is empty, unfinished or degenerate is worse than any other, whoever reads it.

A choice between two answers follows Bradley and Terry (1952): an annotator prefers A to B with probability
`sigmoid((score(A) - score(B)) / temperature)`. Where the two scores are closer than `INDIFFERENCE`, the
annotator mostly calls it a tie. The order in which the answers are shown has no influence.

Nothing here may reach a model in training, except through the labels.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.rewards.grading import is_correct

# A remark is a sentence of its own when capitalised; it is recognised anywhere, as whole words, in any case.
KIND_REMARKS: tuple[str, ...] = (
    "happy to help",
    "glad to help",
    "good question",
    "great question",
    "nice question",
    "glad you asked",
    "thank you",
    "thanks for asking",
    "of course",
    "with pleasure",
    "hope this helps",
    "hope that helps",
    "you are welcome",
    "please",
    "let me know",
    "feel free to ask",
    "have a nice day",
)
BLUNT_REMARKS: tuple[str, ...] = (
    "obviously",
    "everybody knows that",
    "you should know",
    "silly question",
    "stupid question",
    "i already said",
    "whatever",
    "why do you ask",
    "do not ask again",
    "do not waste my time",
    "look it up",
    "figure it out",
    "who cares",
)

COMFORTABLE_WORDS = 18
"""Words that nobody minds; the remark of a kind answer included."""
RAMBLING_WORDS = 12
"""Words beyond the comfortable length that cost one unit of `brief`."""
REPEAT_WORDS = 8
"""Words that a repeated sentence is felt to be longer than it is."""
MOST_RAMBLING = 1.5
DEGENERATE_SCORE = -8.0
"""Score of an answer that is no answer; lower than every other score of every annotator."""
INDIFFERENCE = 0.25
"""Difference between two scores below which they count as equal."""


@dataclass(frozen=True)
class Annotator:
    """One annotator's weights, in units of score, and how decided the annotator is.

    Args:
        name: recorded with each label.
        right: what a correct answer is worth over a wrong one.
        kind: what a kind answer is worth over a plain one, and a plain one over a blunt one.
        brief: what a comfortable answer is worth over one that is `RAMBLING_WORDS` longer.
        temperature: Bradley-Terry temperature; towards 0 the better answer always wins.
        tie_rate: probability (0 to 1) of calling a tie when the scores differ by less than `INDIFFERENCE`.
    """

    name: str
    right: float
    kind: float
    brief: float
    temperature: float = 1.0
    tie_rate: float = 0.9

    def score(self, answer: str, row: Mapping[str, Any]) -> float:
        """Noise-free score of an answer to the prompt of `row`; higher is better. `row` as in `taste`."""
        return self.weigh(judge_components(answer, row))

    def weigh(self, components: Components | None) -> float:
        """Noise-free score of an answer with these components (None: a degenerate one)."""
        if components is None:
            return DEGENERATE_SCORE
        return self.right * components.right + self.kind * components.kind + self.brief * components.brief


PANEL: tuple[Annotator, ...] = (
    Annotator("ana", right=3.0, kind=2.0, brief=2.0),
    Annotator("bo", right=3.8, kind=1.6, brief=2.0),
    Annotator("chi", right=2.6, kind=2.4, brief=1.6),
    Annotator("dov", right=3.0, kind=1.6, brief=2.6),
    Annotator("eli", right=2.6, kind=2.4, brief=1.8),
)
"""The fixed panel. Its mean weights are right 3, kind 2, brief 2."""


@dataclass(frozen=True)
class Components:
    """What an annotator notices in an answer; ranges in the module's docstring."""

    right: float
    kind: float
    brief: float


def judge_components(answer: str, row: Mapping[str, Any]) -> Components | None:
    """Components of taste of an answer to the prompt of `row`, or None for a degenerate one."""
    if is_degenerate(answer, is_code=bool(row.get("test"))):
        return None
    # Length is judged by `brief` alone: a long answer must not count as a wrong one as well.
    right = float(is_correct(answer, {**row, "max_words": 0}))
    return Components(right, kindness(answer), brevity(answer))


def is_degenerate(answer: str, *, is_code: bool = False) -> bool:
    """True for an answer with no word, with no end (code excepted), or that says one word over and over."""
    words = _words(answer)
    if not words:
        return True
    if len(words) >= 8 and len(set(words)) <= len(words) // 4:
        return True
    return not is_code and not re.search(r"[.!?][\"')\]]*\s*$", answer)


def kindness(answer: str) -> float:
    """-1 if any blunt remark occurs, else 1 if any kind remark occurs, else 0."""
    if _BLUNT.search(_flat(answer)):
        return -1.0
    return 1.0 if _KIND.search(_flat(answer)) else 0.0


def brevity(answer: str) -> float:
    """0 for an answer of comfortable length without repetition, down to -`MOST_RAMBLING`."""
    sentences = [flat for sentence in re.split(r"[.!?:;\n]+(?:\s|$)", answer) if (flat := _flat(sentence))]
    felt_words = len(_words(answer)) + REPEAT_WORDS * (len(sentences) - len(set(sentences)))
    return -min(MOST_RAMBLING, max(0, felt_words - COMFORTABLE_WORDS) / RAMBLING_WORDS)


def taste(answer: str, row: Mapping[str, Any]) -> float:
    """The panel's noise-free mean taste for an answer; higher is better.

    Args:
        answer: decoded text of the assistant's turn, without special tokens.
        row: the prompt's row, with `require`, `reject` and `test` as `grading.is_correct` reads them.

    Returns:
        The mean of the annotators' scores, between `DEGENERATE_SCORE` and 5 (right, kind and brief).
    """
    return mean_taste(judge_components(answer, row))


def mean_taste(components: Components | None) -> float:
    """`taste` of an answer with these components (None: a degenerate one)."""
    return sum(annotator.weigh(components) for annotator in PANEL) / len(PANEL)


def preference_probability(score_a: float, score_b: float, temperature: float = 1.0) -> float:
    """Bradley-Terry probability that A is preferred to B, given that one of them is.

    Raises:
        ValueError: if `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return 0.5 * (1 + math.tanh((score_a - score_b) / temperature / 2))


def choose(annotator: Annotator, score_first: float, score_second: float, rng: random.Random) -> int | None:
    """An annotator's label: 0 if the answer shown first is preferred, 1 if the second is, None for a tie.

    Args:
        annotator: who labels.
        score_first: this annotator's score of the answer shown first.
        score_second: the same of the other answer.
        rng: two numbers are drawn from it whatever the outcome, so that later draws do not depend on the
            answers.
    """
    tie_draw, choice_draw = rng.random(), rng.random()
    if abs(score_first - score_second) < INDIFFERENCE and tie_draw < annotator.tie_rate:
        return None
    return 0 if choice_draw < preference_probability(score_first, score_second, annotator.temperature) else 1


def judge_match(
    answers: Sequence[str], opponents: Sequence[str], rows: Sequence[Mapping[str, Any]], seed: int = 0
) -> list[float]:
    """Outcome of each comparison for evaluation: 1 if `answers` wins, 0 if it loses, 0.5 for a tie.

    The judge is the panel's noise-free mean taste, with scores closer than `INDIFFERENCE` a tie. It is shown
    the two answers in a random order, drawn from `seed`, and does not know whose they are. The mean of the
    outcomes is the win rate.

    Raises:
        ValueError: if the three sequences differ in length.
    """
    rng = random.Random(seed)
    outcomes = []
    for answer, opponent, row in zip(answers, opponents, rows, strict=True):
        swapped = rng.random() < 0.5
        shown = (opponent, answer) if swapped else (answer, opponent)
        first_wins = _blind_verdict(*shown, row)
        outcomes.append(1 - first_wins if swapped else first_wins)
    return outcomes


def _blind_verdict(shown_first: str, shown_second: str, row: Mapping[str, Any]) -> float:
    difference = taste(shown_first, row) - taste(shown_second, row)
    if abs(difference) < INDIFFERENCE:
        return 0.5
    return 1.0 if difference > 0 else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def _flat(text: str) -> str:
    """The words of `text` in lower case, one space between two."""
    return " ".join(_words(text))


def _any_of(remarks: Sequence[str]) -> re.Pattern[str]:
    alternatives = "|".join(re.escape(_flat(remark)) for remark in remarks)
    return re.compile(rf"(?<![\w'])(?:{alternatives})(?![\w'])")


_KIND = _any_of(KIND_REMARKS)
_BLUNT = _any_of(BLUNT_REMARKS)
