"""Tools that models may call: functions with type hints and a docstring, as TRL and transformers describe them.

Each limits its own time and memory. If it raises an exception, the model reads its message as the result.
"""

import ast
import operator
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from pipeline.rewards.sandbox.run import CODE_SECONDS, run_many

MAX_EXPRESSION = 200
"""Maximum length of an expression in characters."""
MAX_BITS = 4096
"""Maximum size of a number in bits, about 1,200 digits."""
MAX_OUTPUT = 1000
"""Maximum number of characters of a program's output that the model reads."""
# Numbers with an exponent, such as 1e999999999, would take long to write out.
_DECIMAL = re.compile(r"\d*\.\d*")

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def calculator(expression: str) -> str:
    """Compute an expression exactly.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as "(1234 + 5678) * 3".
    """
    expression = expression.strip()
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression may have at most {MAX_EXPRESSION} characters")
    try:
        tree = ast.parse(expression, mode="eval")
    # For instance a null character, an unfinished number, or deeply nested parentheses.
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is not an expression") from None
    value = _value(tree.body, expression)
    # Write the number as people do: whole, as a decimal of up to 30 places, or else as a fraction.
    if (value * 10**30).denominator != 1:
        return str(value)
    with localcontext(prec=MAX_BITS):
        return format(Decimal(value.numerator) / value.denominator, "f")


def python(code: str) -> str:
    """Run a Python program and return what it prints.

    Args:
        code: A program that prints its result.
    """
    return run_programs([code])[0]


def run_programs(codes: Sequence[str]) -> list[str]:
    """Run the programs of several `python` calls at once in the sandbox. Return each one's output and error."""
    faults = {"timeout": f"stopped after {CODE_SECONDS:g} seconds", "failed": "failed", "memory": "out of memory"}
    results = []
    for outcome in run_many([(code, "") for code in codes]):
        text = outcome.output.strip()
        if len(text) > MAX_OUTPUT:
            text = f"{text[:MAX_OUTPUT]} ... ({len(text)} characters)"
        if not outcome.passed:
            fault = faults.get(outcome.status, outcome.status)
            text = f"{text}\n({fault})".lstrip()
        results.append(text or "(printed nothing)")
    return results


TOOLS = {"calculator": "pipeline.tools.functions:calculator", "python": "pipeline.tools.functions:python"}
"""Built-in tools: the name in YAML files -> the function, which `pipeline.tools.loading` imports."""

MANY: dict[Callable[..., Any], Callable[[Sequence[str]], list[str]]] = {python: run_programs}
"""Tools with one argument that answer several calls faster together than one by one."""


def _value(node: ast.AST, expression: str) -> Fraction:
    """Return the value of an expression, or raise a `ValueError` or a `ZeroDivisionError`."""
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            value = Fraction(number)
        case ast.Constant(value=float()) if _DECIMAL.fullmatch(text := ast.get_source_segment(expression, node) or ""):
            # Decimals are exact: 0.1 is one tenth.
            value = Fraction(text)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _value(operand, expression) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base = _value(left, expression)
            exponent = _value(right, expression)
            if exponent.denominator != 1:
                raise ValueError("an exponent must be a whole number")
            # An upper bound of the size of the power, without computing it.
            if max(_bits(base), 1) * abs(exponent) > MAX_BITS:
                raise ValueError("the number is too long")
            value = base ** int(exponent)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
            value = Fraction(OPERATORS[type(sign)](_value(left, expression), _value(right, expression)))
        case _:
            raise ValueError(f"{expression!r} is not arithmetic")
    if _bits(value) > MAX_BITS:
        raise ValueError("the number is too long")
    return value


def _bits(value: Fraction) -> int:
    """Return the size of a number in bits, that of its longer part."""
    return max(value.numerator.bit_length(), value.denominator.bit_length())
