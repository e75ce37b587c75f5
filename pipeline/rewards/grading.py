"""Is an answer right? Did it end? Did it show its steps? No model is needed to say so.

A gradeable row carries `require` (every inner list: at least one of its phrases must occur in the answer),
`reject` (none may occur), `max_words` (0: no limit) and `test` (Python asserts that a code answer must pass,
"" for an answer that is not code). Phrases are matched as whole words, whatever their case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_FINAL_ANSWER = re.compile(r"\bthe (?:final )?answer is\b|####|\\boxed", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?:[.!?;](?=\s|$)|\n)+")


def normalise(text: str) -> str:
    """`text` in lower case, its white space runs single spaces and its curly apostrophes straight."""
    return " ".join(text.replace("\u2019", "'").casefold().split())


def contains(text: str, phrase: str) -> bool:
    """Whether `phrase` occurs as whole words, in any case: "cat" not in "category", 12 not in 12.5."""
    wanted = re.escape(normalise(phrase))
    pattern = rf"(?<!\w)(?<!\d[.,]){wanted}(?!\w)(?![.,]\d)"
    return bool(wanted) and re.search(pattern, normalise(text)) is not None


def extract_code(answer: str) -> str:
    """The Python source in `answer`: its first fenced block, or else all of it."""
    fenced = _FENCE.search(answer)
    return fenced.group(1) if fenced else answer


def _text_is_correct(answer: str, row: Mapping[str, Any]) -> bool:
    """The conditions on the words of the answer; all but `test`."""
    if not answer.strip():
        return False
    max_words = row.get("max_words") or 0
    if max_words and len(answer.split()) > max_words:
        return False
    if any(contains(answer, phrase) for phrase in row.get("reject") or ()):
        return False
    return all(any(contains(answer, phrase) for phrase in options) for options in row.get("require") or ())


def grade(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each answer is right by its row's `require`, `reject`, `max_words` and `test`.

    Args:
        answers: the texts to judge; one that is empty or white space is never right.
        rows: one for each answer; a field that a row lacks asks for nothing.

    Returns:
        One bool an answer. All code is run in one batch of sandboxed subprocesses.

    Raises:
        ValueError: `answers` and `rows` differ in length.
    """
    correct = [_text_is_correct(answer, row) for answer, row in zip(answers, rows, strict=True)]
    code = [i for i, row in enumerate(rows) if correct[i] and row.get("test")]
    if code:
        from pipeline.rewards.sandbox.run import run_many

        outcomes = run_many([(extract_code(answers[i]), rows[i]["test"]) for i in code])
        for i, outcome in zip(code, outcomes, strict=True):
            correct[i] = outcome.passed
    return correct


def is_correct(answer: str, row: Mapping[str, Any]) -> bool:
    """`grade` for one answer. Many answers that hold code are judged faster by one call of `grade`."""
    return grade([answer], [row])[0]


def has_steps(answer: str) -> bool:
    r"""Whether worked steps stand before the final answer.

    The final answer begins at the first "The answer is", "####" or "\boxed"; without one there are no steps.
    A step is a sentence of at least two words, or an equation: "So the answer is 3." has none,
    "1 + 2 = 3. The answer is 3." has one.
    """
    final = _FINAL_ANSWER.search(answer)
    if final is None:
        return False
    sentences = _SENTENCE_END.split(answer[: final.start()])
    return any("=" in sentence or len(re.findall(r"\w+", sentence)) >= 2 for sentence in sentences)
