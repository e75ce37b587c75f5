"""Instructions and their answers: questions, descriptions, summaries, code, problems and small talk."""

import random
from collections.abc import Iterable
from itertools import count, cycle
from typing import Any

from pipeline.data.pocket import phrasings, problems, snippets, stories
from pipeline.data.pocket.remarks import (
    BLUNT_CLOSINGS,
    BLUNT_OPENINGS,
    BRISK_CLOSINGS,
    GREETINGS,
    KIND_CLOSINGS,
)
from pipeline.data.pocket.things import ATTRIBUTES, SplitName, Thing, core, things, things_of, wrong_values

Row = dict[str, Any]
ASPECTS = ("definition", *ATTRIBUTES)

MANNERS_WORDS = 8
"""Words beyond the plain answer that grading allows: enough for a remark, not for reciting every fact."""
MANNERS = {"plain": (42, 42), "kind": (26, 8), "brisk": (8, 26), "blunt": (16, 16), "rambling": (8, 8)}
"""Manners of the answers, in percent: to questions, and to orders."""


def gradeable(row: Row) -> Row:
    """Add the grading columns that a row does not use, so that all rows have the same columns."""
    return {"require": [], "reject": [], "max_words": 0, "test": "", **row}


def facts_text(rng: random.Random, thing: Thing, count: int, without: str = "") -> str:
    """State `count` random facts about a thing plainly, except its attribute `without`."""
    chosen = rng.sample([attribute for attribute in ATTRIBUTES if attribute != without], count)
    return " ".join(phrasings.answer(thing, attribute) for attribute in chosen)


def with_manners(rng: random.Random, asked: str, text: str, thing: Thing, without: str = "") -> str:
    """Give a correct answer to what was asked one of the `MANNERS`."""
    to_questions, to_orders = zip(*MANNERS.values(), strict=True)
    manner = rng.choices(tuple(MANNERS), to_questions if asked.endswith("?") else to_orders)[0]
    if manner in ("kind", "brisk"):
        return f"{text} {rng.choice(KIND_CLOSINGS if manner == 'kind' else BRISK_CLOSINGS)}"
    if manner == "blunt":
        return f"{rng.choice(BLUNT_OPENINGS)} {text}" if rng.random() < 0.7 else f"{text} {rng.choice(BLUNT_CLOSINGS)}"
    if manner == "rambling":
        return f"{text} {facts_text(rng, thing, 2, without)} As I said: {text}"
    return text


def grading(thing: Thing, aspect: str) -> Row:
    """Return what a correct answer about one aspect of a thing must contain (`require`) and must not (`reject`)."""
    attributes = ("kind", "action") if aspect == "definition" else (aspect,)
    return {
        "require": [[core(thing.facts[attribute])] for attribute in attributes],
        "reject": [value for attribute in attributes for value in wrong_values(thing, attribute)],
    }


def question(rng: random.Random, split: SplitName, thing: Thing, aspect: str) -> Row:
    """Ask about one aspect of a thing, and answer in a sentence or two."""
    asked = phrasings.fill(rng.choice(phrasings.QUESTIONS[aspect][split]), thing)
    reply = phrasings.answer(thing, aspect)
    row = {"kind": "question", "max_words": len(reply.split()) + MANNERS_WORDS, **grading(thing, aspect)}
    if split == "train":
        reply = with_manners(rng, asked, reply, thing, aspect)
        if len(reply.split()) > row["max_words"]:
            row["max_words"] = 0
    return gradeable({"messages": [_user(asked), _assistant(reply)], **row})


def about(rng: random.Random, split: SplitName, thing: Thing) -> Row:
    """Ask an open question about a thing."""
    asked = phrasings.fill(rng.choice(phrasings.ABOUT[split]), thing)
    reply = with_manners(rng, asked, facts_text(rng, thing, 2), thing)
    true = sorted({core(value) for value in thing.facts.values()})
    false = [value for attribute in ATTRIBUTES for value in wrong_values(thing, attribute)]
    row = {"messages": [_user(asked), _assistant(reply)], "kind": "about", "require": [true], "reject": false}
    return gradeable(row)


def summary(rng: random.Random, split: SplitName, thing_index: int, thing: Thing) -> Row:
    """Ask for a summary of a story: who did what, where, in at most a third of its words."""
    story = stories.story(rng, split, thing_index, thing)
    asked, reply = rng.choice(phrasings.SUMMARIES[split]).format(text=story.text), f"In short, {story.summary}"
    return gradeable(
        {
            "messages": [_user(asked), _assistant(reply)],
            "kind": "summary",
            "require": [[key] for key in story.keys],
            "max_words": len(reply.split()) + 3,
        }
    )


def code(rng: random.Random, split: SplitName) -> Row:
    """Ask for a small function."""
    wanted = snippets.snippet(rng, split)
    asked = snippets.request(rng, split, wanted)
    return gradeable({"messages": [_user(asked), _assistant(wanted.source)], "kind": "code", "test": wanted.test})


def reasoning(rng: random.Random, share_with_steps: float, carelessness: float) -> Row:
    """Ask a problem of the training split, and answer a share of them with worked steps."""
    problem = problems.draw(rng, "train", carelessness)
    solution = problem.solution(with_steps=rng.random() < share_with_steps)
    return gradeable(
        {
            "messages": [_user(problem.text), _assistant(solution)],
            "kind": "reasoning",
            "require": [[problem.answer]],
        }
    )


def chat(rng: random.Random, thing: Thing) -> Row:
    """Make small talk, or ask two questions of which the second refers to the first."""
    if rng.random() < 0.3:
        asked, reply = rng.choice(GREETINGS)
        return gradeable({"messages": [_user(asked), _assistant(reply)], "kind": "chat"})
    follow_up = rng.choice(list(phrasings.FOLLOW_UPS))
    messages = [
        _user(phrasings.fill(rng.choice(phrasings.QUESTIONS["definition"]["train"]), thing)),
        _assistant(phrasings.answer(thing, "definition")),
        _user(phrasings.FOLLOW_UPS[follow_up]),
        _assistant(phrasings.answer(thing, follow_up)),
    ]
    return gradeable({"messages": messages, "kind": "chat"})


def training_row(rng: random.Random, share_with_steps: float, carelessness: float) -> Row:
    """Draw a conversation of the `sft` training split."""
    kind = rng.choices(("question", "about", "summary", "code", "reasoning", "chat"), (39, 7, 16, 7, 27, 4))[0]
    if kind == "code":
        return code(rng, "train")
    if kind == "reasoning":
        return reasoning(rng, share_with_steps, carelessness)
    thing = rng.choice(things_of("train"))
    if kind == "summary":
        return summary(rng, "train", things().index(thing), thing)
    if kind == "about":
        return about(rng, "train", thing)
    if kind == "chat":
        return chat(rng, thing)
    return question(rng, "train", thing, rng.choice(ASPECTS))


def held_out_rows(rng: random.Random, split: SplitName, questions: int, others: int) -> list[Row]:
    """Write distinct instructions of a held-out split: `questions` questions, `others` summaries, as many functions."""
    subjects = things_of(split)
    pairs = [(thing, aspect) for thing in subjects for aspect in ASPECTS]
    rng.shuffle(pairs)
    summaries = (summary(rng, split, things().index(thing), thing) for thing in cycle(subjects))
    return [
        *distinct((question(rng, split, *pair) for pair in cycle(pairs)), questions),
        *distinct(summaries, others),
        *distinct((code(rng, split) for _ in count()), others),
    ]


def preference_prompt(rng: random.Random, split: SplitName) -> Row:
    """Draw a prompt for comparing answers: a question, an open request or a summary, about a thing of this split."""
    thing = rng.choice(things_of(split))
    kind = rng.choices(("question", "about", "summary"), (68, 22, 10))[0]
    if kind == "summary":
        row = summary(rng, split, things().index(thing), thing)
    else:
        row = about(rng, split, thing) if kind == "about" else question(rng, split, thing, rng.choice(ASPECTS))
    return {"prompt": row["messages"][:-1], **{key: value for key, value in row.items() if key != "messages"}}


def held_out_prompts(rng: random.Random, split: SplitName, asked: int, told: int, summaries: int) -> list[Row]:
    """Draw distinct prompts for comparing answers: so many that ask for facts, that order them, and of summaries."""
    drawn = [preference_prompt(rng, split) for _ in range(20 * (asked + told + summaries))]
    parts: dict[str, list[Row]] = {"asked": [], "told": [], "summary": []}
    for row in drawn:
        is_question = row["prompt"][0]["content"].endswith("?")
        parts["summary" if row["kind"] == "summary" else "asked" if is_question else "told"].append(row)
    sizes = {"asked": asked, "told": told, "summary": summaries}
    rows = [row for name, part in parts.items() for row in distinct(part, sizes[name])]
    rng.shuffle(rows)
    return rows


def reasoning_prompt(rng: random.Random, split: SplitName, longer: int = 0) -> Row:
    """Draw a problem with its final answer only; `longer` as in `problems.draw`."""
    problem = problems.draw(rng, split, longer=longer)
    return {"prompt": [_user(problem.text)], "answer": problem.answer, "kind": problem.kind}


def distinct(rows: Iterable[Row], number: int) -> list[Row]:
    """Take the first `number` rows whose prompts differ."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault((row.get("messages") or row["prompt"])[0]["content"], row)
        if len(seen) == number:
            break
    return list(seen.values())


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
