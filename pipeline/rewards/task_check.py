"""Scores by the verifiers of reasoning-gym, in the child process of `pipeline.rewards.checker`.

Several verifiers evaluate what the model wrote as Python, by `eval` or by SymPy's `parse_expr`. An answer such as
`entry['answer']` would be paid in full, and one that calls functions could change how later ones are judged. So the
child refuses to evaluate anything but literals and formulas: no attributes, and no names but SymPy's functions and
variables of one letter.

Some verifiers pay for wrong answers in full (reasoning-gym 0.1.25: `game_of_life_halting` for any text, `puzzle24` for
the solution of any other problem, `complex_arithmetic` for "nan", `coin_flip` for "0"). What they pay is therefore
checked, in ways that no task's name decides; see `_serve`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib.util import find_spec
from types import CodeType
from typing import Any

from pipeline.rewards.answers import number
from pipeline.rewards.checker import Checker, ask_all, serve

MAX_LENGTH = 10_000
"""Characters in an answer; longer ones are not looked at."""
MISSING = "needs reasoning-gym, which is not installed; pip install 'fourstage[reasoning]'"

_WRONG = ("x", "0", "True", "nonsense")
"""Answers that a verifier may only pay in full if they occur in the task's own answer."""
_NOT_FINITE = re.compile(r"(?<![^\W_])[-+]?(?:nan|inf|infinity|1e\d{3,})[ij]?(?![^\W_])", re.IGNORECASE)
_TOLERANCE = 1e-3
"""By how much of itself a number may differ from the task's own answer and still be right."""

Question = tuple[str, str, str, str, str]
"""Task, problem, its own answer, its metadata as JSON text, and the answer to judge."""

_checker = Checker("pipeline.rewards.task_check", "reasoning-gym, which the reward reasoning_gym")


def is_installed() -> bool:
    """Return whether reasoning-gym can be imported."""
    return find_spec("reasoning_gym") is not None


def score(questions: list[Question]) -> list[float | None]:
    """Return the task's own score, 0 to 1, of each answer; None if its row cannot be read or the machine is too busy.

    Answers of more than 10,000 characters and those that take longer than 2 s score 0; see also `ask_all`. So do all
    answers to a problem whose verifier pays for nonsense, or pays without having looked at the problem.
    """
    return ask_all(_ask, questions, slow=0.0)


@lru_cache(maxsize=65_536)
def _ask(question: Question) -> float | None:
    if len(question[-1]) > MAX_LENGTH:
        return 0.0
    reply: float | None = _checker.ask(question)
    return reply


class _Entry(dict[str, Any]):
    """A problem that notices whether its verifier looks at it."""

    read = False

    def __getitem__(self, key: str) -> Any:
        self.read = True
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read = True
        return super().get(key, default)


def _differs(own: str, given: str) -> bool:
    """Return whether an answer is another number than the task's own, or adds numbers to it ("67 days, 10:32")."""
    expected, value = number(own), number(given)
    if expected is not None and value is not None:
        return abs(value - expected) > _TOLERANCE * abs(expected)
    added = given.replace(own, "", 1) if own and own in given else ""
    return any(letter.isdigit() for letter in added)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that code uses, and "." for an attribute."""
    import dis

    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "IMPORT_NAME"):
            yield "."
        elif instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # of a lambda or a comprehension
            yield from _names(constant)


def _serve() -> None:
    """Judge a `Question`: the main function of the child."""
    import json
    import sys

    import sympy
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    @cache
    def is_formula(name: str) -> bool:
        value = getattr(sympy, name, None)
        functions = getattr(value, "__module__", "").startswith("sympy.functions.")
        return len(name) == 1 or (not name.startswith("_") and (isinstance(value, type | sympy.Basic) or functions))

    by_sympy = compile("from sympy import *", "<string>", "exec")  # how its parser begins

    def refuse_programs(event: str, arguments: tuple[Any, ...]) -> None:
        # Code that was not read from a file is what a verifier evaluates.
        if event != "exec" or not arguments[0].co_filename.startswith("<") or arguments[0] == by_sympy:
            return
        if not arguments[0].co_filename.startswith("<frozen "):
            for name in _names(arguments[0]):
                if name == "." or not is_formula(name):
                    raise PermissionError(f"an answer may not use {name}")

    verifier = cache(get_score_answer_fn)

    def pay(question: Question) -> float:
        task, problem, own, metadata, given = question
        if _NOT_FINITE.search(given) and not _NOT_FINITE.search(own):
            return 0.0
        entry = _Entry(question=problem, answer=own, metadata=json.loads(metadata))
        try:
            value = float(verifier(task)(given, entry))
        except Exception:  # noqa: BLE001 - verifiers raise anything at answers that they cannot read
            return 0.0
        if not math.isfinite(value) or (value >= 1.0 and (not entry.read or _differs(own, given))):
            return 0.0
        return min(1.0, max(0.0, value))

    @lru_cache(maxsize=4096)
    def pays_nonsense(row: tuple[str, str, str, str]) -> bool:
        wrong = [text for text in _WRONG if not re.search(rf"\b{text}\b", row[2], re.IGNORECASE)]
        return any(pay((*row, text)) == 1.0 for text in wrong)

    def judge(question: Question) -> float | None:
        task, _, _, metadata, _ = question
        try:
            readable = task in DATASETS and isinstance(json.loads(metadata), dict)
        except ValueError:
            return None
        if not readable:
            return None
        value = pay(question)
        return 0.0 if value == 1.0 and pays_nonsense(tuple(question[:4])) else value

    judge(("chain_sum", "", "2", "{}", "2"))  # triggers the deferred imports
    sys.addaudithook(refuse_programs)
    serve(judge)


if __name__ == "__main__":
    _serve()
