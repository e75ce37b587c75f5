"""KTO by hand, and the rows that it reads: pairs, single answers, and people's votes with ties."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pipeline.config.fields import argument_types
from pipeline.config.parser import parse
from recipes import kto
from tests.helpers.answers_by_hand import adapted, log_prob, trained
from tests.helpers.files import write_rows
from tests.helpers.small_model import conversation, recipe_command

BETA = 0.3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    recipe_command("kto", folder)
    adapted(folder)
    return folder


def trainer_of(inputs: Path, output: Path, *options: str) -> Any:
    """Return the trainer that the recipe would train."""
    made: list[Any] = []
    words = recipe_command("kto", inputs, "--bf16", "false", "--beta", str(BETA), *options)[2:]
    with patch("pipeline.training.train.train_and_save", made.append):
        kto.main(*parse(*argument_types(kto.main), argv=[*words, "--output_dir", str(output)]))
    return made[0]


def test_loss_and_gradient_are_those_computed_by_hand(inputs: Path, tmp_path: Path) -> None:
    """On an adapter that was merged in memory, whose reference TRL would load without it."""
    trainer = trainer_of(inputs, tmp_path, "--model_name_or_path", str(inputs / "adapter"))
    rows = [trainer.train_dataset[i] for i in range(4)]
    assert {row["label"] for row in rows} == {True, False}, "shuffled: TRL puts all chosen answers first"
    batch = trainer.data_collator(rows)
    generator = torch.Generator().manual_seed(0)
    reference = trainer_of(inputs, tmp_path, "--model_name_or_path", str(inputs / "adapter")).model
    with torch.no_grad():
        for weight in trained(trainer.model).values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {key: weight.grad.clone() for key, weight in trained(trainer.model).items()}
    trainer.model.zero_grad()

    def ratio(row: dict[str, Any], answer: Any) -> torch.Tensor:
        with torch.no_grad():
            before = log_prob(reference, row["prompt"], answer)
        return log_prob(trainer.model, row["prompt"], answer) - before

    # Each prompt with the answer of the row before it.
    with torch.no_grad():
        mismatched = [ratio(row, rows[i - 1]["completion"]) for i, row in enumerate(rows)]
    kl = torch.stack(mismatched).mean().clamp(min=0)
    signs = [1 if row["label"] else -1 for row in rows]
    losses = [
        1 - torch.sigmoid(sign * BETA * (ratio(row, row["completion"]) - kl))
        for sign, row in zip(signs, rows, strict=True)
    ]
    expected = torch.stack(losses).mean()
    assert abs(expected.item() - 0.5) > 0.01, "the policy has moved"
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    expected.backward()
    for key, weight in trained(trainer.model).items():
        torch.testing.assert_close(found[key], weight.grad, atol=1e-5, rtol=1e-4, msg=key)


def test_single_answers_are_read_and_shuffled(inputs: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}.", "label": i < 30} for i in range(60)]
    rows[3]["completion"] = [{"role": "assistant", "content": "It is 3."}]
    rows[4]["label"] = 1
    path = write_rows(tmp_path / "rows.jsonl", rows)
    trainer = trainer_of(inputs, tmp_path, "--dataset_name", path)
    read = list(trainer.train_dataset)
    assert len(read) == 57 and sum(row["label"] for row in read) == 28, "every 20th row is held out"
    labels = [row["label"] for row in read]
    assert labels != sorted(labels, reverse=True)
    assert all(row["completion"][0]["content"].split()[-1][:-1] in row["prompt"][0]["content"] for row in read)


def test_a_tie_is_two_wanted_answers_and_two_bad_ones_are_not_wanted(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "votes"
    folder.mkdir()
    choices = ["a", "b", "tie", "bad", "skip"]
    votes = [
        {
            "id": str(i),
            "pair": str(i),
            "annotator": "ann",
            "prompt": conversation(f"What is {i}?", "")[:1],
            "a": f"a{i} {choices[i % 5]}",
            "b": f"b{i} {choices[i % 5]}",
            "model_a": "m",
            "model_b": "m",
            "choice": choices[i % 5],
        }
        for i in range(60)
    ]
    write_rows(folder / "votes.jsonl", votes)
    trainer = trainer_of(inputs, tmp_path / "out", "--dataset_name", str(folder), "--dataset_config", "judgements")
    wanted: dict[str, list[bool]] = {}
    for row in trainer.train_dataset:
        text = row["completion"][0]["content"]
        wanted.setdefault(f"{text[0]} {text.split()[1]}", []).append(row["label"])
    assert {key: set(labels) for key, labels in wanted.items()} == {
        "a a": {True},
        "b a": {False},
        "a b": {False},
        "b b": {True},
        "a tie": {True},
        "b tie": {True},
        "a bad": {False},
        "b bad": {False},
    }
    pairs = trainer_of(inputs, tmp_path / "pairs", "--dataset_name", str(folder))
    assert {row["completion"][0]["content"].split()[1] for row in pairs.train_dataset} == {"a", "b"}, "no ties"


def test_what_is_not_a_judgement_is_refused(inputs: Path, tmp_path: Path) -> None:
    from pipeline.errors import UserError

    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "What?", "completion": "That.", "label": "maybe"}] * 40)
    with pytest.raises(UserError, match="label is 'maybe', not true or false"):
        trainer_of(inputs, tmp_path, "--dataset_name", bad)
    none = write_rows(tmp_path / "none.jsonl", [{"prompt": "What?", "completion": "That."}] * 40)
    with pytest.raises(UserError, match=r"label: .*no such column"):
        trainer_of(inputs, tmp_path, "--dataset_name", none)
