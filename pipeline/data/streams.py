"""Streams of packed blocks: the same batches for any number of processes, resumed where a checkpoint left off.

The files of a streamed data set are dealt to lanes, whose number depends on the data alone. A lane reads its files in
an order drawn from the seed, shuffles and packs some hundred documents at a time, and starts over when it has read them
all. The stream takes one block from each lane in turn, and process r of W gets the blocks r, r + W, r + 2W ...: two
processes with half the batch each train on the same batches as one. If W divides the number of lanes, each document is
read once; otherwise processes share lanes, and each tokenizes every lane that it uses. With four lanes:

    lane        a    b    c    d    a    b    c    d    a  ...
    process     0    1    0    1    0    1    0    1    0        two processes: 0 tokenizes a and c, 1 tokenizes b and d
    process     0    1    2    0    1    2    0    1    2        three processes: all lanes are tokenized three times

The state of a lane is the place in its file before the current chunk of documents, which a resumed run reads again: the
state that `datasets` keeps of a stream does not contain a shuffle buffer, and loses batches of `map`.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from pipeline.data.arguments import DataArguments
from pipeline.data.columns import TOKENS, Split, column_names
from pipeline.data.packing import Encoder, pack_documents
from pipeline.errors import LIBRARY_ERRORS, Problem, RunStopped, UserError
from pipeline.launch import once_per_node

logger = logging.getLogger(__name__)
LANES = 16
"""Maximum number of lanes, each with an open file."""
DOCUMENTS = 256
"""Documents that a lane shuffles and tokenizes together."""
STATE = "stream.json"
"""File of a checkpoint that contains the place in the stream."""
Place = dict[str, Any]
"""Where a lane is, as JSON.

- `file`: how many files it has read to the end, counted over all epochs, and so which one comes next
- `rows`: state of the reader of that file; None at its beginning
- `whole`: whether the lane reads the files of all lanes, because its own have no rows
- `chunk`, `block`: numbers of its next chunk of documents and of its next block
- `rest`: tokens before that block, too few to fill one
"""


class PackedStream(torch.utils.data.IterableDataset):
    """Endless blocks of `block_size` tokens from packed documents, as read by process number `process` of `processes`.

    tests/data/test_streams.py guards that any number of processes reads the same batches, and that a resumed stream
    continues exactly.

    Attributes:
        rows: Documents: `text`, or `input_ids` from the same tokenizer.
        kind: What identifies the stream. A resumed run must have the same values, or its place would be in another one.
            It includes the data arguments that select rows. With `max_train_samples`, the stream is read as one file,
            because `datasets` would take that many from each.
        begin: Number of the first block of the stream in this run.
        yielded: How many blocks this process has yielded since.
        start: Places of the lanes at `begin`.
        places: Places of the chunks that are being yielded, by lane.
        share: This process reads only every `share`-th lane, and does not know the places of the other lanes.
    """

    def __init__(
        self,
        rows: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        selection: Mapping[str, Any] | None = None,
    ) -> None:
        selection = selection or {}
        self.rows = rows
        self.process = process
        self.processes = processes
        self.encode = Encoder.of(tokenizer)
        files = 1 if selection.get("max_train_samples") is not None else rows.num_shards
        # A power of two, so that the usual numbers of processes divide it.
        self.lanes = min(LANES, 2 ** int(math.log2(files)))
        self.kind = {"files": files, "lanes": self.lanes, "block_size": block_size, "seed": seed, **selection}
        self.column = "text"
        if TOKENS in column_names(rows):
            self.column = TOKENS
            self.kind["column"] = TOKENS
        self.begin = 0
        self.yielded = 0
        self.start: dict[int, Place] = {}
        self.places: dict[int, Place] = {}
        self.share = math.gcd(processes, self.lanes)
        documents = "all documents" if self.share == 1 else f"one document in {self.share}"
        logger.info("stream      files %d, lanes %d; each process tokenizes %s", files, self.lanes, documents)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        lanes: dict[int, Iterator[tuple[int, np.ndarray]]] = {}
        self.places = dict(self.start)
        numbers = count(self.begin + self.process, self.processes)
        # A thread tokenizes the next documents during training.
        with ThreadPoolExecutor(1) as thread:
            # `yielded` counts a block before it is yielded, so that `state_dict` continues after it.
            for self.yielded, number in enumerate(numbers, start=1):
                # Block 9 of the stream is block 2 of lane 1, if there are four lanes.
                number_in_lane, lane = divmod(number, self.lanes)
                if lane not in lanes:
                    lanes[lane] = self._blocks(lane, thread)
                # If other processes read this lane as well, skip their blocks.
                for block_number, ids in lanes[lane]:
                    if block_number == number_in_lane:
                        yield {"input_ids": ids}
                        break

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to continue after the last block that was yielded, as JSON."""
        places = {}
        for lane, place in self.places.items():
            # `start` may contain places of lanes that only other processes read.
            if (lane - self.begin - self.process) % self.share == 0:
                places[str(lane)] = place
        return {"kind": self.kind, "begin": self.begin + self.yielded * self.processes, "places": places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where one process, or several with joined states (`join_states`), left off."""
        self.begin = state["begin"]
        self.yielded = 0
        self.start = {int(lane): place for lane, place in state["places"].items()}

    def _blocks(self, lane: int, thread: ThreadPoolExecutor) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the blocks of a lane with their numbers in the lane, and prepare a chunk of documents ahead."""
        chunks = self._chunks(lane)
        ahead = thread.submit(next, chunks)
        while True:
            try:
                place, blocks = ahead.result()
            except (UserError, *LIBRARY_ERRORS) as error:
                # Only the first process reports a `UserError`, but another process may have failed.
                raise RunStopped(f"The stream cannot be read: {' '.join(str(error).split())}") from error
            self.places[lane] = place
            ahead = thread.submit(next, chunks)
            yield from enumerate(blocks, start=place["block"])

    def _chunks(self, lane: int) -> Iterator[tuple[Place, np.ndarray]]:
        """Yield the place before each chunk of documents, and its blocks, of shape (blocks, block size).

        A chunk has `DOCUMENTS` documents, or fewer at the end of an epoch. This never ends: the lane starts over when
        it has read all of its files.
        """
        seed = self.kind["seed"]
        size = self.kind["block_size"]
        place = self.places.get(lane, {"file": 0, "rows": None, "whole": False, "chunk": 0, "block": 0, "rest": []})
        rest = np.array(place["rest"], self.encode.dtype)
        reader, rows, file_count = self._open(lane, place)
        while True:
            # `place` moves on while the chunk is read.
            place_of_chunk = place
            place = dict(place)
            # Number of files in a row that ended without giving a document.
            empty_files = 0
            documents: list[Any] = []
            while len(documents) < DOCUMENTS:
                next_documents = [row[self.column] for row in islice(rows, DOCUMENTS - len(documents))]
                documents += next_documents
                place["rows"] = reader.state_dict()
                if len(documents) == DOCUMENTS:
                    break
                # The file ends before the chunk is full, so go to the next one.
                place |= {"file": place["file"] + 1, "rows": None}
                empty_files = 0 if next_documents else empty_files + 1
                # One more than all files: the first may have rows, if the chunk before has read it exactly to its end.
                if empty_files > file_count:
                    if place["whole"]:
                        raise UserError(Problem("dataset_name", "the stream", "has no rows to train on"))
                    # The files of this lane are empty, so it reads the files of all lanes.
                    place |= {"file": 0, "whole": True}
                    empty_files = 0
                reader, rows, file_count = self._open(lane, place)
                # End the chunk with the epoch, so that no document is repeated before all others have been read.
                if documents and place["file"] % file_count == 0:
                    break
            # Shuffle, tokenize and cut into blocks. The rest that does not fill a block begins the next chunk.
            order = np.random.default_rng([seed, lane, place["chunk"]]).permutation(len(documents))
            ids = np.concatenate([rest, self.encode([documents[i] for i in order])])
            blocks, rest = np.split(ids, [len(ids) // size * size])
            blocks = blocks.reshape(-1, size)
            place |= {"chunk": place["chunk"] + 1, "block": place["block"] + len(blocks), "rest": rest.tolist()}
            yield place_of_chunk, blocks

    def _open(self, lane: int, place: Place) -> tuple[IterableDataset, Iterator[Mapping[str, Any]], int]:
        """Return the current file of a lane, its remaining rows, and how many files the lane reads in each epoch."""
        # The files are shuffled and dealt to the lanes like cards.
        files = np.random.default_rng(self.kind["seed"]).permutation(self.kind["files"])
        if not place["whole"]:
            files = files[lane :: self.lanes]
        epoch, number = divmod(place["file"], len(files))
        if number == 0 and epoch:
            logger.info("stream      lane %d has read its files %d times, and starts over", lane, epoch)
        # Each epoch has its own order of the lane's files.
        file = int(np.random.default_rng([self.kind["seed"], lane, epoch]).permutation(files)[number])
        reader = self.rows.shard(self.kind["files"], file) if self.kind["files"] > 1 else self.rows
        # With a shard for each row group of a Parquet file, the row groups before the place are not read.
        reader = reader.reshard()
        if place["rows"] is not None:
            reader.load_state_dict(place["rows"])
        return reader, iter(reader), len(files)


def pack_splits(
    splits: Sequence[Split | None], tokenizer: PreTrainedTokenizerBase, args: Any, data_args: DataArguments
) -> list[Dataset | PackedStream | None]:
    """Pack documents for pretraining: once on each node, or while a stream is read.

    Args:
        splits: Documents to train on, and to evaluate on or None.
        tokenizer: A tokenizer with bos and eos tokens.
        args: A `pipeline.training.pretraining.PretrainConfig`.
        data_args: With `max_train_samples`, a stream is read as one file.

    Returns:
        The blocks of each split, or None. Those of an evaluation are stored, so that a stream of them is read once.

    Raises:
        UserError: If the documents of a split do not fill a block.
    """
    if args.dataset_num_proc:
        # Each of the processes tokenizes with one thread.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    processes = f"{args.dataset_num_proc} processes" if args.dataset_num_proc else "one process, all cores"
    if args.world_size > 1:
        processes += ", on each node once"
    logger.info("%-11s %s", "packing", processes)
    packed: list[Dataset | PackedStream | None] = []
    for purpose, split in zip(("training", "evaluation"), splits, strict=True):
        if isinstance(split, IterableDataset) and purpose == "training":
            seed = args.seed if args.data_seed is None else args.data_seed
            names = ("max_train_samples", "validation_share", "keep_rows")
            selection = {name: getattr(data_args, name) for name in names}
            process = (args.process_index, args.world_size)
            packed.append(PackedStream(split, tokenizer, args.block_size, seed, *process, selection))
            continue
        if split is None:
            packed.append(None)
            continue
        if isinstance(split, IterableDataset):
            # Each evaluation reads the same rows, so a stream of them is stored.
            split = Dataset.from_list(list(split))
        column = TOKENS if TOKENS in split.column_names else "text"
        with once_per_node(args):
            blocks = pack_documents(split, tokenizer, args.block_size, column, args.dataset_num_proc)
        if not len(blocks):
            remedy = f"the {purpose} data do not fill a block; lower it or give more text"
            raise UserError(Problem("block_size", args.block_size, remedy))
        packed.append(blocks)
    return packed


def join_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the states of all processes. Each process only knows the lanes that it reads."""
    places: dict[str, Place] = {}
    for state in states:
        for lane, place in state["places"].items():
            # If several processes read a lane, resume at the earliest of their places.
            if lane not in places or place["block"] <= places[lane]["block"]:
                places[lane] = place
    return {**states[0], "places": places}


@dataclass
class StreamPlace:
    """The place in a stream, part of every checkpoint (`pipeline.training.reliable`), even with `save_only_model`."""

    stream: PackedStream
    args: TrainingArguments
    belongs_to_model = False

    def save(self, folder: Path) -> None:
        """Write the places of all processes, joined."""
        state = join_states(gather_object([self.stream.state_dict()]))
        if self.args.should_save:
            (folder / STATE).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Continue at the checkpoint's place. Raise a `UserError` if it is missing or from another stream."""
        try:
            state = json.loads((folder / STATE).read_text())
        except FileNotFoundError:
            remedy = f"does not contain {STATE}, the place in the stream; give another output_dir to start again"
            raise UserError(Problem("resume_from_checkpoint", folder, remedy)) from None
        kind = self.stream.kind
        saved_kind = state["kind"]
        names = [name for name in {**kind, **saved_kind} if saved_kind.get(name) != kind.get(name)]
        if names:
            changed = [f"{name} {saved_kind.get(name)}" for name in names]
            remedy = f"is from a stream with {', '.join(changed)}; restore that, or give another output_dir"
            raise UserError(Problem("resume_from_checkpoint", folder, remedy))
        self.stream.load_state_dict(state)
