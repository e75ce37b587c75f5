"""Functions of the kind that users name in evaluate.yaml."""

from typing import Any


def even_answers_are_right(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Pay for every answer to a problem whose reference is even; 0.9 is not enough for others."""
    return [1.0 if int(reference) % 2 == 0 else 0.9 for reference in answer]


def longer_answers_win(completions: list[Any], **columns: Any) -> list[float]:
    """Return the length of each answer."""
    return [float(len(completion[-1]["content"])) for completion in completions]


def the_first_wins(completions: list[Any], opponents: list[Any], **columns: Any) -> list[float]:
    """Prefer every answer to its opponent."""
    return [1.0 for _ in zip(completions, opponents, strict=True)]
