"""Tokenize documents into shards with `datatrove`, on the processes of this machine or of a cluster."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.data.arguments import DataArguments, option
from pipeline.data.documents import digest_of
from pipeline.data.packing import DOCUMENTS_AT_ONCE, Encoder
from pipeline.data.shards import RECORD, TOKENIZER, document_tokenizer, open_shards
from pipeline.data.splits import load_splits
from pipeline.errors import Problem, UserError, refuse
from pipeline.files import check_directory, check_links, write_text


@dataclass
class ShardArguments:
    """Where shards are written, and by which processes."""

    output_dir: str = field(metadata={"help": "Folder of the shards: a data set with one folder for each split."})
    executor: Literal["local", "slurm", "ray"] = option("local", "Processes of this machine, jobs of Slurm, or Ray.")
    workers: int | None = option(None, "Files tokenized at once (default: locally one per core, otherwise all).")
    partition: str | None = option(None, "Partition of Slurm.")
    time: str = option("24:00:00", "Time limit of a Slurm job, which processes one file.")


def read_documents(data_args: DataArguments, data: Any, rank: int, world_size: int) -> Iterator[Any]:
    """Yield the documents of file number `rank` of `world_size` files: the first step of a datatrove pipeline.

    datatrove passes the result of the step before as `data`, which is None here.
    """
    from datatrove.data import Document

    rows, _ = load_splits(data_args, "text", evaluation=False)
    if world_size > 1:
        rows = rows.shard(world_size, rank)
    for number, row in enumerate(rows):
        yield Document(row["text"], f"{rank}/{number}")


def write_shards(tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, args: ShardArguments) -> None:
    """Tokenize the rows of `dataset_train_split`, each file into a shard, or continue where this was stopped.

    Args:
        tokenizer: A tokenizer with bos and eos tokens.
        data_args: The documents. No row is held out: that is for those who read the shards.
        args: Where shards are written, and by which processes.

    Raises:
        UserError: If an argument is wrong, or the folder has shards of other documents or another tokenizer.
    """
    # By default, loguru logs the values of all variables with an error.
    for name in ("LOGURU_BACKTRACE", "LOGURU_DIAGNOSE"):
        os.environ.setdefault(name, "false")
    try:
        from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
        from datatrove.pipeline.tokens import DocumentTokenizer
    except ImportError:
        remedy = "needs datatrove, which is not installed; pip install 'fourstage[datatrove]'"
        raise UserError(Problem("executor", args.executor, remedy)) from None
    if len(data_args.dataset_names) > 1:
        remedy = "are several data sets; run a command for each, with its own folder, and pretrain on all folders"
        raise UserError(Problem("dataset_name", ", ".join(data_args.dataset_names), remedy))
    name = data_args.dataset_names[0]
    source = Path(name).expanduser()
    if source.exists():
        # A job of Slurm or Ray may have another current directory.
        name = str(source.absolute())
    data_args = replace(data_args, dataset_name=name, dataset_streaming=True, validation_share=0.0)
    rows, _ = load_splits(data_args, "text", evaluation=False)
    # A task tokenizes a file. The first rows of the whole stream, however, are read by a single task.
    tasks = rows.num_shards if data_args.max_train_samples is None else 1
    folder = Path(args.output_dir, data_args.dataset_train_split).absolute()
    record = json.dumps(_describe_documents(data_args, source, tasks), indent=2)
    files = {TOKENIZER: document_tokenizer(tokenizer), RECORD: record}
    refuse(*check_arguments(args, folder, source, files))
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in files.items():
        write_text(folder / file_name, content)
    # Not shuffled, because a stream of shards is shuffled when it is read.
    writer_options: dict[str, Any] = {"batch_size": DOCUMENTS_AT_ONCE, "shuffle_documents": False}
    writer = DocumentTokenizer(str(folder), str(folder / TOKENIZER), **writer_options)
    # Bytes of a token. datatrove would derive them from the vocabulary, without counting special tokens.
    writer.token_size = np.dtype(Encoder.of(tokenizer).dtype).itemsize
    steps = [partial(read_documents, data_args), writer]
    options: dict[str, Any] = {"tasks": tasks, "logging_dir": str(folder / "logs"), "workers": args.workers or -1}
    if args.executor == "slurm":
        SlurmPipelineExecutor(steps, time=args.time, partition=args.partition, mem_per_cpu_gb=4, **options).run()
    elif args.executor == "ray":
        RayPipelineExecutor(steps, **options).run()
        # Ray does not raise the error of a task; the shards that it leaves are incomplete.
        open_shards(folder)
    else:
        options["workers"] = min(tasks, args.workers or os.cpu_count() or 1)
        if options["workers"] > 1:
            # Each process uses a single thread.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        LocalPipelineExecutor(steps, **options).run()


def _describe_documents(data_args: DataArguments, source: Path, tasks: int) -> dict[str, Any]:
    """Return the content of `RECORD`: the number of shards, and what determines which documents they contain."""
    fields = (
        "dataset_name", "dataset_config", "dataset_train_split", "keep_rows", "max_train_samples", "text_column",
        "document",
    )  # fmt: skip
    record: dict[str, Any] = {"tasks": tasks, "digest": digest_of(source) if source.exists() else None}
    for name in fields:
        record[name] = getattr(data_args, name)
    return record


def check_arguments(args: ShardArguments, folder: Path, source: Path, files: Mapping[str, str]) -> list[Problem]:
    """Check the arguments for writing shards of `source` to `folder`, which will have `files`: texts by name."""
    problems = check_links(Path(args.output_dir))
    problem = check_directory(args.output_dir)
    if problem is not None and not problems:
        problems.append(problem)
    if folder.resolve().is_relative_to(source.resolve()):
        remedy = "lies inside dataset_name, and would be read as data; choose another directory"
        problems.append(Problem("output_dir", args.output_dir, remedy))
    if args.workers is not None and args.workers < 1:
        problems.append(Problem("workers", args.workers, "must be at least 1"))
    if args.executor == "slurm" and not args.partition:
        problems.append(Problem("partition", "nothing", "give the partition of Slurm"))
    if args.executor == "slurm" and shutil.which("sbatch") is None:
        problems.append(Problem("executor", args.executor, "needs Slurm's sbatch, which is not on this machine"))
    if args.executor == "ray" and find_spec("ray") is None:
        problems.append(Problem("executor", args.executor, "needs Ray, which is not installed; pip install ray"))
    for name, content in files.items():
        file = folder / name
        if file.exists() and file.read_text() != content:
            what = "another tokenizer" if name == TOKENIZER else "other documents"
            remedy = f"has shards of {what}, as {name} says; give another folder, or delete {folder}"
            problems.append(Problem("output_dir", args.output_dir, remedy))
    return problems
