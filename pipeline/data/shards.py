"""Shards of tokens: documents that `datatrove` has tokenized, on any number of nodes, read as a stream.

A shard is three files. `NAME.ds` has the tokens of its documents, one after the other, in 2 or 4 bytes each;
`NAME.ds.index` has the end of each document, and `NAME.ds.metadata` the tokenizer's name and the number of tokens.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from datasets import Features, IterableDataset, IterableDatasetDict, List, NamedSplit, Value
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from pipeline.data.arguments import DataArguments
from pipeline.data.columns import TOKENS
from pipeline.data.packing import Encoder
from pipeline.errors import Problem, refuse
from pipeline.files import read_json

Arguments = TypeVar("Arguments", bound=DataArguments)
TOKENIZER = "tokenizer.json"
"""File next to shards of `pipeline.data.shard_writer`: the result of `document_tokenizer`."""
RECORD = "documents.json"
"""File next to shards of `pipeline.data.shard_writer`: what was tokenized."""


def is_shards(path: Path) -> bool:
    """Return whether a path is a folder of shards."""
    return path.is_dir() and any(path.rglob("*.ds"))


def open_shards(folder: Path) -> IterableDatasetDict:
    """Open the shards in a folder as the split `train`, and the shards in each subfolder as a split of its name.

    They are streams of documents with the column `input_ids`, and each shard is a file of its stream. Raise a
    `UserError` if a shard is incomplete or damaged, if shards are missing, or if a split has no documents.
    """
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.ds")):
        parts = file.relative_to(folder).parts
        splits.setdefault(parts[0] if len(parts) > 1 else "train", []).append(file)
    refuse(*map(_validate, splits.values()))
    features = Features({TOKENS: List(Value("uint32"))})
    streams = IterableDatasetDict()
    for name, files in splits.items():
        streams[name] = IterableDataset.from_generator(_documents, features, {"files": files}, NamedSplit(name))
    return streams


def documents_of(args: Arguments) -> Arguments:
    """Return arguments that read the texts that shards were made from; without shards, the arguments as they are."""
    record = read_json(Path(args.dataset_names[0], args.dataset_train_split, RECORD))
    return replace(args, **{name: value for name, value in record.items() if name not in ("tasks", "digest")})


def document_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the JSON, for the library `tokenizers`, of a tokenizer that makes `bos + text + eos`, as `Encoder` does.

    It does not recognise special tokens, because `datatrove` has no option to encode them as text. Raise a `UserError`
    if the tokenizer does not use the library `tokenizers`.
    """
    backend = Encoder.of(tokenizer).backend
    bos_and_eos = [("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)]
    backend.post_processor = TemplateProcessing(single=["bos", "$A", "eos"], special_tokens=bos_and_eos)
    settings = json.loads(backend.to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if not token["special"]]
    return json.dumps(settings)


def check_tokenizers(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """Report shards made with a tokenizer other than the model's. Shards of other programs do not name theirs."""
    expected = Tokenizer.from_str(document_tokenizer(tokenizer)).to_str()
    remedy = "is not the tokenizer of the model; give the tokenizer of the shards, or make them again"
    problems = []
    for record in folder.rglob(RECORD):
        file = record.with_name(TOKENIZER)
        if Tokenizer.from_file(str(file)).to_str() != expected:
            problems.append(Problem("tokenizer_name_or_path", file, remedy))
    return problems


def _documents(files: Sequence[Path]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the documents of shards, without reading those that a resumed run skips."""
    # With documents of three and two tokens:
    #
    #   NAME.ds         [bos a eos][bos eos]
    #   NAME.ds.index   3          5
    for file in files:
        ends = np.fromfile(f"{file}.index", "<u8")
        if not len(ends):
            continue
        # Bytes of a token.
        size = file.stat().st_size // int(ends[-1])
        tokens: np.ndarray = np.memmap(file, f"<u{size}", "r")
        begin = 0
        for end in ends:
            yield {TOKENS: tokens[begin:end]}
            begin = end


def _validate(files: Sequence[Path]) -> Problem | None:
    """Return what is wrong with the shards of a split, or None."""
    total = 0
    for file in files:
        tokens = _count_tokens(file)
        if tokens is None:
            remedy = "does not match its .index and .metadata: it is still being written, or damaged"
            return Problem("dataset_name", file, f"{remedy}; wait for it, or make it again")
        total += tokens
    folder = files[0].parent
    tasks = read_json(folder / RECORD).get("tasks", len(files))
    if tasks != len(files):
        remedy = f"has {len(files)} of {tasks} shards; repeat the command that makes them to get the rest"
        return Problem("dataset_name", folder, remedy)
    if not total:
        return Problem("dataset_name", folder, "is empty; choose one that has rows")
    return None


def _count_tokens(file: Path) -> int | None:
    """Return the number of tokens of a shard, or None if its three files do not match."""
    try:
        # The first lines are, for instance, "/tokens/tokenizer.json|2" (bytes of a token) and "51200" (tokens).
        name, number, *_ = Path(f"{file}.metadata").read_text(encoding="utf-8").split("\n")
        size = int(name.rpartition("|")[2])
        tokens = int(number)
        end = 0
        if tokens:
            end = int(np.memmap(f"{file}.index", "<u8", "r")[-1])
        if file.stat().st_size != size * tokens or end != tokens:
            return None
    except (OSError, ValueError):
        return None
    return tokens
