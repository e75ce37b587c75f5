"""No row is trained on by any stage of a run, and measured: whatever the data, their layout, filters and shares."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.data.arguments import DataArguments
from pipeline.data.columns import Kind
from pipeline.data.splits import load_splits
from pipeline.errors import UserError
from pipeline.evaluation.evaluate_yaml import RunFacts, Settings, complete, find_settings
from pipeline.evaluation.held_out import HeldOut, read_held_out
from pipeline.stages import HELD_OUT
from tests.helpers.files import write_rows

KINDS: dict[str, Kind] = {
    "pretrain": "text", "sft": "conversation", "reward": "preference", "dpo": "preference", "kto": "unpaired",
    "ppo": "prompt", "grpo": "prompt",
}  # fmt: skip


def numbers_in(rows: Any) -> set[int]:
    """Return the numbers that the texts of rows name."""
    return {int(number) for row in rows for number in re.findall(r"row (\d+)", json.dumps(row, default=str))}


def row(number: int, fault: str) -> dict[str, Any]:
    """Return a row that every kind of stage can read, unless it has a `fault`."""
    chosen, rejected = f"Yes, row {number}.", f"No, row {number}."
    return {
        "text": f"A document about row {number}.",
        "prompt": " " if fault == "bad" else f"What is row {number}?",
        "answer": f"It is row {number}.",
        "chosen": chosen,
        "rejected": {"equal": chosen, "empty": ""}.get(fault, rejected),
        "source": "ab"[number // 3 % 2],
    }


def settings_of(run: Path, stages: list[tuple[str, str, dict[str, Any]]], content: dict[str, Any]) -> Settings:
    """Return how a run of these stages is measured if its evaluate.yaml has this content."""
    facts = RunFacts.of_stages(stages, run)
    return find_settings(run, complete(content, facts), facts)


def lay(folder: Path, layout: str, rows: list[dict[str, Any]]) -> str | list[str]:
    """Write rows as a file, a folder of files, or two data sets, and return their name."""
    folder.mkdir(exist_ok=True)
    third = len(rows) // 3
    if layout == "file":
        return write_rows(folder / "rows.jsonl", rows)
    parts = {"one": rows[:third], "two": rows[third:]}
    paths = [write_rows(folder / f"{name}.jsonl", part) for name, part in parts.items()]
    return str(folder) if layout == "folder" else paths


@st.composite
def stages(draw: st.DrawFn) -> tuple[list[str], list[dict[str, Any]]]:
    """Draw the kinds of some stages, and how each reads the rows."""
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3, unique=True))
    usual = draw(st.sampled_from([0.05, 0.1, 0.125, 0.5]))
    how = []
    for kind in kinds:
        options: dict[str, Any] = {"drop_bad_rows": True}
        options["validation_share"] = draw(st.sampled_from([usual, usual, usual, 0.07, 0.0]))
        if draw(st.booleans()):
            options["keep_rows"] = [f"source={draw(st.sampled_from('ab'))}"]
        if draw(st.booleans()):
            options |= {"dataset_streaming": True, "drop_bad_rows": False}
        how.append({name: options[name] for name in sorted(options)} | {"kind": kind})
    return kinds, how


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    drawn=stages(),
    layout=st.sampled_from(["file", "folder", "two data sets"]),
    faults=st.lists(st.sampled_from(["", "", "", "equal", "empty", "bad"]), min_size=42, max_size=90),
    named=st.none() | st.sampled_from(sorted(HELD_OUT)),
)
def test_no_row_is_both_trained_on_and_measured(
    tmp_path_factory: pytest.TempPathFactory, drawn: Any, layout: str, faults: list[str], named: str | None
) -> None:
    kinds, how = drawn
    # The rows of a stream cannot be dropped.
    streams = any(options.get("dataset_streaming") for options in how)
    rows = [row(number, "" if streams and fault == "bad" else fault) for number, fault in enumerate(faults)]
    folder = tmp_path_factory.mktemp("drawn")
    data = lay(folder / "data", layout, rows)
    values = [{**options, "dataset_name": data} for options in how]
    trained: set[int] = set()
    for options in values:
        about = {name: value for name, value in options.items() if name != "kind"}
        try:
            split, _ = load_splits(DataArguments(**about), KINDS[options["kind"]], evaluation=False)
            own = numbers_in(split)
            evaluates = options["validation_share"] > 0
            _, held_out = load_splits(DataArguments(**about), KINDS[options["kind"]], evaluates)
        except UserError:
            # For instance, none of the rows that are left is held out.
            assume(False)
        assert not own & numbers_in(held_out or ())
        trained |= own
    content = {named: data if isinstance(data, str) else data[0]} if named else {}
    order = [
        (f"{number}_{kind}", kind, options) for number, (kind, options) in enumerate(zip(kinds, values, strict=True))
    ]
    recipe = settings_of(folder / "run", order, content)
    try:
        measured: HeldOut | None = read_held_out(recipe, (), baselines=False)
    except UserError:
        # For instance, a stage trains on all rows of the data that evaluate.yaml names.
        measured = None
    for key in HELD_OUT if measured else ():
        assert not trained & numbers_in(getattr(measured, key)), key


@pytest.mark.parametrize("key", ["prompts", "problems", "pairs"])
def test_pairs_that_say_nothing_do_not_move_the_rows_that_are_held_out(tmp_path: Path, key: str) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [row(i, "" if i % 9 else "equal") for i in range(1000)])
    trained, held_out = load_splits(DataArguments(path), "preference", evaluation=True)
    recipe = settings_of(tmp_path / "run", [("3_dpo", "dpo", {"dataset_name": path})], {key: path})
    measured = numbers_in(getattr(read_held_out(recipe, (), baselines=False), key))
    assert measured and not measured & numbers_in(trained)
    assert measured >= numbers_in(held_out), "the same rows"


@pytest.mark.parametrize(
    ("entry", "fault", "is_said"),
    [
        ({}, "equal", True),
        ({}, "", False),
        ({"keep_rows": ["source=a"]}, "", True),
        ({"validation_share": 0.0}, "equal", False),
        ({"division": "by row number"}, "equal", False),
    ],
)
def test_a_stage_that_an_earlier_release_trained_on_other_rows_is_named(
    tmp_path: Path, entry: dict[str, Any], fault: str, is_said: bool
) -> None:
    """It stays finished, but the rows that it held out were numbered after some had been dropped."""
    path = write_rows(tmp_path / "pairs.jsonl", [row(i, "" if i % 9 else fault) for i in range(60)])
    values = {"dataset_name": path} | {name: value for name, value in entry.items() if name != "division"}
    step = {"id": "x", "values": values} | {name: value for name, value in entry.items() if name == "division"}
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"steps": {"3_reward": step}}))
    recipe = settings_of(run, [("3_reward", "reward", values)], {})
    remarks = read_held_out(recipe, (), baselines=False).remarks
    assert len(remarks) == is_said and all("3_reward: an earlier release" in remark for remark in remarks)


def test_a_test_split_that_is_the_training_split_does_not_change_what_is_held_out(tmp_path: Path) -> None:
    """Without an evaluation during training, such a stage used to train on the rows that it was measured on."""
    path = write_rows(tmp_path / "rows.jsonl", [row(i, "") for i in range(60)])
    values = {"dataset_name": path, "dataset_test_split": "train"}
    train, _ = load_splits(DataArguments(**values), "preference", evaluation=False)
    recipe = settings_of(tmp_path / "run", [("3_reward", "reward", values)], {})
    measured = numbers_in(read_held_out(recipe, (), baselines=False).pairs)
    assert measured == {0, 20, 40} and not measured & numbers_in(train)
