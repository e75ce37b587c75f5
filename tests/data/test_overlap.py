"""Whether test data inside training data is found, and only that."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import __main__ as command
from pipeline.data.overlap import overlap, texts
from tests.helpers.files import write_rows
from tests.helpers.refusals import refused

FOX = "The quick brown fox jumps over the lazy dog and runs away."


def rows(*values: str, column: str = "text") -> list[dict[str, Any]]:
    return [{column: value} for value in values]


@pytest.mark.parametrize(
    ("train", "test", "share"),
    [
        (FOX, FOX, 1.0),
        (FOX, "He said: THE QUICK, brown fox; jumps over the lazy cat!", 1.0),
        (FOX, "The quick brown fox jumps over a lazy dog", 0.0),
        (FOX, "lazy dog", 1.0),
        (FOX, "lazy cat", 0.0),
        (FOX, "", 0.0),
        ("", FOX, 0.0),
        ("ﬁne ﬂowers", "fine flowers", 1.0),
    ],
)
def test_what_counts_as_overlap(train: str, test: str, share: float) -> None:
    assert overlap(rows(train), rows(test), 8).share == share


def test_the_share_and_the_matching_rows_are_reported() -> None:
    found = overlap(rows("nothing", FOX), rows("something else", FOX.upper(), FOX), 8)
    assert (found.share, found.test_rows, found.train_rows) == (2 / 3, 3, 2)
    assert [(match.test_row, match.train_row) for match in found.matches] == [(1, 1), (2, 1)]
    assert found.matches[0].shared == "the quick brown fox jumps over the lazy"
    assert overlap([], [], 8).share == 0.0


QUESTION = "How many legs do three spiders and two cats have together?"
SHAPES: list[dict[str, Any]] = [
    {"text": f"Somebody asked. {QUESTION} 32"},
    {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "32"}]},
    {"prompt": [{"role": "user", "content": QUESTION}], "answer": "32", "kind": "arithmetic"},
    {"prompt": QUESTION, "completion": "32"},
    {"question": QUESTION, "answer": "3 * 8 + 2 * 4 = 32 #### 32"},
    {
        "prompt": [{"role": "user", "content": QUESTION}],
        "chosen": [{"role": "assistant", "content": "32"}],
        "rejected": "7",
    },
    {"unknown": QUESTION, "number": 3},
]


@pytest.mark.parametrize("train", SHAPES)
@pytest.mark.parametrize("test", SHAPES)
def test_every_shape_of_row_is_read(train: dict[str, Any], test: dict[str, Any]) -> None:
    assert overlap([train], [test], 8).share == 1.0


def test_a_short_answer_alone_is_not_an_overlap() -> None:
    test = {"question": "Is it so?", "answer": "yes"}
    assert overlap(rows("yes", "no, yes"), [test], 8).share == 0.0
    assert overlap(rows("He asked: is it so?"), [test], 8).share == 1.0
    assert texts({"kind": "x", "answer": None, "question": "Why?"}) == ["Why?"]


sentences = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=12).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(train=st.lists(sentences, max_size=4), test=st.lists(sentences, max_size=4), n=st.integers(1, 6))
def test_agrees_with_the_definition(train: list[str], test: list[str], n: int) -> None:
    padded = [f" {text} " for text in train]

    def found(text: str) -> bool:
        tokens = text.split()
        size = min(n, len(tokens))
        grams = [" ".join(tokens[i : i + size]) for i in range(len(tokens) - size + 1)] if size else []
        return any(f" {gram} " in text for gram in grams for text in padded)

    result = overlap(rows(*train), rows(*test), n)
    assert [match.test_row for match in result.matches] == [i for i, text in enumerate(test) if found(text)]
    assert overlap(rows(*train), rows(*train), n).share == (sum(map(bool, train)) / len(train) if train else 0.0)


@settings(max_examples=100, deadline=None)
@given(train=st.lists(st.text(max_size=40), max_size=4), test=st.text(max_size=40), n=st.integers(1, 4))
def test_any_text_is_safe_and_more_training_data_never_hides_an_overlap(train: list[str], test: str, n: int) -> None:
    alone = overlap(rows(*train), rows(test), n).share
    assert overlap(rows(*train, "more"), rows(test), n).share >= alone
    with_itself = overlap(rows(*train, test), rows(test), n)
    assert with_itself.share in (0.0, 1.0) and with_itself.share >= alone


def test_the_command_prints_overlap_and_fails_above_the_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(FOX, "Another one"))
    questions = [{"question": FOX, "answer": "x"}, {"question": "Who else?", "answer": "y"}]
    test = write_rows(tmp_path / "test.jsonl", questions)
    clean = write_rows(tmp_path / "clean.jsonl", rows("Nothing in common"))
    assert command.main(["check-overlap", "--train", train, "--test", test]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 rows (50.00%)" in printed and "test row 0, training row 0: the quick brown fox" in printed
    assert command.main(["check-overlap", "--train", train, "--test", test, "--max_share", "0.5"]) == 0
    assert command.main(["check-overlap", "--train", train, "--test", test, "--max_share", "0.4"]) == 1
    assert command.main(["check-overlap", "--train", clean, "--test", test]) == 0
    assert command.main(["check-overlap", "--train", clean, train, "--test", clean, test]) == 1


def test_by_default_eight_words_in_a_row_are_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "one two three four five six seven eight nine ten"
    train = write_rows(tmp_path / "train.jsonl", rows(words))
    for number, code in ((7, 0), (8, 1)):
        shortened = " ".join(words.split()[:number])
        test = write_rows(tmp_path / f"{number}.jsonl", rows(f"{shortened} and other words"))
        assert command.main(["check-overlap", "--train", train, "--test", test]) == code
        assert "share 8 words in a row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "none.jsonl"], "none.jsonl"),
        (["--train", "{train}::validation"], "choose from: train"),
        (["--train", "{numbers}"], "do not contain text"),
        (["--train", "{train}", "--n", "0"], "n: 0"),
        (["--train", "{train}", "--max_share", "2"], "max_share: 2.0"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "train": write_rows(tmp_path / "train.jsonl", rows(FOX)),
        "numbers": write_rows(tmp_path / "numbers.jsonl", [{"x": 3}]),
    }
    words = [word.format(**names) for word in arguments]
    lines = refused(capsys, "check-overlap", "--test", names["train"], *words).splitlines()
    # Progress bars show how many examples are read in a second.
    messages = [line for line in lines if line and "examples/s]" not in line]
    assert len(messages) == 1 and message in messages[0]


def test_documents_of_text_files_and_the_examples_shown_can_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"the number {n} has its own line in this file of text" for n in ("one", "two", "six", "ten")]
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    argv = ["check-overlap", "--train", str(tmp_path / "train.txt"), "--test", str(tmp_path / "test.txt")]
    assert command.main([*argv, "--document", "lines:1", "--examples", "3"]) == 1
    printed = capsys.readouterr().out
    assert "4 of 4 rows" in printed and printed.count("training row") == 3 + 1
    assert command.main([*argv, "--document", "file"]) == 1
    assert "1 of 1 rows" in capsys.readouterr().out
