"""What is held out from what, measured on the data set that is written."""

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from pipeline.data.arguments import SPLITS
from recipes.worlds.pocket.phrasings import REQUESTS
from recipes.worlds.pocket.things import core, things

Row = dict[str, Any]
Rows = Callable[[str, str], list[Row]]
HELD_OUT = SPLITS[1:]


def asked(row: Row) -> str:
    return (row.get("messages") or row["prompt"])[0]["content"]


def structure(row: Row) -> tuple[str, ...]:
    """Return what is left of a problem without names and items: what it is made of, in order."""
    text = asked(row)
    if row["kind"] == "logic":
        return tuple(re.findall(r"faces (\w+)", text))
    numbers = re.findall(r"\d+", text)
    if row["kind"] == "arithmetic":
        grows = re.search(r"gets|finds|buys|loses|sells|gives", text)[0] in ("gets", "finds", "buys")
        # Problems of arithmetic are told apart by their first operation.
        return (numbers[0], "+" if grows else "-", numbers[1])
    if row["kind"] == "ordering":
        return tuple(str(sorted(map(int, numbers)).index(int(number))) for number in numbers)
    return tuple(numbers)


def length(row: Row) -> int:
    return len(re.findall(r"faces |\d+", asked(row)))


def test_held_out_rows_are_distinct(rows: Rows) -> None:
    for config in ("sft", "preferences", "reasoning"):
        for split in (*HELD_OUT, "test_longer") if config == "reasoning" else HELD_OUT:
            prompts = [asked(row) for row in rows(config, split)]
            assert len(set(prompts)) == len(prompts), (config, split)


def test_no_two_splits_share_a_prompt(rows: Rows) -> None:
    for config in ("sft", "preferences", "reasoning"):
        prompts = {split: {asked(row) for row in rows(config, split)} for split in SPLITS}
        for one, other in combinations(SPLITS, 2):
            assert not prompts[one] & prompts[other], (config, one, other)


def test_no_two_splits_share_a_phrasing_of_a_question() -> None:
    for aspect, phrasings in REQUESTS.items():
        for one, other in combinations(SPLITS, 2):
            assert phrasings[one] and not set(phrasings[one]) & set(phrasings[other]), aspect


@pytest.mark.parametrize("split", HELD_OUT)
def test_as_many_prompts_ask_as_order(rows: Rows, split: str) -> None:
    """So that an answer that fits one of them fits less than half of the prompts."""
    ends = [asked(row).endswith("?") for row in rows("preferences", split) if row["kind"] != "summary"]
    assert sum(ends) * 2 == len(ends) < len(rows("preferences", split))


@pytest.mark.parametrize("kind", ["arithmetic", "ordering", "counting", "logic"])
def test_no_two_splits_share_the_structure_of_a_problem(rows: Rows, kind: str) -> None:
    found = {
        split: {structure(row) for row in rows("reasoning", split) if row["kind"] == kind}
        for split in (*SPLITS, "test_longer")
    }
    found["train"] |= {structure(row) for row in worked(rows) if row["kind"] == kind}
    for one, other in combinations(SPLITS, 2):
        assert found[one] and not found[one] & found[other], (one, other)
    assert not found["test_longer"] & found["train"]
    # Of each length, some structures are kept from training.
    lengths = {row["length"] for row in rows("reasoning", "train") if row["kind"] == kind}
    for split in HELD_OUT:
        assert {row["length"] for row in rows("reasoning", split) if row["kind"] == kind} == lengths, split


def worked(rows: Rows) -> list[Row]:
    """Return the problems of conversations, with the kind that their question shows."""
    kinds = {"Which way": "logic", "Which age": "ordering", "How many in all": "counting"}
    texts = [asked(row) for row in rows("sft", "train") if row["kind"] == "reasoning"]
    return [
        {
            "prompt": [{"content": text}],
            "kind": next((kind for mark, kind in kinds.items() if mark in text), "arithmetic"),
        }
        for text in texts
    ]


def test_longer_problems_are_longer_than_any_in_training(rows: Rows) -> None:
    for kind in {row["kind"] for row in rows("reasoning", "test_longer")}:
        trained = {length(row) for row in rows("reasoning", "train") if row["kind"] == kind}
        assert {length(row) for row in rows("reasoning", "test") if row["kind"] == kind} <= trained
        longer = {length(row) for row in rows("reasoning", "test_longer") if row["kind"] == kind}
        assert min(longer) > max(trained), kind


def test_the_facts_that_held_out_questions_ask_for_are_pretrained(rows: Rows) -> None:
    documents = [row["text"] for row in rows("pretrain", "train") if row["kind"] == "facts"]
    stated, wanted = 0, 0
    for thing in things():
        if thing.split != "train":
            about = " ".join(text for text in documents if core(thing.noun) in text)
            stated += sum(core(value) in about for value in thing.facts.values())
            wanted += len(thing.facts)
    # A data set as large as the recipe's states all of them.
    assert stated / wanted > 0.9
