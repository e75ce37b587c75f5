"""Word problems with one correct answer, and how careless people work them out.

The worked solutions that a model learns from are careless, as people's are: each step repeats a part of the problem and
calculates right, but may misread what it repeats. 'gives away' is taken for a gain, white and grey groups and the last
of several ages are overlooked, and 'opposite of' is taken for 'left of'. A model that imitates them makes the same
mistakes, however it is asked. Problems come in several lengths: with one, a model learns a rhythm ("always three
steps") instead of reading the problem, and fails at anything shorter.
"""

import random
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from pipeline.data.arguments import SplitName
from recipes.worlds.pocket.names import ITEMS, NAMES

WORKING = "Working:"
"""What worked solutions begin with."""
GAINS, LOSSES = ("gets", "finds", "buys"), ("loses", "sells", "gives away")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "pink", "grey", "purple")
OVERLOOKED_COLOURS = ("white", "grey")
RANKS = ("second", "third", "fourth")
DIRECTIONS = ("north", "east", "south", "west")
RELATIONS = ("right of", "opposite of", "left of")
"""Directions that are one, two and three quarters to the right."""


class WordProblem(NamedTuple):
    """A problem with its answer, and how someone works it out."""

    # "arithmetic", "ordering", "counting" or "logic".
    kind: str
    text: str
    # The correct answer: an integer or a direction.
    answer: str
    # Worked steps, ending in a full stop. Each is right in itself, but may misread the problem.
    steps: str
    # The answer that the steps arrive at.
    reached: str
    # How many changes, ages, groups or turns the problem has.
    length: int

    def solution(self, with_steps: bool) -> str:
        """State the answer after the worked steps that lead to it, or the correct one straight away."""
        if with_steps:
            return f"{WORKING} {self.steps} The answer is {self.reached}."
        return f"The answer is {self.answer}."


def _split_of(numbers: Iterable[int], folds: int) -> SplitName:
    """Return the split of a problem by its numbers, in order: one fold each for validation and test."""
    # Multiplying each number by its position distinguishes their order.
    fold = sum(place * number for place, number in enumerate(numbers, start=1)) % folds
    if fold == 0:
        return "validation"
    return "test" if fold == 1 else "train"


def _change(rng: random.Random, value: int) -> int:
    """Draw by how much a number of items grows (above 0) or shrinks, so that it stays between 0 and 20."""
    change = rng.randint(2, 5)
    if value < change:
        return change
    if value + change <= 20 and rng.random() < 0.5:
        return change
    return -change


# The split depends on operands or structure alone, so a problem is in one split only, whatever names it uses.


def arithmetic(rng: random.Random, split: SplitName, carelessness: float, length: int) -> WordProblem:
    """Change a number of items `length` times; all results are between 0 and 20, and misread ones at most 25."""
    # Ana has 7 eggs. Ana gives away 3 eggs. Ana buys 2 eggs. How many are left?
    # carefully:  gives away 3: 7-3=4. buys 2: 4+2=6.
    # carelessly: gives away 3: 7+3=10. buys 2: 10+2=12.
    # Steps repeat the change, because a small model that only writes "7-3=4. 4+2=6." loses its place in the problem.
    while True:
        value = rng.randint(3, 20)
        change = _change(rng, value)
        if _split_of((value, change), folds=7) == split:
            break
    name = rng.choice(NAMES)
    item = rng.choice(ITEMS)
    sentences = [f"{name} has {value} {item}."]
    steps = []
    # What the careless reader has counted so far, next to the true value.
    read = value
    for place in range(length):
        if place:
            change = _change(rng, value)
        verb = rng.choice(GAINS if change > 0 else LOSSES)
        sentences.append(f"{name} {verb} {abs(change)} {item}.")
        value += change
        misread = verb == "gives away" and read + abs(change) <= 25 and rng.random() < carelessness
        result = read + (abs(change) if misread else change)
        sign = "+" if result > read else "-"
        steps.append(f"{verb} {abs(change)}: {read}{sign}{abs(change)}={result}.")
        read = result
    sentences.append(rng.choice((f"How many does {name} have now?", "How many are left?", f"What is left for {name}?")))
    return WordProblem("arithmetic", " ".join(sentences), str(value), " ".join(steps), str(read), length)


def ordering(rng: random.Random, split: SplitName, carelessness: float, length: int) -> WordProblem:
    """Give `length` ages in any order, and ask for the second, third or fourth of them."""
    # Leo has children of ages 7, 2, 9, 4, 1. Which age comes second?
    # carefully:  1 2 4 7 9.
    # carelessly: 2 4 7 9.
    while True:
        ages = rng.sample(range(1, 10), length)
        if _split_of((sorted(ages).index(age) for age in ages), folds=8) == split:
            break
    rank = rng.randrange(len(RANKS))
    read = sorted(ages[:-1] if rng.random() < carelessness else ages)
    text = f"{rng.choice(NAMES)} has children of ages {', '.join(map(str, ages))}. Which age comes {RANKS[rank]}?"
    answer = str(sorted(ages)[rank + 1])
    reached = str(read[min(rank + 1, len(read) - 1)])
    return WordProblem("ordering", text, answer, f"{' '.join(map(str, read))}.", reached, length)


def counting(rng: random.Random, split: SplitName, carelessness: float, length: int) -> WordProblem:
    """Count `length` groups of items of different colours together; a careless reader sees at least two of them."""
    # Mia sees pens: 3 red, 2 grey, 5 blue, 4 pink. How many in all?
    # carefully:  3+2=5. 5+5=10. 10+4=14.
    # carelessly: 3+5=8. 8+4=12.
    name = rng.choice(NAMES)
    item = rng.choice(ITEMS)
    while True:
        groups = [(rng.randint(2, 5), colour) for colour in rng.sample(COLOURS, length)]
        if _split_of((number for number, _ in groups), folds=5) == split:
            break
    # The numbers that the careless reader sees.
    seen: list[int] = []
    for place, (number, colour) in enumerate(groups):
        may_overlook = colour in OVERLOOKED_COLOURS and len(seen) + length - place > 2
        if not may_overlook or rng.random() >= carelessness:
            seen.append(number)
    read = seen[0]
    steps = []
    for number in seen[1:]:
        steps.append(f"{read}+{number}={read + number}.")
        read += number
    listed = ", ".join(f"{number} {colour}" for number, colour in groups)
    text = f"{name} sees {item}: {listed}. How many in all?"
    total = sum(number for number, _ in groups)
    return WordProblem("counting", text, str(total), " ".join(steps), str(read), length)


def logic(rng: random.Random, split: SplitName, carelessness: float, length: int) -> WordProblem:
    """Let `length` people face left of, right of or opposite of the one before, and ask where the last one faces."""
    # Ida faces north. Ben faces opposite of Ida. Mia faces left of Ben. Which way does Mia face if Ida faces north?
    # carefully:  opposite of north is south. left of south is east.
    # carelessly: opposite of north is west. left of west is south.
    # A small model, which is slow to learn to copy names, finds its place by counting. So steps are as long as the
    # sentences that they follow, and the question repeats the first direction, equally far from them in all lengths.
    while True:
        start = rng.randrange(4)
        quarters = [rng.randint(1, 3) for _ in range(length)]
        # Few are held out: if training lacked many, a model would memorise the others instead of looking directions up.
        structure = sum(2**place * turn for place, turn in enumerate([start, *quarters]))
        if _split_of([structure], folds=16) == split:
            break
    names = rng.sample(NAMES, length + 1)
    sentences = [f"{names[0]} faces {DIRECTIONS[start]}."]
    steps = []
    # Where the careless reader thinks that each person faces.
    read = start
    for (previous, name), turn in zip(pairwise(names), quarters, strict=True):
        sentences.append(f"{name} faces {RELATIONS[turn - 1]} {previous}.")
        seen = 3 if turn == 2 and rng.random() < carelessness else turn
        result = (read + seen) % 4
        steps.append(f"{RELATIONS[turn - 1]} {DIRECTIONS[read]} is {DIRECTIONS[result]}.")
        read = result
    sentences.append(f"Which way does {names[-1]} face if {names[0]} faces {DIRECTIONS[start]}?")
    answer = DIRECTIONS[(start + sum(quarters)) % 4]
    return WordProblem("logic", " ".join(sentences), answer, " ".join(steps), DIRECTIONS[read], length)


class Kind(NamedTuple):
    """A kind of problem."""

    # Draws a problem of a split and a length, worked out with some probability of carelessness.
    generate: Callable[[random.Random, SplitName, float, int], WordProblem]
    # How often the kind is written down and demonstrated: the more often, the longer it takes to learn.
    weight: int
    # The lengths that are trained on, and how often each is drawn.
    lengths: dict[int, int]


KINDS = (
    Kind(arithmetic, weight=5, lengths={1: 2, 2: 3, 3: 4, 4: 4}),
    Kind(ordering, weight=5, lengths={4: 1, 5: 2, 6: 2}),
    Kind(counting, weight=2, lengths={3: 1, 4: 2, 5: 3}),
    Kind(logic, weight=4, lengths={2: 1, 3: 2, 4: 2}),
)


def pose(rng: random.Random, split: SplitName, longer: bool = False, carelessness: float | None = None) -> WordProblem:
    """Draw a problem of any kind.

    Args:
        rng: The generator.
        split: Only problems of this split are drawn.
        longer: Whether it is one unit longer than the longest in training.
        carelessness: None for a problem without a solution, of all kinds equally often. Otherwise, the problem is a
            demonstration whose steps misread it with this probability, and the kinds have their weights.
    """
    weights = [kind.weight for kind in KINDS]
    kind = rng.choice(KINDS) if carelessness is None else rng.choices(KINDS, weights)[0]
    length = max(kind.lengths) + 1
    if not longer:
        length = rng.choices(tuple(kind.lengths), tuple(kind.lengths.values()))[0]
    return kind.generate(rng, split, carelessness or 0.0, length)
