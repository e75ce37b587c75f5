"""Shards of tokens: datatrove makes them, and training on them is training on the documents themselves."""

import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import IterableDataset

from pipeline.data.arguments import DataArguments
from pipeline.data.columns import Kind
from pipeline.data.shard_writer import ShardArguments, write_shards
from pipeline.data.shards import documents_of
from pipeline.data.splits import load_splits
from pipeline.data.streams import PackedStream, join_states
from pipeline.errors import RunStopped, UserError
from pipeline.models.scratch import ScratchArguments
from pipeline.models.tokenizer import train_tokenizer
from pipeline.training.inputs import load_inputs
from pipeline.training.pretraining import PretrainConfig
from tests.helpers.files import write_rows
from tests.helpers.small_model import save_tokenizer, tokenizer

FILES = {"0.jsonl": 90, "1.jsonl": 0, "2.jsonl": 60}
"""Documents of each file."""

FIRST = Path("train", "00000_unshuffled.ds")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of them are empty, or spell special tokens."""
    folder = tmp_path_factory.mktemp("documents")
    for name, rows in FILES.items():
        texts = [f"{name} {row}: " + f"The cat <|end|><|bos|> sat. {row} é" * (row % 5) for row in range(rows)]
        write_rows(folder / name, [{"text": text if row % 7 else ""} for row, text in enumerate(texts)])
    return folder


def make_shards(documents: Path, folder: Path, **options: int) -> None:
    write_shards(tokenizer(), DataArguments(str(documents), **options), ShardArguments(str(folder), workers=1))


@pytest.fixture(scope="module")
def original_shards(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(documents, folder)
    return folder


@pytest.fixture
def shards(original_shards: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(original_shards, tmp_path / "shards")


def splits(folder: Path, kind: Kind) -> tuple[IterableDataset, IterableDataset]:
    train, held_out = load_splits(DataArguments(str(folder), dataset_streaming=True), kind, evaluation=True)
    assert held_out is not None
    return train, held_out


def blocks(stream: PackedStream, number: int) -> list[list[int]]:
    return [block["input_ids"].tolist() for block in itertools.islice(stream, number)]


def preflight(folder: Path, words: str, streaming: bool = True, **more: str) -> str:
    """Return what pretraining refuses, before it writes anything."""
    output = folder.parent / "output"
    args = PretrainConfig(str(output), block_size=32, max_steps=1, use_cpu=True, bf16=False, report_to="none")
    names = [str(folder), *more.values()]
    data_args = DataArguments(names, dataset_streaming=streaming, tokenizer_name_or_path=words)
    with pytest.raises(UserError) as refused:
        load_inputs("text", data_args, args, ScratchArguments(hidden_size=32))
    assert not output.exists()
    return str(refused.value)


def test_the_blocks_are_those_of_the_documents(documents: Path, original_shards: Path) -> None:
    """Beyond the end of the data, where they repeat; the rows that are held out are the same, too."""
    texts, held_out = splits(documents, "text")
    tokens, held_out_tokens = splits(original_shards, "tokens")
    expected = blocks(PackedStream(texts, tokenizer(), 32, 3), 600)
    assert blocks(PackedStream(tokens, tokenizer(), 32, 3), 600) == expected
    held_out_texts = [row["text"] for row in held_out]
    assert len(held_out_texts) == 5
    assert [tokenizer().decode(row["input_ids"][1:-1]) for row in held_out_tokens] == held_out_texts


def test_two_processes_that_are_resumed_take_the_blocks_in_turn(documents: Path, original_shards: Path) -> None:
    texts, _ = splits(documents, "text")
    tokens, _ = splits(original_shards, "tokens")
    expected = blocks(PackedStream(texts, tokenizer(), 32, 3), 400)
    taken: list[list[int]] = []
    state = None
    for steps in (70, 30, 100):
        processes = [PackedStream(tokens, tokenizer(), 32, 3, process, 2) for process in range(2)]
        if state is not None:
            for stream in processes:
                stream.load_state_dict(state)
        first, second = [blocks(stream, steps) for stream in processes]
        taken += itertools.chain(*zip(first, second, strict=True))
        state = join_states([stream.state_dict() for stream in processes])
    assert taken == expected


def test_tokens_of_four_bytes_and_several_folders_are_read(original_shards: Path, shards: Path) -> None:
    """As a vocabulary of more than 65,536 tokens needs them."""
    for file in shards.rglob("*.ds"):
        np.fromfile(file, "<u2").astype("<u4").tofile(file)
        metadata = Path(f"{file}.metadata")
        metadata.write_text(metadata.read_text().replace("|2\n", "|4\n"))
    streams = [PackedStream(splits(folder, "tokens")[0], tokenizer(), 32, 3) for folder in (original_shards, shards)]
    assert blocks(streams[0], 100) == blocks(streams[1], 100)
    both = DataArguments([str(original_shards), str(shards)], dataset_streaming=True, validation_share=0)
    rows = load_splits(both, "tokens", evaluation=False)[0]
    assert rows.num_shards == 2 * len(FILES) and len(list(rows)) == 2 * sum(FILES.values())


def test_folders_inside_are_splits(shards: Path) -> None:
    shutil.copytree(shards / "train", shards / "validation")
    train, validation = splits(shards, "tokens")
    assert len(list(train)) == len(list(validation)) == sum(FILES.values())


def test_what_measures_on_text_reads_the_documents(documents: Path, original_shards: Path) -> None:
    args = DataArguments(str(original_shards), dataset_streaming=True, validation_share=0.1)
    assert documents_of(args) == replace(args, dataset_name=str(documents))
    assert documents_of(DataArguments(str(documents))) == DataArguments(str(documents))


def test_the_command_that_made_shards_only_makes_those_that_are_missing(documents: Path, shards: Path) -> None:
    last = shards / "train" / "00002_unshuffled.ds"
    whole, times = last.read_bytes(), (shards / FIRST).stat().st_mtime_ns
    for file in (last, *shards.rglob("completions/00002")):
        file.unlink()
    assert f"{shards / 'train'}: has 2 of 3 shards" in preflight(shards, save_tokenizer(shards.parent / "words"))
    make_shards(documents, shards)
    assert last.read_bytes() == whole and (shards / FIRST).stat().st_mtime_ns == times


def test_a_folder_with_other_shards_is_not_written_to(documents: Path, shards: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir.* has shards of other documents"):
        make_shards(documents, shards, max_train_samples=5)
    with pytest.raises(UserError, match=r"are several data sets; run a command for each"):
        write_shards(tokenizer(), DataArguments([str(documents), "more"]), ShardArguments(str(shards)))
    (shards / "train" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"output_dir.* has shards of another tokenizer"):
        make_shards(documents, shards)


def test_documents_that_have_changed_are_others(tmp_path: Path) -> None:
    file = Path(write_rows(tmp_path / "documents.jsonl", [{"text": "The cat sat."}]))
    make_shards(file, tmp_path / "shards")
    file.write_text(file.read_text().replace("cat", "dog"))
    os.utime(file, (1, 1))
    with pytest.raises(UserError, match=r"output_dir.* has shards of other documents"):
        make_shards(file, tmp_path / "shards")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers: 0: must be at least 1"),
        ({"executor": "slurm"}, "partition: nothing: give the partition"),
        ({"executor": "slurm", "partition": "cpu"}, "executor: slurm: needs Slurm's sbatch"),
        ({"executor": "ray"}, "executor: ray: needs Ray"),
    ],
)
def test_options_are_checked(
    documents: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("PATH", "")
    inside = documents / "shards"
    with pytest.raises(UserError, match=message) as refused:
        write_shards(tokenizer(), DataArguments(str(documents)), ShardArguments(str(inside), **options))
    assert f"output_dir: {inside}: lies inside dataset_name" in str(refused.value) and not inside.exists()


def test_datatrove_is_asked_for(documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(UserError, match=r"pip install 'fourstage\[datatrove\]'"):
        make_shards(documents, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def cut(shards: Path) -> None:
    (shards / FIRST).write_bytes((shards / FIRST).read_bytes()[:-2])


def remove_index(shards: Path) -> None:
    Path(f"{shards / FIRST}.index").unlink()


def remove_metadata(shards: Path) -> None:
    Path(f"{shards / FIRST}.metadata").unlink()


def empty(shards: Path) -> None:
    for number in (0, 2):
        for suffix in ("", ".index", ".metadata"):
            source = shards / "train" / f"00001_unshuffled.ds{suffix}"
            shutil.copy(source, source.with_name(f"0000{number}_unshuffled.ds{suffix}"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"00000_unshuffled.ds: does not match its .index"),
        (remove_index, r"00000_unshuffled.ds: does not match its .index"),
        (
            remove_metadata,
            r"00000_unshuffled.ds: .*it is still being written, or damaged; wait for it, or make it again",
        ),
        (empty, r"train: is empty"),
    ],
)
def test_damaged_shards_are_refused(shards: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(shards)
    assert re.search(message, preflight(shards, save_tokenizer(shards.parent / "words")))


def test_shards_of_another_tokenizer_are_refused(shards: Path) -> None:
    words = str(shards.parent / "words")
    train_tokenizer(["A dog is here. " * 20], vocab_size=300).save_pretrained(words)
    assert "tokenizer.json: is not the tokenizer of the model" in preflight(shards, words)


def test_shards_that_others_made_must_have_the_tokens_of_the_tokenizer(shards: Path) -> None:
    words = save_tokenizer(shards.parent / "words")
    # Without our file, tokenizer.json may be something else.
    (shards / "train" / "documents.json").unlink()
    save_tokenizer(shards / "train")
    tokens = np.memmap(shards / FIRST, "<u2", "r+")
    tokens[4] = 5000
    assert "the token 5000" in preflight(shards, words)
    stream = PackedStream(splits(shards, "tokens")[0], tokenizer(), 32, 0)
    with pytest.raises(RunStopped, match="the token 5000"):
        blocks(stream, 600)
    tokens[2] = tokens[4] = 7
    assert "documents must begin with the tokenizer's bos" in preflight(shards, words)


def test_what_reads_text_does_not_read_shards(documents: Path, original_shards: Path, tmp_path: Path) -> None:
    words = save_tokenizer(tmp_path / "words")
    with pytest.raises(UserError, match=r"text_column: text: there is no such column; choose from: input_ids"):
        splits(original_shards, "text")
    assert "has text, and others of dataset_name have tokens" in preflight(original_shards, words, other=str(documents))
    assert "dataset_streaming: False: must be true" in preflight(original_shards, words, streaming=False)
