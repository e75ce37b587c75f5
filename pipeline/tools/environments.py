"""Environments: games of several turns, whose methods a model calls as tools, by TRL's interface.

TRL keeps the objects from batch to batch. What is hidden comes from a column of the data, by `reset`, so that it is the
same for all completions of a prompt, and for a resumed run.
"""

from __future__ import annotations

from typing import Any


class GuessNumber:
    """Find a hidden number by asking whether it is higher or lower, a few times."""

    QUESTIONS = 3

    def __init__(self) -> None:
        self._hidden: int | None = None
        self._asked = 0

    def reset(self, hidden: int | None = None, **_: Any) -> None:
        """Begin a game; rows without a hidden number do not have one."""
        self._hidden, self._asked = hidden, 0

    def ask(self, number: int) -> str:
        """Ask whether the hidden number is higher or lower than a number.

        Args:
            number: The number to compare it with.
        """
        if self._hidden is None:
            raise ValueError("no number is hidden")
        if self._asked == self.QUESTIONS:
            raise ValueError("no questions are left")
        self._asked += 1
        # A model may write anything for a number.
        asked = int(number)
        return "yes" if asked == self._hidden else "higher" if self._hidden > asked else "lower"


ENVIRONMENTS: dict[str, type] = {"guess_number": GuessNumber}
