"""Where data comes from: a Hub id, a local data set repository, or plain files; with errors that name the
place."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import lzma
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets import DatasetDict, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from pipeline.data.arguments import DataArguments
from pipeline.errors import Problem, UserError

logger = logging.getLogger(__name__)

BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
    ".arrow": "arrow",
}
LINES_A_DOCUMENT = 64
"""Consecutive lines of a plain text file that make one document: a packed block's worth, in constant memory.
"""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

UNREADABLE = (OSError, EOFError, ValueError, TypeError, RuntimeError, zlib.error, lzma.LZMAError, yaml.YAMLError)
"""What the libraries raise for files that are not what their names say."""


def open_source(args: DataArguments) -> DatasetDict | IterableDatasetDict:
    """Open all splits of the data set that `args` names.

    Args:
        args: `dataset_name`, `dataset_config` and `dataset_streaming` are used.

    Returns:
        The splits by name; a plain file is one split, `train`.

    Raises:
        UserError: If there is no such data set or configuration, or a file cannot be parsed (with its line
            number).
    """
    name = args.dataset_name
    if not name:
        raise UserError(Problem("dataset_name", "nothing", "give a Hub id, a file or a folder"))
    path = Path(name).expanduser()
    builder = name
    options: dict[str, Any] = {"name": args.dataset_config}
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(Problem("dataset_name", name, "is an empty file; give one that has rows"))
    if path.suffix == ".json" and path.is_file() and not _begins_json(path):
        raise UserError(Problem("dataset_name", name, "must hold a list of rows, or an object; correct the file"))
    if path.is_file():
        builder, options = _file_builder(path), {"data_files": {"train": str(path)}}
    elif path.is_dir():
        builder, options = _folder_builder(path, args.dataset_config)
        options["cache_dir"] = _cache_of_folder(path)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in {*BUILDERS, *COMPRESSIONS}:
        raise UserError(Problem("dataset_name", name, "there is no such file or folder; correct the path"))
    if builder == "text":
        options["keep_linebreaks"] = True
    if builder == "csv" and path.name.removesuffix(".gz").endswith(".tsv"):
        options["sep"] = "\t"
    _check_config(args, builder)
    # It logs the traceback of a file that cannot be parsed, which is told below in one line.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    try:
        source = datasets.load_dataset(builder, streaming=args.dataset_streaming, **options)
    except ConnectionError as error:
        remedy = f"the Hub cannot be reached ({_first_line(error)})"
        raise UserError(Problem("dataset_name", name, remedy)) from None
    except (DatasetNotFoundError, FileNotFoundError) as error:
        remedy = "is neither a local path nor a public data set on the Hub (log in for a private one)"
        if path.exists():
            remedy = f"holds no data ({_first_line(error)})"
        raise UserError(Problem("dataset_name", name, remedy)) from None
    except (DatasetGenerationError, StopIteration, *UNREADABLE) as error:
        raise UserError(*broken_files(path, error)) from None
    if builder == "text":
        source = source.map(_join_lines, batched=True, batch_size=LINES_A_DOCUMENT)
    return source


def _begins_json(path: Path) -> bool:
    """Whether a list or an object begins there; of another value pyarrow's reader crashes."""
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{")


def _cache_of_folder(path: Path) -> str:
    """A cache of its own for what a folder holds now.

    `datasets` caches a local data set repository under the folder's name, whatever its path and content: without this,
    the rows of another run's `data`, or of this one's before it was made anew, would be read.
    """
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.resolve().rglob("*"))]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / digest)


def _join_lines(batch: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {"text": ["".join(line if line.endswith("\n") else line + "\n" for line in batch["text"])]}


def _file_builder(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise UserError(Problem("dataset_name", path, f"files of this type are not read; known are {known}, also .gz"))
    return BUILDERS[suffix]


def _folder_builder(path: Path, config: str | None) -> tuple[str, dict[str, Any]]:
    if not (path / "README.md").exists():
        texts = [file for file in sorted(path.rglob("*")) if ".txt" in file.suffixes]
        if texts and config is None:
            # Found by `datasets` itself, line ends would be lost.
            return "text", {"data_dir": str(path)}
    return str(path), {"name": config}


def _check_config(args: DataArguments, builder: str) -> None:
    """Tell a configuration that isn't there before anything is read."""
    if builder in BUILDERS.values():
        if args.dataset_config is not None:
            # A recipe's data set was replaced on the command line, and its configuration was left behind.
            logger.info("dataset_config %s is ignored: plain files have none", args.dataset_config)
        return
    try:
        known = datasets.get_dataset_config_names(builder)
    except (DatasetNotFoundError, *UNREADABLE):
        return  # told better when the data itself is asked for
    if args.dataset_config is None and len(known) > 1 and "default" not in known:
        raise UserError(Problem("dataset_config", "nothing", f"must be given; choose from: {', '.join(known)}"))
    if args.dataset_config is not None and args.dataset_config not in known:
        remedy = f"there is no such configuration; choose from: {', '.join(known)}"
        remedy += ", or set it to null" if len(known) == 1 else ""
        raise UserError(Problem("dataset_config", args.dataset_config, remedy))


def broken_files(path: Path, error: Exception) -> list[Problem]:
    """Name the lines of local files that cannot be parsed, for an error of `datasets`, which names the file
    at most."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    problems = []
    for file in files:
        if file.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
            with contextlib.suppress(OSError, EOFError, zlib.error):  # told below by `error`
                problems += _broken_line(file)
    cause = error.__cause__ or error
    return problems or [Problem("dataset_name", path, f"cannot be read ({_first_line(cause)}); correct the file")]


def _broken_line(file: Path) -> list[Problem]:
    """The first line that is not JSON."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line) if line.strip() else None
            except (json.JSONDecodeError, UnicodeDecodeError) as fault:
                remedy = f"is not valid JSON ({fault}); correct or remove it"
                return [Problem("dataset_name", f"{file}, line {number}", remedy)]
    return []


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
