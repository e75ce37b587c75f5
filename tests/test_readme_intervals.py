"""No interval in a README is narrower than test rows allow, and tables over seeds keep the rule of `over_seeds`."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.evaluation.intervals import Estimate, Z
from tests.benchmarks.preferences import show

ROOT = Path(__file__).parents[1]
INTERVAL = re.compile(r"([+−-]?\d+\.\d+)\W{0,3} \(([+−-]?\d+\.\d+) to ([+−-]?\d+\.\d+)\)")
"""A value and the ends of its interval."""

SHARE, WINS = 0.9, 0.5
"""Part of the least width that an interval must have. A bootstrap is random, and draws, which count one half, vary less
than wins and losses."""

MEASURED: dict[str, list[tuple[str, int, float]]] = {
    "README.md": [
        ("win rate", 200 * 4, WINS), ("accuracy", 400, SHARE), ("pass@1", 300, SHARE), ("solved", 500, SHARE),
    ],
    "recipes/gsm8k-shakespeare/README.md": [("", 50 * 4, WINS)],
    "recipes/pocket/README.md": [
        # Of `2_sft` against itself, all matches are draws.
        ("win rate, greedy", 0, WINS), ("win rate", 200 * 4, WINS), ("accuracy|stop rate", 402, SHARE),
        ("sampled", 64 * 8, SHARE), ("@8", 64, SHARE), ("longer", 120, SHARE), ("pass@1|worked steps", 300, SHARE),
    ],
    "recipes/pocket-dpo/README.md": [("greedy", 200, WINS), ("", 200 * 4, WINS)],
    "recipes/pocket-llama4/README.md": [("bits per byte", 0, SHARE), ("", 200 * 4, WINS)],
    "recipes/pocket-preferences/README.md": [
        ("KL", 0, SHARE), ("instruction accuracy", 400, SHARE), ("greedy|best of", 200, WINS), ("", 200 * 4, WINS),
    ],
    "recipes/pocket-reasoning/README.md": [("^all", 300, SHARE), ("", 50, SHARE)],
    "recipes/pocket-tools/README.md": [("score", 0, SHARE), ("", 300, SHARE)],
    "recipes/smollm2/README.md": [("", 64 * 8, SHARE)],
}  # fmt: skip
"""For each README, the most answers of one seed behind a figure, by a pattern of its row, column or paragraph.

The first pattern that is found counts; 0 answers, or no pattern: the figure is not a share. Several answers to one
prompt count as if they were independent: the interval may be wider than the least width, but never narrower.
"""


def figures(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield each interval with the words that say what it is of: row and column of a table, or the paragraph."""
    header: list[str] = []
    for block in re.split(r"\n(?=\|)|\n\n", text):
        line = block.split("\n")[0] if block.startswith("|") else " ".join(block.split())
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if block.startswith("|") else []
        if not cells:
            header = []
            yield from ((line, match) for match in INTERVAL.finditer(line))
        elif not header:
            header = cells
        for column, cell in enumerate(cells):
            title = header[column] if column < len(header) else ""
            yield from ((f"{' '.join(cells[:2])} {title}", match) for match in INTERVAL.finditer(cell))


def least_width(value: float, answers: int, decimals: int) -> float:
    """Return the width of a share's interval for so many independent answers, after rounding.

    A difference of two shares on the same problems has at least the variance of a share of its size.
    """
    step = 10.0**-decimals
    nearest = max(abs(value) + step / 2, 0.5) if abs(value) > 0.5 else max(abs(value) - step / 2, 0.0)
    return 2 * Z * math.sqrt(max(nearest * (1 - nearest), 0.0) / answers) - step


def too_narrow(path: str) -> list[str]:
    narrow = []
    for words, match in figures((ROOT / path).read_text(encoding="utf-8")):
        value, low, high = (float(number.replace("−", "-")) for number in match.groups())
        matching = (entry for entry in MEASURED[path] if re.search(entry[0], words))
        _, answers, part = next(matching, ("", 0, SHARE))
        decimals = len(match[2].partition(".")[2])
        # An interval that ends at the greatest or least value is cut off there.
        is_whole = low not in (-1, 0) and high < 1
        width = high - low if is_whole else 2 * max(high - value, value - low)
        if answers and abs(value) <= 1 and width < part * least_width(value, answers, decimals):
            narrow.append(f"{match[0]}, {answers} answers: {words[:80]}")
    return narrow


@pytest.mark.parametrize("path", MEASURED)
def test_no_interval_is_narrower_than_test_rows_allow(path: str) -> None:
    assert too_narrow(path) == []


def test_every_readme_with_intervals_is_looked_at() -> None:
    for path in [ROOT / "README.md", *ROOT.glob("recipes/*/README.md")]:
        if INTERVAL.search(" ".join(path.read_text(encoding="utf-8").split())):
            assert str(path.relative_to(ROOT)) in MEASURED


def test_an_interval_over_seeds_is_not_narrower_than_over_test_rows() -> None:
    """Seeds may agree by chance: these five win rates, each from 200 prompts, are within 0.007 of each other."""
    runs = [Estimate(value, value - 0.03, value + 0.028, 200) for value in (0.782, 0.784, 0.785, 0.786, 0.788)]
    assert show(runs, "win rate") == "0.785 (0.755 to 0.813)"
    assert show([Estimate(0.99, 0.97, 1.0, 200), Estimate(0.97, 0.95, 0.99, 200)], "greedy").endswith("to 1.000)")
    assert show(runs, "words") == "0.8", "its interval says little"
    assert show([None, None], "greedy") == ""
