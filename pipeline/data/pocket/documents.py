"""Pretraining documents: what is true of the things, stories, recitals, worked problems and small functions."""

import random

from pipeline.data.pocket import problems, snippets, stories
from pipeline.data.pocket.names import NAMES
from pipeline.data.pocket.phrasings import STATEMENTS, fill, held_out_phrasings
from pipeline.data.pocket.things import ATTRIBUTES, Split, things

KINDS = ("facts", "story", "arithmetic", "code", "recital")
WEIGHTS = (36, 14, 37, 3, 10)


def statement(rng: random.Random, split: Split, thing_index: int, attribute: str) -> str:
    """One fact in a phrasing that this split may use for this thing."""
    held_out = held_out_phrasings(thing_index, ATTRIBUTES.index(attribute))
    templates = STATEMENTS[attribute]
    if split == "train":
        allowed = [i for i in range(len(templates)) if i not in held_out.values()]
        template = templates[rng.choice(allowed)]
    else:
        template = templates[held_out[split]]
    return fill(template, things()[thing_index], attribute)


def facts(rng: random.Random, split: Split, thing_index: int) -> str:
    """Five or six facts about one thing, or three each about two things."""
    attributes = rng.sample(ATTRIBUTES, rng.randint(5, 6))
    if split == "train" and rng.random() < 0.2:
        other = rng.randrange(len(things()))
        told = [(thing_index, attribute) for attribute in attributes[:3]]
        told += [(other, attribute) for attribute in attributes[:3]]
    else:
        told = [(thing_index, attribute) for attribute in attributes]
    return " ".join(statement(rng, split, index, attribute) for index, attribute in told)


def worked(rng: random.Random) -> str:
    """One or two problems with their worked solutions."""
    drawn = [problems.draw(rng, "train") for _ in range(rng.randint(1, 2))]
    return "\n".join(f"{problem.text}\n{problem.solution(with_steps=True)}" for problem in drawn)


def recital(rng: random.Random) -> str:
    """Numbers that somebody reads out and others repeat.

    Small models come late to copying what they have never seen in that place, a held-out operand for instance: one
    token in fifty asks it of them elsewhere, here every second one.
    """
    reader, *repeaters = rng.sample(NAMES, 3)
    row = " ".join(str(number) for number in rng.sample(range(2, 40), rng.randint(3, 6)))
    return " ".join([f"{reader} reads out: {row}.", *(f"{repeater} repeats: {row}." for repeater in repeaters)])


def document(rng: random.Random) -> dict[str, str]:
    """One document of the `pretrain` training split."""
    kind = rng.choices(KINDS, WEIGHTS)[0]
    thing_index = rng.randrange(len(things()))
    if kind == "facts":
        text = facts(rng, "train", thing_index)
    elif kind == "story":
        text = stories.document(rng, thing_index, things()[thing_index])
    elif kind == "arithmetic":
        text = worked(rng)
    elif kind == "recital":
        text = recital(rng)
    else:
        text = snippets.commented(rng)
    return {"text": text, "kind": kind}


def held_out_documents(rng: random.Random, split: Split, rounds: int) -> list[dict[str, str]]:
    """`rounds` documents of facts about every thing, in the phrasings kept from training for that thing."""
    order = list(range(len(things()))) * rounds
    rng.shuffle(order)
    return [{"text": facts(rng, split, index), "kind": "facts"} for index in order]
