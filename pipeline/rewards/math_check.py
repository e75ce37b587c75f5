r"""Equality of expressions, sets and intervals, by math-verify in the child process of `pipeline.rewards.checker`.

math-verify computes: to it, `\sqrt{50}+\sqrt{18}` is `8\sqrt{2}`, and the time 1:10 is 3:30. So it only compares single
expressions, and an answer must be as simple as its reference and have its form: the problem itself is not its solution.

math-verify's own limit, `signal.alarm`, works only in the main thread, and not against one long multiplication.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipeline.rewards.answers import (
    HEDGE,
    NOT_UNITS,
    SUPERSCRIPTS,
    ascii_digits,
    is_name,
    is_rounded,
    number,
    same_answer,
    unwrap,
)
from pipeline.rewards.checker import Checker, ask_all, serve

if TYPE_CHECKING:
    import sympy

MAX_LENGTH = 300
"""Characters in an expression; longer ones are not parsed."""

Question = tuple[str, str | None, bool]
"""A reference, the answer to judge or None, and whether the answer is a part of the prompt."""

_checker = Checker("pipeline.rewards.math_check", "math-verify, which math_answer")

# spellings that math-verify does not read, or that do not matter
_SPELLINGS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\\(?:left|right|displaystyle|big|Big)(?![A-Za-z])|(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z])|~", " "),
    (r"^\$([^$]+)\$(?=\s)", r"\1"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?:√|(?<![\\A-Za-z])sqrt)\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))", r"\\sqrt{\1\2}"),
    (r"π|(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|min|max|lim|gcd|lcm)(?![A-Za-z])", r"\\\1 "),
    ("∞", r"\\infty "),
    (r"\*\*", "^"),
    (r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}"),
    (r"\\leq?(?:slant)?(?![A-Za-z])|<=", "≤"),
    (r"\\geq?(?:slant)?(?![A-Za-z])|>=", "≥"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:cup|union)(?![A-Za-z])", "∪"),
    (r"\\in(?![A-Za-z])", "∈"),
    (r"\\\{", "⦃"),
    (r"\\\}", "⦄"),
    (r"[×·⋅]", r"\\cdot "),
    ("≈", r"\\approx "),
    (r"(?<=\d)\s+(?=[A-Za-z](?![A-Za-z]))", ""),
    (r"[−–]", "-"),
]
_UNITS = re.compile(r"(?<=[\w})])\s+(?:[A-Za-z]{2,}\s*){1,3}(?:\^\{?[23]\}?)?$")
_PAIRS = {"(": ")", "[": "]", "{": "}", "⦃": "⦄"}
_SEPARATOR = re.compile(r"[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_BETWEEN = re.compile(r"([^<>≤≥=]+)([<>≤≥])\s*[A-Za-z]\s*([<>≤≥])([^<>≤≥=]+)")
_BEYOND = re.compile(r"([A-Za-z])\s*([<>≤≥])([^<>≤≥=]+)")
_COMMON = {
    "frac", "sqrt", "pi", "cdot", "times", "div", "infty", "alpha", "beta", "gamma", "delta", "epsilon", "theta",
    "lambda", "mu", "nu", "rho", "sigma", "tau", "phi", "varphi", "psi", "omega", "Delta", "Omega",
}  # fmt: skip
"""Commands that any answer may have. All others compute, hide or mean something: the reference must have them, too."""


def compare(questions: Sequence[Question]) -> list[bool | None]:
    """Check that each answer equals its reference, in as simple a form. Without answers, check the references.

    An answer that is a part of the prompt must have the form of the reference. Expressions of more than 300 characters
    and those that take longer than 2 s give False; see also `ask_all`.
    """
    return ask_all(_ask, questions, slow=False)


@lru_cache(maxsize=65_536)
def _ask(question: Question) -> bool:
    reference, answer, _ = question
    if len(reference) > MAX_LENGTH or len(answer or "") > MAX_LENGTH:
        return False
    return bool(_checker.ask(question))


def split(text: str) -> tuple[str, list[str]]:
    r"""Return the kind of a collection and its elements: `[1,2)` as ("[)", ["1", "2"]); ("", [text]) if it is none.

    Sets and lists ("x = 1 or x = 2", `\pm 1`) are of the kind ",", unions "∪". Inequalities are intervals.
    """
    text = text.strip()
    text = re.sub(r"^(?:[A-Za-z]\s*∈|\([A-Za-z](?:\s*,\s*[A-Za-z])+\)\s*=)", "", text).strip()
    if match := _BETWEEN.fullmatch(text):
        low, first, second, high = match.groups()
        if first in ">≥" and second in ">≥":
            low, first, second, high = high, second, first, low
        if first in "<≤" and second in "<≤":
            return ("[" if first in "≤≥" else "(") + ("]" if second in "≤≥" else ")"), [low, high]
    if match := _BEYOND.fullmatch(text):
        _, sign, bound = match.groups()
        if sign in "<≤":
            return "(" + ("]" if sign == "≤" else ")"), [r"-\infty", bound]
        return ("[" if sign == "≥" else "(") + ")", [bound, r"\infty"]
    if len(parts := _split_outside(text, re.compile("∪"))) > 1:
        return "∪", parts
    if len(parts := _split_outside(text, _SEPARATOR)) > 1:
        unite = "or" in text and all(map(_BEYOND.fullmatch, map(str.strip, parts)))
        return "∪" if unite else ",", parts
    if text[:1] in _PAIRS and _closing(text) == len(text) - 1:
        inner = _split_outside(text[1:-1], _SEPARATOR)
        if text[0] in "{⦃":
            return ",", inner
        if len(inner) > 1:
            return text[0] + text[-1], inner
    if text.count(r"\pm") == 1:
        return ",", [text.replace(r"\pm", "+"), text.replace(r"\pm", "-")]
    return "", [text]


def _closing(text: str) -> int:
    """Return where the bracket at the beginning closes; brackets of an interval need not match."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in _PAIRS) - (letter in _PAIRS.values())
        if depth == 0:
            return index
    return -1


def _split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text at separators outside of brackets."""
    parts, start, depth, position = [], 0, 0, 0
    for position, letter in enumerate(text):
        depth += (letter in _PAIRS) - (letter in _PAIRS.values())
        if depth == 0 and position >= start and (match := separator.match(text, position)):
            parts.append(text[start:position])
            start = match.end()
    return [part for part in [*parts, text[start:]] if part.strip()]


def _spell(text: str) -> str:
    text = ascii_digits(unwrap(text))
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    text = text.strip()
    unit = _UNITS.search(text)
    if unit is None or ":" in text or HEDGE.search(unit[0]) or not NOT_UNITS.isdisjoint(unit[0].casefold().split()):
        return text
    return text[: unit.start()]


def _commands(text: str) -> set[str]:
    return set(re.findall(r"\\([A-Za-z]+|[^A-Za-z])", text))


def _is_label(reference: str) -> bool:
    """Return whether a reference is not mathematics: a time, a date, a score, words. Only its text is an answer."""
    # Digits of a base that is given, as in 101_2, are not a number to math-verify.
    words = re.findall(r"\d_", reference) or re.findall(r"(?<![\\A-Za-z])(?<!begin\{)(?<!end\{)[A-Za-z]{4,}", reference)
    return bool(re.fullmatch(r"[\d\s:./-]*", reference)) or ":" in reference or bool(words)


@dataclass
class Form:
    """What an expression is made of, by which two forms of one value are told apart.

    Attributes:
        size: Additions, multiplications, powers and functions.
        magnitude: The product of all numbers.
        sums: Sums that are factors, bases or divided; `(x-1)(x+1)` has 2, `x^2-1` has none.
        functions: Names of functions and relations.
    """

    size: int
    magnitude: int
    sums: int
    functions: frozenset[str]

    def is_as_simple_as(self, *others: Form) -> bool:
        """Return whether an answer may have this form; the first of the others is the reference's as it is written."""
        return (
            self.size <= max(other.size for other in others)
            and self.magnitude <= max(other.magnitude for other in others)
            and self.sums == others[0].sums
            and self.functions <= others[0].functions
        )


def form(expression: sympy.Basic) -> Form:
    """Measure an expression that was parsed without being evaluated."""
    import sympy

    size, magnitude, sums, functions = 0, 1, 0, set()
    todo: list[tuple[Any, bool]] = [(expression, False)]
    while todo:
        node, is_factor = todo.pop()
        if isinstance(node, sympy.MatrixBase):
            todo += [(entry, False) for entry in node]
        elif isinstance(node, sympy.Number) and node.is_finite:
            value = sympy.Rational(str(node))
            magnitude *= abs(int(value.p)) * int(value.q) or 1
        elif isinstance(node, sympy.Add):
            # Like terms, as like factors below, count twice.
            terms = [tuple(factor for factor in _factors(term) if not factor.is_number) for term in node.args]
            size += len(terms) - 1 + len(terms) - len(set(terms))
            sums += is_factor
            todo += [(term, False) for term in node.args]
        elif isinstance(node, sympy.Mul):
            factors = _factors(node)
            bases = [base for base, _ in (factor.as_base_exp() for factor in factors) if not base.is_Rational]
            size += max(0, len(factors) - 1) + len(bases) - len(set(bases))
            todo += [(factor, True) for factor in factors]
        elif isinstance(node, sympy.Pow):
            # A power of a number can be calculated, so it counts as three.
            power = node.base.is_Rational and node.exp.is_Rational and abs(node.exp.p) > 1
            size += 3 if power else node.exp != -1
            todo += [(node.base, True), *([(node.exp, False)] if node.exp != -1 else [])]
        elif node.args:
            size += 1
            functions.add(getattr(node, "name", type(node).__name__))
            todo += [(argument, False) for argument in node.args]
    return Form(size, magnitude, sums, frozenset(functions))


def _factors(node: Any) -> list[Any]:
    """Return the factors of a product of products, a fraction being two; 1 and -1 do not count."""
    import sympy

    if node.is_Mul:
        return [factor for argument in node.args for factor in _factors(argument)]
    if node.is_Number and node.is_finite:
        value = sympy.Rational(str(node))
        parts = [sympy.Integer(value.p), sympy.Pow(value.q, -1, evaluate=False)]
        return [part for part, number in zip(parts, (value.p, value.q), strict=True) if abs(number) != 1]
    return [node]


def _serve() -> None:
    """Judge a `Question`: the main function of the child."""
    import logging

    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)

    commands = {"≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "⦃": r"\{", "⦄": r"\}"}

    @lru_cache(maxsize=4096)
    def read(expression: str) -> list[Any]:
        for symbol, command in commands.items():
            expression = expression.replace(symbol, command)
        if "\\int" not in expression:  # 2ab would be 2 of some unit
            expression = re.sub(r"(?<![\\A-Za-z])[A-Za-z]{2,3}(?![A-Za-z])", lambda run: " ".join(run[0]), expression)
        latex = [LatexExtractionConfig()]
        found = parse(f"${expression}$", extraction_config=latex, fallback_mode="no_fallback", parsing_timeout=0)
        return [one for one in found if isinstance(one, sympy.Basic | sympy.MatrixBase)]

    def is_readable(reference: str) -> bool:
        return number(reference) is not None or _is_label(reference) or bool(read(reference))

    def is_same_expression(reference: str, answer: str, literal: bool) -> bool:
        if same_answer(reference, answer):
            return True
        if number(reference) is not None or _is_label(reference):
            return False
        answer, _, rounded = answer.partition(r"\approx")
        special = set(re.findall(r"[^\w\s\\{}()\[\]^+*/=<>.-]|_", answer))
        if not special <= set(reference) or not _commands(answer) <= _COMMON | _commands(reference):
            return False
        if "=" in answer and "=" not in reference:  # a calculation
            left, _, answer = answer.rpartition("=")
            if not verify(read(left), read(answer), timeout_seconds=0):
                return False
        expected, given = read(reference), read(answer)
        if len(expected) != 1 or len(given) != 1:
            return False
        (expected,), (given,) = expected, given
        if rounded and not (given.is_number and is_rounded(number(rounded), Fraction(str(sympy.N(given))))):
            return False
        # math-verify drops what it takes for a unit, as in 2ab.
        letters = set(re.findall("[A-Za-z]", re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+", "", reference))) - {"e"}
        if expected.free_symbols != given.free_symbols or (letters and not expected.free_symbols):
            return False
        solved = expected.doit()
        value = number(answer, reduced=True)
        if value is not None:  # math-verify rounds
            return bool(solved == sympy.Rational(value.numerator, value.denominator))
        if literal and form(given) != form(expected):
            return False
        if not form(given).is_as_simple_as(form(expected), form(solved)):
            return False
        return bool(verify([expected], [given], timeout_seconds=0))

    def judge(question: Question) -> bool:
        reference, answer, literal = question
        if answer is None:
            return _all_elements(is_readable, _spell(reference))
        same: Callable[[str, str], bool] = lambda one, other: is_same_expression(one, other, literal)  # noqa: E731
        return _is_same(_spell(reference), _spell(answer), same, literal)

    judge((r"\frac{1}{2}x", "0.5x", False))  # triggers the deferred imports
    serve(judge)


def _all_elements(check: Callable[[str], bool], text: str) -> bool:
    """Return whether a check holds for each single expression in a text."""
    kind, parts = split(text)
    return all(_all_elements(check, part) for part in parts) if kind and parts else check(text)


def _is_same(reference: str, answer: str, same: Callable[[str, str], bool], ordered: bool) -> bool:
    """Compare two texts element by element; the elements of sets and lists may have another order if not `ordered`."""
    if _is_label(reference):
        return same_answer(*(re.sub("[{}]", "", text) for text in (reference, answer)))
    kind, expected = split(reference)
    given_kind, given = split(answer)
    if not kind and given_kind == "," and len(given) == 1:
        given_kind = ""
    if kind != given_kind or len(expected) != len(given):
        return False
    if not kind:
        return same(*_right_sides(reference, answer))
    if kind == "," and any(len({*map(_name, parts)} - {""}) > 1 for parts in (expected, given)):  # x = 1, y = 2
        expected, given, ordered = sorted(expected, key=_name), sorted(given, key=_name), True
        if [*map(_name, expected)] != [*map(_name, given)]:
            return False
    if ordered or kind not in (",", "∪"):
        return all(_is_same(one, other, same, ordered) for one, other in zip(expected, given, strict=True))
    for one in expected:
        found = next((other for other in given if _is_same(one, other, same, ordered)), None)
        if found is None:
            return False
        given.remove(found)
    return True


def _name(part: str) -> str:
    """Return the left side of an equation, or nothing."""
    return part.rpartition("=")[0].strip()


def _right_sides(reference: str, answer: str) -> tuple[str, str]:
    """Return what is to compare of two expressions; "y = 2x" is "2x" if only one of both has a left side."""
    left, equals, right = reference.partition("=")
    given_left, given_equals, given_right = answer.partition("=")
    if "=" in right or "=" in given_right:
        return reference, answer
    if equals and given_equals:
        return (right, given_right) if left.split() == given_left.split() else (reference, answer)
    if equals:
        return (right, answer) if is_name(left) else (reference, answer)
    return (reference, given_right) if given_equals and is_name(given_left) else (reference, answer)


if __name__ == "__main__":
    _serve()
