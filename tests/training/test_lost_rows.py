"""Rows that training drops or truncates are counted over all rows, and recorded as the runner reads them."""

import importlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from datasets import Dataset

from pipeline import progress
from pipeline.config.fields import argument_types
from pipeline.config.parser import parse
from pipeline.data.tokenized import drop_long_prompts
from tests.helpers.files import write_rows
from tests.helpers.small_model import conversation, recipe_command, tokenizer

ROWS, TOO_LONG = 1500, 500
LONG = "What is a cat? " * 20


@pytest.fixture
def lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that reads what a step has told the runner about lost rows."""
    file = tmp_path / "progress.jsonl"
    file.touch()
    monkeypatch.setenv(progress.VARIABLE, str(file))
    monkeypatch.setattr(progress, "_lost", [])
    return lambda: [facts["lost"] for facts in map(json.loads, file.read_text().splitlines()) if "lost" in facts][-1]


def question(row: int) -> str:
    """Return a question that is too long in the last rows, as in data that are sorted or joined."""
    return LONG if row >= ROWS - TOO_LONG else f"What is {row}?"


def trainer_of(recipe: str, folder: Path, rows: list[dict[str, Any]], *options: str) -> Any:
    """Return the trainer that a recipe would train on the `rows`."""
    made: list[Any] = []
    data = ["--dataset_name", write_rows(folder / "rows.jsonl", rows), "--validation_share", "0"]
    data += ["--eval_strategy", "no", "--max_length", "40", "--bf16", "false"]
    words = recipe_command(recipe, folder / "inputs", *data, *options)[2:]
    module = importlib.import_module(f"recipes.{recipe}")
    with patch("pipeline.training.train.train_and_save", made.append):
        module.main(*parse(*argument_types(module.main), argv=[*words, "--output_dir", str(folder / "out")]))
    return made[0]


@pytest.mark.parametrize(("recipe", "answers"), [("dpo", 1), ("reward", 1), ("kto", 2)])
def test_pairs_that_are_too_long_are_counted_wherever_they_are(
    tmp_path: Path, lost: Any, recipe: str, answers: int
) -> None:
    rows = [{"prompt": question(row), "chosen": "It is.", "rejected": "No."} for row in range(ROWS)]
    trainer = trainer_of(recipe, tmp_path, rows)
    assert len(trainer.train_dataset) == answers * (ROWS - TOO_LONG)
    (entry,) = lost()
    assert (entry["rows"], entry["of"]) == (answers * TOO_LONG, answers * ROWS)
    assert "max_length 40" in entry["what"] and "are dropped" in entry["what"]


def test_conversations_whose_prompt_fills_the_sequence_are_counted(tmp_path: Path, lost: Any) -> None:
    rows = [{"messages": conversation(question(row), "It is.")} for row in range(ROWS)]
    trainer = trainer_of("sft", tmp_path, rows, "--packing", "false")
    assert len(trainer.train_dataset) == ROWS - TOO_LONG, "TRL drops rows without labels"
    truncated, unlabelled = lost()
    assert {truncated["rows"], unlabelled["rows"]} == {TOO_LONG} and {truncated["of"], unlabelled["of"]} == {ROWS}
    assert "lose their end" in truncated["what"] and "nothing is learned" in unlabelled["what"]


@pytest.mark.parametrize(("streaming", "counted"), [(False, ROWS), (True, 100)])
def test_prompts_without_room_for_an_answer_are_counted(lost: Any, streaming: bool, counted: int) -> None:
    """Of a stream, whose rows may have to be downloaded, the first hundred."""
    prompts = [[{"role": "user", "content": LONG if row % 3 == 2 else "What?"}] for row in range(ROWS)]
    rows = Dataset.from_dict({"prompt": prompts})
    kept = drop_long_prompts(rows.to_iterable_dataset() if streaming else rows, tokenizer(), 8, 48)
    assert len(list(kept)) == ROWS - TOO_LONG
    (entry,) = lost()
    assert (entry["rows"], entry["of"]) == (counted // 3, counted)
