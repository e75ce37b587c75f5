"""Environments: games of several turns whose methods a model calls as tools, through TRL's interface.

TRL reuses the objects for all batches. `reset` takes the hidden value from a column of the data, so that it is the same
for all completions of a prompt, and in a resumed run.
"""

from typing import Any


class GuessLetter:
    """Find a hidden letter by asking a few times whether it comes earlier or later in the alphabet."""

    QUESTIONS = 3
    _hidden: str | None = None

    def reset(self, hidden: str | None = None, **_: Any) -> None:
        """Begin a game; rows without a hidden letter do not have one."""
        self._hidden = hidden
        self._number_asked = 0

    def ask(self, letter: str) -> str:
        """Ask whether the hidden letter comes earlier or later than a letter.

        Args:
            letter: The letter to compare it with.
        """
        if self._hidden is None:
            raise ValueError("no letter is hidden")
        if self._number_asked == self.QUESTIONS:
            raise ValueError("no questions are left")
        self._number_asked += 1
        guess = letter.strip().upper()
        if guess == self._hidden:
            return "yes"
        return "later" if self._hidden > guess else "earlier"


ENVIRONMENTS = {"guess_letter": "pipeline.tools.environments:GuessLetter"}
"""Built-in environments: the name in YAML files -> the class, which `pipeline.tools.loading` imports."""
