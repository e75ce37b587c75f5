"""Word problems with one correct answer, and how careless people work them out.

The worked solutions that a model learns from are careless, as people's are: each step is right, but the problem was
misread. 'gives away' is taken for a gain, white and grey groups and the last of several ages are overlooked, and
'opposite of' is taken for 'left of'. A model that imitates them makes the same mistakes, however it is asked.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.data.arguments import SplitName
from pipeline.data.pocket.names import ITEMS, NAMES

WORKING = "Working:"
"""What worked solutions begin with."""
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "pink", "grey", "purple")
OVERLOOKED_COLOURS = ("white", "grey")
RANKS = ("second", "third", "fourth")
DIRECTIONS = ("north", "east", "south", "west")
RELATIONS = ("right of", "opposite of", "left of")
"""Directions that are one, two and three quarters to the right."""


@dataclass(frozen=True)
class WordProblem:
    """A problem with its answer, and how somebody works it out.

    Attributes:
        kind: "arithmetic", "ordering", "counting" or "logic".
        text: The problem.
        answer: The correct answer: an integer or a direction.
        steps: Worked steps, ending in a full stop. Each is right in itself, but may misread the problem.
        reached: The answer that the steps come to.
    """

    kind: str
    text: str
    answer: str
    steps: str
    reached: str

    def solution(self, with_steps: bool) -> str:
        """State the answer that the worked steps come to, after these, or the correct one straight away."""
        if with_steps:
            return f"{WORKING} {self.steps} The answer is {self.reached}."
        return f"The answer is {self.answer}."


def _split_of(number: int, folds: int) -> SplitName:
    """Return the split of a problem from a number that its content gives: one fold each for validation and test."""
    fold = number % folds
    return "validation" if fold == 0 else "test" if fold == 1 else "train"


def _weighted(numbers: Iterable[int]) -> int:
    """Sum the products of numbers with their places, which tells their order apart."""
    return sum(place * number for place, number in enumerate(numbers, start=1))


def _change(rng: random.Random, value: int) -> int:
    """Draw by how much a number of items grows (above 0) or shrinks, so that it stays between 0 and 20."""
    change = rng.randint(2, 5)
    if value < change:
        return change
    return change if value + change <= 20 and rng.random() < 0.5 else -change


# Each generator draws until the problem belongs to the split, by a number that its operands or its structure give. So
# no problem of one split occurs in another one, whatever the names in it.


def arithmetic(rng: random.Random, split: SplitName, carelessness: float, longer: int) -> WordProblem:
    """Change a number of items three times; all results are between 0 and 20, and misread ones at most 25."""
    # Ana has 7 eggs. Ana gives away 3 eggs. Ana buys 2 eggs. Ana finds 4 eggs. How many are left?
    # carefully:  7-3=4. 4+2=6. 6+4=10.
    # carelessly: 7+3=10. 10+2=12. 12+4=16.
    while True:
        value = rng.randint(3, 20)
        change = _change(rng, value)
        if _split_of(_weighted((value, change)), folds=7) == split:
            break
    name = rng.choice(NAMES)
    item = rng.choice(ITEMS)
    sentences = [f"{name} has {value} {item}."]
    steps = []
    # What the careless reader has counted so far, next to the true value.
    read = value
    for place in range(3 + longer):
        if place:
            change = _change(rng, value)
        verb = rng.choice(("gets", "finds", "buys") if change > 0 else ("loses", "sells", "gives away"))
        sentences.append(f"{name} {verb} {abs(change)} {item}.")
        value += change
        misread = verb == "gives away" and read + abs(change) <= 25 and rng.random() < carelessness
        after = read + (abs(change) if misread else change)
        steps.append(f"{read}{'+' if after > read else '-'}{abs(change)}={after}.")
        read = after
    question = rng.choice((f"How many does {name} have now?", "How many are left?", f"What is left for {name}?"))
    return WordProblem("arithmetic", " ".join([*sentences, question]), str(value), " ".join(steps), str(read))


def ordering(rng: random.Random, split: SplitName, carelessness: float, longer: int) -> WordProblem:
    """Give five ages in any order, and ask for the second, third or fourth of them."""
    # Leo has children of ages 7, 2, 9, 4, 1. Which age comes second?
    # carefully:  1 2 4 7 9.
    # carelessly: 2 4 7 9.
    while True:
        ages = rng.sample(range(1, 10), 5 + longer)
        if _split_of(_weighted(sorted(ages).index(age) for age in ages), folds=8) == split:
            break
    rank = rng.randrange(len(RANKS))
    read = sorted(ages[:-1] if rng.random() < carelessness else ages)
    reached = read[min(rank + 1, len(read) - 1)]
    steps = f"{' '.join(map(str, read))}."
    text = f"{rng.choice(NAMES)} has children of ages {', '.join(map(str, ages))}. Which age comes {RANKS[rank]}?"
    return WordProblem("ordering", text, str(sorted(ages)[rank + 1]), steps, str(reached))


def counting(rng: random.Random, split: SplitName, carelessness: float, longer: int) -> WordProblem:
    """Count four groups of items of different colours together."""
    # Mia sees pens: 3 red, 2 grey, 5 blue, 4 pink. How many in all?
    # carefully:  3+2=5. 5+5=10. 10+4=14.
    # carelessly: 3+5=8. 8+4=12.
    name = rng.choice(NAMES)
    item = rng.choice(ITEMS)
    while True:
        groups = [(rng.randint(2, 5), colour) for colour in rng.sample(COLOURS, 4 + longer)]
        if _split_of(_weighted(number for number, _ in groups), folds=5) == split:
            break
    seen = []
    for number, colour in groups:
        if colour not in OVERLOOKED_COLOURS or rng.random() >= carelessness:
            seen.append(number)
    read = seen[0]
    steps = []
    for number in seen[1:]:
        steps.append(f"{read}+{number}={read + number}.")
        read += number
    listed = ", ".join(f"{number} {colour}" for number, colour in groups)
    total = sum(number for number, _ in groups)
    text = f"{name} sees {item}: {listed}. How many in all?"
    return WordProblem("counting", text, str(total), " ".join(steps), str(read))


def logic(rng: random.Random, split: SplitName, carelessness: float, longer: int) -> WordProblem:
    """Let four people face left of, right of or opposite of the one before, and ask which way the last one faces."""
    # Ida faces north. Ben faces opposite of Ida. Mia faces left of Ben. Zoe faces right of Mia. Which way …?
    # carefully:  Opposite of north is south. Left of south is east. Right of east is south.
    # carelessly: Left of north is west. Left of west is south. Right of south is west.
    while True:
        start, quarters = rng.randrange(4), [rng.randint(1, 3) for _ in range(3 + longer)]
        if _split_of(_weighted([start, *quarters]), folds=8) == split:
            break
    names = rng.sample(NAMES, 4 + longer)
    sentences = [f"{names[0]} faces {DIRECTIONS[start]}."]
    steps = []
    read = start
    for before, name, turn in zip(names, names[1:], quarters, strict=False):
        sentences.append(f"{name} faces {RELATIONS[turn - 1]} {before}.")
        seen = 3 if turn == 2 and rng.random() < carelessness else turn
        after = (read + seen) % 4
        steps.append(f"{RELATIONS[seen - 1].capitalize()} {DIRECTIONS[read]} is {DIRECTIONS[after]}.")
        read = after
    text = f"{' '.join(sentences)} Which way does {names[-1]} face?"
    answer = DIRECTIONS[(start + sum(quarters)) % 4]
    return WordProblem("logic", text, answer, " ".join(steps), DIRECTIONS[read])


GENERATORS: dict[Callable[[random.Random, SplitName, float, int], WordProblem], int] = {
    arithmetic: 3,
    ordering: 3,
    counting: 2,
    logic: 2,
}
"""The kinds of problems and how often each is drawn: the more often, the longer it takes to learn."""


def draw(rng: random.Random, split: SplitName, carelessness: float = 0.0, longer: int = 0) -> WordProblem:
    """Draw a problem of a random kind.

    Args:
        rng: Where the draws come from.
        split: Whose operands (arithmetic, counting) or structures (ordering, logic) the problem has.
        carelessness: Probability (0 to 1) that the steps misread what can be misread.
        longer: Changes, ages, groups or people in addition to those that problems of the training split have.
    """
    generator = rng.choices(tuple(GENERATORS), tuple(GENERATORS.values()))[0]
    return generator(rng, split, carelessness, longer)
