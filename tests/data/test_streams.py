"""Streams: the same blocks for any number of processes, resumed exactly, in an order that the seed draws."""

import itertools
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoModelForCausalLM

from pipeline.data import streams
from pipeline.data.arguments import DataArguments
from pipeline.data.packing import Encoder, PackedBlocks
from pipeline.data.splits import load_splits
from pipeline.data.streams import PackedStream, join_states, pack_splits
from pipeline.errors import RunStopped, UserError
from pipeline.launch import once_per_node
from pipeline.training.pretraining import PretrainConfig, PretrainTrainer
from tests.helpers.files import write_rows
from tests.helpers.small_model import save_model, tokenizer

BLOCK, ROWS = 32, 40
EMPTY = 2


def write_files(folder: Path, kind: str, files: int) -> str:
    """Write documents that say where they are; the file `EMPTY` has none."""
    folder.mkdir()
    for file in range(files):
        texts = [
            f"file {file} row {row}. " + "The cat sat. " * (row % 5) for row in range(ROWS if file != EMPTY else 0)
        ]
        if kind == "parquet":
            Dataset.from_dict({"text": texts}).to_parquet(folder / f"{file}.parquet", batch_size=20)
        elif kind == "jsonl":
            write_rows(folder / f"{file}.jsonl", [{"text": text} for text in texts])
        else:
            # Every 64 lines become a document.
            (folder / f"{file}.txt").write_text("".join(f"{text}\n" * 20 for text in texts))
    return str(folder)


def rows(data: str, **options: Any) -> IterableDataset:
    return load_splits(DataArguments(data, dataset_streaming=True, **options), "text", evaluation=False)[0]


def blocks(stream: PackedStream, number: int) -> list[list[int]]:
    return [block["input_ids"].tolist() for block in itertools.islice(stream, number)]


@pytest.fixture(autouse=True)
def few_documents_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "DOCUMENTS", 16)


@pytest.mark.parametrize(("kind", "files"), [("parquet", 5), ("jsonl", 1), ("text", 4)])
def test_any_number_of_processes_goes_on_where_others_were(tmp_path: Path, kind: str, files: int) -> None:
    """Over the end of the data, several times in a row."""
    data = rows(write_files(tmp_path / "data", kind, files))
    plan = [(1, 7), (2, 40), (4, 11), (1, 11), (3, 9), (1, 60), (2, 45)]
    expected = blocks(PackedStream(data, tokenizer(), BLOCK, 0), sum(size * steps for size, steps in plan))
    assert expected != blocks(PackedStream(data, tokenizer(), BLOCK, 1), len(expected)), "the seed has an effect"
    given: list[list[int]] = []
    state = None
    for processes, steps in plan:
        parts, states = [], []
        for process in range(processes):
            stream = PackedStream(data, tokenizer(), BLOCK, 0, process, processes)
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            parts.append(blocks(stream, steps))
            states.append(stream.state_dict())
        given += [part[step] for step in range(steps) for part in parts]
        state = join_states(states)
        assert given == expected[: len(given)]


def test_each_resumption_begins_where_the_lanes_are(tmp_path: Path) -> None:
    """Otherwise it would tokenize more and more documents again."""
    data = rows(write_files(tmp_path / "data", "jsonl", 4))
    state, places = None, []
    for _ in range(3):
        states = []
        for process in range(2):
            stream = PackedStream(data, tokenizer(), BLOCK, 0, process, 2)
            if state is not None:
                stream.load_state_dict(state)
            blocks(stream, 60)
            states.append(stream.state_dict())
        state = join_states(states)
        places.append(min(place["block"] for place in state["places"].values()))
    assert places[0] < places[1] < places[2]


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_found_in_whichever_file_they_are(seed: int) -> None:
    def documents(files: list[int]) -> Iterator[dict[str, str]]:
        for file in files:
            yield from ({"text": f"{row} is a row"} for row in range(50 if file == 3 else 0))

    data = IterableDataset.from_generator(documents, gen_kwargs={"files": list(range(8))})
    assert len(blocks(PackedStream(data, tokenizer(), BLOCK, seed), 20)) == 20


def test_a_stream_that_cannot_be_read_on_ends_the_run_in_one_line() -> None:
    def documents() -> Iterator[dict[str, str]]:
        yield from ({"text": f"{row} is a row"} for row in range(100))
        raise ValueError("line 101 is damaged")

    with pytest.raises(RunStopped, match=r"cannot be read: .*line 101"):
        blocks(PackedStream(IterableDataset.from_generator(documents), tokenizer(), BLOCK, 0), 1000)


def test_every_document_is_given_once_before_any_is_given_again(tmp_path: Path) -> None:
    data = rows(write_files(tmp_path / "data", "jsonl", 2), validation_share=0)
    stream = PackedStream(data, tokenizer(), BLOCK, 0)
    lanes: list[list[int]] = [[], []]
    for number, block in enumerate(blocks(stream, 220)):
        lanes[number % 2] += block
    for lane in lanes:
        texts = "".join(tokenizer().decode(lane)).split(tokenizer().eos_token)
        first, second = texts[:ROWS], texts[ROWS : 2 * ROWS]
        assert len(set(first)) == ROWS and set(first) == set(second)
        assert first != sorted(first) and first != second, "the order is drawn anew each time"


def test_a_process_reads_only_the_files_of_its_lanes(tmp_path: Path) -> None:
    def documents(files: list[int]) -> Iterator[dict[str, str]]:
        for file in files:
            yield from ({"text": f"{file} is a file"} for _ in range(50))

    data = IterableDataset.from_generator(documents, gen_kwargs={"files": list(range(4))})
    read = []
    for process in range(2):
        stream = PackedStream(data, tokenizer(), BLOCK, 0, process, 2)
        text = "".join(tokenizer().decode(block) for block in blocks(stream, 40))
        read.append({file for file in range(4) if f"{file} is a file" in text})
    assert read[0] | read[1] == {0, 1, 2, 3} and not read[0] & read[1]


def test_rows_that_are_held_out_of_a_stream_are_of_its_first_file(tmp_path: Path) -> None:
    args = DataArguments(write_files(tmp_path / "data", "jsonl", 2), dataset_streaming=True)
    train, held_out = load_splits(args, "text", evaluation=True)
    assert held_out is not None
    texts = [row["text"] for row in held_out]
    assert len(texts) == ROWS // 20 and all(text.startswith("file 0") for text in texts)
    text = "".join(tokenizer().decode(block) for block in blocks(PackedStream(train, tokenizer(), BLOCK, 0), 200))
    assert "file 0 row 1." in text and "file 1 row 0." in text and "file 0 row 0." not in text


def test_the_first_rows_of_all_files_are_read_as_one(tmp_path: Path) -> None:
    data = rows(write_files(tmp_path / "data", "jsonl", 2), max_train_samples=5, validation_share=0)
    stream = PackedStream(data, tokenizer(), BLOCK, 0, selection={"max_train_samples": 9})
    text = "".join(tokenizer().decode(block) for block in blocks(stream, 40))
    assert all(f"file 0 row {row}." in text for row in range(5))
    assert "row 5" not in text and "file 1" not in text


def test_a_stream_is_read_no_further_than_it_is_asked_for() -> None:
    read = []

    def documents() -> Iterator[dict[str, str]]:
        for number in itertools.count():
            read.append(number)
            yield {"text": f"{number} is a number"}

    assert len(blocks(PackedStream(IterableDataset.from_generator(documents), tokenizer(), BLOCK, 0), 3)) == 3
    assert max(read) <= 3 * streams.DOCUMENTS


def trainer(folder: Path, output: str = "out", seed: int = 0, steps: int = 4, **options: Any) -> PretrainTrainer:
    """Return a trainer on a stream of two files, which keeps what it trains on as `trained_on`."""
    made, model = folder / "data", folder / "model"
    data = rows(str(made) if made.exists() else write_files(made, "jsonl", 2))
    config = {"use_cpu": True, "bf16": False, "report_to": "none", "save_steps": 2, "disable_tqdm": True, **options}
    args = PretrainConfig(str(folder / output), max_steps=steps, per_device_train_batch_size=2, **config)
    stream = PackedStream(data, tokenizer(), BLOCK, seed)
    bos, eos = tokenizer().bos_token_id, tokenizer().eos_token_id
    collate, trained_on = PackedBlocks(bos, eos), []

    def record(examples: list[Any]) -> Any:
        trained_on.extend(example["input_ids"].tolist() for example in examples)
        return collate(examples)

    path = str(model) if model.exists() else save_model(model)
    built = PretrainTrainer(AutoModelForCausalLM.from_pretrained(path), args, record, stream)
    built.trained_on = trained_on
    return built


def test_a_run_that_saves_the_model_only_goes_on_in_the_stream(tmp_path: Path) -> None:
    undisturbed = trainer(tmp_path, "undisturbed")
    undisturbed.train()
    trainer(tmp_path, steps=2, save_only_model=True).train()
    resumed = trainer(tmp_path, save_only_model=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.trained_on == undisturbed.trained_on[4:]


def test_a_checkpoint_of_another_stream_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    with pytest.raises(UserError, match=r"checkpoint-2: is from a stream with seed 0; restore"):
        trainer(tmp_path, seed=1).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / streams.STATE).unlink()
    with pytest.raises(UserError, match=r"checkpoint-2: does not contain stream\.json"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_workers_without_effect_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path)
    assert "dataloader_num_workers" not in caplog.text
    trainer(tmp_path, dataloader_num_workers=2)
    assert "dataloader_num_workers has no effect on training" in caplog.text


def test_an_evaluation_that_does_not_fill_a_block_is_refused(tmp_path: Path) -> None:
    args = PretrainConfig(str(tmp_path / "out"), block_size=4096, use_cpu=True, bf16=False, report_to="none")
    data_args = DataArguments(write_files(tmp_path / "data", "jsonl", 2), dataset_streaming=True, max_eval_samples=2)
    with pytest.raises(UserError, match=r"block_size: 4096: the evaluation data do not fill a block"):
        pack_splits(load_splits(data_args, "text", evaluation=True), tokenizer(), args, data_args)


def prepare(process: int, port: int, folder: Path) -> None:
    """Pack documents as one of two processes, and write what it tokenized, and the blocks."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {**address, "RANK": str(process), "LOCAL_RANK": str(process)}
    PartialState._reset_state()
    encode, tokenized = Encoder.__call__, []

    def record(self: Encoder, texts: list[str]) -> Any:
        tokenized.append(len(texts))
        return encode(self, texts)

    Encoder.__call__ = record  # type: ignore[method-assign]
    tempfile.tempdir = str(folder / "temporary")
    args = PretrainConfig(str(folder / "out"), block_size=16, use_cpu=True, bf16=False, report_to="none")
    documents = load_dataset("json", data_files=str(folder / "text.jsonl"), split="train")
    # The locks must not wait for each other, even if they are taken more often than in a run.
    for _ in range(20):
        with once_per_node(args):
            pass
    packed = pack_splits([documents, documents.select(range(5))], tokenizer(), args, DataArguments())
    rows = [row["input_ids"].tolist() for split in packed for row in split]
    (folder / f"{process}.json").write_text(json.dumps([tokenized, rows]))


def test_data_are_prepared_once_by_two_processes(tmp_path: Path) -> None:
    write_rows(tmp_path / "text.jsonl", [{"text": f"{row} is a number"} for row in range(30)])
    (tmp_path / "temporary").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare, args=(number, port, tmp_path)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    (first, blocks), (second, same) = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first == [30, 5] and second == [] and blocks == same
    assert not list((tmp_path / "temporary").glob("fourstage-*")), "no lock file is left"
