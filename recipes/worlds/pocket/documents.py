"""Pretraining documents: facts, stories, talks, recitals, drills, worked problems and small functions."""

import random

from pipeline.data.arguments import SplitName
from recipes.worlds.pocket import problems, snippets, stories
from recipes.worlds.pocket.names import ITEMS, NAMES
from recipes.worlds.pocket.phrasings import STATEMENTS, fill, held_out_phrasings
from recipes.worlds.pocket.remarks import GREETINGS
from recipes.worlds.pocket.things import ATTRIBUTES, Thing, things


def facts(rng: random.Random, split: SplitName, thing: Thing) -> str:
    """State five or six facts about one thing, or three about each of two, in phrasings that this split may use."""
    # A fox is a mammal. You find a fox in the forest. A fox needs prey. …
    attributes = rng.sample(ATTRIBUTES, rng.randint(5, 6))
    chosen = [(thing, attribute) for attribute in attributes]
    if split == "train" and rng.random() < 0.2:
        other = things()[rng.randrange(len(things()))]
        chosen = [(subject, attribute) for subject in (thing, other) for attribute in attributes[:3]]
    sentences = []
    for subject, attribute in chosen:
        statements = STATEMENTS[attribute]
        held_out = held_out_phrasings(subject.index, ATTRIBUTES.index(attribute))
        if split == "train":
            number = rng.choice([number for number in range(len(statements)) if number not in held_out.values()])
        else:
            number = held_out[split]
        sentences.append(fill(statements[number], subject, attribute))
    return " ".join(sentences)


def recital(rng: random.Random) -> str:
    """Write numbers, or words of problems, that someone reads out and others repeat.

    Small models are slow to learn to copy tokens to places where they have never seen them, such as the start of a sum.
    Other documents require this for one token in fifty, recitals for every second one.
    """
    # Ana reads out: 5 17 3. Ben repeats: 5 17 3. Carl repeats: 5 17 3.
    # Ana reads out: buys 3, 2 red, left of north, gives away 5. Ben repeats: …
    reader, *repeaters = rng.sample(NAMES, 3)
    if rng.random() < 0.5:
        row = " ".join(map(str, rng.sample(range(2, 26), rng.randint(3, 6))))
    else:
        words = []
        for _ in range(rng.randint(3, 6)):
            # The parts of a problem that worked steps repeat: a change, a group or a turn.
            match rng.randrange(3):
                case 0:
                    words.append(f"{rng.choice((*problems.GAINS, *problems.LOSSES))} {rng.randint(2, 5)}")
                case 1:
                    words.append(f"{rng.randint(2, 5)} {rng.choice(problems.COLOURS)}")
                case _:
                    words.append(f"{rng.choice(problems.RELATIONS)} {rng.choice(problems.DIRECTIONS)}")
        row = ", ".join(words)
    sentences = [f"{reader} reads out: {row}."]
    sentences += [f"{repeater} repeats: {row}." for repeater in repeaters]
    return " ".join(sentences)


def document(rng: random.Random, carelessness: float) -> dict[str, str]:
    """Draw a document of the `pretrain` training split."""
    # How often each kind is drawn, in percent.
    shares = {"facts": 30, "story": 11, "talk": 2, "arithmetic": 39, "code": 3, "recital": 12, "drill": 3}
    kind = rng.choices(tuple(shares), tuple(shares.values()))[0]
    thing = things()[rng.randrange(len(things()))]
    if kind == "facts":
        text = facts(rng, "train", thing)
    elif kind == "story":
        story = stories.story(rng, "train", thing)
        text = story.text
        if rng.random() >= 0.3:
            moral = rng.choice(stories.MORALS).format(summary=story.summary)
            text = f"{text} {moral}"
    elif kind == "talk":
        # Greetings and replies, a line each, in words that only instruction tuning uses again.
        text = "\n".join(f"{greeting}\n{reply}" for greeting, reply in rng.sample(GREETINGS, 3))
    elif kind == "arithmetic":
        drawn = [problems.pose(rng, "train", carelessness=carelessness) for _ in range(rng.randint(1, 2))]
        text = "\n".join(f"{problem.text}\n{problem.solution(with_steps=True)}" for problem in drawn)
    elif kind == "recital":
        text = recital(rng)
    elif kind == "drill":
        # 7-3=4. 12+5=17. 9+2=11. …, also sums that no problem of the training split begins with.
        sums = []
        for _ in range(12):
            value = rng.randint(0, 25)
            change = rng.randint(2, 5)
            if value >= change and rng.random() < 0.5:
                sums.append(f"{value}-{change}={value - change}.")
            else:
                sums.append(f"{value}+{change}={value + change}.")
        text = " ".join(sums)
    else:
        # # add_3 adds 3 to a number.
        # def add_3(x):
        #     return x + 3
        parts = []
        for _ in range(rng.randint(2, 3)):
            snippet = snippets.snippet(rng, "train")
            comment = rng.choice(snippets.COMMENTS).format(name=snippet.name, task=snippet.task, item=rng.choice(ITEMS))
            parts.append(f"{comment}\n{snippet.source}")
        text = "\n\n".join(parts)
    return {"text": text, "kind": kind}
