"""The data of recipes/pocket-tools: what is held out, and that what tools answer in it is right."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.data.messages import read_messages
from pipeline.tools.environments import GuessLetter
from pipeline.tools.functions import calculator
from recipes.worlds.pocket import tools as module
from recipes.worlds.pocket.build import PocketArguments

SIZES: dict[str, Any] = {"world": "tools", "size_mb": 0.2, "sft_rows": 1500, "reasoning_rows": 1500}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools") / "data"
    module.build(PocketArguments(str(folder), **SIZES))
    return folder


def rows(data: Path, config: str, split: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(data / config / f"{split}.parquet").to_pylist()
    return found


def asked(row: dict[str, Any]) -> str:
    text: str = (row.get("prompt") or row["messages"])[0]["content"]
    return text


def test_the_same_seed_gives_the_same_bytes(data: Path, tmp_path: Path) -> None:
    for _ in range(2):
        # The second time, it replaces the first.
        module.build(PocketArguments(str(tmp_path / "data"), **SIZES))
    files = sorted(path.relative_to(data) for path in data.rglob("*.*"))
    assert len(files) == 14
    assert all((data / file).read_bytes() == (tmp_path / "data" / file).read_bytes() for file in files)


@pytest.mark.parametrize("config", ["sft", "direct", "reasoning"])
def test_no_problem_of_a_held_out_split_is_trained_on(data: Path, config: str) -> None:
    trained = {asked(row) for one in ("sft", "direct", "reasoning") for row in rows(data, one, "train")}
    sums = {tuple(re.findall(r"\d{4,}", text)) for text in trained}
    for split in ("validation", "test", *(("test_longer",) if config == "reasoning" else ())):
        held_out = rows(data, config, split)
        assert len(held_out) > 100
        assert not trained & {asked(row) for row in held_out}
        long = [tuple(re.findall(r"\d{4,}", asked(row))) for row in held_out]
        assert not sums - {()} & set(long)


def test_every_sum_of_one_digit_is_trained_on_in_other_words(data: Path) -> None:
    trained = [asked(row) for row in rows(data, "sft", "train") if row["kind"] == "one digit"]
    pairs = {tuple(re.findall(r"\d+", text)) for text in trained}
    assert len(pairs) > 90


def test_what_tools_and_the_game_answer_is_right(data: Path) -> None:
    calls = games = 0
    for row in rows(data, "sft", "train"):
        messages = read_messages(row["messages"], "messages", calls=True)
        # The letters that would give all of these answers.
        hidden = letters(row) if row["kind"] == "game" else []
        for call, result in pairwise(messages):
            for one in call.get("tool_calls") or ():
                arguments: dict[str, Any] = one["function"]["arguments"]
                calls += 1
                if one["function"]["name"] == "calculator":
                    assert calculator(**arguments) == result["content"]
                else:
                    hidden = [letter for letter in hidden if ask(letter, arguments["letter"]) == result["content"]]
        games += row["kind"] == "game"
        assert hidden or row["kind"] != "game"
    assert calls > 1500 and games > 500


def letters(row: dict[str, Any]) -> list[str]:
    """Return the letters of which a game hides one."""
    low, high = re.findall(r"from (.) to (.) ", asked(row))[0]
    return list(module.LETTERS[module.LETTERS.index(low) : module.LETTERS.index(high) + 1])


def ask(hidden: str, letter: str) -> str:
    game = GuessLetter()
    game.reset(hidden=hidden)
    return game.ask(letter)


def test_three_questions_find_every_letter_and_a_blind_player_few(data: Path) -> None:
    test = [row for row in rows(data, "reasoning", "test") if row["kind"] == "game"]
    assert len(test) == 300
    places: list[int] = []
    for row in test:
        left, game = letters(row), GuessLetter()
        places.append(left.index(row["hidden"]))
        game.reset(**row)
        for _ in range(module.QUESTIONS):
            middle = left[(len(left) - 1) // 2]
            said = game.ask(middle)
            left = [letter for letter in left if (said == "yes") == (letter == middle) and ask(letter, middle) == said]
            if said == "yes":
                break
        assert left == [row["answer"]]
    assert max(map(places.count, places)) / len(test) < 0.15
