"""Every kind of source gives the columns that TRL expects; mistakes in data are in test_bad_input."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from pipeline.data import conversion, splits
from pipeline.data.arguments import DataArguments
from pipeline.data.splits import load_splits
from pipeline.errors import UserError
from pipeline.progress import VARIABLE
from tests.helpers.files import write_rows
from tests.helpers.small_model import conversation

ROWS = [{"text": f"Document {i}.", "kind": "fact"} for i in range(40)]
QUESTIONS = [{"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(40)]


def all_of(path: str, **columns: Any) -> DataArguments:
    """Arguments under which no row of a single split is held out."""
    return DataArguments(path, validation_share=0.0, **columns)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_files_of_every_kind_streamed_or_not(tmp_path: Path, kind: str, streaming: bool) -> None:
    args = DataArguments(write_rows(tmp_path / f"data.{kind}", ROWS), dataset_streaming=streaming)
    train, test = load_splits(args, "text", evaluation=True)
    assert test is not None
    assert train.column_names == test.column_names == ["text"]
    trained, held_out = ({row["text"] for row in split} for split in (train, test))
    assert held_out == {"Document 0.", "Document 20."}
    assert trained | held_out == {row["text"] for row in ROWS} and not trained & held_out


@pytest.mark.parametrize("streaming", [False, True])
def test_the_rows_that_are_held_out_do_not_depend_on_whether_training_evaluates(
    tmp_path: Path, streaming: bool
) -> None:
    args = DataArguments(write_rows(tmp_path / "data.jsonl", ROWS), dataset_streaming=streaming, validation_share=0.1)
    train, none = load_splits(args, "text", evaluation=False)
    trained, held_out = load_splits(args, "text", evaluation=True)
    assert none is None and held_out is not None
    assert [row["text"] for row in train] == [row["text"] for row in trained]
    assert {row["text"] for row in held_out} == {row["text"] for row in ROWS[::10]}
    one = DataArguments(write_rows(tmp_path / "one.jsonl", ROWS[:1]))
    assert len(list(load_splits(one, "text", evaluation=False)[0])) == 1, "too few to hold any out"


def hub_folder(folder: Path) -> Path:
    (folder / "a").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{split} {i}"} for i in range(3)]
        Dataset.from_list(rows).to_parquet(folder / "a" / f"{split}.parquet")
    files = "".join(f"  - split: {s}\n    path: a/{s}.parquet\n" for s in ("train", "validation", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files:\n{files}---\n")
    return folder


def test_a_folder_in_hub_layout_by_configuration_and_split(tmp_path: Path) -> None:
    args = DataArguments(str(hub_folder(tmp_path / "hub")), "a", dataset_test_split="test", max_train_samples=2)
    train, test = load_splits(args, "text", evaluation=True)
    assert test is not None
    assert [row["text"] for row in train] == ["train 0", "train 1"]
    assert [row["text"] for row in test] == ["test 0", "test 1", "test 2"]


def test_without_a_split_validation_training_is_evaluated_on_test(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = hub_folder(tmp_path / "hub")
    (folder / "README.md").unlink()
    (folder / "a" / "validation.parquet").unlink()
    with caplog.at_level(logging.INFO, logger="pipeline"):
        _, test = load_splits(DataArguments(str(folder / "a")), "text", evaluation=True)
    assert test is not None and [row["text"] for row in test] == ["test 0", "test 1", "test 2"]
    assert "With load_best_model_at_end, these rows also choose the model" in caplog.text


@pytest.mark.parametrize("test_split", ["test", "validation"])
def test_the_runner_is_told_if_training_is_evaluated_on_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, test_split: str
) -> None:
    """Then the checkpoint that is best there was chosen on the rows that measure it."""
    (tmp_path / "data").mkdir()
    for split in ("train", test_split):
        write_rows(tmp_path / "data" / f"{split}.jsonl", ROWS)
    reports = tmp_path / "reports"
    reports.touch()
    monkeypatch.setenv(VARIABLE, str(reports))
    monkeypatch.delenv("RANK", raising=False)
    load_splits(DataArguments(str(tmp_path / "data")), "text", evaluation=True)
    facts = [json.loads(line) for line in reports.read_text().splitlines()]
    assert ({"evaluated_on": "test"} in facts) == (test_split == "test")


def test_a_configuration_left_behind_by_a_replaced_data_set_does_no_harm(tmp_path: Path) -> None:
    train, _ = load_splits(
        all_of(write_rows(tmp_path / "data.jsonl", ROWS), dataset_config="pretrain"), "text", evaluation=False
    )
    assert len(train) == 40


@pytest.mark.parametrize("named", [True, False])
def test_questions_and_answers_become_conversations(tmp_path: Path, named: bool) -> None:
    columns = {"prompt_column": "question", "completion_column": "answer"} if named else {}
    args = all_of(write_rows(tmp_path / "data.jsonl", QUESTIONS), system_prompt="Add.", **columns)
    train, _ = load_splits(args, "conversation", evaluation=False)
    assert train.column_names == ["messages"]
    assert train[0]["messages"] == [
        {"role": "system", "content": "Add."},
        *conversation("0 + 1?", "0 + 1 = 1\n#### 1"),
    ]


@pytest.mark.parametrize(
    ("pattern", "answer"), [(None, "1"), (r"= (\d+)", "1"), (r"#### \d+", "#### 1"), (r"^\d", "0")]
)
def test_questions_become_prompts_with_the_final_answer(tmp_path: Path, pattern: str | None, answer: str) -> None:
    args = all_of(write_rows(tmp_path / "data.jsonl", QUESTIONS), answer_pattern=pattern)
    train, _ = load_splits(args, "prompt", evaluation=False)
    assert train[0]["prompt"] == [{"role": "user", "content": "0 + 1?"}]
    assert train[0]["answer"] == answer


def test_prompts_keep_the_columns_that_rewards_read(tmp_path: Path) -> None:
    rows = [{"prompt": conversation("Q", "A")[:1], "answer": 5, "kind": "sum", "require": [["a"], ["b"]]}] * 2
    train, _ = load_splits(all_of(write_rows(tmp_path / "data.parquet", rows)), "prompt", evaluation=False)
    assert train[0] == {**rows[0], "answer": "5"}


def test_columns_of_prompts_with_the_names_of_trainers_arguments_are_left_out(tmp_path: Path) -> None:
    row = {"prompt": "What?", "answer": "That.", "completions": "mine", "images": ["a.png"], "level": 1}
    path = write_rows(tmp_path / "a.jsonl", [row] * 4)
    train, _ = load_splits(all_of(path), "prompt", evaluation=False)
    assert set(train.column_names) == {"prompt", "answer", "level"}


@pytest.mark.parametrize("repeated", [{"prompt": "Q"}, {}])
def test_a_prompt_inside_the_answers_is_taken_out(tmp_path: Path, repeated: dict[str, str]) -> None:
    rows = [{"chosen": conversation("Q", "good"), "rejected": conversation("Q", "bad"), **repeated}]
    train, _ = load_splits(all_of(write_rows(tmp_path / "data.parquet", rows)), "preference", evaluation=False)
    assert train[0] == {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }


def test_the_prompt_of_whole_conversations_is_all_that_precedes_the_answers(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, *conversation("Q", "A"), {"role": "user", "content": "And?"}]
    answers = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    args = all_of(write_rows(tmp_path / "data.parquet", [{"prompt": "And?", **answers}]))
    assert load_splits(args, "preference", evaluation=False)[0][0] == {
        "prompt": turns,
        **{side: [{"role": "assistant", "content": side}] for side in answers},
    }
    assert load_splits(args, "prompt", evaluation=False)[0][0]["prompt"] == turns


def test_few_rows_of_the_hub_without_the_shape_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": conversation(f"Q {i}", f"A {i}")} for i in range(40)]
    rows[7]["messages"][1]["content"] = " "
    rows[9]["messages"][0]["content"] = "What is <end>?"
    monkeypatch.setattr(splits, "open_source", lambda *_: DatasetDict(train=Dataset.from_list(rows)))
    args = DataArguments(dataset_name="someone/chats", validation_share=0)
    train, _ = load_splits(args, "conversation", False, re.compile("<end>"))
    assert train["messages"] == [row["messages"] for i, row in enumerate(rows) if i not in (7, 9)]
    assert "2 of 40 rows are dropped; row 7, for instance: messages has an empty message" in caplog.text
    args.validation_share = 0.1
    train, held_out = load_splits(args, "conversation", True, re.compile("<end>"))
    assert held_out is not None and held_out["messages"] == [rows[i]["messages"] for i in (0, 10, 20, 30)]
    assert train["messages"] == [row["messages"] for i, row in enumerate(rows) if i % 10 and i not in (7, 9)]
    args.validation_share = 0
    for row in rows[10:15]:
        row["messages"][1]["content"] = "<end>"
    with pytest.raises(UserError, match="row 7: messages has an empty message of the assistant; correct or remove"):
        load_splits(args, "conversation", False, re.compile("<end>"))


def test_few_documents_of_a_stream_of_the_hub_that_are_not_text_are_empty(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts: list[str | None] = [f"text {i}" for i in range(60)]
    texts[30] = texts[45] = None
    texts += [None] * 100
    stream = Dataset.from_dict({"text": texts, "nothing": [None] * 160}).to_iterable_dataset(2)
    monkeypatch.setattr(splits, "open_source", lambda *_: IterableDatasetDict(train=stream))
    args = DataArguments(dataset_name="someone/texts", dataset_streaming=True, validation_share=0.1)
    train, held_out = load_splits(args, "text", True)
    # The stream has two shards, and rows are held out of the first one.
    first = range(0, len(texts) // 2, 10)
    assert held_out is not None and [row["text"] for row in held_out] == [texts[i] or "" for i in first]
    assert [row["text"] for row in train] == [text or "" for i, text in enumerate(texts) if i not in first]
    assert caplog.text.count("some documents are not text, and are read as empty ones") == 1
    args.text_column = "nothing"
    with pytest.raises(UserError, match="the text is None; correct or remove that row"):
        list(load_splits(args, "text", False)[0])
    # Without streaming, the rows are counted first, and so many are not dropped.
    monkeypatch.setattr(splits, "open_source", lambda *_: DatasetDict(train=Dataset.from_dict({"text": texts})))
    with pytest.raises(UserError, match="the text is None; correct or remove that row"):
        load_splits(DataArguments(dataset_name="someone/texts"), "text", False)


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_without_information_are_left_out_with_a_warning(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [{"prompt": "What?", "chosen": f"That {i}.", "rejected": "No.", "margin": i / 2} for i in range(6)]
    pairs[1]["rejected"], pairs[4]["chosen"] = "That 1. ", " "
    args = all_of(write_rows(tmp_path / "data.jsonl", pairs), dataset_streaming=streaming)
    train, _ = load_splits(args, "preference", evaluation=False)
    # TRL's loss subtracts the margins.
    assert sorted(row["margin"] for row in train) == [0.0, 1.0, 1.5, 2.5]
    if not streaming:
        assert "2 of 6 pairs are dropped" in caplog.text


def test_a_stream_is_shuffled_by_the_seed_and_anew_each_epoch(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "answer": f"{i}"} for i in range(20)]
    args = all_of(write_rows(tmp_path / "data.jsonl", rows), dataset_streaming=True)
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        train, _ = load_splits(args, "prompt", evaluation=False, seed=seed)
        train.set_epoch(epoch)
        orders.append([row["answer"] for row in train])
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_special_token_in_a_message_is_refused_by_its_row(tmp_path: Path, streaming: bool) -> None:
    rows = [{"messages": conversation("Q", "A" if i != 7 else "A<end>")} for i in range(9)]
    args = all_of(write_rows(tmp_path / "data.jsonl", rows), dataset_streaming=streaming)
    for tokens in (None, re.compile("<start>")):
        assert len(list(load_splits(args, "conversation", False, tokens)[0])) == 9
    with pytest.raises(UserError, match="row 7: messages contains <end>"):
        list(load_splits(args, "conversation", False, re.compile("<start>|<end>"))[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_several_data_sets_are_joined_split_by_split(tmp_path: Path, streaming: bool) -> None:
    for name, rows in (("one", 5), ("two", 3)):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            pairs = [{"prompt": f"{name} {i}", "chosen": "yes", "rejected": "no", name: i} for i in range(rows)]
            write_rows(tmp_path / name / f"{split}.jsonl", pairs)
    names = [str(tmp_path / "one"), str(tmp_path / "two")]
    args = DataArguments(dataset_name=names, dataset_streaming=streaming)
    train, validation = load_splits(args, "preference", evaluation=True)
    assert validation is not None
    for split in (train, validation):
        questions = [row["prompt"][0]["content"] for row in split]
        assert sorted(questions) == [*(f"one {i}" for i in range(5)), *(f"two {i}" for i in range(3))]
    few, _ = load_splits(DataArguments(dataset_name=names, max_train_samples=6), "preference", evaluation=False)
    assert [row["prompt"][0]["content"] for row in few] == [*(f"one {i}" for i in range(5)), "two 0"]


def test_a_list_of_one_data_set_is_that_data_set(tmp_path: Path) -> None:
    assert DataArguments(dataset_name=["only"]).dataset_name == "only"
    with pytest.raises(UserError, match="nothing"):
        load_splits(DataArguments(dataset_name=[]), "text", evaluation=False)


def test_a_column_that_only_some_data_sets_have_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = {"prompt": "1?", "chosen": "yes", "rejected": "no"}
    names = []
    for name, extra in {"with": {"margin": 1.0, "answer": "1"}, "without": {}}.items():
        (tmp_path / name).mkdir()
        names.append(write_rows(tmp_path / name / "data.jsonl", [{**pair, **extra}] * 30))
    args = DataArguments(dataset_name=names)
    with pytest.raises(UserError, match=r"without/data.jsonl: has no column margin, unlike other data sets"):
        load_splits(args, "preference", evaluation=False)
    load_splits(args, "prompt", evaluation=False)
    assert f"{names[1]}: has no answers for rewards, unlike other data sets of this stage" in caplog.text


def test_a_value_of_keep_rows_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{**row, "source": "a"} for row in QUESTIONS])
    for kind in ("conversation", "prompt"):
        with pytest.raises(UserError, match=r"keep_rows: source=b: no row of .*data.jsonl, split train, has these"):
            load_splits(DataArguments(path, keep_rows=["source=b"]), kind, evaluation=True)


def test_dates_in_json_are_refused_and_kept_as_text_in_a_table(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": f"2024-01-{i + 10}"} for i in range(9)]
    for kind in ("prompt", "conversation"):
        with pytest.raises(UserError, match="2024-01-10 00:00:00 was read as a date, like its whole column; save"):
            load_splits(all_of(write_rows(tmp_path / "data.jsonl", rows)), kind, evaluation=False)
    train, _ = load_splits(all_of(write_rows(tmp_path / "data.csv", rows)), "prompt", evaluation=False)
    assert train["answer"] == [row["answer"] for row in rows]


def test_numbers_with_leading_zeros_stay_text_in_any_column_of_a_table(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "code": text, "n": i} for i, text in enumerate(["110", "0110", "20"])]
    path = write_rows(tmp_path / "data.csv", rows)
    train, _ = load_splits(all_of(path, answer_column="code"), "prompt", evaluation=False)
    assert train["answer"] == ["110", "0110", "20"] and train["n"] == [0, 1, 2]


def test_a_trial_run_checks_the_rows_that_it_does_not_train_on(tmp_path: Path) -> None:
    for split, rows in (("train", [*QUESTIONS[:30], {"question": "31?", "answer": None}]), ("test", QUESTIONS[:5])):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(UserError, match="split train, row 30: answer is"):
        load_splits(DataArguments(str(tmp_path), max_train_samples=4), "conversation", evaluation=True)


def test_rows_are_converted_once_for_the_same_arguments_and_again_for_others_or_another_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": conversation("Hi.", "Hello.")}] * 3)
    first, again = (load_splits(all_of(path), "conversation", evaluation=False)[0] for _ in range(2))
    assert first.cache_files == again.cache_files
    other = load_splits(all_of(path, system_prompt="Be brief."), "conversation", evaluation=False)[0]
    assert [message["content"] for message in other[0]["messages"]] == ["Be brief.", "Hi.", "Hello."]
    assert [message["content"] for message in again[0]["messages"]] == ["Hi.", "Hello."]
    (tmp_path / "code").mkdir()
    monkeypatch.setattr(conversion, "__file__", str(tmp_path / "code" / "conversion.py"))
    changed = []
    for line in ("one = 1\n", "one = 2\n"):
        (tmp_path / "code" / "messages.py").write_text(line)
        changed.append(load_splits(all_of(path), "conversation", evaluation=False)[0].cache_files)
    assert changed[0] != changed[1] and first.cache_files not in changed


def test_a_row_is_named_by_its_number_in_the_file_although_others_are_not_kept(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": None if i == 8 else "yes", "source": "ab"[i % 2]} for i in range(20)]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", rows if split == "train" else rows[:5])
    args = DataArguments(str(tmp_path), keep_rows=["source=a"])
    with pytest.raises(UserError, match="split train, row 8: answer is"):
        load_splits(args, "conversation", evaluation=True)


@pytest.mark.parametrize("kind", ["preference", "unpaired", "prompt"])
def test_pairs_without_rows_are_refused(tmp_path: Path, kind: Any) -> None:
    pairs = [{"prompt": "What?", "chosen": "That.", "rejected": "No."}]
    Dataset.from_list(pairs).take(0).to_parquet(tmp_path / "pairs.parquet")
    args = DataArguments(str(tmp_path / "pairs.parquet"), dataset_streaming=True)
    with pytest.raises(UserError, match=r"pairs.parquet, split train: is empty; choose one that has rows"):
        load_splits(args, kind, evaluation=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_evaluation_split_is_read_as_the_training_split(tmp_path: Path, streaming: bool) -> None:
    """What the columns are is decided once, although the other split spells them in another way and has more."""
    write_rows(tmp_path / "train.jsonl", QUESTIONS[:20])
    rows = [{"Answer": row["answer"], " QUESTION": row["question"], "messages": "no"} for row in QUESTIONS[20:25]]
    write_rows(tmp_path / "test.jsonl", rows)
    args = DataArguments(str(tmp_path), dataset_streaming=streaming)
    train, test = load_splits(args, "conversation", evaluation=True)
    assert test is not None and train.column_names == test.column_names == ["messages"]
    assert [row["messages"][0]["content"] for row in test] == [f"{i} + 1?" for i in range(20, 25)]


@pytest.mark.parametrize("lacks", ["train", "test"])
def test_margins_are_optional_in_either_split(tmp_path: Path, lacks: str) -> None:
    for split in ("train", "test"):
        pair = {"prompt": "What?", "chosen": "That.", "rejected": "No."}
        write_rows(tmp_path / f"{split}.jsonl", [pair if split == lacks else {**pair, "margin": 0.5}] * 3)
    train, test = load_splits(DataArguments(str(tmp_path)), "preference", evaluation=True)
    assert test is not None
    columns = ["prompt", "chosen", "rejected"]
    assert train.column_names == (columns if lacks == "train" else [*columns, "margin"])
    # Without margins in training, those of the evaluation would give its loss another meaning.
    assert test.column_names == columns


@pytest.mark.parametrize("streaming", [False, True])
def test_the_evaluation_split_may_have_prompts_without_answers_if_they_have_a_column(
    tmp_path: Path, streaming: bool
) -> None:
    pairs = [{"prompt": f"What is {i}?", "chosen": "That.", "rejected": "No."} for i in range(6)]
    write_rows(tmp_path / "train.jsonl", pairs)
    write_rows(tmp_path / "test.jsonl", [{"prompt": row["prompt"]} for row in pairs[:2]])
    args = DataArguments(str(tmp_path), dataset_streaming=streaming)
    _, test = load_splits(args, "prompt", evaluation=True)
    assert test is not None
    assert [row["prompt"][0]["content"] for row in test] == ["What is 0?", "What is 1?"]
    whole = [{side: conversation(row["prompt"], row[side]) for side in ("chosen", "rejected")} for row in pairs]
    write_rows(tmp_path / "train.jsonl", whole)
    with pytest.raises(UserError, match="dataset_test_split: test: has no column chosen, rejected, unlike train"):
        load_splits(args, "prompt", evaluation=True)
