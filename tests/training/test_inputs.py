"""What a stage trains on is loaded part by part, and everything that is wrong with any part is reported together."""

from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig, SFTConfig

from pipeline.data.arguments import DataArguments
from pipeline.errors import UserError
from pipeline.training.inputs import load_inputs
from tests.helpers.files import write_rows
from tests.helpers.small_model import conversation, save_model, save_tokenizer

ROWS = [{"messages": conversation(f"What is {i}?", "It is.")} for i in range(8)]


def problem_fields(
    folder: Path, model: str, rows: list[dict[str, Any]], data: dict[str, Any], **training: Any
) -> list[str]:
    """Return the fields of the problems, in order."""
    data_args = DataArguments(write_rows(folder / "rows.jsonl", rows), validation_share=0.0, **data)
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "no"}
    args = SFTConfig(str(folder / "output"), **{**settings, **training})
    with pytest.raises(UserError) as error:
        load_inputs("conversation", data_args, args, ModelConfig(model))
    return [problem.field for problem in error.value.problems]


def test_each_part_is_checked_although_others_cannot_be_loaded(tmp_path: Path) -> None:
    words = save_tokenizer(tmp_path / "tokenizer")
    without_answers = [{"messages": row["messages"][:1]} for row in ROWS]
    # Without the model, its tokenizer cannot be loaded either, and no length can be checked.
    missing = str(tmp_path / "missing")
    assert problem_fields(tmp_path, missing, without_answers, {}) == ["model_name_or_path", "dataset_name"]
    # With another tokenizer, the prompts are counted, and its own settings are checked.
    data = {"tokenizer_name_or_path": words}
    assert problem_fields(tmp_path, missing, ROWS, data, max_length=2) == ["model_name_or_path", "max_length"]
    expected = ["model_name_or_path", "system_prompt", "dataset_name", "eos_token"]
    data["system_prompt"] = "Never say <|end|>."
    assert problem_fields(tmp_path, missing, without_answers, data, eos_token="<none>") == expected


def test_data_that_cannot_be_read_do_not_hide_what_is_wrong_with_the_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    data = {"text_column": "text", "messages_column": "turns"}
    fields = problem_fields(
        tmp_path, model, ROWS, data, max_length=1 << 20, chat_template_path=str(tmp_path / "none.jinja")
    )
    assert fields == ["messages_column", "chat_template_path", "max_length"]
