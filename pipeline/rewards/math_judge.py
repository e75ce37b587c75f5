r"""Judge whether expressions, sets and intervals are equal: the child process that `math_answer` asks.

math-verify evaluates: it accepts `\sqrt{50}+\sqrt{18}` for `8\sqrt{2}`, and the time 1:10 for 3:30. So it only compares
single expressions, and an answer must be as simple as its reference, in the same form: a problem is not its solution.
"""

# From two texts to a verdict:
#
#     reference  "\left\{\frac12, 2\sqrt{2}\right\}"        answer  "$\{2√2, 1/2\}$"
#     _spell     "⦃\frac12, 2\sqrt{2}⦄"                             "⦃2\sqrt{2}, 1/2⦄"
#     split      ",": "\frac12", "2\sqrt{2}"                        ",": "2\sqrt{2}", "1/2"
#
# Then `_is_same_expression` compares the elements: "2\sqrt{2}" with "2\sqrt{2}", and "\frac12" with "1/2".
#
# "⦃" and "⦄" stand for the braces of a set, because "{" and "}" only group in LaTeX.

import logging
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from pipeline.rewards import answers
from pipeline.rewards.answers import is_name, is_rounded, number, same_answer
from pipeline.rewards.checker import serve

# Spellings that math-verify cannot read, or that do not matter, and their replacements.
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
    (r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: "^{" + match[0].translate(answers.SUPERSCRIPTS) + "}"),
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
# Longer expressions are ignored.
MAX_CHARACTERS = 300
_UNITS = re.compile(r"(?<=[\w})])\s+(?:[A-Za-z]{2,}\s*){1,3}(?:\^\{?[23]\}?)?$")
_OPENING, _CLOSING = "([{⦃", ")]}⦄"
_SEPARATOR = re.compile(r"[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
# "1 < x ≤ 2"
_BETWEEN = re.compile(r"([^<>≤≥=]+)([<>≤≥])\s*[A-Za-z]\s*([<>≤≥])([^<>≤≥=]+)")
# "x < 1"
_BEYOND = re.compile(r"([A-Za-z])\s*([<>≤≥])([^<>≤≥=]+)")
# The inverse of `_SPELLINGS`, for math-verify.
_COMMANDS = str.maketrans({"≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "⦃": r"\{", "⦄": r"\}"})
# LaTeX commands that any answer may use. Others may compute or hide something, so they must also be in the reference.
_COMMON = {
    "frac", "sqrt", "pi", "cdot", "times", "div", "infty", "alpha", "beta", "gamma", "delta", "epsilon", "theta",
    "lambda", "mu", "nu", "rho", "sigma", "tau", "phi", "varphi", "psi", "omega", "Delta", "Omega",
}  # fmt: skip


def judge(question: tuple[str, str | None, bool]) -> bool | None:
    """Judge whether an answer equals its reference.

    Args:
        question: The reference, the answer, and whether the answer must have the same form (`literal`), because it
            occurs in the problem. If the answer is None, only the reference is judged.

    Returns:
        None if the reference cannot be read. Otherwise whether the answer equals it; True without an answer.
    """
    reference, answer, literal = question
    if len(reference) > MAX_CHARACTERS or not _is_readable(_spell(reference)):
        return None
    if answer is None:
        return True
    if len(answer) > MAX_CHARACTERS:
        return False
    return _is_same(_spell(reference), _spell(answer), literal, ordered=literal)


def _spell(text: str) -> str:
    """Unify the spelling of an expression and cut off its unit."""
    text = answers.ascii_digits(answers.unwrap(text))
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    text = text.strip()
    unit = _UNITS.search(text)
    if unit is None or ":" in text or answers.HEDGE.search(unit[0]):
        return text
    words = unit[0].casefold().split()
    if not answers.NOT_UNITS.isdisjoint(words):
        return text
    return text[: unit.start()]


def split(text: str) -> tuple[str, list[str]]:
    r"""Return the kind of a collection and its elements: `[1,2)` as ("[)", ["1", "2"]), or "" and the text itself.

    Sets and lists ("x = 1 or x = 2", `\pm 1`) are of the kind ",", unions "∪". Inequalities are intervals.
    """
    text = re.sub(r"^(?:[A-Za-z]\s*∈|\([A-Za-z](?:\s*,\s*[A-Za-z])+\)\s*=)", "", text.strip()).strip()
    interval = _interval(text)
    if interval is not None:
        return interval

    parts = _split_outside(text, re.compile("∪"))
    if len(parts) > 1:
        return "∪", parts
    parts = _split_outside(text, _SEPARATOR)
    if len(parts) > 1:
        # "x < 1 or x > 2" is a union of intervals.
        is_union = "or" in text and all(_BEYOND.fullmatch(part.strip()) for part in parts)
        return ("∪" if is_union else ","), parts
    # Brackets around everything make a set, a tuple or an interval. Those of an interval need not match: [1,2).
    depths = _depths(text)
    if text and text[0] in _OPENING and 0 not in depths[:-1] and depths[-1] == 0:
        elements = _split_outside(text[1:-1], _SEPARATOR)
        if text[0] in "{⦃":
            return ",", elements
        if len(elements) > 1:
            return text[0] + text[-1], elements
    if text.count(r"\pm") == 1:
        return ",", [text.replace(r"\pm", "+"), text.replace(r"\pm", "-")]
    return "", [text]


def _interval(text: str) -> tuple[str, list[str]] | None:
    """Return an inequality as `split` returns an interval: "1 < x ≤ 2" as ("(]", ["1", "2"]); None for other texts."""
    if match := _BETWEEN.fullmatch(text):
        low, first, second, high = match.groups()
        if first in "<≤" and second in "<≤":
            opening = "[" if first == "≤" else "("
            closing = "]" if second == "≤" else ")"
            return opening + closing, [low, high]
    if match := _BEYOND.fullmatch(text):
        _, sign, bound = match.groups()
        if sign in "<≤":
            return ("(]" if sign == "≤" else "()"), [r"-\infty", bound]
        return ("[)" if sign == "≥" else "()"), [bound, r"\infty"]
    return None


def _depths(text: str) -> list[int]:
    """Return how many brackets are open after each character: [1, 1, 0] for "(x)"."""
    depth = 0
    depths = []
    for letter in text:
        if letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        depths.append(depth)
    return depths


def _split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text at separators outside of brackets, and drop empty parts."""
    parts = []
    start = 0
    for position, depth in enumerate(_depths(text)):
        if depth != 0 or position < start:
            continue
        match = separator.match(text, position)
        if match:
            parts.append(text[start:position])
            start = match.end()
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


def _is_label(reference: str) -> bool:
    """Return whether a reference is not mathematics (a time, date, score or words), so that only its text is right."""
    # math-verify does not read numbers with a base, such as 101_2.
    has_base = re.search(r"\d_", reference)
    has_words = re.search(r"(?<![\\A-Za-z])(?<!begin\{)(?<!end\{)[A-Za-z]{4,}", reference)
    return bool(has_base or has_words or ":" in reference or re.fullmatch(r"[\d\s./-]*", reference))


def _is_readable(reference: str) -> bool:
    """Return whether a reference, or each of its elements, is a number, a label, or an expression for math-verify."""
    kind, elements = split(reference)
    if kind and elements:
        return all(map(_is_readable, elements))
    return number(reference) is not None or _is_label(reference) or bool(_read(reference))


def _is_same(reference: str, answer: str, literal: bool, ordered: bool) -> bool:
    """Return whether a reference and an answer have equal elements; a single expression is one element.

    Args:
        reference: The reference, as `_spell` returns it.
        answer: The answer, as `_spell` returns it.
        literal: Whether expressions must have the same form.
        ordered: Whether the order of sets and lists matters.
    """
    if _is_label(reference):
        return same_answer(re.sub("[{}]", "", reference), re.sub("[{}]", "", answer))
    kind, expected = split(reference)
    answer_kind, elements = split(answer)
    # A set of one element is the element.
    if not kind and answer_kind == "," and len(elements) == 1:
        answer_kind = ""
    if kind != answer_kind or len(expected) != len(elements):
        return False
    if not kind:
        return _is_same_expression(*_without_left_sides(reference, answer), literal)

    # "x = 1, y = 2" is compared name by name.
    expected_names = [_left_side(element) for element in expected]
    names = [_left_side(element) for element in elements]
    if kind == "," and (_has_several(expected_names) or _has_several(names)):
        if sorted(expected_names) != sorted(names):
            return False
        expected = sorted(expected, key=_left_side)
        elements = sorted(elements, key=_left_side)
        ordered = True
    if ordered or kind not in (",", "∪"):
        pairs = zip(expected, elements, strict=True)
        return all(_is_same(*pair, literal, ordered) for pair in pairs)

    # In any order: for each element of the reference, remove an equal one from the answer.
    for reference_element in expected:
        for element in elements:
            if _is_same(reference_element, element, literal, ordered):
                elements.remove(element)
                break
        else:
            return False
    return True


def _left_side(equation: str) -> str:
    """Return what is left of the last equals sign, "" without one."""
    return equation.rpartition("=")[0].strip()


def _has_several(names: list[str]) -> bool:
    return len(set(names) - {""}) > 1


def _without_left_sides(reference: str, answer: str) -> tuple[str, str]:
    """Return both texts without their names, so that the reference "y = 2x" equals the answer "2x", and vice versa.

    Nothing is cut off if the left sides differ, or if one is not a name.
    """
    name, equals, right = reference.partition("=")
    answer_name, answer_equals, answer_right = answer.partition("=")
    if "=" in right or "=" in answer_right:
        return reference, answer
    if equals and answer_equals:
        return (right, answer_right) if name.split() == answer_name.split() else (reference, answer)
    if equals and is_name(name):
        return right, answer
    if answer_equals and is_name(answer_name):
        return reference, answer_right
    return reference, answer


@lru_cache(maxsize=4096)
def _read(expression: str) -> list[Any]:
    """Parse an expression with math-verify, without evaluation. Return the parsed expressions, mostly one or none."""
    expression = expression.translate(_COMMANDS)
    # Without spaces, math-verify would read 2ab as 2 with a unit.
    if "\\int" not in expression:
        expression = re.sub(r"(?<![\\A-Za-z])[A-Za-z]{2,3}(?![A-Za-z])", lambda run: " ".join(run[0]), expression)
    readings = parse(f"${expression}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=0)
    return [reading for reading in readings if isinstance(reading, sympy.Basic | sympy.MatrixBase)]


def _is_same_expression(reference: str, answer: str, literal: bool) -> bool:
    """Return whether an answer equals the reference and is as simple; if `literal`, it must have the same form."""
    if same_answer(reference, answer):
        return True
    if number(reference) is not None or _is_label(reference):
        return False

    # First, the answer as text: it must not contain signs or commands that could compute or hide something.
    answer, _, rounded = answer.partition(r"\approx")
    if not _uses_common_signs(answer, reference):
        return False
    # The answer may end a correct calculation: "2\sqrt{2} + \sqrt{2} = 3\sqrt{2}".
    if "=" in answer and "=" not in reference:
        calculation, _, answer = answer.rpartition("=")
        if not verify(_read(calculation), _read(answer), timeout_seconds=0):
            return False

    # Parse both as expressions without evaluating them.
    if len(_read(reference)) != 1 or len(_read(answer)) != 1:
        return False
    (expected,) = _read(reference)
    (stated,) = _read(answer)
    # "\frac13 \approx 0.33" must be rounded correctly.
    if rounded and not (stated.is_number and is_rounded(number(rounded), Fraction(str(sympy.N(stated))))):
        return False
    # math-verify drops what it mistakes for a unit, as in 2ab.
    letters = set(re.findall("[A-Za-z]", re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+", "", reference))) - {"e"}
    if expected.free_symbols != stated.free_symbols or (letters and not expected.free_symbols):
        return False
    # math-verify rounds, so it must not compare numbers.
    solution = expected.doit()
    value = number(answer, reduced=True)
    if value is not None:
        return bool(solution == sympy.Rational(value.numerator, value.denominator))
    if not _is_as_simple(form(stated), form(expected), form(solution), literal):
        return False
    return bool(verify([expected], [stated], timeout_seconds=0))


def _uses_common_signs(answer: str, reference: str) -> bool:
    """Return whether each sign and command in an answer is a usual one, or also occurs in the reference."""
    signs = set(re.findall(r"[^\w\s\\{}()\[\]^+*/=<>.-]|_", answer))
    if not signs <= set(reference):
        return False
    command = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
    return set(command.findall(answer)) <= _COMMON | set(command.findall(reference))


class Form(NamedTuple):
    """Counts of an expression's parts, to distinguish two forms of the same value."""

    # Additions, multiplications, powers and functions.
    size: int
    # The product of all numbers.
    magnitude: int
    # Sums that are factors, bases or divided: `(x-1)(x+1)` has 2, `x^2-1` has none.
    sums: int
    # Names of functions and relations.
    functions: set[str]


def _is_as_simple(stated: Form, expected: Form, solution: Form, literal: bool) -> bool:
    """Return whether an answer is factored as the reference and not larger.

    Args:
        stated: The form of the answer.
        expected: The form of the reference as it is written.
        solution: The form of the reference after evaluation, which may be larger or smaller.
        literal: Whether the answer must have exactly the form of the reference.
    """
    if literal and stated != expected:
        return False
    if stated.size > max(expected.size, solution.size):
        return False
    if stated.magnitude > max(expected.magnitude, solution.magnitude):
        return False
    return stated.sums == expected.sums and stated.functions <= expected.functions


def form(expression: sympy.Basic) -> Form:
    """Count the parts of an expression that was parsed without evaluation."""
    size = 0
    magnitude = 1
    sums = 0
    functions = set()
    # Parts that are still to be counted, and whether each is a factor, a base or divided.
    remaining: list[tuple[Any, bool]] = [(expression, False)]
    while remaining:
        node, is_factor = remaining.pop()
        if isinstance(node, sympy.MatrixBase):
            remaining += [(entry, False) for entry in node]
        elif isinstance(node, sympy.Number) and node.is_finite:
            value = sympy.Rational(str(node))
            # 0 would hide all other numbers.
            magnitude *= abs(int(value.p)) * int(value.q) or 1
        elif isinstance(node, sympy.Add):
            # Like terms, as like factors below, count twice.
            terms = [_symbols_of(term) for term in node.args]
            size += len(terms) - 1 + _repetitions(terms)
            if is_factor:
                sums += 1
            remaining += [(term, False) for term in node.args]
        elif isinstance(node, sympy.Mul):
            factors = _factors(node)
            bases = [factor.as_base_exp()[0] for factor in factors]
            size += max(0, len(factors) - 1) + _repetitions([base for base in bases if not base.is_Rational])
            remaining += [(factor, True) for factor in factors]
        elif isinstance(node, sympy.Pow):
            is_division = node.exp == -1
            # A power of a number can be calculated, so it counts as three.
            if node.base.is_Rational and node.exp.is_Rational and abs(node.exp.p) > 1:
                size += 3
            elif not is_division:
                size += 1
            remaining.append((node.base, True))
            if not is_division:
                remaining.append((node.exp, False))
        elif node.args:
            size += 1
            functions.add(getattr(node, "name", type(node).__name__))
            remaining += [(argument, False) for argument in node.args]
    return Form(size, magnitude, sums, functions)


def _symbols_of(term: Any) -> tuple[Any, ...]:
    """Return the factors of a term that are not numbers: (x, y) for 2*x*y."""
    return tuple(factor for factor in _factors(term) if not factor.is_number)


def _repetitions(items: Sequence[Any]) -> int:
    """Return how many items are equal to an earlier one."""
    return len(items) - len(set(items))


def _factors(node: Any) -> list[Any]:
    """Return the factors of a product, also of nested ones. Factors 1 and -1 are left out.

    A rational number has up to two: its numerator, and 1 divided by its denominator.
    """
    if node.is_Mul:
        return [factor for argument in node.args for factor in _factors(argument)]
    if node.is_Number and node.is_finite:
        value = sympy.Rational(str(node))
        factors = []
        if abs(value.p) != 1:
            factors.append(sympy.Integer(value.p))
        if abs(value.q) != 1:
            factors.append(sympy.Pow(value.q, -1, evaluate=False))
        return factors
    return [node]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    # Ask a first question, because it triggers deferred imports, which a confined process cannot do.
    judge((r"\frac{1}{2}x", "0.5x", False))
    serve(judge)
