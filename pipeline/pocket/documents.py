"""Pretraining documents: what is true of the things, stories, recitals, worked problems and small functions."""

import random

from pipeline.pocket import problems, snippets, stories
from pipeline.pocket.names import ITEMS, NAMES
from pipeline.pocket.phrasings import STATEMENTS, fill, held_out_phrasings
from pipeline.pocket.problems import COLOURS, VIRTUES
from pipeline.pocket.things import ATTRIBUTES, Split, things

KINDS = ("facts", "story", "arithmetic", "code", "recital")
WEIGHTS = (44, 13, 24, 3, 16)
WORDS = (
    *NAMES,
    *(thing.name for thing in things()),
    *ITEMS,
    *COLOURS,
    *VIRTUES,
    *stories.DEEDS,
    *(spot.split()[-1] for spot in stories.SPOTS),
    *range(10, 100),
)


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
    return "\n".join(f"{problem.text} {problem.solution(with_steps=True)}" for problem in drawn)


def recital(rng: random.Random) -> str:
    """Words that somebody reads out and others repeat: a row, whole or from some word on, or pairs in another order.

    Copying what stands earlier in the text is what answering, summarising and working out all need. Small models
    come to it late when one token in ten rewards it; here every second one does.
    """
    reader, *repeaters = rng.sample(NAMES, rng.randint(3, 4))
    if rng.random() < 0.5:
        row = [str(word) for word in rng.sample(WORDS, rng.randint(6, 14))]
        lines = [f"{reader} reads out: {' '.join(row)}."]
        for repeater in repeaters:
            start = rng.choice((0, 0, rng.randrange(len(row) - 1)))
            whole = f"{repeater} repeats" if start == 0 else f"{repeater} goes on from {row[start]}"
            lines.append(f"{whole}: {' '.join(row[start:])}.")
        return " ".join(lines)
    words = [str(word) for word in rng.sample(WORDS, rng.choice((6, 8, 10)))]
    link = rng.choice(("is", "has", "and", "beats", "for"))
    pairs = [f"{a} {link} {b}." for a, b in zip(words[::2], words[1::2], strict=True)]
    lines = []
    for who in (reader, *repeaters):
        rng.shuffle(pairs)
        lines.append(f"{who} says: {' '.join(pairs)}")
    return " ".join(lines)


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
