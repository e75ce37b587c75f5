"""No training row contains part of a held-out row: a check that shares no code with the generator."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

Rows = Callable[[str, str], list[dict[str, Any]]]
Grams = set[tuple[str, ...]]

CONFIGS = ("pretrain", "sft", "preferences", "reasoning")
N = 8


def words(row: dict[str, Any]) -> list[str]:
    """Return the lower-cased words of all that a model may see of a row."""
    text = (
        row["text"]
        if "text" in row
        else " ".join(message["content"] for message in row.get("messages") or row["prompt"])
    )
    return "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text.lower()).split()


def runs(tokens: list[str], length: int) -> Iterable[tuple[str, ...]]:
    return (tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1))


def grams(rows: Iterable[list[str]], lengths: Iterable[int]) -> Grams:
    return {run for tokens in rows for length in lengths for run in runs(tokens, length)}


def overlap(held_out: list[list[str]], training: Grams) -> Grams:
    """Return the runs of `N` words of held-out rows, or whole shorter rows, that are in training rows."""
    return {run for tokens in held_out for run in runs(tokens, min(N, len(tokens)))} & training


@pytest.fixture(scope="module")
def training(rows: Rows) -> Grams:
    """Return the runs of `N` words of the training rows of all configs, and of fewer for short held-out rows."""
    held_out = [row for config in CONFIGS for split in ("validation", "test") for row in rows(config, split)]
    lengths = {min(N, len(words(row))) for row in held_out}
    return grams((words(row) for config in CONFIGS for row in rows(config, "train")), lengths)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_training_row_of_any_config_contains_part_of_a_held_out_row(
    rows: Rows, training: Grams, config: str, split: str
) -> None:
    held_out = [words(row) for row in rows(config, split)]
    assert held_out and all(held_out)
    assert not overlap(held_out, training)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_check_finds_a_planted_overlap(rows: Rows, training: Grams, config: str) -> None:
    held_out = [words(row) for row in rows(config, "test")]
    victim = max(held_out, key=len)
    planted = ["so", *victim[-N:], "and", "more"]
    assert overlap(held_out, training | grams([planted], [N])) == {tuple(victim[-N:])}
    shorter = ["so", *victim[: N - 1], "more"]
    assert not overlap(held_out, training | grams([shorter], [N]))


def test_a_short_row_is_found_whole() -> None:
    assert overlap([["what", "is", "iron"]], grams([["say", "what", "is", "iron", "now"]], [3, N]))
    assert not overlap([["what", "is", "iron"]], grams([["say", "what", "is", "gold"]], [3, N]))
