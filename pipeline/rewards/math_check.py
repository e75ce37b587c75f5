"""Ask math-verify about expressions, sets and intervals, in a child process (`pipeline.rewards.math_judge`)."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.rewards.checker import Checker

MAX_LENGTH = 300
"""Characters in an expression; longer ones are not parsed."""

Question = tuple[str, str | None, bool]
"""A reference, the answer to judge or None, and whether the answer is a part of the prompt."""

_checker = Checker("pipeline.rewards.math_judge", "math-verify, which math_answer")


def compare(questions: Sequence[Question]) -> list[bool | None]:
    """Check that each answer equals its reference, in as simple a form. Without answers, check the references.

    An answer that is a part of the prompt must have the form of the reference. Expressions of more than 300 characters
    and those that take longer than 2 s give False; see also `Checker.ask_all`.
    """
    return _checker.ask_all(
        questions,
        slow=False,
        is_too_long=lambda question: len(question[0]) > MAX_LENGTH or len(question[1] or "") > MAX_LENGTH,
    )
