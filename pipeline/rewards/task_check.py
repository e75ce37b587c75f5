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
from functools import lru_cache
from types import CodeType, ModuleType
from typing import Any

from pipeline.rewards.answers import number
from pipeline.rewards.checker import serve

_NOT_FINITE = re.compile(r"(?<![^\W_])[-+]?(?:nan|inf|infinity|1e\d{3,})[ij]?(?![^\W_])", re.IGNORECASE)


def _serve() -> None:
    # Only generating games of life needs it. It would import matplotlib, which takes almost half of the start.
    sys.modules["cellpylib"] = ModuleType("cellpylib")
    import sympy
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    # SymPy's parser begins with this, compiled with postponed annotations, as in this module.
    by_sympy = compile("from sympy import *", "<string>", "exec")

    def refuse_programs(event: str, arguments: tuple[Any, ...]) -> None:
        # Code that does not come from a file is evaluated by a verifier.
        if event != "exec" or arguments[0] == by_sympy or not re.match("<(?!frozen )", arguments[0].co_filename):
            return
        # A lambda or a comprehension is a constant of the code around it.
        code = arguments[0]
        nested = any(isinstance(constant, CodeType) for constant in code.co_consts)
        used = {instruction.opname for instruction in dis.get_instructions(code)}
        if nested or used & {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "IMPORT_NAME"}:
            raise PermissionError("an answer must not use attributes or define functions")
        for name in code.co_names:
            value = getattr(sympy, name, None)
            is_function = getattr(value, "__module__", "").startswith("sympy.functions.")
            is_formula = not name.startswith("_") and (isinstance(value, type | sympy.Basic) or is_function)
            if not (len(name) == 1 or is_formula):
                raise PermissionError(f"an answer may not use {name}")

    verifier = lru_cache(get_score_answer_fn)

    def pay_by_verifier(task: str, given: str, entry: dict[str, Any]) -> float:
        # Verifiers raise anything at answers that they cannot read.
        try:
            value = float(verifier(task)(given, entry))
        except Exception:  # noqa: BLE001
            return 0.0
        return max(0.0, value) if math.isfinite(value) else 0.0

    def pay(task: str, problem: str, own: str, metadata: str, given: str) -> float:
        """Return the score of the task's verifier, lowered if it cannot be right."""
        if _NOT_FINITE.search(given) and not _NOT_FINITE.search(own):
            return 0.0
        value = pay_by_verifier(task, given, {"question": problem, "answer": own, "metadata": json.loads(metadata)})
        expected, stated = number(own), number(given)
        if expected is not None and stated is not None:
            # Verifiers pay for the digits of the right number in another one: half for "-4" or "14" where "4" is right.
            wrong = abs(stated - expected) > 1e-3 * abs(expected)
        else:
            # At least, an answer that is paid in full must add no number, as "67 days, 10:32" does to "67 days".
            wrong = value >= 1.0 and own in given and own != "" and any(map(str.isdigit, given.replace(own, "", 1)))
        return 0.0 if wrong or (value >= 1.0 and pay_by_verifier(task, given, {}) >= 1.0) else min(value, 1.0)

    @lru_cache(maxsize=4096)
    def pays_nonsense(task: str, problem: str, own: str, metadata: str) -> bool:
        # Answers with these may only be paid in full if the task's own answer contains them.
        wrong = [text for text in ("x", "0", "True", "nonsense") if not re.search(rf"\b{text}\b", own, re.IGNORECASE)]
        return any(pay(task, problem, own, metadata, text) == 1.0 for text in wrong)

    def judge(question: tuple[str, str, str, str, str]) -> float | None:
        task, _problem, _own, metadata, _given = question
        try:
            if task not in DATASETS or not isinstance(json.loads(metadata), dict):
                return None
        except ValueError:
            return None
        value = pay(*question)
        return 0.0 if value == 1.0 and pays_nonsense(*question[:4]) else value

    # Ask a first question, because it triggers deferred imports, which the child cannot do once it is confined.
    judge(("chain_sum", "", "2", "{}", "2"))
    sys.addaudithook(refuse_programs)
    serve(judge)


if __name__ == "__main__":
    _serve()
