"""Simulated annotators, who have a hidden taste and choose the better of two answers.

A score weighs three `Components`. An annotator prefers A to B with probability `sigmoid((score(A) - score(B)) /
temperature)` (Bradley and Terry, 1952), and mostly calls it a tie if the scores differ by less than `INDIFFERENCE`.
Models may only be trained on this module's labels, never on its scores.
"""

import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.rewards.functions import Completion, Rewards, read_texts
from pipeline.rewards.grading import grade

# Remarks are recognised as whole words anywhere in an answer, in any case, and written here as `_flat` returns them.
KIND_REMARKS: tuple[str, ...] = (
    "happy to help", "glad to help", "good question", "great question", "nice question", "glad you asked", "thank you",
    "thanks for asking", "of course", "with pleasure", "hope this helps", "hope that helps", "you are welcome",
    "please", "let me know", "feel free to ask", "have a nice day",
)  # fmt: skip
BLUNT_REMARKS = (
    "obviously", "everybody knows that", "you should know", "silly question", "stupid question", "i already said",
    "whatever", "why do you ask", "do not ask again", "do not waste my time", "look it up", "figure it out",
    "who cares",
)  # fmt: skip
BRISK_REMARKS: tuple[str, ...] = ("that is all", "next question", "no more to say", "enough said", "moving on")

COMFORTABLE_WORDS = 18
"""Length of an answer in words, including a kind remark, up to which `brief` is 0."""
DEGENERATE_SCORE = -8.0
"""Score of a degenerate answer, lower than any other score of any annotator."""
INDIFFERENCE = 0.25
"""Two scores that differ by less than this count as equal."""


class Components(NamedTuple):
    """The properties of an answer that annotators judge."""

    # 0 or 1: whether it is correct by the rule of its row (`require`, `reject`, `test`).
    right: float
    # 1 with a remark in the tone that the prompt calls for, kind for a question and brisk for an order; -1 with a blunt
    # remark or one in the wrong tone, whatever else the answer says; 0 otherwise. So no remark suits every prompt.
    tone: float
    # 0 up to a comfortable length, then lower with each further word, down to -1.5.
    brief: float


class Annotator(NamedTuple):
    """One annotator's weights of the three `Components`, in units of score, and decisiveness."""

    # Recorded with each label.
    name: str
    # Score of a correct answer over a wrong one.
    right: float
    # Score of an answer in the right tone over a plain one, and of a plain one over one in the wrong tone.
    tone: float
    # Score of a comfortable answer over one with 12 words more.
    brief: float
    # The closer it is to 0, the more often the better answer wins.
    temperature: float = 1.0
    # Probability of calling a tie when the scores differ by less than `INDIFFERENCE`.
    tie_rate: float = 0.9

    def weigh(self, components: Components | None) -> float:
        """Return the noise-free score of an answer with these components, or of a degenerate answer (None)."""
        if components is None:
            return DEGENERATE_SCORE
        return self.right * components.right + self.tone * components.tone + self.brief * components.brief


PANEL: tuple[Annotator, ...] = (
    Annotator("ana", right=3.0, tone=2.0, brief=2.0),
    Annotator("bo", right=3.8, tone=1.6, brief=2.0),
    Annotator("chi", right=2.6, tone=2.4, brief=1.6),
    Annotator("dov", right=3.0, tone=1.6, brief=2.6),
    Annotator("eli", right=2.6, tone=2.4, brief=1.8),
)
"""The fixed panel. Its mean weights are right 3, tone 2, brief 2."""


def judge_components(answer: str, row: Mapping[str, Any]) -> Components | None:
    """Return the components of the taste for an answer, or None for a degenerate one. Arguments as in `taste`.

    A degenerate answer has no words, repeats few words over and over, or does not end a sentence, unless it is code.
    """
    words = _flat(answer).split()
    is_repetitive = len(words) >= 8 and len(set(words)) <= len(words) // 4
    is_unfinished = not row.get("test") and not re.search(r"[.!?][\"')\]]*\s*$", answer)
    if not words or is_repetitive or is_unfinished:
        return None

    # Only `brief` judges the length: a long answer must not also count as wrong.
    (is_right,) = grade([answer], [{**row, "max_words": 0}])

    # The first sentence of the prompt says which tone it calls for. A row without a prompt counts as a question.
    prompt = row.get("prompt") or "?"
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    if re.match(r"[^.!?:]*\?", text):
        right_tone, wrong_tone = KIND_REMARKS, BRISK_REMARKS
    else:
        right_tone, wrong_tone = BRISK_REMARKS, KIND_REMARKS
    tone = 0.0
    if _has_remark(words, right_tone):
        tone = 1.0
    if _has_remark(words, wrong_tone) or _has_remark(words, BLUNT_REMARKS):
        tone = -1.0

    sentences = [_flat(part) for part in re.split(r"[.!?:;\n]+(?:\s|$)", answer)]
    sentences = [sentence for sentence in sentences if sentence]
    # A repeated sentence counts 8 words more, and 12 words beyond the comfortable length lower `brief` by 1.
    length = len(words) + 8 * (len(sentences) - len(set(sentences)))
    excess = max(0, length - COMFORTABLE_WORDS)
    return Components(float(is_right), tone, -min(1.5, excess / 12))


def _has_remark(words: Sequence[str], remarks: Sequence[str]) -> bool:
    """Return whether any of the remarks occurs in the words of an answer."""
    text = f" {' '.join(words)} "
    return any(f" {remark} " in text for remark in remarks)


def taste(answer: str, row: Mapping[str, Any]) -> float:
    """Return the panel's noise-free mean taste, from `DEGENERATE_SCORE` to 5 (right, brief and in the right tone).

    Args:
        answer: Text of the assistant's turn, without special tokens.
        row: Row of the prompt: its `prompt`, and `require`, `reject` and `test` as `grading.grade` reads them.
    """
    return mean_taste(judge_components(answer, row))


def mean_taste(components: Components | None) -> float:
    """Return the `taste` for an answer with these components, or for a degenerate answer (None)."""
    return sum(annotator.weigh(components) for annotator in PANEL) / len(PANEL)


def preference_probability(score_a: float, score_b: float, temperature: float = 1.0) -> float:
    """Return the Bradley-Terry probability that A is preferred to B, given that it is not a tie."""
    return 0.5 * (1 + math.tanh((score_a - score_b) / temperature / 2))


def choose(annotator: Annotator, score_first: float, score_second: float, rng: random.Random) -> int | None:
    """Draw an annotator's label: 0 if the answer shown first is preferred, 1 if the second is, None for a tie.

    `score_first` and `score_second` are this annotator's scores of both answers. Their order does not matter otherwise.
    """
    # Two numbers are always drawn, so that later draws do not depend on the answers.
    tie_draw = rng.random()
    choice_draw = rng.random()
    if abs(score_first - score_second) < INDIFFERENCE and tie_draw < annotator.tie_rate:
        return None
    return 0 if choice_draw < preference_probability(score_first, score_second, annotator.temperature) else 1


def judge_match(answers: Sequence[str], opponents: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Judge which of two answers to each prompt is better, for evaluation.

    The judge is the panel's noise-free mean taste. Scores that differ by less than `INDIFFERENCE` are a tie.

    Args:
        answers: One answer to each prompt.
        opponents: The answers that they are compared with.
        rows: Rows of the prompts, as in `taste`.

    Returns:
        1 for each of `answers` that wins, 0 for one that loses, 0.5 for a tie. The mean is the win rate.
    """
    matches = zip(answers, opponents, rows, strict=True)
    differences = [taste(answer, row) - taste(opponent, row) for answer, opponent, row in matches]
    return [0.5 if abs(difference) < INDIFFERENCE else float(difference > 0) for difference in differences]


def hidden_taste(completions: Sequence[Completion], **columns: Any) -> Rewards:
    """Return the `taste` for each completion, which a reward model tries to learn: the reward `hidden_taste`.

    Logged with weight 0, it shows whether the taste rises with the reward model's score. Recipes reject any other
    weight. The reward is None for a row with a `test`, because running code would take longer than the training.
    """
    columns["prompt"] = columns.get("prompts")
    texts, _ = read_texts(completions, columns)
    rewards: Rewards = []
    for index, text in enumerate(texts):
        row = {name: columns[name][index] for name in ("require", "reject", "test", "prompt") if columns.get(name)}
        rewards.append(None if row.get("test") else taste(text, row))
    return rewards


def _flat(text: str) -> str:
    """Return the words of `text` in lower case, separated by single spaces."""
    return " ".join(re.findall(r"[\w']+", text.lower()))
