"""Small Python functions: a request, the source, and a test that a correct answer passes."""

import random
from collections.abc import Callable
from typing import NamedTuple

from pipeline.data.arguments import SplitName


class Snippet(NamedTuple):
    """A Python function, with its description and its test."""

    name: str
    # What it does, as a predicate: "adds 3 to a number".
    task: str
    source: str
    # Assertions about the function, with inputs that no prompt shows.
    test: str


LIST = list(range(100))
# The constants 2 to 60 are divided among the splits, so that "add_13" tests what "add_12" taught.
FAMILIES: tuple[tuple[str, str, str, str, Callable[[int], list[tuple[object, object]]]], ...] = (
    ("add", "adds {k} to a number", "x", "x + {k}", lambda k: [(5, 5 + k), (-3, k - 3)]),
    ("take", "takes {k} from a number", "x", "x - {k}", lambda k: [(9, 9 - k), (-1, -1 - k)]),
    ("times", "multiplies a number by {k}", "x", "x * {k}", lambda k: [(4, 4 * k), (-2, -2 * k)]),
    ("power", "raises a number to the power {k}", "x", "x ** {k}", lambda k: [(2, 2**k), (3, 3**k)]),
    ("over", "says if a number is over {k}", "x", "x > {k}", lambda k: [(k, False), (k + 1, True)]),
    ("under", "says if a number is under {k}", "x", "x < {k}", lambda k: [(k, False), (k - 1, True)]),
    ("by", "says if {k} divides a number", "x", "x % {k} == 0", lambda k: [(2 * k, True), (2 * k + 1, k == 1)]),
    ("rest", "gives the rest after division by {k}", "x", "x % {k}", lambda k: [(3 * k, 0), (k - 1, k - 1)]),
    ("repeat", "repeats a text {k} times", "s", "s * {k}", lambda k: [("ab", "ab" * k), ("", "")]),
    ("first", "gives the first {k} items of a list", "a", "a[:{k}]", lambda k: [(LIST, LIST[:k])]),
    ("last", "gives the last {k} items of a list", "a", "a[-{k}:]", lambda k: [(LIST, LIST[-k:])]),
    ("scale", "multiplies each item by {k}", "a", "[x * {k} for x in a]", lambda k: [([1, 2, 5], [k, 2 * k, 5 * k])]),
)
"""Name, task, parameter and expression of a function with a constant k, and test cases as (argument, result)."""
COMMENTS = (
    "# {name} {task}.",
    "# This function {task}.",
    "# A small function. It {task}.",
    "# For {item}: {name} {task}.",
)


def snippet(rng: random.Random, split: SplitName) -> Snippet:
    """Draw a function of a random family with a constant of this split."""
    family = rng.randrange(len(FAMILIES))
    residues = {"test": (0,), "validation": (4,), "train": (1, 2, 3, 5, 6, 7)}[split]
    k = rng.choice([k for k in range(2, 61) if (k + family) % 8 in residues])
    *templates, make_cases = FAMILIES[family]
    prefix, task, parameter, expression = (template.format(k=k) for template in templates)
    name = f"{prefix}_{k}"
    test = "\n".join(f"assert {name}({argument!r}) == {result!r}" for argument, result in make_cases(k))
    return Snippet(name, task, f"def {name}({parameter}):\n    return {expression}", test)
