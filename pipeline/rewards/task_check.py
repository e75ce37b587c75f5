"""Scores from reasoning-gym's verifiers: the child process behind the reward `reasoning_gym`.

Several verifiers evaluate what the model wrote as Python. A model could write `entry['answer']`, so the child only lets
them evaluate literals and formulas. Some verifiers give wrong answers the full score of 1 (reasoning-gym 0.1.25:
`game_of_life_halting` any text, `puzzle24` the solution of any other problem, `complex_arithmetic` "nan", `coin_flip`
"0"). So the score of 1 also requires that the answer agrees with the reference, and that the verifier rejects nonsense,
and the same answer to an empty task.
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

    A question is (task, problem, reference, metadata as JSON, answer), all texts.
    """
    # Only generating games of life needs this package. It imports matplotlib, which takes almost half of the start.
    sys.modules["cellpylib"] = ModuleType("cellpylib")
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    verifier = lru_cache(get_score_answer_fn)

    def verifier_score(task: str, answer: str, entry: dict[str, Any]) -> float:
        """Return the score from the verifier of a task, at least 0; 0 if it raises an exception."""
        # Verifiers raise anything at answers that they cannot read.
        try:
            value = float(verifier(task)(answer, entry))
        except Exception:  # noqa: BLE001
            return 0.0
        return max(0.0, value) if math.isfinite(value) else 0.0

    def checked_score(task: str, problem: str, reference: str, metadata: str, answer: str) -> float:
        """Return the score from the task's verifier, at most 1, or 0 if the answer cannot be right."""
        if _NOT_FINITE.search(answer) and not _NOT_FINITE.search(reference):
            return 0.0
        entry = {"question": problem, "answer": reference, "metadata": json.loads(metadata)}
        score = verifier_score(task, answer, entry)
        if _contradicts(reference, answer, is_full_score=score >= 1.0):
            return 0.0
        # A verifier that gives the full score without a task gives it to anything.
        if score >= 1.0 and verifier_score(task, answer, {}) >= 1.0:
            return 0.0
        return min(score, 1.0)

    @lru_cache(maxsize=4096)
    def accepts_nonsense(task: str, problem: str, reference: str, metadata: str) -> bool:
        """Return whether a verifier gives the full score to an answer that has nothing to do with the reference."""
        for nonsense in ("x", "0", "True", "nonsense"):
            # It may be right if the reference contains it.
            if re.search(rf"\b{nonsense}\b", reference, re.IGNORECASE):
                continue
            if checked_score(task, problem, reference, metadata, nonsense) == 1.0:
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
        score = checked_score(task, problem, reference, metadata, answer)
        if score == 1.0 and accepts_nonsense(task, problem, reference, metadata):
            return 0.0
        return score

    # Ask a first question, because it triggers deferred imports, which the child cannot do once it is confined.
    judge(("chain_sum", "", "2", "{}", "2"))
    sys.addaudithook(_program_hook())
    serve(judge)


def _contradicts(reference: str, answer: str, is_full_score: bool) -> bool:
    """Return whether an answer cannot be right, because it has another number than the reference.

    `is_full_score` says whether the verifier gave the answer 1 or more; then it also must not add a number.
    """
    expected = number(reference)
    stated = number(answer)
    if expected is not None and stated is not None:
        # Verifiers give partial scores to numbers that contain the right one: 0.5 to "-4" or "14" if "4" is right.
        return abs(stated - expected) > 1e-3 * abs(expected)
    # "67 days, 10:32" adds numbers to the reference "67 days".
    if not is_full_score or reference == "" or reference not in answer:
        return False
    addition = answer.replace(reference, "", 1)
    return any(letter.isdigit() for letter in addition)


def _program_hook() -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that lets code from texts, which verifiers evaluate, be literals and formulas only."""
    import sympy

    # SymPy's parser runs this line itself, so it is allowed. Code objects are only equal if they are compiled with the
    # same future statements, hence `from __future__ import annotations` in this module, as in SymPy's.
    import_by_sympy = compile("from sympy import *", "<string>", "exec")

    def reject_programs(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "exec":
            return
        code = arguments[0]
        # Code from a text has a file name such as "<string>", and is evaluated by a verifier.
        is_from_text = re.match("<(?!frozen )", code.co_filename)
        if code == import_by_sympy or not is_from_text:
            return
        # A lambda or a comprehension is a constant of the code around it.
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
