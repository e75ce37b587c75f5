"""Instructions and their answers: questions, descriptions, summaries, code, problems and small talk.

A row is a conversation with columns by which answers are graded: `require` (a correct answer contains a phrase of each
list), `reject` (phrases that it lacks), `max_words` (0 for no limit) and `test` (assertions that its code passes).
"""

import random
from collections.abc import Iterable
from itertools import cycle
from typing import Any

from pipeline.data.arguments import SplitName
from recipes.worlds.pocket import phrasings, problems, remarks, snippets, stories
from recipes.worlds.pocket.things import ATTRIBUTES, Thing, core, things_of, wrong_values

ASPECTS = ("definition", *ATTRIBUTES)
MANNERS = {"plain": (38, 38), "kind": (30, 8), "brisk": (8, 30), "blunt": (16, 16), "rambling": (8, 8)}
"""Manners of answers to questions and to orders, in percent."""


def conversation(kind: str, turns: Iterable[str], **grading: Any) -> dict[str, Any]:
    """Return a row: what user and assistant say in turn, and how answers are graded (by default, not at all)."""
    roles = cycle(("user", "assistant"))
    messages = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]
    return {"messages": messages, "kind": kind, "require": [], "reject": [], "max_words": 0, "test": "", **grading}


def facts_text(rng: random.Random, thing: Thing, count: int, without: str = "") -> str:
    """State `count` random facts about a thing plainly, except its attribute `without`."""
    chosen = rng.sample([attribute for attribute in ATTRIBUTES if attribute != without], count)
    return " ".join(phrasings.answer(thing, attribute) for attribute in chosen)


def with_manners(rng: random.Random, request: str, text: str, thing: Thing, without: str = "") -> str:
    """Rephrase a correct answer to a request in one of the `MANNERS`; `without` as for `facts_text`."""
    column = 0 if request.endswith("?") else 1
    weights = [shares[column] for shares in MANNERS.values()]
    match rng.choices(tuple(MANNERS), weights)[0]:
        case "kind":
            return f"{text} {rng.choice(remarks.KIND_CLOSINGS)}"
        case "brisk":
            return f"{text} {rng.choice(remarks.BRISK_CLOSINGS)}"
        case "blunt" if rng.random() < 0.7:
            return f"{rng.choice(remarks.BLUNT_OPENINGS)} {text}"
        case "blunt":
            return f"{text} {rng.choice(remarks.BLUNT_CLOSINGS)}"
        case "rambling":
            return f"{text} {facts_text(rng, thing, 2, without)} As I said: {text}"
    return text


def question(rng: random.Random, split: SplitName, thing: Thing, aspect: str) -> dict[str, Any]:
    """Ask about one aspect of a thing, and answer in a sentence or two."""
    request = phrasings.fill(rng.choice(phrasings.REQUESTS[aspect][split]), thing)
    reply = phrasings.answer(thing, aspect)
    # Grading allows words beyond the plain answer: enough for a remark, not for reciting every fact.
    max_words = len(reply.split()) + 8
    if split == "train":
        reply = with_manners(rng, request, reply, thing, aspect)
        # A rambling answer is long, but still correct.
        if len(reply.split()) > max_words:
            max_words = 0
    attributes = ("kind", "action") if aspect == "definition" else (aspect,)
    require = [[core(thing.facts[attribute])] for attribute in attributes]
    reject = [value for attribute in attributes for value in wrong_values(thing, attribute)]
    return conversation("question", (request, reply), require=require, reject=reject, max_words=max_words)


def summary(rng: random.Random, split: SplitName, thing: Thing) -> dict[str, Any]:
    """Ask for a summary of a story: who did what, where, in at most a third of its words."""
    story = stories.story(rng, split, thing)
    request = rng.choice(phrasings.REQUESTS["summary"][split]).format(text=story.text)
    reply = f"In short, {story.summary}"
    require = [[key] for key in story.keys]
    return conversation("summary", (request, reply), require=require, max_words=len(reply.split()) + 3)


def code(rng: random.Random, split: SplitName) -> dict[str, Any]:
    """Ask for a small function."""
    snippet = snippets.snippet(rng, split)
    request = rng.choice(phrasings.REQUESTS["code"][split]).format(name=snippet.name, task=snippet.task)
    return conversation("code", (request, snippet.source), test=snippet.test)


def training_row(rng: random.Random, share_with_steps: float, carelessness: float) -> dict[str, Any]:
    """Draw a conversation of the `sft` training split."""
    kind = rng.choices(("question", "about", "summary", "code", "reasoning", "chat"), (38, 7, 16, 7, 27, 5))[0]
    if kind == "code":
        return code(rng, "train")
    if kind == "reasoning":
        problem = problems.pose(rng, "train", carelessness=carelessness)
        solution = problem.solution(with_steps=rng.random() < share_with_steps)
        return conversation(kind, (problem.text, solution), require=[[problem.answer]])
    thing = rng.choice(things_of("train"))
    if kind != "chat":
        return thing_conversation(rng, "train", kind, thing)
    if rng.random() < 0.5:
        return conversation(kind, rng.choice(remarks.GREETINGS))
    # Two questions, the second of which refers to the first.
    follow_up = rng.choice(list(phrasings.FOLLOW_UPS))
    request = phrasings.fill(rng.choice(phrasings.REQUESTS["definition"]["train"]), thing)
    first_reply = phrasings.answer(thing, "definition")
    second_reply = phrasings.answer(thing, follow_up)
    return conversation(kind, (request, first_reply, phrasings.FOLLOW_UPS[follow_up], second_reply))


def thing_conversation(rng: random.Random, split: SplitName, kind: str, thing: Thing) -> dict[str, Any]:
    """Draw a conversation of a kind about a thing: a "question", a "summary", or "about", which asks for any facts."""
    if kind == "question":
        return question(rng, split, thing, rng.choice(ASPECTS))
    if kind == "summary":
        return summary(rng, split, thing)
    request = phrasings.fill(rng.choice(phrasings.REQUESTS["about"][split]), thing)
    reply = with_manners(rng, request, facts_text(rng, thing, 2), thing)
    true_values = sorted({core(value) for value in thing.facts.values()})
    false_values = [value for attribute in ATTRIBUTES for value in wrong_values(thing, attribute)]
    return conversation(kind, (request, reply), require=[true_values], reject=false_values)


def preference_prompt(rng: random.Random, split: SplitName) -> dict[str, Any]:
    """Draw a prompt for comparing answers: a question, an open request or a summary, about a thing of this split."""
    thing = rng.choice(things_of(split))
    kind = rng.choices(("question", "about", "summary"), (68, 22, 10))[0]
    row = thing_conversation(rng, split, kind, thing)
    messages = row.pop("messages")
    return {"prompt": messages[:-1], **row}


def reasoning_prompt(rng: random.Random, split: SplitName, longer: bool = False) -> dict[str, Any]:
    """Draw a problem with its final answer only; `longer` as in `problems.pose`."""
    problem = problems.pose(rng, split, longer)
    prompt = [{"role": "user", "content": problem.text}]
    return {"prompt": prompt, "answer": problem.answer, "kind": problem.kind, "length": problem.length}


def distinct(rows: Iterable[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Return the first `number` rows whose prompts or answers differ, or fewer if there are not as many."""
    # By the first message and the answer.
    by_content: dict[tuple[str, str | None], dict[str, Any]] = {}
    for row in rows:
        messages = row.get("messages") or row["prompt"]
        by_content.setdefault((messages[0]["content"], row.get("answer")), row)
        if len(by_content) == number:
            break
    return list(by_content.values())
