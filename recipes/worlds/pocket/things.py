"""The things of the pocket world and the facts about them, from `things.tsv`, one thing per row."""

import csv
import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from pipeline.data.arguments import SplitName

ATTRIBUTES = ("kind", "place", "part", "action", "need", "size")


@dataclass(frozen=True)
class Thing:
    """One thing of the world, in the row `index` of the table."""

    # "a fox", "mars", "rice". None begins with "the": stage 4 makes the first token of "The answer is 12." improbable,
    # also where it would begin "The sun is …".
    noun: str
    # The value of each attribute as a statement uses it: "a mammal", "in the forest".
    facts: dict[str, str] = field(hash=False)
    # The split whose instructions may ask about this thing. Pretraining documents describe every thing.
    split: SplitName
    index: int


def core(value: str) -> str:
    """Remove the preposition and the article at the beginning of a value: "in the forest" -> "forest"."""
    return re.sub(r"^(?:(?:in|on|at) )?(?:(?:a|an|the) )?", "", value)


def read_table(name: str) -> list[dict[str, str]]:
    """Read a table of this package, with a header and tab-separated columns."""
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


@cache
def things() -> tuple[Thing, ...]:
    """Return all things in the order of the table. Of every six, one is held out for validation and one for test."""
    held_out: dict[int, SplitName] = {2: "validation", 5: "test"}
    world = []
    for index, row in enumerate(read_table("things.tsv")):
        noun = row["thing"]
        split: SplitName = "train"
        # Things without an article ("mars") stay in training: too few to learn from how to write about held-out ones.
        if noun.startswith(("a ", "an ")):
            split = held_out.get(index % 6, "train")
        world.append(Thing(noun, {name: row[name] for name in ATTRIBUTES}, split, index))
    return tuple(world)


@cache
def things_of(split: SplitName) -> tuple[Thing, ...]:
    """Return the things that instructions of `split` may be about."""
    return tuple(thing for thing in things() if thing.split == split)


@cache
def wrong_values(thing: Thing, attribute: str) -> tuple[str, ...]:
    """Return the `core` of all values of an attribute that do not occur in the facts about `thing`."""
    # Surrounded by spaces, so that "ant" is not found in "an elephant plant".
    facts = [f" {core(value)} ".lower() for value in (*thing.facts.values(), thing.noun)]
    wrong = []
    for value in sorted({core(other.facts[attribute]) for other in things()}):
        if not any(f" {value.lower()} " in fact for fact in facts):
            wrong.append(value)
    return tuple(wrong)
