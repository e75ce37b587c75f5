"""At the end of a smoke run, users see what was read of their data, and how."""

import importlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pipeline import progress
from pipeline.config.fields import argument_types
from pipeline.config.parser import parse
from pipeline.runner.data_table import LONGEST_ROW, describe_data, shorten
from tests.helpers.files import write_rows
from tests.helpers.small_model import recipe_command


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that returns what a step has told the runner, with the last value of each fact."""
    file = tmp_path / "progress.jsonl"
    file.touch()
    monkeypatch.setenv(progress.VARIABLE, str(file))
    monkeypatch.delenv("RANK", raising=False)

    def read() -> dict[str, Any]:
        known: dict[str, Any] = {}
        for line in file.read_text().splitlines():
            known |= json.loads(line)
        return known

    return read


def load(recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Load the data of a recipe as its step does, without training."""
    monkeypatch.setattr(progress, "_read", [])
    words = recipe_command(recipe, folder / "inputs", *options)[2:]
    module = importlib.import_module(f"recipes.{recipe}")
    with patch("pipeline.training.train.train_and_save"):
        module.main(*parse(*argument_types(module.main), argv=[*words, "--output_dir", str(folder / "out")]))


def test_each_step_says_what_it_read_and_shows_the_first_row_in_its_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: Any
) -> None:
    questions = [{"question": f"What is {i}?", "answer": f"It is {i}.", "choices": "A B"} for i in range(40)]
    pairs = [{"query": f"What is {i}?", "chosen": "It is.", "rejected": "No.", "id": i} for i in range(60)]
    questions_file = write_rows(tmp_path / "questions.jsonl", questions)
    pairs_file = write_rows(tmp_path / "pairs.jsonl", pairs)
    load("sft", tmp_path, monkeypatch, "--dataset_name", questions_file, "--bf16", "false")
    sft = facts()
    load("reward", tmp_path, monkeypatch, "--dataset_name", pairs_file, "--bf16", "false", "--eval_strategy", "no")
    reward = facts()
    table = describe_data({"2_sft": sft, "3_reward": reward, "3_judge": reward, "report": {}})
    assert table == [
        "data that the stages read:",
        f"  2_sft              {questions_file}: 40 rows, of which 2 are held out",
        "                     question, answer -> messages; not used: choices",
        "                     first row: <|bos|><|user|>What is 1?<|end|><|assistant|>It is 1.<|end|>",
        f"  3_reward, 3_judge  {pairs_file}: 60 rows, of which 3 are held out",
        "                     query, chosen, rejected -> prompt, chosen, rejected; not used: id",
        "                     first row: " + shorten(reward["first_row"]),
    ]
    chosen, _, rejected = reward["first_row"].partition(" (rejected: ")
    assert "What is 1?" in chosen and "It is." in chosen and rejected == "No.)"


def test_a_first_row_is_one_line_with_its_beginning_and_its_end() -> None:
    assert shorten("one\ntwo\x1b[2J") == "one\\ntwo?[2J"
    line = shorten("begin" + "x" * 1000 + "end")
    assert line.startswith("begin") and line.endswith("end") and len(line) < LONGEST_ROW + 10
    assert describe_data({"report": {}}) == []
