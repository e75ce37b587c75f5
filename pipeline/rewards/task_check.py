"""Scores by the verifiers of reasoning-gym, in the child process of `pipeline.rewards.checker`.

Several verifiers evaluate what the model wrote as Python, by `eval` or by SymPy's `parse_expr`. An answer such as
`entry['answer']` would be paid in full, and one that calls functions could change how later ones are judged. So the
child refuses to evaluate anything but literals and formulas: no attributes, and no names but SymPy's functions and
variables of one letter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib.util import find_spec
from types import CodeType
from typing import Any

from pipeline.rewards.checker import Checker, ask_all, serve

MAX_LENGTH = 10_000
"""Characters in an answer; longer ones are not looked at."""
MISSING = "needs reasoning-gym, which is not installed; pip install 'fourstage[reasoning]'"

Question = tuple[str, str, str, str, str]
"""Task, problem, its own answer, its metadata as JSON text, and the answer to judge."""

_checker = Checker("pipeline.rewards.task_check", "reasoning-gym, which the reward reasoning_gym")


def is_installed() -> bool:
    """Return whether reasoning-gym can be imported."""
    return find_spec("reasoning_gym") is not None


def score(questions: list[Question]) -> list[float | None]:
    """Return the task's own score, 0 to 1, of each answer; None if its row cannot be read or the machine is too busy.

    Answers of more than 10,000 characters and those that take longer than 2 s score 0; see also `ask_all`.
    """
    return ask_all(_ask, questions, slow=0.0)


@lru_cache(maxsize=65_536)
def _ask(question: Question) -> float | None:
    if len(question[-1]) > MAX_LENGTH:
        return 0.0
    reply: float | None = _checker.ask(question)
    return reply


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

    def judge(question: Question) -> float | None:
        task, problem, answer, metadata, given = question
        try:
            entry = {"question": problem, "answer": answer, "metadata": json.loads(metadata)}
        except ValueError:
            return None
        if task not in DATASETS or not isinstance(entry["metadata"], dict):
            return None
        try:
            value = float(verifier(task)(given, entry))
        except Exception:  # noqa: BLE001 - verifiers raise anything at answers that they cannot read
            return 0.0
        return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0

    judge(("chain_sum", "", "1", "{}", "1"))  # triggers the deferred imports
    sys.addaudithook(refuse_programs)
    serve(judge)


if __name__ == "__main__":
    _serve()
