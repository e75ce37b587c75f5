"""Folders and files as people bring them: each is read as it is meant, or refused with what to do."""

import csv
import gzip
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from pipeline.data import documents
from pipeline.data.arguments import DataArguments
from pipeline.data.columns import Kind
from pipeline.data.documents import LONGEST
from pipeline.data.overlap import overlap, words
from pipeline.data.sources import open_source
from pipeline.data.splits import load_splits
from pipeline.errors import UserError
from tests.helpers.files import write_rows
from tests.helpers.small_model import ROOT, conversation

POEM = "Title\n\n" + "A line of verse.\nAnd another.\n\n" * 10
ASKED = conversation("Why?", "Because.")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def lay(folder: Path, **files: str | bytes) -> str:
    """Write files, whose names have `__` for a dot and `_in_` for a folder, and return the path of the folder."""
    for name, content in files.items():
        path = folder / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def read(path: str, kind: Kind = "text", streaming: bool = False, **options: Any) -> list[dict[str, Any]]:
    args = DataArguments(path, dataset_streaming=streaming, validation_share=0.0, **options)
    return list(load_splits(args, kind, evaluation=False)[0])


def texts(path: str, **options: Any) -> list[str]:
    """Return the documents, which are the same in memory, in a stream, and in what looks for overlaps."""
    found = [row["text"] for row in read(path, **options)]
    assert [row["text"] for row in read(path, streaming=True, **options)] == found
    assert open_source(path, document=options.get("document"))["train"]["text"][:] == found
    return found


def test_a_document_is_a_file_in_any_folder_and_other_files_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = lay(
        tmp_path / "poems", a__txt=POEM, B__TXT="\ufeff" + POEM, c__md=POEM.encode("utf-16"), in_in_d__txt=POEM,
        e__txt__gz=gzip.compress(POEM.encode()), README__md="# Poems", LICENSE="MIT", __hidden__txt="no", f__png=b"P",
        g__txt="", h__jsonl='{"text": "from JSON", "url": "u"}\n', **{"std::vector__txt": POEM},
    )  # fmt: skip
    os.symlink(tmp_path / "poems" / "in", tmp_path / "poems" / "linked")
    os.symlink(tmp_path / "poems", tmp_path / "poems" / "in" / "loop")
    caplog.set_level("INFO", "pipeline")
    assert sorted(texts(folder)) == sorted([POEM] * 6 + ["from JSON"])
    assert "not read, because they are not data, or empty: LICENSE, README.md, f.png, g.txt" in caplog.text
    assert "split train: read 7 files, 7 rows" in caplog.text and "7 files, a stream" in caplog.text
    assert "only `text` is read" in caplog.text


def test_a_file_of_white_space_in_a_folder_is_named_as_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blank = {"b__txt": " \n" * 99, "c__md": "\u200b\n", "d__txt__gz": gzip.compress(b"\n")}
    folder = lay(tmp_path / "poems", a__txt=POEM, e__txt=POEM, **blank)
    caplog.set_level("INFO", "pipeline")
    assert texts(folder) == [POEM] * 2
    assert "not read, because they are not data, or empty: b.txt, c.md, d.txt.gz" in caplog.text


def test_long_files_and_single_ones_are_cut_at_blank_lines_or_line_ends(tmp_path: Path) -> None:
    verse, prose, line = POEM * 30, "A line of prose.\n" * 900, "word " * 3000 + "文" * 9000
    folder = lay(tmp_path / "several", a__txt=verse, b__txt=prose, c__txt=line, d__txt=POEM)
    documents = texts(folder)
    assert "".join(documents) == verse + prose + line + POEM and documents[-1] == POEM
    assert max(map(len, documents)) <= LONGEST and min(map(len, documents[:2])) > LONGEST / 2
    assert all(document.endswith("\n\n") for document in documents[:2])
    # A single file is cut into some dozens, so that a part of it can be held out.
    for single in (verse, prose, POEM * 3):
        documents = texts(lay(tmp_path / "one", a__txt=single))
        assert "".join(documents) == single and (len(documents) >= 30 or len(single) < 2000) and len(documents) > 3
        assert all(document.endswith("\n") for document in documents)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("file", ["a\nb\n\n\nc", "d\n"]),
        ("blank_line", ["a\nb\n\n\n", "c", "d\n"]),
        ("lines:1", ["a\n", "b\n", "c", "d\n"]),
        ("lines:3", ["a\nb\n\n", "\nc", "d\n"]),
    ],
)
def test_what_a_document_is_can_be_chosen(tmp_path: Path, rule: str, expected: list[str]) -> None:
    assert texts(lay(tmp_path, a__txt="a\nb\n\n\nc", b__txt="d\n"), document=rule) == expected


def test_files_belong_to_splits_by_their_names_and_none_is_dropped(tmp_path: Path) -> None:
    line = json.dumps({"text": "a"}) + "\n"
    by_folder = open_source(lay(tmp_path / "a", train_in_x__jsonl=line, Test_in_x__jsonl=line * 2))
    assert {name: len(rows) for name, rows in by_folder.items()} == {"train": 1, "test": 2}
    by_name = open_source(lay(tmp_path / "b", mine__jsonl=line, eval__jsonl=line * 2, contest__jsonl=line * 3))
    assert {name: len(rows) for name, rows in by_name.items()} == {"train": 4, "test": 2}
    with pytest.raises(UserError, match=r"c/more.jsonl: does not name a split, as .*c/train.jsonl does"):
        open_source(lay(tmp_path / "c", train__jsonl=line, more__jsonl=line))


def table(separator: str, *rows: list[str]) -> str:
    content = io.StringIO(newline="")
    csv.writer(content, delimiter=separator).writerows(rows)
    return content.getvalue()


def test_tables_are_read_whatever_separates_their_fields(tmp_path: Path) -> None:
    rows = [[" Question ", "ANSWER"], ['Say "hi", or; a|b\nnow?', "007"], ["Why?", "NA"]]
    expected = [conversation(*row) for row in rows[1:]]
    for number, (suffix, content) in enumerate(
        {
            ".csv": table(",", *rows),
            ".CSV": "\ufeff" + table(";", *rows),
            "2.csv": table(";", *([*row, "n"] for row in rows)).replace("n\r", '"a, b, c, d"\r'),
            "3.csv": table("|", *rows),
            "6.csv": "sep=;\r\n" + table(";", *rows),
            ".tsv": table("\t", *rows).encode("utf-16"),
            "4.csv": table("\t", *rows).encode("utf-16"),
            "5.csv": table("\t", *rows),
        }.items()
    ):
        file = tmp_path / str(number) / f"a{suffix}"
        file.parent.mkdir()
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        found = read(str(file), "conversation", streaming=number % 2 == 0)
        assert sorted((row["messages"] for row in found), key=str) == sorted(expected, key=str), suffix


@pytest.mark.parametrize("name", ["What is it?\n(one or two\nsentences)", "What is it? (one or two sentences)"])
def test_the_heading_of_a_form_may_have_line_breaks(tmp_path: Path, name: str) -> None:
    rows = [["Time", "Who, or what?", "What is it?\n(one or two\nsentences)"], ["1", "A fox", "An animal.\nIt runs."]]
    for separator in ",;\t":
        file = tmp_path / f"{ord(separator)}.csv"
        file.write_text(table(separator, *rows), newline="")
        for streaming in (False, True):
            columns = {"prompt_column": "Who, or what?", "completion_column": name}
            (found,) = read(str(file), "conversation", streaming, **columns)
            assert found["messages"] == conversation("A fox", "An animal.\nIt runs.")
        with pytest.raises(UserError, match=r"choose from: Time, Who, or what\?, 'What is it\?\\n"):
            read(str(file), "text")


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_in_columns_of_other_names(tmp_path: Path, streaming: bool) -> None:
    row = {"query": "Why?", "positive": "Because.", "negative": "No."}
    path = write_rows(tmp_path / "a.jsonl", [row] * 2)
    columns = {"chosen_column": "Positive", "rejected_column": "negative"}
    for kind in ("preference", "unpaired"):
        assert read(path, kind, streaming, **columns)[0] == PAIR
    assert read(path, "prompt", streaming, **columns)[0]["prompt"] == PAIR["prompt"]
    whole = {"good": [HUMAN, GPT], "bad": [HUMAN, BAD]}
    path = write_rows(tmp_path / "b.jsonl", [whole] * 2)
    for kind in ("preference", "prompt"):
        found = read(path, kind, streaming, chosen_column="good", rejected_column="bad")
        assert found[0]["prompt"] == PAIR["prompt"]


def test_front_matter_is_not_read_and_other_lines_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")
    notes = {
        "a__md": "---\ntitle: Whales\ntags: [sea, big]\n---\nThey sing.",
        "b__md__gz": gzip.compress(b"\xef\xbb\xbf---\r\n# mine\r\ntitle: Foxes\r\n...\r\nThey bark."),
        "c__md": "---\n---\nEmpty.",
        "d__md": "---\nA rule, and then: text.\n---\nMore.",
        "e__md": "Text.\n---\ntitle: No\n---\n",
        "f__md": "---\ntitle: without an end\n",
        "g__txt": "---\ntitle: Text\n---\nIn a text file.",
        "sub_in_README__md": "# A note",
    }
    found = texts(lay(tmp_path / "notes", **notes))
    assert found[:3] == ["They sing.", "They bark.", "Empty."]
    assert found[3:] == [notes[f"{name}"] for name in ("d__md", "e__md", "f__md", "g__txt")]
    assert "3 files begin with front matter" in caplog.text
    assert "sub/README.md: not read, because of its name; if it is a document, rename it" in caplog.text
    assert texts(lay(tmp_path / "one", a__md=notes["a__md"]) + "/a.md") == ["They sing."]


def test_conversations_are_converted_as_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "speaker" in code]
    turns = [{"speaker": "customer", "utterance": "Why?"}, {"speaker": "agent", "utterance": "Because."}]
    (tmp_path / "chats.json").write_text(json.dumps([{"turns": [*turns, turns[0]]}, {"turns": turns}, {"turns": []}]))
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102
    assert [row["messages"] for row in read("chats.jsonl", "conversation")] == [ASKED] * 2
    (rows,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    kinds: list[Kind] = ["conversation", "conversation", "preference"]
    for line, kind in zip(rows.splitlines(), kinds, strict=True):
        (tmp_path / "row.jsonl").write_text(line + "\n")
        assert len(read("row.jsonl", kind)) == 1


def test_quotes_that_do_not_surround_a_field_are_a_part_of_it_between_tabs(tmp_path: Path) -> None:
    lines = ['"Hurry!\tVite!', '"Who?" he said.\t"Qui?"', "Go.\tVa."]
    path = lay(tmp_path, a__tsv="\n".join(["question\tanswer", *lines])) + "/a.tsv"
    assert [row["messages"] for row in read(path, "conversation")] == [
        conversation(*line.split("\t")) for line in lines
    ]


def test_what_datasets_keeps_beside_the_data_is_not_read(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    Dataset.from_list([{"text": f"document {i}"} for i in range(3)]).save_to_disk(folder)
    load_from_disk(folder).map(lambda row: {"text": row["text"].upper()})
    assert list(tmp_path.glob("saved/cache-*.arrow"))
    assert [row["text"] for row in read(folder)] == ["document 0", "document 1", "document 2"]


def test_a_linked_folder_is_read_once(tmp_path: Path) -> None:
    elsewhere = lay(tmp_path / "disk", a__txt="a", in_b__txt="b")
    folder = Path(lay(tmp_path / "data", c__txt="c"))
    os.symlink(elsewhere, folder / "linked")
    os.symlink(folder, folder / "loop")
    assert sorted(texts(str(folder))) == ["a", "b", "c"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_whose_types_differ_are_joined(tmp_path: Path, kind: str, streaming: bool) -> None:
    """A column may be without values in the first file, have numbers in one and texts in another, or more keys."""
    more = {"content": "Why?", "role": "user", "name": "Ann"}
    rows = [
        {"prompt": ASKED[:1], "answer": 1, "level": None, "tags": []},
        {"prompt": [more], "answer": "1/2", "level": "hard", "tags": ["a"]},
        {"prompt": ASKED[:1], "answer": 0.5, "level": "easy", "tags": []},
    ]
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.{kind}"
        if kind == "jsonl":
            write_rows(path, [row] * 2)
        else:
            Dataset.from_list([row] * 2).to_parquet(path)
    found = sorted(read(str(tmp_path), "prompt", streaming), key=str)
    expected = [{**row, "prompt": ASKED[:1], "answer": str(row["answer"])} for row in rows for _ in range(2)]
    assert found == sorted(expected, key=lambda row: str({name: row[name] for name in found[0]}))


def test_leading_zeros_are_found_in_a_large_table_whose_sample_ends_within_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'question,code\n"Why?",007\n"Who are\nyou?",08\n'
    monkeypatch.setattr(documents, "SAMPLE_CHARACTERS", text.index("you?"))
    rows = open_source(lay(tmp_path, a__csv=text))["train"]
    assert rows["code"][:] == ["007", "08"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_may_lack_the_values_of_a_column_or_have_text_in_it(tmp_path: Path, streaming: bool) -> None:
    header = "question,answer,level,id\n"
    for number, row in enumerate(("NA,007,,1", "Why?,08,hard,x1", "Who?,,,2")):
        (tmp_path / f"{number}.csv").write_text(f"{header}{row}\n")
    rows = list(open_source(str(tmp_path), streaming=streaming)["train"])
    assert [(row["question"], row["answer"]) for row in rows] == [("NA", "007"), ("Why?", "08"), ("Who?", None)]
    assert [(row["level"], row["id"]) for row in rows] == [(None, "1"), ("hard", "x1"), (None, "2")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("first", ["plain", "with calls"])
def test_conversations_with_and_without_calls_are_joined(tmp_path: Path, streaming: bool, first: str) -> None:
    called = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    calls = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [called]}]
    calls += [{"role": "tool", "content": "1"}, ASKED[1]]
    rows = [{"messages": ASKED}, {"messages": calls}]
    for number, row in enumerate(rows if first == "plain" else rows[::-1]):
        write_rows(tmp_path / f"{number}.jsonl", [row])
    found = read(str(tmp_path), "conversation", streaming)
    found = sorted((row["messages"] for row in found), key=len)
    assert found[0] == ASKED and found[1][1]["tool_calls"] == [called] and found[1][2:] == calls[2:]


@pytest.mark.parametrize("streaming", [False, True])
def test_types_that_do_not_fit_are_refused_with_both_files(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "alike").mkdir()
    for number, tags in enumerate(("a b", ["a", "b"])):
        Dataset.from_list([{"text": "a", "tags": tags}]).to_parquet(tmp_path / "alike" / f"{number}.parquet")
    write_rows(Path(lay(tmp_path / "mixed", a__csv="text,tags\na,b\n"), "b.jsonl"), [{"text": "a", "tags": ["b"]}])
    for folder, one, other in (("alike", "0.parquet", "1.parquet"), ("mixed", "a.csv", "b.jsonl")):
        with pytest.raises(UserError, match=f"{one}: its column tags has a different type in .*{other}; give"):
            open_source(str(tmp_path / folder), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_without_rows_are_passed_over(tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")
    Dataset.from_dict({"text": ["a"]}).take(0).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict({"text": ["b"]}).to_parquet(tmp_path / "b.parquet")
    folder = lay(tmp_path, c__csv="", d__csv="text\nd\n", e__csv="other\n\n", f__tsv="a\tb".encode("utf-16"))
    assert sorted(row["text"] for row in read(folder, streaming=streaming)) == ["b", "d"]
    assert "not read, because they are not data, or empty: c.csv, e.csv, f.tsv" in caplog.text
    with pytest.raises(UserError, match=r"a.parquet(, split train: is empty|: .* corresponds to no data)"):
        read(f"{folder}/a.parquet", streaming=streaming)


def test_a_split_that_lacks_the_answers_is_named(tmp_path: Path) -> None:
    folder = lay(tmp_path, train__csv="question,answer\nWhy?,Because.\n", test__csv="question\nWho?\n")
    for kind in ("conversation", "prompt"):
        with pytest.raises(
            UserError, match=r"dataset_test_split: test: has no column answer, unlike train; add it, or"
        ):
            load_splits(DataArguments(folder), kind, evaluation=True)


HUMAN, GPT = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}
BAD = {"from": "gpt", "value": "No."}
PAIR = {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": [{"role": "assistant", "content": "No."}]}


@pytest.mark.parametrize(
    ("kind", "row", "expected", "named"),
    [
        ("conversation", {"conversations": [HUMAN, GPT], "id": "1"}, {"messages": ASKED}, "'id' are not used"),
        ("conversation", {"messages": ASKED, "tools": None}, {"messages": ASKED}, ""),
        (
            "conversation",
            {"messages": [{**ASKED[0], "name": "Ann"}, {**ASKED[1], "weight": 0}]},
            {"messages": ASKED},
            "the columns 'messages.name', 'messages.weight' are not used",
        ),
        ("conversation", {"instruction": "Why?", "input": "", "output": "Because."}, {"messages": ASKED}, ""),
        (
            "conversation",
            {"instruction": "Sum.", "context": "1 2", "response": "3", "category": "qa"},
            {"messages": conversation("Sum.\n\n1 2", "3")},
            "the columns 'category' are not used",
        ),
        ("conversation", {"Q": "Why?", " A ": "Because."}, {"messages": ASKED}, ""),
        ("preference", {"conversations": [HUMAN], "chosen": GPT, "rejected": BAD}, PAIR, ""),
        ("preference", {"chosen": [HUMAN, GPT], "rejected": [HUMAN, BAD]}, PAIR, ""),
        ("preference", {"instruction": "Why?", "Chosen": "Because.", "Rejected": "No."}, PAIR, ""),
        (
            "preference",
            {"Prompt": "Why?", "Chosen": "Because.", "Rejected": "No.", "Margin": 2},
            {**PAIR, "margin": 2.0},
            "",
        ),
        (
            "conversation",
            {"messages": ASKED, "Tools": [{"name": "look"}]},
            {"messages": ASKED, "tools": '[{"type": "function", "function": {"name": "look"}}]'},
            "",
        ),
        ("prompt", {"Question": "Why?", "Answer": "x"}, {"prompt": ASKED[:1], "answer": "x"}, ""),
        (
            "prompt",
            {"instruction": "Sum.", "input": "1 2", "output": "3"},
            {"prompt": conversation("Sum.\n\n1 2", "")[:1]},
            "'output' are passed to rewards",
        ),
    ],
)
def test_shapes_of_rows_are_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Kind, row: dict[str, Any], expected: Any, named: str
) -> None:
    caplog.set_level("INFO", "pipeline")
    path = write_rows(tmp_path / "a.jsonl", [row] * 2)
    for streaming in (False, True):
        found = read(path, kind, streaming)
        assert len(found) == 2 and {name: found[0][name] for name in expected} == expected
    assert named in caplog.text and bool(named) == ("the columns" in caplog.text.replace("made of the columns", ""))
    # The prompt is found where training data are compared with test data as well.
    asked = "Sum 1 2" if "Sum." in row.values() else "Why"
    if kind != "preference":
        assert overlap([row], [{"text": asked}], 8).share == 1


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "conversation",
            {"instruction": "Sort.", "input": [3, 1], "output": "1"},
            r"input, .* prompt, is \[3, 1\], not",
        ),
        ("conversation", {"question": "Why?", "answer": float("nan")}, "answer is empty"),
        ("conversation", {"question": "Why?", "answer": 2**70}, r"1.18\d*e\+21 is not exact; write it as text"),
        ("prompt", {"question": "Why?", "answer": 2.0**53}, "9007199254740992.0 is not exact; write it as text"),
        (
            "conversation",
            {"messages": [ASKED[0], {**ASKED[1], "tool_calls": [{"id": "1"}]}]},
            "has the call {'id': '1'}, not",
        ),
        (
            "conversation",
            {"messages": [{**HUMAN, "from": ["human"]}, GPT]},
            r"contains {'from': \['human'\], .*}, not {role, content}",
        ),
        ("prompt", {"question": "Who?", "answer": ["I", "me"]}, r"answer is \['I', 'me'\], not one answer"),
        ("prompt", {"question": "Who?", "answer": {"value": "I"}}, r"answer is {'value': 'I'}, not one answer"),
        ("unpaired", {"prompt": "Who?", "completion": ["I"], "label": True}, r"completion is \['I'\], not one answer"),
    ],
)
def test_rows_of_other_shapes_are_refused(tmp_path: Path, kind: Kind, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"row 0: .*{message}"):
        read(write_rows(tmp_path / "a.jsonl", [row] * 2), kind)


def test_numbers_are_a_part_of_the_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": "Double.", "input": number, "output": "?"} for number in (2, 0.5, float("nan"))]
    found = [row["prompt"][0]["content"] for row in read(write_rows(tmp_path / "a.jsonl", rows), "prompt")]
    assert found == ["Double.\n\n2", "Double.\n\n0.5", "Double."]


def test_the_context_belongs_to_a_prompt_that_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"task": "Sum.", "input": "1 2", "result": "3"}])
    columns = {"prompt_column": "task", "completion_column": "result"}
    assert read(path, "conversation", **columns)[0]["messages"] == conversation("Sum.\n\n1 2", "3")


def test_empty_rows_are_counted_and_dropped_if_that_is_asked_for(tmp_path: Path) -> None:
    rows = [{"question": f"Why {i}?", "answer": None if i % 5 == 3 else "Because."} for i in range(40)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    numbers = r"and 7 more of 40 \(8, 13, 18, 23, ...\); rows count"
    with pytest.raises(UserError, match=rf"row 3: answer is empty; .* {numbers}"):
        read(path, "conversation")
    kept = [row["messages"][0]["content"] for row in read(path, "conversation", drop_bad_rows=True)]
    assert kept == [f"Why {i}?" for i in range(40) if i % 5 != 3]
    args = DataArguments(path, drop_bad_rows=True, validation_share=0.1)
    train, held_out = load_splits(args, "conversation", evaluation=True)
    assert held_out is not None and len(held_out) == 4 and len(train) == 28
    with pytest.raises(UserError, match=r"drop_bad_rows: True: rows of a stream cannot be dropped"):
        read(path, "conversation", streaming=True, drop_bad_rows=True)
    with pytest.raises(UserError, match=r"row 1: answer is empty"):
        read(lay(tmp_path / "csv", a__csv="question,answer\nWhy?,None\nWhy?,NULL\n"), "conversation")


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        ({"a__txt": "Café".encode("cp1252") * 9}, "text", r"a.txt: cannot be read .*iconv -f WINDOWS-1252"),
        (
            {"a__txt": '\n{"text": "a"}\n', "b__txt": "b"},
            "text",
            r"a.txt: contains rows in JSON, .*rename it to .jsonl$",
        ),
        ({"a__txt": "a", "b__md": '[\n {"text": "' + "a" * 9999}, "text", r"b.md: contains rows .*rename it to .json$"),
        ({"a__jsonl": '["a"]\n' * 2}, "text", r"a.jsonl, line 1: .*it must be an object, not \['a'\]"),
        ({"a__txt": "a\tb\r\n".encode("utf-16")}, "text", r"a.txt: .*not plain text; rename it to .tsv"),
        ({"a__csv": "text\nhello\n".encode("utf-16-le")}, "text", r"a.csv: is not text"),
        ({"a__json": '{"text": ["a"]}'.encode("utf-16")}, "text", r"a.json: is UTF-16; convert it: `iconv"),
        ({"a__jsonl": '{"text": "a"}\n'.encode("utf-16")}, "text", r"a.jsonl: is UTF-16; convert it: `iconv"),
        ({"a__parquet": POINTER}, "text", r"a.parquet: is only a Git LFS pointer; fetch the file with `git lfs pull`"),
        ({"a__jsonl": POINTER}, "text", r"a.jsonl: is only a Git LFS pointer; fetch the file with `git lfs pull`"),
        ({"a__csv": 'question,answer\n"A \\"b\\".",c\n'}, "conversation", r"a.csv, line 2: has a quote within a field"),
        ({"a__json": json.dumps({f"id {i}": i for i in range(99)})}, "text", r"from: id 0, .*, id 19 and 79 more$"),
        ({"a__csv": "a" * 99 + "\nb\n"}, "text", r"choose from: 'a{56}\.\.\.$"),
        ({"a__txt": "text".encode("utf-16-le")}, "text", r"a.txt: is not text in UTF-8"),
        ({"a__txt__gz": gzip.compress(b"a" * 999)[:20]}, "text", r"a.txt.gz: cannot be read .*correct the file"),
        ({"a__csv": "question,answer\nCafé,1\n".encode("cp1252")}, "text", r"a.csv: cannot be read .*iconv"),
        ({"a__csv": "text\nHello, world\n"}, "text", r"a.csv: cannot be read: row 0 has 2 fields, .*in quotes"),
        (
            {"a__xlsx": b"PK", "README__md": "# a"},
            "text",
            r"does not contain data \(README.md, a.xlsx\); save the sheet as CSV, or give a file or folder of .parquet",
        ),
        ({"a__zip": b"PK"}, "text", r"does not contain data \(a.zip\); unzip it, or give"),
        (
            {"a__jsonl": '{"messages": [{"from": "customer", "text": "a"}]}\n' * 40},
            "conversation",
            r"row 0: messages contains .*; all 40 rows are like this: convert them \(docs/data.md, “Rows”\)",
        ),
        (
            {"a__jsonl": '{"turns": [{"speaker": "customer", "utterance": "a"}]}\n' * 40},
            "conversation",
            r"messages_column: messages: there is no such column; .*convert the rows \(docs/data.md, .*from: turns",
        ),
        (
            {"a__jsonl": '{"query": "a", "positive": "b", "negative": "c"}\n' * 40},
            "preference",
            r"chosen_column: chosen: there is no such column; choose from: query, positive, negative",
        ),
        (
            {"a__txt": POEM, "b__jsonl": json.dumps({"question": "a"})},
            "text",
            r"a.txt: has the columns text, and .*b.jsonl",
        ),
        (
            {"a__jsonl": json.dumps({"question": "a"}), "b__jsonl": json.dumps({"prompt": "a"})},
            "conversation",
            r"a.jsonl: has the columns question.*b.jsonl has prompt.*folders of their own",
        ),
        ({"a__csv": "b ,c\n1,2\n"}, "conversation", r"messages_column: .*name prompt_column .*choose from: 'b ', c"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_file_and_what_to_do(
    tmp_path: Path, files: dict[str, str | bytes], kind: Kind, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(lay(tmp_path / "folder", **files), kind)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_columns_are_found_before_a_stream_comes_to_them(tmp_path: Path, kind: str) -> None:
    def write(name: str, *rows: dict[str, str]) -> DataArguments:
        (tmp_path / name).mkdir()
        for number, row in enumerate(rows):
            path = tmp_path / name / f"{number}.{kind}"
            if kind == "jsonl":
                write_rows(path, [row])
            else:
                Dataset.from_list([row]).to_parquet(path)
        return DataArguments(str(tmp_path / name), dataset_streaming=True, validation_share=0.0)

    more = {"text": "b", "url": "u"}
    for name, rows in {"first": [more, {"text": "a"}], "last": [{"text": "a"}, more]}.items():
        args = write(name, *rows)
        assert sorted(row["text"] for row in load_splits(args, "text", evaluation=False)[0]) == ["a", "b"]
    args = write("other", {"question": "a", "answer": "b"}, {"prompt": "a", "answer": "b"})
    with pytest.raises(UserError, match=rf"0.{kind}: has the columns answer, question, and .*1.{kind} has answer, pr"):
        load_splits(args, "conversation", evaluation=False)


def test_rows_in_a_text_file_are_refused_before_a_stream_comes_to_them(tmp_path: Path) -> None:
    folder = lay(tmp_path, a__txt=POEM, b__txt='{"text": "a"}\n', c__txt='{\n  "an": "object"\n}\n')
    with pytest.raises(UserError, match=r"b.txt: contains rows in JSON"):
        open_source(folder, streaming=True)
    (tmp_path / "b.txt").write_text('{curly} words: "quoted"')
    assert len(texts(folder)) == 3


def test_names_that_are_not_of_one_file_or_rule_are_refused(tmp_path: Path) -> None:
    folder = lay(tmp_path, a__txt=POEM, b__xlsx=b"PK")
    with pytest.raises(UserError, match=r"is a pattern; give the folder, or a list of the files"):
        open_source(f"{folder}/*.txt")
    with pytest.raises(UserError, match=r"b.xlsx: this type of file is not supported; save the sheet as CSV"):
        open_source(f"{folder}/b.xlsx")
    with pytest.raises(UserError, match=r"document: page: must be file, blank_line or lines:N"):
        open_source(folder, document="page")


def test_chinese_characters_are_words() -> None:
    assert words("我有3个 apples，かな。") == ["我", "有", "3", "个", "apples", "か", "な"]
    assert overlap([{"text": "昨天我们在公园里看见了一只狐狸。"}], [{"text": "我们在公园里看见一只鸟"}], 8).share == 1


def test_rows_in_an_object_are_read(tmp_path: Path) -> None:
    pairs = [{"question": "Why?", "answer": "Because."}] * 3
    columns = {"question": ["Why?"] * 3, "answer": ["Because."] * 3}
    for number, content in enumerate((columns, {"version": 1, "data": pairs}, dict(zip("xyz", pairs, strict=True)))):
        for indent in (None, 1):
            path = tmp_path / f"{number}{indent}.json"
            path.write_text(json.dumps(content, indent=indent))
            assert [row["messages"] for row in read(str(path), "conversation")] == [ASKED] * 3
    # An object for each file, which has a list as well, is a row.
    folder = lay(tmp_path / "rows", a__json=json.dumps({**pairs[0], "notes": [{"a": 1}] * 2}, indent=1))
    assert len(read(folder, "conversation")) == 1
