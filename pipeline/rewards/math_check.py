"""Symbolic equality by math-verify, in the child process of `pipeline.rewards.checker`.

math-verify's own limit, `signal.alarm`, works only in the main thread, and not against one long multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pipeline.rewards.checker import Checker, ask_all, serve

MAX_LENGTH = 300
"""Characters in an expression; longer ones are not parsed."""

_checker = Checker("pipeline.rewards.math_check", "math-verify, which math_answer")


def compare(pairs: Sequence[tuple[str, str | None]]) -> list[bool | None]:
    """Check with math-verify that each answer equals its reference. Without answers, check that the references parse.

    Expressions of more than 300 characters and those that take longer than 2 s give False; see also `ask_all`.
    """
    return ask_all(_ask, pairs, slow=False)


@lru_cache(maxsize=65_536)
def _ask(pair: tuple[str, str | None]) -> bool:
    reference, answer = pair
    if len(reference) > MAX_LENGTH or len(answer or "") > MAX_LENGTH:
        return False
    return bool(_checker.ask(pair))


def _serve() -> None:
    """Judge pairs of a reference and an answer or null: the main function of the child."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)

    def read(expression: str) -> list[object]:
        latex = [LatexExtractionConfig()]
        return list(parse(f"${expression}$", extraction_config=latex, fallback_mode="no_fallback", parsing_timeout=0))

    def judge(pair: tuple[str, str | None]) -> bool:
        reference, answer = pair
        parsed = read(reference)
        return bool(parsed) and (answer is None or bool(verify(parsed, read(answer), timeout_seconds=0)))

    judge((r"\frac{1}{2}", "0.5"))  # triggers the deferred imports
    serve(judge)


if __name__ == "__main__":
    _serve()
