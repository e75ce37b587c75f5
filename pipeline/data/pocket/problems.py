"""Word problems with one right answer: arithmetic of several steps, ordering, counting and deduction."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from pipeline.data.pocket.names import ITEMS, NAMES
from pipeline.data.pocket.things import Split

COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "pink", "grey", "purple")
RANKS = ("second", "third", "fourth")
STARTS: dict[Split, tuple[int, ...]] = {
    "train": (3, 4, 5, 6, 7, 9, 10, 12, 15, 16, 17, 18, 19, 20),
    "validation": (8, 13),
    "test": (11, 14),
}
"""First operands of arithmetic problems. In training, those of validation and test occur as results, and in rows of
numbers that are read out."""


@dataclass(frozen=True)
class Problem:
    """A problem, how it is worked out, and its final answer.

    Attributes:
        kind (`str`): "arithmetic", "ordering", "counting" or "logic".
        text (`str`): the problem as it is asked.
        steps (`str`): worked steps, ending in a full stop.
        answer (`str`): final answer: an integer, "yes" or "no".
    """

    kind: str
    text: str
    steps: str
    answer: str

    def solution(self, with_steps: bool) -> str:
        """The answer in words, after the worked steps or straight away."""
        final = f"The answer is {self.answer}."
        return f"Working: {self.steps} {final}" if with_steps else final


def _split_of(number: int, folds: int) -> Split:
    """The split of a problem whose content this number stands for: one of `folds` each is for validation and test."""
    fold = number % folds
    return "validation" if fold == 0 else "test" if fold == 1 else "train"


def _names(rng: random.Random, split: Split, count: int) -> list[str]:
    """Distinct names whose set belongs to `split`: no set of names of a test problem is that of a training problem."""
    while True:
        indices = rng.sample(range(len(NAMES)), count)
        if _split_of(sum(index * index for index in indices), folds=8) == split:
            return [NAMES[index] for index in indices]


def arithmetic(rng: random.Random, split: Split) -> Problem:
    """Three changes to a number of things; all results lie in 0..20."""
    value = rng.choice(STARTS[split])
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    sentences, steps = [f"{name} has {value} {item}."], []
    for _ in range(3):
        change = rng.randint(2, 5)
        grows = value < change or (value + change <= 20 and rng.random() < 0.5)
        verb = rng.choice(("gets", "finds", "buys") if grows else ("loses", "sells", "gives away"))
        sentences.append(f"{name} {verb} {change} {item}.")
        after = value + change if grows else value - change
        steps.append(f"{value}{'+' if grows else '-'}{change}={after}.")
        value = after
    question = rng.choice((f"How many does {name} have now?", "How many are left?", f"What is left for {name}?"))
    return Problem("arithmetic", " ".join([*sentences, question]), " ".join(steps), str(value))


def ordering(rng: random.Random, split: Split) -> Problem:
    """Five ages in any order, which must be put in order to tell the second, third or fourth of them."""
    while True:
        ages = rng.sample(range(1, 10), 5)
        if _split_of(sum(ages), folds=5) == split:
            break
    rank = rng.randrange(len(RANKS))
    ordered = [str(age) for age in sorted(ages)]
    text = f"{rng.choice(NAMES)} has children of ages {', '.join(map(str, ages))}. Which age comes {RANKS[rank]}?"
    return Problem("ordering", text, f"{' '.join(ordered)}.", ordered[rank + 1])


def counting(rng: random.Random, split: Split) -> Problem:
    """Four groups of things of different colours, counted together."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    while True:
        groups = [(rng.randint(2, 5), colour) for colour in rng.sample(COLOURS, 4)]
        if _split_of(sum(number * place for place, (number, _) in enumerate(groups, start=1)), folds=5) == split:
            break
    total, steps = groups[0][0], []
    for number, _ in groups[1:]:
        steps.append(f"{total}+{number}={total + number}.")
        total += number
    seen = ", ".join(f"{number} {colour}" for number, colour in groups)
    return Problem("counting", f"{name} sees {item}: {seen}. How many in all?", " ".join(steps), str(total))


def logic(rng: random.Random, split: Split) -> Problem:
    """Four people, each of whom agrees with the one before or says the opposite; what the last one says follows."""
    names = _names(rng, split, 4)
    said = rng.choice(("yes", "no"))
    sentences, steps = [f"{names[0]} says {said}."], []
    for before, name in pairwise(names):
        how = rng.choice(("same as", "opposite of"))
        heard, said = said, said if how == "same as" else {"yes": "no", "no": "yes"}[said]
        sentences.append(f"{name} says the {how} {before}.")
        steps.append(f"The {how} {heard} is {said}.")
    text = f"{' '.join(sentences)} What does {names[-1]} say?"
    return Problem("logic", text, " ".join(steps), said)


KINDS: dict[str, Callable[[random.Random, Split], Problem]] = {
    "arithmetic": arithmetic,
    "ordering": ordering,
    "counting": counting,
    "logic": logic,
}
KIND_WEIGHTS = (3, 2, 2, 3)
"""How often each is drawn: those that take more to learn more often."""


def draw(rng: random.Random, split: Split) -> Problem:
    """A problem of a random kind."""
    return KINDS[rng.choices(tuple(KINDS), KIND_WEIGHTS)[0]](rng, split)
