"""The judge of English replies: what the turns before add to the log-probability of a reply."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import UserError
from recipes.worlds.english import judge
from tests.helpers import small_model

QUESTION = [{"role": "user", "content": "The cat sat on the mat?"}]
LONGER = [*QUESTION, {"role": "assistant", "content": "A dog is not a cat."}, {"role": "user", "content": "A token?"}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model that judges, in a folder of its own."""
    small_model.save_model(tmp_path / "judge")
    monkeypatch.setattr(judge, "MODEL", str(tmp_path / "judge"))
    judge._load.cache_clear()
    yield tmp_path / "judge"
    judge._load.cache_clear()


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_each_token_of_a_reply_is_scored_after_its_turns(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "It is a piece of text."

    @torch.no_grad()
    def logprob(turns: list[dict[str, str]]) -> float:
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        of_reply = tokenizer(text, add_special_tokens=False)["input_ids"]
        total = 0.0
        for place, token in enumerate(of_reply):
            logits = model(torch.tensor([ids + of_reply[:place]])).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
        return total

    expected = logprob(LONGER) - logprob([{"role": "user", "content": ""}])
    assert judge.relevance([reply(text)], [LONGER]) == pytest.approx([expected], abs=1e-4)


def test_replies_are_judged_one_by_one(folder: Path) -> None:
    replies = [reply("A dog."), reply("It is a piece of text, and 12 is not 21."), reply("No.")] * 7
    prompts = [QUESTION, LONGER, QUESTION] * 7
    together = judge.relevance(replies, prompts)
    assert together[:3] == pytest.approx([judge.relevance([replies[n]], [prompts[n]])[0] for n in range(3)], abs=1e-4)
    assert together[3:6] == pytest.approx(together[:3], abs=1e-4)


def test_a_missing_model_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(judge, "MODEL", str(tmp_path / "nothing"))
    judge._load.cache_clear()
    with pytest.raises(UserError, match=r"nothing.*recipes/smollm2/README\.md"):
        judge.relevance([reply("No.")], [QUESTION])
