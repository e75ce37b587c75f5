"""Short stories about a person and a thing, with one-sentence summaries."""

import random
from typing import NamedTuple

from pipeline.data.arguments import SplitName
from recipes.worlds.pocket.names import NAMES
from recipes.worlds.pocket.phrasings import STATEMENTS, fill
from recipes.worlds.pocket.remarks import QUOTED
from recipes.worlds.pocket.things import Thing, core

# With 12 places, 12 deeds and 40 people, stories cannot be memorised: a summary has to be copied from the story.
SPOTS = (
    "in the park", "at the lake", "on the hill", "at the market", "in the village", "near the bridge", "in the yard",
    "at the fair", "by the well", "in the square", "at the harbour", "in the valley",
)  # fmt: skip
DEEDS = (
    "copied", "painted", "admired", "described", "photographed", "sketched", "filmed", "praised", "watched", "studied",
    "imagined", "mentioned",
)  # fmt: skip
LEADS = ("One day", "Last week", "After lunch", "This morning", "On holiday", "At last", "Once more", "All at once")
OPENINGS = ("It was warm.", "Nobody was in a hurry.", "{friend} was still asleep.", "The rain had stopped.")
ECHOES = (
    "It was {spot} that {name} {deed} {x}.", "Nobody but {name} {deed} {x} {spot}.",
    "{friend} heard that {name} {deed} {x}.", "{friend} had never {deed} {x}.",
    "So {name} {deed} {x} and {friend} did not.", "What {name} {deed} {spot} was {x}.",
    "Why {name} {deed} {x}, nobody knows.", "{friend} asked who {deed} {x}. It was {name}.",
    "{name} and {friend} stayed {spot}.", "{friend} found {name} {spot}.",
)  # fmt: skip
"""Sentences that repeat part of the event. They teach copying, which a summary needs."""
ENDINGS = ("{friend} smiled.", "{friend} went home.", "Everybody laughed.", "Then it rained.", "It was a good day.")
MORALS = ("In short, {summary}", "So this is what happened: {summary}", "All in all, {summary}")


class Story(NamedTuple):
    """A story and its summary."""

    # The event, in a sentence near the beginning, and three remarks on it.
    text: str
    # One sentence: who did what, where.
    summary: str
    # Words that a correct summary contains: the name, the deed, the thing and the place.
    keys: tuple[str, ...]


def story(rng: random.Random, split: SplitName, thing: Thing) -> Story:
    """Write a story about `thing` and a person, a combination that only occurs in this `split`."""
    # It was warm. One day Ana painted a fox in the park. Ben smiled. What Ana painted in the park was a fox. …
    #
    # Of every eight people, one meets this thing only in the test, and one only in validation.
    residues = {"test": (0,), "validation": (4,), "train": (1, 2, 3, 5, 6, 7)}[split]
    people = [person for index, person in enumerate(NAMES) if (index + 3 * thing.index) % 8 in residues]
    name = rng.choice(people)
    friend = rng.choice([person for person in NAMES if person != name])
    spot = rng.choice(SPOTS)
    deed = rng.choice(DEEDS)
    event = f"{name} {deed} {thing.noun} {spot}."
    attribute = rng.choice(("kind", "part", "need", "size"))
    statement = fill(STATEMENTS[attribute][rng.randrange(3)], thing, attribute)
    aside = rng.choice((statement, rng.choice(ENDINGS), f"{{friend}} said: {rng.choice(QUOTED)}"))
    rest = [*rng.sample(ECHOES, 2), aside]
    rng.shuffle(rest)
    opening = rng.choice(("", f"{rng.choice(OPENINGS)} ", f"{rng.choice(QUOTED)} So people say. "))
    text = f"{opening}{rng.choice(LEADS)} {event} {' '.join(rest)}"
    text = text.format(name=name, friend=friend, deed=deed, x=thing.noun, spot=spot)
    return Story(text, event, (name, deed, core(thing.noun), spot))
