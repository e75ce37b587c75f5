"""Small Python functions: a request, the source, and a test that a correct answer passes."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.data.pocket.names import ITEMS
from pipeline.data.pocket.things import SplitName


@dataclass(frozen=True)
class Snippet:
    """A function with its description and test.

    Attributes:
        name: Name of the function.
        task: What it does, as a predicate: "adds 3 to a number".
        source: Python source.
        test: Assertions about the function, with inputs that no prompt shows.
    """

    name: str
    task: str
    source: str
    test: str


def _snippet(name: str, task: str, parameter: str, expression: str, cases: list[tuple[object, object]]) -> Snippet:
    source = f"def {name}({parameter}):\n    return {expression}"
    test = "\n".join(f"assert {name}({given!r}) == {expected!r}" for given, expected in cases)
    return Snippet(name, task, source, test)


def _add(k: int) -> Snippet:
    return _snippet(f"add_{k}", f"adds {k} to a number", "x", f"x + {k}", [(5, 5 + k), (-3, k - 3)])


def _subtract(k: int) -> Snippet:
    return _snippet(f"take_{k}", f"takes {k} from a number", "x", f"x - {k}", [(9, 9 - k), (-1, -1 - k)])


def _multiply(k: int) -> Snippet:
    return _snippet(f"times_{k}", f"multiplies a number by {k}", "x", f"x * {k}", [(4, 4 * k), (-2, -2 * k)])


def _power(k: int) -> Snippet:
    return _snippet(f"power_{k}", f"raises a number to the power {k}", "x", f"x ** {k}", [(2, 2**k), (3, 3**k)])


def _over(k: int) -> Snippet:
    return _snippet(f"over_{k}", f"says if a number is over {k}", "x", f"x > {k}", [(k, False), (k + 1, True)])


def _under(k: int) -> Snippet:
    return _snippet(f"under_{k}", f"says if a number is under {k}", "x", f"x < {k}", [(k, False), (k - 1, True)])


def _divides(k: int) -> Snippet:
    task = f"says if {k} divides a number"
    return _snippet(f"by_{k}", task, "x", f"x % {k} == 0", [(2 * k, True), (2 * k + 1, k == 1)])


def _remainder(k: int) -> Snippet:
    return _snippet(f"rest_{k}", f"gives the rest after division by {k}", "x", f"x % {k}", [(3 * k, 0), (k - 1, k - 1)])


def _repeat(k: int) -> Snippet:
    return _snippet(f"repeat_{k}", f"repeats a text {k} times", "s", f"s * {k}", [("ab", "ab" * k), ("", "")])


def _first(k: int) -> Snippet:
    values = list(range(100))
    return _snippet(f"first_{k}", f"gives the first {k} items of a list", "a", f"a[:{k}]", [(values, values[:k])])


def _last(k: int) -> Snippet:
    values = list(range(100))
    return _snippet(f"last_{k}", f"gives the last {k} items of a list", "a", f"a[-{k}:]", [(values, values[-k:])])


def _scale(k: int) -> Snippet:
    task = f"multiplies each item by {k}"
    return _snippet(f"scale_{k}", task, "a", f"[x * {k} for x in a]", [([1, 2, 5], [k, 2 * k, 5 * k])])


FAMILIES: tuple[Callable[[int], Snippet], ...] = (
    _add, _subtract, _multiply, _power, _over, _under, _divides, _remainder, _repeat, _first, _last, _scale,
)  # fmt: skip
REQUESTS: dict[SplitName, tuple[str, ...]] = {
    "train": (
        "Write a function {name} that {task}.",
        "Write a Python function {name} that {task}.",
        "Write code for a function {name} that {task}.",
        "I need a function {name} that {task}.",
        "Can you write a function {name} that {task}?",
        "I would like a function {name} that {task}.",
    ),
    "validation": ("Tell me how to write a function {name} that {task}.",),
    "test": ("Can you tell me code for a function {name} that {task}?", "I want a function {name} that {task}."),
}
COMMENTS = (
    "# {name} {task}.",
    "# This function {task}.",
    "# A small function. It {task}.",
    "# For {item}: {name} {task}.",
)


def constants(family: int, split: SplitName) -> list[int]:
    """Return the constants (2 to 60) that functions of a family use in this split."""
    residues = {"test": (0,), "validation": (4,), "train": (1, 2, 3, 5, 6, 7)}[split]
    return [k for k in range(2, 61) if (k + family) % 8 in residues]


def snippet(rng: random.Random, split: SplitName) -> Snippet:
    """Draw a function of a random family with a constant of this split."""
    family = rng.randrange(len(FAMILIES))
    return FAMILIES[family](rng.choice(constants(family, split)))


def request(rng: random.Random, split: SplitName, wanted: Snippet) -> str:
    """Ask for the function in a phrasing of this split."""
    return rng.choice(REQUESTS[split]).format(name=wanted.name, task=wanted.task)


def commented(rng: random.Random) -> str:
    """Write a pretraining document of two or three functions with comments."""
    parts = []
    for _ in range(rng.randint(2, 3)):
        wanted = snippet(rng, "train")
        comment = rng.choice(COMMENTS).format(name=wanted.name, task=wanted.task, item=rng.choice(ITEMS))
        parts.append(f"{comment}\n{wanted.source}")
    return "\n\n".join(parts)
