"""The reward model scores an answer alike, wherever the padding is and whatever it is batched with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import conversation, run_recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TOLERANCE = 1e-6
"""In float32: padding changes the order of sums. The scores of the same batch are the same to the bit."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    result = run_recipe("reward", folder / "inputs", "--output_dir", str(folder / "output"))
    assert result.returncode == 0, result.stderr
    return folder / "output"


def scores(folder: Path, batches: list[list[str]], side: str) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    found = []
    for texts in batches:
        encoded = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        found.append(logits[:, 0])
    return torch.cat(found)


def test_padding_and_batches_do_not_matter(output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(output)
    texts = [
        tokenizer.apply_chat_template(conversation("What?" * n, "That. " * n), tokenize=False) for n in (1, 4, 9, 2)
    ]
    alone = scores(output, [[text] for text in texts], "right")
    assert alone.std() > 1e-3, "they are told apart"
    for side in ("left", "right"):
        torch.testing.assert_close(scores(output, [texts], side), alone, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(scores(output, [texts[:3], texts[3:]], side), alone, atol=TOLERANCE, rtol=0)
        assert torch.equal(scores(output, [texts], side), scores(output, [texts], side))


def test_it_learned_which_answer_is_preferred(output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(output)
    texts = [
        tokenizer.apply_chat_template(conversation("What is 77?", answer), tokenize=False)
        for answer in ("It is 77.", "I do not know. No. No.")
    ]
    better, worse = scores(output, [texts], "right")
    assert better > worse
