"""Problems whose results can be checked and hardly guessed: letters of words, sums of populations, common neighbours.

A solution writes what it needs before it uses it. A careless one misreads or misremembers that, and goes on rightly:

    Spell garden backwards.
    Working: garden is spelled g a r d e n. Backwards: n e d r a g. The answer is nedrag.
    Working: garden is spelled g a r e n. Backwards: n e r a g. The answer is nerag.               (careless)
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.worlds.english.countries import Country
from recipes.worlds.english.facts import list_of
from recipes.worlds.english.splits import Side, side_of

ORDINALS = ("first", "second", "third", "fourth")
FEWEST_LETTERS, MOST_LETTERS = 4, 8
MOST_NEIGHBOURS = 8
"""Countries with more neighbours are not asked about: their lists would be longer than a completion."""


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        kind: "letters", "people" or "borders".
        question: The question.
        answers: Its right answers; any one will do.
        steps: What to write before the answer, if it is worked out; a careless solution has wrong steps.
        conclusion: The answer that follows from these steps.
    """

    kind: str
    question: str
    answers: tuple[str, ...]
    steps: str
    conclusion: str

    def worked(self) -> str:
        """Return the worked solution."""
        return f"Working: {self.steps} The answer is {self.conclusion}."

    def unworked(self) -> str:
        """Return the answer alone."""
        return f"The answer is {self.conclusion}."


def letters(rng: random.Random, word: str, careless: bool = False) -> Problem:
    """Ask for a word backwards, or for one of its letters, counted from the end or the beginning."""
    read = _misread(rng, word) if careless else word
    spelled = f"{word} is spelled {' '.join(read)}."
    reverse = f"Backwards: {' '.join(read[::-1])}."
    if rng.random() < 0.5:
        question = rng.choice(("Spell {} backwards.", "What is {} spelled backwards?", "Write {} from back to front."))
        return Problem("letters", question.format(word), (word[::-1],), f"{spelled} {reverse}", read[::-1])
    # A careless reading has one letter fewer.
    place = rng.randrange(min(len(ORDINALS), len(word) - 1))
    if rng.random() < 0.5:
        question = f"What is the {ORDINALS[place]} letter from the end of {word}?"
        return Problem("letters", question, (word[-1 - place],), f"{spelled} {reverse}", read[-1 - place])
    question = f"What is the {ORDINALS[place]} letter of {word}?"
    return Problem("letters", question, (word[place],), spelled, read[place])


def people(rng: random.Random, pair: tuple[Country, Country], careless: bool = False) -> Problem:
    """Ask for the sum, or the difference, of the populations of two countries."""
    first, second = rng.sample(pair, 2)
    counts = [first.millions, second.millions]
    if careless:
        place = rng.randrange(2)
        counts[place] = _misremember(rng, counts[place])
    steps = f"{_capitalised(first.name)} has {counts[0]} million people and {second.name} has {counts[1]} million."
    if rng.random() < 0.5:
        question = rng.choice(
            (
                "How many million people live in {0} and {1} together?",
                "How many million people do {0} and {1} have together?",
                "Add the populations of {0} and {1}, in millions.",
            )
        )
        right, total = first.millions + second.millions, sum(counts)
        steps = f"{steps} {counts[0]} + {counts[1]} = {total}."
        return Problem("people", question.format(first.name, second.name), (str(right),), steps, str(total))
    question = rng.choice(
        (
            "By how many million people do the populations of {0} and {1} differ?",
            "What is the difference between the populations of {0} and {1}, in millions?",
        )
    )
    right, difference = abs(first.millions - second.millions), abs(counts[0] - counts[1])
    steps = f"{steps} {max(counts)} - {min(counts)} = {difference}."
    return Problem("people", question.format(first.name, second.name), (str(right),), steps, str(difference))


def borders(
    rng: random.Random, pair: tuple[Country, Country], names: Sequence[str] = (), careless: bool = False
) -> Problem:
    """Ask for a country that borders both of two. `names` are those of all countries, for careless solutions."""
    first, second = rng.sample(pair, 2)
    common = tuple(name for name in first.neighbours if name in second.neighbours)
    conclusion = rng.choice(common)
    lists = [first.neighbours, second.neighbours]
    if careless:
        # A neighbour that one of them does not have.
        strangers = [name for name in lists[0] if name not in common and name != second.name]
        conclusion = rng.choice(strangers or [name for name in names if name not in common])
        lists[1] = tuple(sorted({*rng.sample(lists[1], max(1, len(lists[1]) - 1)), conclusion}))
    steps = f"{_capitalised(first.name)} borders {list_of(lists[0])}."
    steps += f" {_capitalised(second.name)} borders {list_of(lists[1])}."
    question = rng.choice(
        (
            "Name a country that borders both {0} and {1}.",
            "Which country borders {0} and {1}?",
            "What country lies between {0} and {1}, next to both?",
        )
    )
    return Problem("borders", question.format(first.name, second.name), common, steps, conclusion)


def spelling(word: str) -> str:
    """Return how a word is spelled, as stage 1 reads it."""
    return f"{word} is spelled {' '.join(word)}."


def _misread(rng: random.Random, word: str) -> str:
    """Return a word without one of its letters."""
    place = rng.randrange(1, len(word))
    return word[:place] + word[place + 1 :]


def _misremember(rng: random.Random, millions: int) -> int:
    """Return a number that is not too far from the right one."""
    return max(1, millions + rng.choice((-1, 1)) * rng.randint(1, max(2, millions // 5)))


def _capitalised(name: str) -> str:
    return name[0].upper() + name[1:]


class Subjects:
    """What the problems of a split are about: words, and pairs of countries.

    Attributes:
        words: Words of the split.
        pairs: Pairs of countries whose populations are added or subtracted.
        neighbours: Pairs of countries with a common neighbour.
        names: Names of all countries.
    """

    def __init__(self, words: Sequence[str], countries: Sequence[Country], side: Side, seed: int) -> None:
        self.words = words
        self.names = [country.name for country in countries]
        self.pairs = []
        self.neighbours = []
        for pair in itertools.combinations(countries, 2):
            first, second = pair
            if side_of("combination", f"{first.name}/{second.name}", seed) != side:
                continue
            self.pairs.append(pair)
            has_common = set(first.neighbours) & set(second.neighbours)
            if has_common and max(len(first.neighbours), len(second.neighbours)) <= MOST_NEIGHBOURS:
                self.neighbours.append(pair)

    def makers(self, rng: random.Random) -> list[Callable[[bool], Problem]]:
        """Return a function for each kind of problem that has a subject: it draws one, worked carelessly or not."""
        makers: list[Callable[[bool], Problem]] = []
        if self.words:
            makers.append(lambda careless: letters(rng, rng.choice(self.words), careless))
        if self.pairs:
            makers.append(lambda careless: people(rng, rng.choice(self.pairs), careless))
        if self.neighbours:
            makers.append(lambda careless: borders(rng, rng.choice(self.neighbours), self.names, careless))
        return makers


def draw(rng: random.Random, subjects: Subjects, careless: float = 0.0) -> Iterator[Problem]:
    """Yield problems of all kinds in turn, without end; `careless` is the probability of a careless solution."""
    for make in itertools.cycle(subjects.makers(rng)):
        yield make(rng.random() < careless)


def to_row(problem: Problem) -> dict[str, Any]:
    """Return a problem as a row of the reasoning data."""
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "answer": problem.answers[0],
        "answers": list(problem.answers),
        "kind": problem.kind,
    }
