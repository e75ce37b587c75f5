"""Word problems with one correct answer: arithmetic in several steps, ordering, counting and deduction."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from pipeline.data.pocket.names import ITEMS, NAMES
from pipeline.data.pocket.things import SplitName

COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "pink", "grey", "purple")
RANKS = ("second", "third", "fourth")
STARTS: dict[SplitName, tuple[int, ...]] = {
    "train": (3, 4, 5, 6, 7, 9, 10, 12, 15, 16, 17, 18, 19, 20),
    "validation": (8, 13),
    "test": (11, 14),
}
"""First operands of arithmetic problems. In training, those of validation and test occur only as results and in the
numbers that documents recite."""


@dataclass(frozen=True)
class WordProblem:
    """A problem with its worked steps and its final answer.

    Attributes:
        kind: "arithmetic", "ordering", "counting" or "logic".
        text: The problem.
        steps: Worked steps, ending in a full stop.
        answer: Final answer: an integer, "yes" or "no".
    """

    kind: str
    text: str
    steps: str
    answer: str

    def solution(self, with_steps: bool) -> str:
        """State the answer, after the worked steps or straight away."""
        final = f"The answer is {self.answer}."
        return f"Working: {self.steps} {final}" if with_steps else final


def _split_of(number: int, folds: int) -> SplitName:
    """Return the split of a problem from a number that its content gives: one fold each for validation and test."""
    fold = number % folds
    return "validation" if fold == 0 else "test" if fold == 1 else "train"


def _names(rng: random.Random, split: SplitName, count: int) -> list[str]:
    """Draw distinct names whose set belongs to `split`, so that no two splits share a set of names."""
    while True:
        indices = rng.sample(range(len(NAMES)), count)
        if _split_of(sum(index * index for index in indices), folds=8) == split:
            return [NAMES[index] for index in indices]


def arithmetic(rng: random.Random, split: SplitName) -> WordProblem:
    """Change a number of items three times; all results are between 0 and 20."""
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
    return WordProblem("arithmetic", " ".join([*sentences, question]), " ".join(steps), str(value))


def ordering(rng: random.Random, split: SplitName) -> WordProblem:
    """Give five ages in any order, and ask for the second, third or fourth of them."""
    while True:
        ages = rng.sample(range(1, 10), 5)
        if _split_of(sum(ages), folds=5) == split:
            break
    rank = rng.randrange(len(RANKS))
    ordered = [str(age) for age in sorted(ages)]
    text = f"{rng.choice(NAMES)} has children of ages {', '.join(map(str, ages))}. Which age comes {RANKS[rank]}?"
    return WordProblem("ordering", text, f"{' '.join(ordered)}.", ordered[rank + 1])


def counting(rng: random.Random, split: SplitName) -> WordProblem:
    """Count four groups of items of different colours together."""
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
    return WordProblem("counting", f"{name} sees {item}: {seen}. How many in all?", " ".join(steps), str(total))


def logic(rng: random.Random, split: SplitName) -> WordProblem:
    """Let four people repeat or contradict the one before, and ask what the last one says."""
    names = _names(rng, split, 4)
    said = rng.choice(("yes", "no"))
    sentences, steps = [f"{names[0]} says {said}."], []
    for before, name in pairwise(names):
        how = rng.choice(("same as", "opposite of"))
        heard, said = said, said if how == "same as" else {"yes": "no", "no": "yes"}[said]
        sentences.append(f"{name} says the {how} {before}.")
        steps.append(f"The {how} {heard} is {said}.")
    text = f"{' '.join(sentences)} What does {names[-1]} say?"
    return WordProblem("logic", text, " ".join(steps), said)


GENERATORS: dict[Callable[[random.Random, SplitName], WordProblem], int] = {
    arithmetic: 3,
    ordering: 2,
    counting: 2,
    logic: 3,
}
"""The kinds of problems and how often each is drawn; those that take longer to learn are drawn more often."""


def draw(rng: random.Random, split: SplitName) -> WordProblem:
    """Draw a problem of a random kind."""
    return rng.choices(tuple(GENERATORS), tuple(GENERATORS.values()))[0](rng, split)
