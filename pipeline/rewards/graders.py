"""Graders decide whether answers are right. They use the rewards of training: only a reward of 1 means right."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.rewards.functions import exact_answer, math_answer
from pipeline.rewards.loading import call_reward, load_rewards
from pipeline.rewards.table import GRADES

Example = Mapping[str, Any]
Grader = Callable[[Sequence[str], Sequence[Example]], list[bool]]
"""A function of answers, and of the row that belongs to each; it returns whether each answer is right."""

COMPARED = (None, "exact", "any", "math", "choice", "reasoning_gym")
"""Values of `grade` that only compare final answers with the row's `answer`, so that a majority of samples can be
taken. None is the default, `grade_rows`."""


def grade_rows(answers: Sequence[str], rows: Sequence[Example]) -> list[bool]:
    """Return whether each final answer equals the `answer` of its row: as a number, as words, or mathematically."""
    references = [row["answer"] for row in rows]
    # Rewards judge some answers by the problem, such as whether "50%" is 50.
    prompts = [row.get("prompt") for row in rows]
    exact = exact_answer(answers, references, prompts=prompts)
    mathematical = math_answer(answers, references, prompts=prompts)
    return [1.0 in rewards for rewards in zip(exact, mathematical, strict=True)]


def load_grader(grade: str | None) -> Grader:
    """Load the grader of problems: a key of `GRADES`, a reward, or `package.module:function`; None means `grade_rows`.

    Raises:
        UserError: If there is no such reward.
    """
    if grade is None:
        return grade_rows
    (reward,) = load_rewards([GRADES.get(grade, grade)], "problems: grade")

    def grade_by_reward(answers: Sequence[str], rows: Sequence[Example]) -> list[bool]:
        return [value == 1.0 for value in call_reward(reward, answers, rows)]

    return grade_by_reward
