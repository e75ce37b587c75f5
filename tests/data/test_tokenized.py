"""Tokens made a thousand rows at a time are those that TRL's trainers make of each row."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers.normalizers import NFKC
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from pipeline.data.tokenized import add_tokens, drop_long_prompts, log_truncated
from pipeline.errors import UserError
from pipeline.models.generation import encode_prompts
from tests.helpers.small_model import CHATML, conversation, save_model, tokenizer

CONVERSATIONS = [conversation(f"What is {i}?", f"It is {i * 7}.") for i in range(6)]
CONVERSATIONS[2] += conversation("And then?", "Nothing.")
PAIRS = {
    "prompt": [row[:1] for row in CONVERSATIONS],
    "chosen": [row[1:2] for row in CONVERSATIONS],
    "rejected": [[{"role": "assistant", "content": "What?"}] for _ in CONVERSATIONS],
}


def test_prompts_that_are_too_long_are_found_wherever_they_are() -> None:
    words = tokenizer()
    prompts = [[{"role": "user", "content": "A cat? " * (40 if i == 1050 else 1 + i % 3)}] for i in range(1100)]
    prompts[3] = [{"role": "system", "content": "A dog."}, *prompts[3]]
    rows = Dataset.from_dict({"prompt": prompts})
    (size,) = map(len, encode_prompts(words, [prompts[1050]]))
    kept = drop_long_prompts(rows, words, 10, size + 9)
    assert kept["prompt"][:] == prompts[:1050] + prompts[1051:]
    assert len(drop_long_prompts(rows, words, 10, size + 10)) == 1100
    with pytest.raises(UserError, match="every prompt takes"):
        drop_long_prompts(rows, words, 10, 12)


def test_prompts_are_counted_with_the_arguments_of_the_chat_template() -> None:
    words = tokenizer()
    words.chat_template = CHATML + "{% if slow %}A dog is not a cat.{% endif %}"
    prompts = [[{"role": "user", "content": text}] for text in ("A cat?", "A token is a piece of text. " * 3)]
    rows = Dataset.from_dict({"prompt": prompts})
    longest = len(encode_prompts(words, [prompts[1]])[0])
    assert len(drop_long_prompts(rows, words, 10, longest + 10)) == 2
    assert drop_long_prompts(rows, words, 10, longest + 10, {"slow": True})["prompt"][:] == prompts[:1]


def test_prompts_are_counted_whatever_the_template_and_the_normalizer_make_of_the_content() -> None:
    doubled = tokenizer()
    doubled.chat_template = CHATML.replace("message['content']", "message['content'] * 9") + CHATML
    normalized = tokenizer()
    normalized.backend_tokenizer.normalizer = NFKC()
    # NFKC turns this one character into eighteen.
    for words, text in ((doubled, "A cat? " * 5), (normalized, "\ufdfa" * 8)):
        prompts = [[{"role": "user", "content": content}] for content in ("A cat?", text)]
        short, long = map(len, encode_prompts(words, prompts))
        assert short < long
        rows = Dataset.from_dict({"prompt": prompts})
        assert drop_long_prompts(rows, words, 10, long + 9)["prompt"][:] == prompts[:1]
        assert len(drop_long_prompts(rows, words, 10, long + 10)) == 2


@pytest.mark.parametrize("answers_only", [True, False])
def test_conversations_become_what_sft_trainer_makes_of_them(tmp_path: Path, answers_only: bool) -> None:
    raw = Dataset.from_dict({"messages": CONVERSATIONS})
    args = SFTConfig(
        str(tmp_path / "output"),
        use_cpu=True,
        bf16=False,
        max_length=96,
        packing=True,
        assistant_only_loss=answers_only,
        report_to="none",
    )
    model = save_model(tmp_path / "model")
    prepared = [
        SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer()).train_dataset
        for rows in (raw, add_tokens(raw, "conversation", tokenizer(), answers_only))
    ]
    assert prepared[0][:] == prepared[1][:]
    assert any(label == -100 for row in prepared[0]["labels"] for label in row) == answers_only


def test_pairs_become_what_reward_trainer_makes_of_them(tmp_path: Path) -> None:
    raw = Dataset.from_dict(PAIRS)
    args = RewardConfig(str(tmp_path / "output"), use_cpu=True, bf16=False, max_length=96, report_to="none")
    model = AutoModelForSequenceClassification.from_pretrained(save_model(tmp_path / "model"), num_labels=1)
    prepared = [
        RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer()).train_dataset
        for rows in (raw, add_tokens(raw, "preference", tokenizer()))
    ]
    for side in ("chosen_ids", "rejected_ids"):
        assert prepared[0][:][side] == prepared[1][:][side]


@pytest.mark.parametrize("streaming", [True, False])
def test_answers_are_found_under_a_template_that_does_not_mark_them(streaming: bool) -> None:
    words = tokenizer()
    words.chat_template = CHATML
    rows = Dataset.from_dict({"messages": CONVERSATIONS})
    prepared = add_tokens(rows.to_iterable_dataset() if streaming else rows, "conversation", words, True)
    for row, messages in zip(prepared, CONVERSATIONS, strict=True):
        assert words.decode(row["input_ids"]) == words.apply_chat_template(messages, tokenize=False)
        said = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert said == [label for label in row["labels"] if label != -100]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert words.decode(said) == "".join(answer + words.eos_token for answer in answers)


@pytest.mark.parametrize(
    "template",
    [
        # Answers have no end.
        "{% for message in messages %}{{ message['content'] }} {% endfor %}",
        # Later turns change how earlier ones are rendered.
        CHATML.replace("{% for", "{{ messages | length }}{% for"),
    ],
)
def test_a_template_under_which_no_answer_can_be_found_is_refused(template: str) -> None:
    words = tokenizer()
    words.chat_template = template
    with pytest.raises(UserError, match=r"assistant_only_loss.*\{% generation %\}"):
        add_tokens(Dataset.from_dict({"messages": CONVERSATIONS}), "conversation", words, True)


def test_a_template_that_marks_no_answer_is_refused() -> None:
    words = tokenizer()
    words.chat_template = CHATML + "{% generation %}{% endgeneration %}"
    with pytest.raises(UserError, match=r"assistant_only_loss.*does not mark any token"):
        add_tokens(Dataset.from_dict({"messages": CONVERSATIONS}), "conversation", words, True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_length": 8}, "3 of 5 conversations are longer than max_length 8 (up to 11 tokens) and lose their end"),
        ({"max_length": 8, "packing": True}, "lose their end"),
        ({"max_length": 8, "truncation_mode": "keep_end"}, "lose their beginning"),
        ({"max_length": 8, "packing": True, "packing_strategy": "wrapped"}, ""),
        ({"max_length": 11}, ""),
        ({"max_length": None}, ""),
    ],
)
def test_conversations_that_are_cut_off_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], said: str
) -> None:
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in (7, 8, 9, 10, 11)]})
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
    for split in (rows, rows.to_iterable_dataset(), rows.rename_column("input_ids", "messages")):
        log_truncated(split, args)
    assert said in caplog.text and len(caplog.records) == bool(said)
