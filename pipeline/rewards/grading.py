"""Grading without a model: whether an answer is correct and whether it shows its steps.

A gradable row has `require` (at least one phrase of each inner list must occur in the answer), `reject` (none of its
phrases may occur), `max_words` (0: no limit) and `test` (Python assertions that a code answer must pass; "" for other
answers). Phrases are matched as whole words, in any case.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pipeline.errors import RunStopped
from pipeline.rewards.answers import ANNOUNCEMENT
from pipeline.rewards.sandbox.run import run_many

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SENTENCE_END = re.compile(r"(?:[.!?;](?=\s|$)|\n)+")

# Columns by which an answer is graded.
RULE_COLUMNS = ("require", "reject", "max_words", "test")


def is_gradable(row: Mapping[str, Any]) -> bool:
    """Return whether a row has grading rules; without any, every answer would be right."""
    return any(row.get(column) for column in RULE_COLUMNS)


def validate_rule(row: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a row's grading rules, or None."""
    require, reject = row.get("require") or [], row.get("reject") or []
    lists = require if isinstance(require, list) else [None]
    if not all(isinstance(options, list) and all(isinstance(item, str) for item in options) for options in lists):
        return f"require is {require!r:.60}, not a list of lists of phrases"
    if not (isinstance(reject, list) and all(isinstance(item, str) for item in reject)):
        return f"reject is {reject!r:.60}, not a list of phrases"
    if not isinstance(row.get("max_words") or 0, int):
        return f"max_words is {row['max_words']!r:.60}, not a whole number"
    return None if isinstance(row.get("test") or "", str) else f"test is {row['test']!r:.60}, not Python code"


# An answer is compared with many phrases, and a phrase with many answers.
_fold = lru_cache(4096)(lambda text: " ".join(text.replace("\u2019", "'").casefold().split()))


def contains(text: str, phrase: str) -> bool:
    """Return whether `phrase` occurs as whole words, in any case: "cat" not in "category", 12 not in 12.5."""
    wanted, folded = _fold(phrase), _fold(text)
    # Most phrases do not occur at all, and this check is faster than the pattern.
    if not wanted or wanted not in folded:
        return False
    return re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(wanted)}(?!\w)(?![.,]\d)", folded) is not None


def extract_code(answer: str) -> str:
    """Return the Python source in `answer`: its first fenced block, or all of it."""
    fenced = _FENCE.search(answer)
    return fenced.group(1) if fenced else answer


def grade(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return whether each answer is correct by its row's `require`, `reject`, `max_words` and `test`.

    An empty answer is never correct, and a missing field requires nothing. Raise `RunStopped` if code cannot be run.
    """
    correct = []
    for answer, row in zip(answers, rows, strict=True):
        words = len(answer.split())
        rejected = any(contains(answer, phrase) for phrase in row.get("reject") or ())
        complete = all(any(contains(answer, phrase) for phrase in options) for options in row.get("require") or ())
        correct.append(0 < words <= (row.get("max_words") or words) and complete and not rejected)

    # Code only runs if everything else is already right.
    code = [i for i, row in enumerate(rows) if correct[i] and row.get("test")]
    outcomes = run_many([(extract_code(answers[i]), rows[i]["test"]) for i in code])
    if any(outcome.status == "busy" for outcome in outcomes):
        raise RunStopped("The machine is too busy to run the code in the answers; run this step again.")
    for i, outcome in zip(code, outcomes, strict=True):
        correct[i] = outcome.passed
    return correct


def has_steps(answer: str) -> bool:
    """Return whether an answer shows steps (sentences or equations) before its final answer: "1 + 2 = 3. Answer: 3"."""
    final = ANNOUNCEMENT.search(answer)
    if final is None:
        return False
    sentences = _SENTENCE_END.split(answer[: final.start()])
    return any("=" in sentence or len(re.findall(r"\w+", sentence)) >= 2 for sentence in sentences)
