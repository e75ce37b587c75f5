"""The things of the pocket world and what is true of them (`things.tsv`, one row a thing)."""

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

ATTRIBUTES = ("kind", "place", "part", "action", "need", "size")
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Thing:
    """One thing of the world.

    Attributes:
        noun (`str`): noun phrase as it stands inside a sentence: "a fox", "the sun", "rice".
        facts (`dict[str, str]`): value of each attribute as a statement uses it: "a mammal", "in the forest".
        split (`str`): the split whose *instructions* may ask about this thing. Pretraining documents describe
            every thing; what instruction tuning never asked about is what the validation and test questions are about.
    """

    noun: str
    facts: dict[str, str]
    split: Split

    @property
    def name(self) -> str:
        """The noun without its article: "fox"."""
        return core(self.noun)

    @property
    def at_start(self) -> str:
        """The noun phrase at the start of a sentence: "A fox"."""
        return capitalize(self.noun)

    def __hash__(self) -> int:
        return hash(self.noun)


def capitalize(text: str) -> str:
    """Upper-cases the first letter and leaves the rest ("an LLM" -> "An LLM")."""
    return text[:1].upper() + text[1:]


def core(value: str) -> str:
    """A value without the preposition and article it begins with: "in the forest" -> "forest"."""
    return re.sub(r"^(?:(?:in|on|at) )?(?:(?:a|an|the) )?", "", value)


@cache
def things() -> tuple[Thing, ...]:
    """All things, in file order. Of every six neighbours one is kept for validation and one for test.

    Those without "a" or "an" ("the sun", "rice") stay in training: they are too few for a model to learn from the
    others how they are spoken of.
    """
    table = files(__package__).joinpath("things.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(table.splitlines(), delimiter="\t")
    held_out: dict[int, Split] = {2: "validation", 5: "test"}
    return tuple(
        Thing(
            noun=row["thing"],
            facts={name: row[name] for name in ATTRIBUTES},
            split=held_out.get(index % 6, "train") if row["thing"].startswith(("a ", "an ")) else "train",
        )
        for index, row in enumerate(rows)
    )


@cache
def things_of(split: Split) -> tuple[Thing, ...]:
    """The things that instructions of `split` may be about."""
    return tuple(thing for thing in things() if thing.split == split)


@cache
def wrong_values(thing: Thing, attribute: str) -> tuple[str, ...]:
    """The attribute's values (cores) in the whole world that occur in nothing that is true of `thing`."""
    true = [f" {core(value)} ".lower() for value in (*thing.facts.values(), thing.noun)]
    values = sorted({core(other.facts[attribute]) for other in things()})
    return tuple(value for value in values if not any(f" {value.lower()} " in right for right in true))
