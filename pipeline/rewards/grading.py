"""Grading without a model: whether an answer is correct and whether it shows its steps.

A gradable row has `require` (at least one phrase of each inner list must occur in the answer), `reject` (none of its
phrases may occur), `max_words` (0: no limit) and `test` (Python assertions that a code answer must pass; "" for other
answers). Phrases are matched as whole words, in any case.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pipeline.errors import RunStopped
from pipeline.rewards.answers import ANNOUNCEMENT
from pipeline.rewards.sandbox.run import run_many

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SENTENCE_END = re.compile(r"(?:[.!?;](?=\s|$)|\n)+")

RULE_COLUMNS = ("require", "reject", "max_words", "test")
"""Columns by which an answer is graded."""


def is_gradable(row: Mapping[str, Any]) -> bool:
    """Return whether a row has grading rules; without any, every answer would be right."""
    return any(row.get(column) for column in RULE_COLUMNS)


def validate_rule(row: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a row's grading rules, such as "max_words is 'ten', not a whole number", or None."""
    require = row.get("require") or []
    if not isinstance(require, list) or not all(map(_is_list_of_texts, require)):
        return f"require is {require!r:.60}, not a list of lists of phrases"
    reject = row.get("reject") or []
    if not _is_list_of_texts(reject):
        return f"reject is {reject!r:.60}, not a list of phrases"
    max_words = row.get("max_words") or 0
    if not isinstance(max_words, int):
        return f"max_words is {max_words!r:.60}, not a whole number"
    test = row.get("test") or ""
    if not isinstance(test, str):
        return f"test is {test!r:.60}, not Python code"
    return None


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# It is cached because an answer is compared with many phrases, and a phrase with many answers.
@lru_cache(4096)
def _fold(text: str) -> str:
    """Return a text in lower case, with single spaces and straight apostrophes."""
    return " ".join(text.replace("\u2019", "'").casefold().split())


def contains(text: str, phrase: str) -> bool:
    """Return whether `phrase` occurs as whole words, in any case: "cat" not in "category", 12 not in 12.5."""
    folded_phrase = _fold(phrase)
    folded_text = _fold(text)
    # Most phrases do not occur at all, and this check is faster than the pattern.
    if not folded_phrase or folded_phrase not in folded_text:
        return False
    return re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(folded_phrase)}(?!\w)(?![.,]\d)", folded_text) is not None


def extract_code(answer: str) -> str:
    """Return the Python source in `answer`: its first fenced block, or all of it."""
    match = _FENCE.search(answer)
    return match.group(1) if match else answer


def grade(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return whether each answer is correct by its row's `require`, `reject`, `max_words` and `test`.

    All code runs in one batch of sandboxed processes.

    Args:
        answers: The texts to judge; one that is empty or white space is never correct.
        rows: One row per answer; a field that a row lacks requires nothing.

    Raises:
        RunStopped: If code cannot be run here, or the machine is too busy for it.
    """
    correct = [_is_right_text(answer, row) for answer, row in zip(answers, rows, strict=True)]
    # Code only runs if everything else is already right.
    code = [i for i, row in enumerate(rows) if correct[i] and row.get("test")]
    outcomes = run_many([(extract_code(answers[i]), rows[i]["test"]) for i in code])
    if any(outcome.status == "busy" for outcome in outcomes):
        raise RunStopped("The machine is too busy to run the code in the answers; run this step again.")
    for i, outcome in zip(code, outcomes, strict=True):
        correct[i] = outcome.passed
    return correct


def _is_right_text(answer: str, row: Mapping[str, Any]) -> bool:
    """Return whether an answer is correct by `require`, `reject` and `max_words`."""
    word_count = len(answer.split())
    # 0 means no limit.
    max_words = row.get("max_words") or word_count
    if not 0 < word_count <= max_words:
        return False
    if _contains_any(answer, row.get("reject") or ()):
        return False
    return all(_contains_any(answer, options) for options in row.get("require") or ())


def _contains_any(text: str, phrases: Iterable[str]) -> bool:
    return any(contains(text, phrase) for phrase in phrases)


def has_steps(answer: str) -> bool:
    """Return whether an answer shows steps before its final answer, which begins where one is first announced.

    A step is a sentence of at least two words, or an equation: "1 + 2 = 3. The answer is 3." has one, "So the answer is
    3." has none. A text without a final answer has no steps.
    """
    final = ANNOUNCEMENT.search(answer)
    if final is None:
        return False
    sentences = _SENTENCE_END.split(answer[: final.start()])
    return any("=" in sentence or len(re.findall(r"\w+", sentence)) >= 2 for sentence in sentences)
