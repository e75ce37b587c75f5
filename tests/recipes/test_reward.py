"""The reward model that is saved scores as the one that was trained, wherever the padding is and whatever the batch."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import ModelConfig, RewardConfig

from pipeline.config.parser import parse
from pipeline.data.arguments import DataArguments
from pipeline.models.kernels.token_trees import share_beginnings
from pipeline.preferences.judges import score
from pipeline.training import train as training
from pipeline.training.custom_trainer import TrainerArguments
from pipeline.training.optimizer import OptimizerArguments
from pipeline.training.token_loss import TokenLossArguments, token_loss
from recipes import reward
from tests.helpers.small_model import conversation, recipe_command, run_recipe

TOLERANCE = 1e-6
"""In float32: padding and batch change the order of sums, and padding on the left also the positions."""

CONVERSATIONS = [conversation("What?" * n, "That. " * n) for n in (1, 4, 9, 2)]
TOGETHER = [[0, 1, 2, 3]]
BATCHES = [TOGETHER, [[0, 1, 2], [3]], [[0], [1], [2], [3]], [[3, 2, 1, 0]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """The model in memory, as the recipe leaves it, and where it was saved."""
    folder = tmp_path_factory.mktemp("reward")
    # Mixed precision would stay with the model in memory.
    options = ["--bf16", "false", "--output_dir", str(folder / "output")]
    arguments = recipe_command("reward", folder / "inputs", *options)[2:]
    trainers = []

    def keep(trainer: Any) -> None:
        trainers.append(trainer)
        train_and_save(trainer)

    train_and_save = training.train_and_save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_and_save", keep)
        kinds = (DataArguments, RewardConfig, ModelConfig, OptimizerArguments, TokenLossArguments, TrainerArguments)
        reward.main(*parse(*kinds, argv=arguments))
    return trainers[0].model.eval(), folder / "output"


def scores(model: PreTrainedModel, folder: Path, batches: list[list[int]], side: str) -> torch.Tensor:
    """Return the scores, in the order of `CONVERSATIONS`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    texts = tokenizer.apply_chat_template(CONVERSATIONS, tokenize=False)
    found = torch.empty(len(texts))
    for batch in batches:
        encoded = tokenizer([texts[i] for i in batch], padding=True, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            found[batch] = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[:, 0]
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_the_saved_model_gives_the_same_scores(
    trained: tuple[PreTrainedModel, Path], side: str, batches: list[list[int]]
) -> None:
    """Bit for bit, if computed in the same way."""
    model, folder = trained
    attention = model.config._attn_implementation
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attention).eval()
    plain = scores(loaded, folder, batches, side)
    assert share_beginnings(loaded)
    found = scores(loaded, folder, batches, side)
    assert found.std() > 1e-3, "the scores differ"
    assert torch.equal(found, scores(model, folder, batches, side))
    torch.testing.assert_close(found, plain, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found, scores(loaded, folder, TOGETHER, "right"), atol=TOLERANCE, rtol=0)


def test_the_score_of_a_conversation_does_not_depend_on_the_others(trained: tuple[PreTrainedModel, Path]) -> None:
    """Nor on their order, bit for bit."""
    model, folder = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    together = score(model, tokenizer, CONVERSATIONS)
    assert score(model, tokenizer, CONVERSATIONS[::-1])[::-1] == together
    alone = [score(model, tokenizer, [one])[0] for one in CONVERSATIONS]
    assert alone == pytest.approx(together, abs=TOLERANCE)
    batched = scores(model, folder, TOGETHER, "right")
    torch.testing.assert_close(torch.tensor(together), batched, atol=TOLERANCE, rtol=0)


def test_it_learned_which_answer_is_preferred(trained: tuple[PreTrainedModel, Path]) -> None:
    model, folder = trained
    answers = [conversation("What is 77?", answer) for answer in ("It is 77.", "I do not know. No. No.")]
    better, worse = score(model, AutoTokenizer.from_pretrained(folder), answers)
    assert better > worse


def test_pairs_that_are_too_long_are_reported(tmp_path: Path) -> None:
    done = run_recipe(
        "reward", tmp_path, "--max_length", "30", "--max_steps", "1", "--output_dir", str(tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr
    logged = re.search(r"(\d+) of (\d+) pairs are longer than max_length 30", done.stderr)
    assert logged and 0 < int(logged[1]) < int(logged[2])


def test_the_loss_at_every_token_compares_means_from_where_two_answers_differ() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 1, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    scores = torch.tensor([[9.0, 9.0, 1.0, 2.0, 3.0], [0.0, 0.0, 4.0, 2.0, 99.0]], requires_grad=True)
    loss = token_loss(scores, ids, mask, margin=0.5)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(torch.tensor(-(2.0 - 3.0 - 0.5))))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert (gradient != 0).tolist() == [[False, False, True, True, True], [False, False, True, True, False]]
    # One answer is the beginning of the other.
    prefix = token_loss(scores, ids[:1].repeat(2, 1), mask)
    torch.testing.assert_close(prefix, torch.nn.functional.softplus(torch.tensor(-3.0)))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_loss_at_every_token_is_added_in_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool
) -> None:
    """In full and with LoRA, the loss of one step is the sum of both; that of an evaluation stays comparable."""
    kinds = (DataArguments, RewardConfig, ModelConfig, OptimizerArguments, TokenLossArguments, TrainerArguments)
    trainers: list[Any] = []
    monkeypatch.setattr(training, "train_and_save", lambda trainer: (trainers.append(trainer), trainer.train()))
    for weight in ("0", "1", "3"):
        options = ["--token_loss_coef", weight, "--max_steps", "1", "--logging_steps", "1", "--bf16", "false"]
        options += ["--use_peft", "--lora_target_modules", "all-linear"] if adapter else []
        options += ["--learning_rate", "1e-12", "--eval_strategy", "steps", "--eval_steps", "1"]
        command = recipe_command("reward", tmp_path / weight, *options, "--output_dir", str(tmp_path / f"out{weight}"))
        reward.main(*parse(*kinds, argv=command[2:]))
    found = [{key: entry[key] for entry in one.state.log_history for key in entry} for one in trainers]
    without, once, thrice = (entry["loss"] for entry in found)
    assert once > without + 1e-3 and thrice - without == pytest.approx(3 * (once - without), rel=1e-3)
    assert [entry["eval_loss"] for entry in found] == pytest.approx([found[0]["eval_loss"]] * 3, rel=1e-6)
