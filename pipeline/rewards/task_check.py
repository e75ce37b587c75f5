"""Scores from reasoning-gym's verifiers: the child process behind the reward `reasoning_gym`.

Several verifiers evaluate what the model wrote as Python, such as `entry['answer']`. So the child only evaluates
literals and formulas. Some verifiers pay for wrong answers in full (reasoning-gym 0.1.25: `game_of_life_halting` for
any text, `puzzle24` for the solution of any other problem, `complex_arithmetic` for "nan", `coin_flip` for "0"). So an
answer is paid in full only if it agrees with the task's own, and if the verifier rejects nonsense and an empty task.
"""

from __future__ import annotations

import dis
import json
import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, ModuleType
from typing import Any

from pipeline.rewards.answers import number
from pipeline.rewards.checker import serve

_NOT_FINITE = re.compile(r"(?<![^\W_])[-+]?(?:nan|inf|infinity|1e\d{3,})[ij]?(?![^\W_])", re.IGNORECASE)


def _serve() -> None:
    """Judge answers until the parent ends: the main function of the child.

    A question is (task, problem, the task's own answer, metadata as JSON, answer), all texts.
    """
    # Only generating games of life needs it. It would import matplotlib, which takes almost half of the start.
    sys.modules["cellpylib"] = ModuleType("cellpylib")
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    verifier = lru_cache(get_score_answer_fn)

    def pay_by_verifier(task: str, answer: str, entry: dict[str, Any]) -> float:
        """Return what the verifier of a task pays, 0 or more."""
        # Verifiers raise anything at answers that they cannot read.
        try:
            value = float(verifier(task)(answer, entry))
        except Exception:  # noqa: BLE001
            return 0.0
        return max(0.0, value) if math.isfinite(value) else 0.0

    def pay(task: str, problem: str, reference: str, metadata: str, answer: str) -> float:
        """Return the score of the task's verifier, lowered to 0 if it cannot be right."""
        if _NOT_FINITE.search(answer) and not _NOT_FINITE.search(reference):
            return 0.0
        entry = {"question": problem, "answer": reference, "metadata": json.loads(metadata)}
        value = pay_by_verifier(task, answer, entry)
        if _contradicts(reference, answer, paid_in_full=value >= 1.0):
            return 0.0
        # A verifier that pays in full without a task pays anything.
        if value >= 1.0 and pay_by_verifier(task, answer, {}) >= 1.0:
            return 0.0
        return min(value, 1.0)

    @lru_cache(maxsize=4096)
    def pays_nonsense(task: str, problem: str, reference: str, metadata: str) -> bool:
        """Return whether a verifier pays an answer in full that has nothing to do with the task's own."""
        for nonsense in ("x", "0", "True", "nonsense"):
            # It may be right if the task's own answer contains it.
            if re.search(rf"\b{nonsense}\b", reference, re.IGNORECASE):
                continue
            if pay(task, problem, reference, metadata, nonsense) == 1.0:
                return True
        return False

    def judge(question: tuple[str, str, str, str, str]) -> float | None:
        """Return the score of an answer, or None if the task is unknown or its metadata is not a JSON object."""
        task, problem, reference, metadata, answer = question
        try:
            if task not in DATASETS or not isinstance(json.loads(metadata), dict):
                return None
        except ValueError:
            return None
        value = pay(task, problem, reference, metadata, answer)
        if value == 1.0 and pays_nonsense(task, problem, reference, metadata):
            return 0.0
        return value

    # Ask a first question, because it triggers deferred imports, which the child cannot do once it is confined.
    judge(("chain_sum", "", "2", "{}", "2"))
    sys.addaudithook(_program_hook())
    serve(judge)


def _contradicts(reference: str, answer: str, paid_in_full: bool) -> bool:
    """Return whether an answer cannot be right, because it has another number than the task's own answer."""
    expected = number(reference)
    stated = number(answer)
    if expected is not None and stated is not None:
        # Verifiers pay for the digits of the right number in another one: half for "-4" or "14" where "4" is right.
        return abs(stated - expected) > 1e-3 * abs(expected)
    # At least, an answer that is paid in full must add no number, as "67 days, 10:32" does to "67 days".
    if not paid_in_full or reference == "" or reference not in answer:
        return False
    addition = answer.replace(reference, "", 1)
    return any(letter.isdigit() for letter in addition)


def _program_hook() -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that lets code from texts, which verifiers evaluate, be literals and formulas only."""
    import sympy

    # SymPy's parser begins with this, compiled with postponed annotations, as in this module.
    by_sympy = compile("from sympy import *", "<string>", "exec")

    def reject_programs(event: str, arguments: tuple[Any, ...]) -> None:
        # Code that does not come from a file is evaluated by a verifier.
        if event != "exec" or arguments[0] == by_sympy or not re.match("<(?!frozen )", arguments[0].co_filename):
            return
        # A lambda or a comprehension is a constant of the code around it.
        code = arguments[0]
        has_functions = any(isinstance(constant, CodeType) for constant in code.co_consts)
        operations = {instruction.opname for instruction in dis.get_instructions(code)}
        if has_functions or operations & {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "IMPORT_NAME"}:
            raise PermissionError("an answer must not use attributes or define functions")
        for name in code.co_names:
            value = getattr(sympy, name, None)
            is_function = getattr(value, "__module__", "").startswith("sympy.functions.")
            is_formula = not name.startswith("_") and (isinstance(value, type | sympy.Basic) or is_function)
            if not (len(name) == 1 or is_formula):
                raise PermissionError(f"an answer may not use {name}")

    return reject_programs


if __name__ == "__main__":
    _serve()
