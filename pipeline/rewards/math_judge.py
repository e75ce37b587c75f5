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
# and then, element by element, what `_is_same_expression` says of "2\sqrt{2}" and "2\sqrt{2}".

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from operator import itemgetter
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
_BETWEEN = re.compile(r"([^<>≤≥=]+)([<>≤≥])\s*[A-Za-z]\s*([<>≤≥])([^<>≤≥=]+)")
_BEYOND = re.compile(r"([A-Za-z])\s*([<>≤≥])([^<>≤≥=]+)")
_COMMANDS = str.maketrans({"≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "⦃": r"\{", "⦄": r"\}"})
# Commands that any answer may use. Others compute, hide or mean something, and must also be in the reference.
_COMMON = {
    "frac", "sqrt", "pi", "cdot", "times", "div", "infty", "alpha", "beta", "gamma", "delta", "epsilon", "theta",
    "lambda", "mu", "nu", "rho", "sigma", "tau", "phi", "varphi", "psi", "omega", "Delta", "Omega",
}  # fmt: skip


def judge(question: tuple[str, str | None, bool]) -> bool | None:
    """Return whether an answer equals its reference, or None if that cannot be read; True without an answer."""
    reference, answer, literal = question
    if len(reference) > MAX_CHARACTERS or not _is_readable(_spell(reference)):
        return None
    if answer is None or len(answer) > MAX_CHARACTERS:
        return answer is None
    return _is_same(_spell(reference), _spell(answer), literal, ordered=literal)


def _spell(text: str) -> str:
    """Unify the spelling of an expression and cut off its unit."""
    text = answers.ascii_digits(answers.unwrap(text))
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    unit = _UNITS.search(text := text.strip())
    if unit is None or ":" in text or answers.HEDGE.search(unit[0]):
        return text
    return text[: unit.start()] if answers.NOT_UNITS.isdisjoint(unit[0].casefold().split()) else text


def split(text: str) -> tuple[str, list[str]]:
    r"""Return the kind of a collection and its elements: `[1,2)` as ("[)", ["1", "2"]), or "" and the text itself.

    Sets and lists ("x = 1 or x = 2", `\pm 1`) are of the kind ",", unions "∪". Inequalities are intervals.
    """
    text = re.sub(r"^(?:[A-Za-z]\s*∈|\([A-Za-z](?:\s*,\s*[A-Za-z])+\)\s*=)", "", text.strip()).strip()
    if match := _BETWEEN.fullmatch(text):
        low, first, second, high = match.groups()
        if first in "<≤" and second in "<≤":
            return ("[" if first == "≤" else "(") + ("]" if second == "≤" else ")"), [low, high]
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
    # Brackets around everything make a set, a tuple or an interval. Those of an interval need not match: [1,2).
    depths = list(accumulate((letter in _OPENING) - (letter in _CLOSING) for letter in text))
    if text and text[0] in _OPENING and 0 not in depths[:-1] and depths[-1] == 0:
        inner = _split_outside(text[1:-1], _SEPARATOR)
        if text[0] in "{⦃":
            return ",", inner
        if len(inner) > 1:
            return text[0] + text[-1], inner
    if text.count(r"\pm") == 1:
        return ",", [text.replace(r"\pm", "+"), text.replace(r"\pm", "-")]
    return "", [text]


def _split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    parts, start = [], 0
    depths = accumulate((letter in _OPENING) - (letter in _CLOSING) for letter in text)
    for position, depth in enumerate(depths):
        if depth == 0 and position >= start and (match := separator.match(text, position)):
            parts.append(text[start:position])
            start = match.end()
    return [part for part in [*parts, text[start:]] if part.strip()]


def _is_label(reference: str) -> bool:
    """Return whether a reference is not mathematics (a time, date, score or words), so that only its text is right."""
    # math-verify does not read numbers with a base, such as 101_2.
    based = re.search(r"\d_", reference)
    words = re.search(r"(?<![\\A-Za-z])(?<!begin\{)(?<!end\{)[A-Za-z]{4,}", reference)
    return bool(based or words or ":" in reference or re.fullmatch(r"[\d\s./-]*", reference))


def _is_readable(reference: str) -> bool:
    kind, parts = split(reference)
    if kind and parts:
        return all(map(_is_readable, parts))
    return number(reference) is not None or _is_label(reference) or bool(_read(reference))


def _is_same(reference: str, answer: str, literal: bool, ordered: bool) -> bool:
    """Compare two texts element by element; the order of sets and lists only matters if `ordered`."""
    if _is_label(reference):
        return same_answer(*(re.sub("[{}]", "", text) for text in (reference, answer)))
    kind, expected = split(reference)
    given_kind, given = split(answer)
    if not kind and given_kind == "," and len(given) == 1:
        given_kind = ""
    if kind != given_kind or len(expected) != len(given):
        return False

    if not kind:
        # "y = 2x" equals "2x" if only one has a left side, or both have the same.
        left, equals, right = reference.partition("=")
        given_left, given_equals, given_right = answer.partition("=")
        if "=" not in right and "=" not in given_right:
            same_left = equals and given_equals and left.split() == given_left.split()
            if same_left or (equals and not given_equals and is_name(left)):
                reference = right
            if same_left or (given_equals and not equals and is_name(given_left)):
                answer = given_right
        return _is_same_expression(reference, answer, literal)

    # "x = 1, y = 2" is compared name by name.
    names, given_names = ([part.rpartition("=")[0].strip() for part in parts] for parts in (expected, given))
    if kind == "," and (len({*names} - {""}) > 1 or len({*given_names} - {""}) > 1):
        if sorted(names) != sorted(given_names):
            return False
        expected = [part for _, part in sorted(zip(names, expected, strict=True), key=itemgetter(0))]
        given = [part for _, part in sorted(zip(given_names, given, strict=True), key=itemgetter(0))]
        ordered = True
    if ordered or kind not in (",", "∪"):
        return all(_is_same(one, other, literal, ordered) for one, other in zip(expected, given, strict=True))
    for one in expected:
        found = next((other for other in given if _is_same(one, other, literal, ordered)), None)
        if found is None:
            return False
        given.remove(found)
    return True


@lru_cache(maxsize=4096)
def _read(expression: str) -> list[Any]:
    expression = expression.translate(_COMMANDS)
    # Without spaces, math-verify would read 2ab as 2 with a unit.
    if "\\int" not in expression:
        expression = re.sub(r"(?<![\\A-Za-z])[A-Za-z]{2,3}(?![A-Za-z])", lambda run: " ".join(run[0]), expression)
    found = parse(f"${expression}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=0)
    return [one for one in found if isinstance(one, sympy.Basic | sympy.MatrixBase)]


def _is_same_expression(reference: str, answer: str, literal: bool) -> bool:
    """Return whether an expression equals another one and is as simple; if `literal`, in the same form."""
    if same_answer(reference, answer):
        return True
    if number(reference) is not None or _is_label(reference):
        return False

    # First, the answer as text: it must not contain signs or commands that could compute or hide something.
    answer, _, rounded = answer.partition(r"\approx")
    special = set(re.findall(r"[^\w\s\\{}()\[\]^+*/=<>.-]|_", answer))
    used, known = (set(re.findall(r"\\([A-Za-z]+|[^A-Za-z])", text)) for text in (answer, reference))
    if not special <= set(reference) or not used <= _COMMON | known:
        return False
    # The answer may end a correct calculation: "2\sqrt{2} + \sqrt{2} = 3\sqrt{2}".
    if "=" in answer and "=" not in reference:
        left, _, answer = answer.rpartition("=")
        if not verify(_read(left), _read(answer), timeout_seconds=0):
            return False

    # Parse both as expressions without evaluating them.
    both = [*_read(reference), *_read(answer)]
    if len(_read(reference)) != 1 or len(both) != 2:
        return False
    expected, given = both
    if rounded and not (given.is_number and is_rounded(number(rounded), Fraction(str(sympy.N(given))))):
        return False
    # math-verify drops what it takes for a unit, as in 2ab.
    letters = set(re.findall("[A-Za-z]", re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+", "", reference))) - {"e"}
    if expected.free_symbols != given.free_symbols or (letters and not expected.free_symbols):
        return False
    # math-verify rounds, so it must not compare numbers.
    solved = expected.doit()
    if (value := number(answer, reduced=True)) is not None:
        return bool(solved == sympy.Rational(value.numerator, value.denominator))

    # The answer must not be larger than the reference, as written or solved, and must be factored likewise.
    ours, wanted, simplest = form(given), form(expected), form(solved)
    if literal and ours != wanted:
        return False
    small = ours.size <= max(wanted.size, simplest.size) and ours.magnitude <= max(wanted.magnitude, simplest.magnitude)
    alike = ours.sums == wanted.sums and ours.functions <= wanted.functions
    return small and alike and bool(verify([expected], [given], timeout_seconds=0))


class Form(NamedTuple):
    """Counts of an expression's parts, to distinguish two forms of the same value.

    The numbers of additions, multiplications, powers and functions; the product of all numbers; sums that are factors,
    bases or divided (`(x-1)(x+1)` has 2, `x^2-1` has none); and the names of functions and relations.
    """

    size: int
    magnitude: int
    sums: int
    functions: set[str]


def form(expression: sympy.Basic) -> Form:
    """Count the parts of an expression that was parsed without evaluation."""
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
    return Form(size, magnitude, sums, functions)


def _factors(node: Any) -> list[Any]:
    """Return the factors of a product of products, a fraction being two; 1 and -1 do not count."""
    if node.is_Mul:
        return [factor for argument in node.args for factor in _factors(argument)]
    if node.is_Number and node.is_finite:
        value = sympy.Rational(str(node))
        parts = [sympy.Integer(value.p), sympy.Pow(value.q, -1, evaluate=False)]
        return [part for part, number in zip(parts, (value.p, value.q), strict=True) if abs(number) != 1]
    return [node]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    # Ask a first question, because it triggers deferred imports, which a confined process cannot do.
    judge((r"\frac{1}{2}x", "0.5x", False))
    serve(judge)
