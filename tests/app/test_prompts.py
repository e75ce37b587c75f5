"""What may be asked: what the card of a run's data says, and its held-out prompts."""

import json
from importlib.resources import files
from pathlib import Path

from pipeline.app.prompts import GENERAL, held_out_prompts, pocket_things, question_advice
from pipeline.data.arguments import DataArguments
from pipeline.data.splits import load_splits
from tests.helpers.files import write_rows

CARD = "# Mine\n\n## What may I ask?\n\nAbout 3 cats,\nand sums.\n\n## Splits\n\nAll.\n"


def test_the_card_of_the_data_says_what_may_be_asked_wherever_the_data_are(run: Path, tmp_path: Path) -> None:
    assert question_advice(run) == GENERAL
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "README.md").write_text(CARD)
    (tmp_path / "run" / "2_sft").mkdir(parents=True)
    trained = {"dataset_name": str(tmp_path / "cats"), "output_dir": str(tmp_path / "run" / "2_sft")}
    (tmp_path / "run" / "2_sft" / "arguments.json").write_text(json.dumps(trained))
    assert question_advice(tmp_path / "run") == "About 3 cats, and sums."
    (tmp_path / "cats" / "README.md").write_text("# Mine\n")
    assert question_advice(tmp_path / "run") == GENERAL
    assert held_out_prompts(tmp_path / "run") == [], "data that cannot be read end nothing"


def test_only_pockets_own_card_is_followed_by_the_list_of_things(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    card = tmp_path / "data" / "README.md"
    written = files("recipes.worlds.pocket").joinpath("card.md").read_text(encoding="utf-8")
    card.write_text(written.replace("{things}", "150"))
    things = pocket_things(tmp_path)
    assert len(things) == len(set(things)) == 150 and {"a fox", "a piano", "a star"} <= set(things)
    card.write_text(written.replace("{things}", "149"))
    assert pocket_things(tmp_path) == [], "the data of another release have other things"
    card.write_text(CARD)
    assert pocket_things(tmp_path) == []


def test_prompts_are_held_out_of_training_and_come_with_their_result(run: Path) -> None:
    prompts = [prompt for prompt in held_out_prompts(run) if prompt.key == "problems"]
    assert [(prompt.kind, prompt.text, prompt.result) for prompt in prompts] == [("problem", "What is 0 and 0?", "0")]
    train, _ = load_splits(DataArguments(dataset_name=str(run / "rows.jsonl")), "prompt", evaluation=False)
    assert len(train) >= 8 and prompts[0].text not in [row["prompt"][0]["content"] for row in train]


def test_a_conversation_of_several_turns_is_no_prompt_for_a_box(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": turns}] + [{"messages": turns[:2]}] * 30
    (tmp_path / "run" / "2_sft").mkdir(parents=True)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    trained = {"dataset_name": path, "output_dir": str(tmp_path / "run" / "2_sft")}
    (tmp_path / "run" / "2_sft" / "arguments.json").write_text(json.dumps(trained))
    prompts = held_out_prompts(tmp_path / "run")
    assert [(prompt.key, prompt.text, prompt.result) for prompt in prompts] == [("instructions", "user says", "")]
