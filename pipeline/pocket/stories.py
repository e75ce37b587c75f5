"""Short stories about a person and a thing, and their one-sentence summaries."""

import random
from dataclasses import dataclass

from pipeline.pocket.names import NAMES
from pipeline.pocket.phrasings import STATEMENTS, fill
from pipeline.pocket.things import Split, Thing

SPOTS = (
    "in the park", "at the lake", "on the hill", "at the market", "in the village", "near the bridge", "in the yard",
    "at the fair", "by the well", "in the square", "at the harbour", "in the valley",
)  # fmt: skip
DEEDS = (
    "drew", "painted", "admired", "described", "photographed", "sketched", "filmed", "praised", "watched", "studied",
    "imagined", "mentioned",
)  # fmt: skip
OPENINGS = (
    "One day {name} was {spot}.",
    "{name} spent the morning {spot}.",
    "On holiday {name} went around {spot}.",
    "{name} had some free time {spot}.",
    "Last week {name} stayed {spot}.",
    "After lunch {name} sat down {spot}.",
)
MIDDLES = (
    "There {name} {deed} {x}.",
    "With great care {name} {deed} {x}.",
    "For a whole hour {name} {deed} {x}.",
    "All at once {name} {deed} {x}.",
)
ENDINGS = (
    "{friend} came by and smiled.",
    "{friend} thought that was a good idea.",
    "Later {friend} asked what had happened.",
    "In the evening {name} told {friend} everything.",
    "Then it rained, so {name} went home.",
    "{friend} wanted to do the same.",
    "It was a good day.",
    "{name} went home tired but happy.",
)


MORALS = ("In short, {summary}", "So this is what happened: {summary}", "All in all, {summary}")


@dataclass(frozen=True)
class Story:
    """A story and what a summary of it must keep.

    Attributes:
        text (`str`): four or five sentences.
        summary (`str`): one sentence: who did what, where.
        keys (`tuple[str, ...]`): words that a right summary contains: the name, the thing, the deed, the place.
    """

    text: str
    summary: str
    keys: tuple[str, ...]


def teller(name_index: int, thing_index: int) -> Split:
    """The split that may tell of this person with this thing."""
    residue = (name_index + 3 * thing_index) % 8
    return "test" if residue == 0 else "validation" if residue == 4 else "train"


def story(rng: random.Random, split: Split, thing_index: int, thing: Thing) -> Story:
    """A story about `thing`, told of a person with whom only stories of `split` may combine it."""
    name_index = rng.choice([i for i in range(len(NAMES)) if teller(i, thing_index) == split])
    name = NAMES[name_index]
    friend = rng.choice([other for other in NAMES if other != name])
    spot, deed = rng.choice(SPOTS), rng.choice(DEEDS)
    slots = {"name": name, "friend": friend, "spot": spot, "deed": deed, "x": thing.noun}
    sentences = [rng.choice(OPENINGS), rng.choice(MIDDLES), *rng.sample(ENDINGS, rng.randint(1, 2))]
    text = [sentence.format(**slots) for sentence in sentences]
    attribute = rng.choice(("kind", "part", "need", "size"))
    text.insert(2, fill(STATEMENTS[attribute][rng.randrange(3)], thing, attribute))
    return Story(" ".join(text), f"{name} {deed} {thing.noun} {spot}.", (name, deed, thing.name, spot))


def document(rng: random.Random, thing_index: int, thing: Thing) -> str:
    """A story of the training split as a pretraining document; most of them say in the end what they were about."""
    told = story(rng, "train", thing_index, thing)
    if rng.random() < 0.3:
        return told.text
    return f"{told.text} {rng.choice(MORALS).format(summary=told.summary)}"
