"""Word problems with one right answer: arithmetic of several steps, ordering, counting and deduction."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.pocket.names import ITEMS, NAMES
from pipeline.pocket.things import Split

COMPARATIVES = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
    ("richer", "richest", "poorest"),
    ("louder", "loudest", "quietest"),
)
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "pink", "grey", "purple")
VIRTUES = (
    "kind", "calm", "wise", "brave", "quick", "proud", "happy", "clever", "honest", "quiet", "loud", "shy", "strong",
    "polite", "funny", "neat", "loyal", "gentle", "lucky", "patient", "careful", "cheerful", "generous", "serious",
)  # fmt: skip
STARTS: dict[Split, range] = {"train": range(4, 70), "validation": range(30, 36), "test": range(40, 50)}
"""First operands of arithmetic problems. Those of validation and test occur in training as results only."""


@dataclass(frozen=True)
class Problem:
    """A problem, how it is worked out, and its final answer.

    Attributes:
        kind (`str`): "arithmetic", "ordering", "counting" or "logic".
        text (`str`): the problem as it is asked.
        steps (`str`): worked steps, ending in a full stop.
        answer (`str`): final answer: an integer, a name or a word.
    """

    kind: str
    text: str
    steps: str
    answer: str

    def solution(self, with_steps: bool) -> str:
        """The answer in words, after the worked steps or straight away."""
        final = f"The answer is {self.answer}."
        return f"{self.steps} {final}" if with_steps else final


def _names(rng: random.Random, split: Split, count: int) -> list[str]:
    """Distinct names whose set belongs to `split`: no set of names of a test problem is that of a training problem."""
    residues = {"validation": (0,), "test": (1,), "train": (2, 3, 4, 5, 6, 7)}[split]
    while True:
        indices = rng.sample(range(len(NAMES)), count)
        if sum(index * index for index in indices) % 8 in residues:
            return [NAMES[index] for index in indices]


def arithmetic(rng: random.Random, split: Split) -> Problem:
    """Three changes to a number of things; all results lie in 0..99."""
    held_out = {*STARTS["validation"], *STARTS["test"]} if split == "train" else set()
    value = rng.choice([start for start in STARTS[split] if start not in held_out])
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    sentences, steps = [f"{name} has {value} {item}."], []
    for _ in range(3):
        change = rng.randint(2, 9)
        grows = value - change < 0 or (value + change <= 99 and rng.random() < 0.5)
        verb = rng.choice(("gets", "finds", "buys") if grows else ("loses", "sells", "gives away"))
        sentences.append(f"{name} {verb} {change} {item}.")
        after = value + change if grows else value - change
        steps.append(f"{value}{'+' if grows else '-'}{change}={after}.")
        value = after
    question = rng.choice(
        (f"How many does {name} have now?", "How many are left?", f"What is left for {name}?")
    )
    return Problem("arithmetic", " ".join([*sentences, question]), " ".join(steps), str(value))


def ordering(rng: random.Random, split: Split) -> Problem:
    """Four people compared pair by pair; the chain must be put together to answer."""
    more, most, least = rng.choice(COMPARATIVES)
    chain = _names(rng, split, 4)
    facts = [f"{a} is {more} than {b}." for a, b in zip(chain, chain[1:], strict=False)]
    rng.shuffle(facts)
    asked, answer = rng.choice(
        ((most, chain[0]), (f"second {most}", chain[1]), (f"second {least}", chain[2]), (least, chain[3]))
    )
    return Problem("ordering", " ".join([*facts, f"Who is the {asked}?"]), f"{', '.join(chain)}.", answer)


def counting(rng: random.Random, split: Split) -> Problem:
    """How often a colour occurs in a row. The rows of each split start with colours of their own."""
    residues = {"validation": (0,), "test": (1,), "train": (2, 3, 4)}[split]
    while True:
        colours = rng.sample(COLOURS, 4)
        row = [rng.choice(colours) for _ in range(rng.randint(6, 10))]
        asked = row[rng.randrange(len(row))]
        if (COLOURS.index(row[0]) + COLOURS.index(row[1]) + COLOURS.index(row[2])) % 5 in residues:
            break
    count = row.count(asked)
    steps = " ".join(f"{asked} {number}." for number in range(1, count + 1))
    text = f"Colours in a row: {', '.join(row)}. How often is {asked} there?"
    return Problem("counting", text, steps, str(count))


def logic(rng: random.Random, split: Split) -> Problem:
    """Two chains of rules of three links; a name starts one of them, and only one of two ends follows."""
    residues = {"validation": (0,), "test": (1,), "train": (2, 3, 4)}[split]
    while True:
        words = rng.sample(VIRTUES, 8)
        if sum(VIRTUES.index(word) for word in words[:4]) % 5 in residues:
            break
    chains = [words[:4], words[4:]]
    rules = [f"Who is {a} is {b}." for chain in chains for a, b in zip(chain, chain[1:], strict=False)]
    rng.shuffle(rules)
    name = rng.choice(NAMES)
    ends = [chain[3] for chain in chains]
    rng.shuffle(ends)
    text = f"{' '.join(rules)} {name} is {words[0]}. Is {name} {ends[0]} or {ends[1]}?"
    return Problem("logic", text, f"{', '.join(chains[0])}.", chains[0][3])


KINDS: dict[str, Callable[[random.Random, Split], Problem]] = {
    "arithmetic": arithmetic,
    "ordering": ordering,
    "counting": counting,
    "logic": logic,
}
MIX = ("arithmetic", "arithmetic", "ordering", "counting", "logic")


def draw(rng: random.Random, split: Split) -> Problem:
    """A problem of a random kind, arithmetic twice as often as each other kind."""
    return KINDS[rng.choice(MIX)](rng, split)
