"""Sources of data: a Hub id, a local data set repository, or plain files, opened with errors that name the place."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import logging
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets import DatasetDict, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.data.shards import is_shards, open_shards
from pipeline.data.votes import VOTES_FILE, update_data_set
from pipeline.errors import HUB_UNREACHABLE, Problem, UserError
from pipeline.files import check_directory, is_missing_path, split_revision

logger = logging.getLogger(__name__)

SUFFIXES = {
    "parquet": ".parquet",
    "json": ".jsonl .ndjson .json",
    "csv": ".csv .tsv",
    "text": ".txt .md",
    "arrow": ".arrow",
}
BUILDERS = {suffix: builder for builder, suffixes in SUFFIXES.items() for suffix in suffixes.split()}

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

LINES_PER_DOCUMENT = 64
"""Consecutive lines of a plain text file that make one document: enough to fill a packed block."""

UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, RuntimeError, LookupError, ImportError, zlib.error, lzma.LZMAError,
    yaml.YAMLError, pickle.PickleError, tarfile.TarError,
)  # fmt: skip
"""Exceptions that the libraries raise for files whose content does not match their names."""


def open_source(
    name: str | None, config: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Open all splits of a data set.

    Args:
        name: A Hub id, also with a revision (`NAME/repo@revision`), a file or a folder: the argument `dataset_name`.
        config: Configuration of a data set repository; plain files ignore it.
        streaming: Whether to read the rows only when they are asked for.

    Returns:
        The splits by name; a plain file is one split, `train`.

    Raises:
        UserError: If the data set or the configuration does not exist, or a file cannot be parsed (with its line
            number).
    """
    if not name:
        raise UserError(Problem("dataset_name", "nothing", "give a Hub id, a file or a folder"))
    path = Path(name).expanduser()
    if (path / VOTES_FILE).is_file() and not update_data_set(path):
        remedy = "does not contain a vote that prefers one of two answers yet; collect some with"
        raise UserError(Problem("dataset_name", name, f"{remedy} `python -m pipeline app`"))
    if is_shards(path):
        if not streaming:
            remedy = f"must be true for the shards of {name}, which are read during training"
            raise UserError(Problem("dataset_streaming", streaming, remedy))
        if config is not None:
            logger.info("dataset_config %s is ignored: shards do not have configurations", config)
        return open_shards(path)

    builder, options = _choose_builder(name, path, config)
    revision = options.get("revision")
    if streaming and "revision" in options and constants.HF_HUB_OFFLINE:
        with contextlib.suppress(LocalEntryNotFoundError):
            builder, options = _choose_fetched(builder, revision, config)
    if builder not in BUILDERS.values():
        _check_config(builder, config, options.get("revision"))
    elif config is not None:
        # A recipe's data set was replaced on the command line, but its configuration was not.
        logger.info("dataset_config %s is ignored: plain files do not have configurations", config)

    # `datasets` converts every file into its cache.
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    if check_directory(cache):
        remedy = "this cache of data sets is not writable; set HF_HOME to a writable directory"
        raise UserError(Problem("HF_HOME", cache, remedy))
    # It logs the traceback of a file that cannot be parsed, which is reported below in one line.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    try:
        source = datasets.load_dataset(builder, streaming=streaming, **options)
    except ConnectionError:
        raise UserError(Problem("dataset_name", name, HUB_UNREACHABLE)) from None
    except (DatasetNotFoundError, FileNotFoundError) as error:
        if path.exists():
            remedy = f"does not contain data ({_first_line(error)}); give a file or folder of {', '.join(BUILDERS)}"
        elif constants.HF_HUB_OFFLINE:
            remedy = HUB_UNREACHABLE
        elif revision is not None:
            remedy = f"there is no such data set with a revision {revision} on the Hub (log in for a private one)"
        else:
            remedy = "is neither a local path nor a public data set on the Hub (log in for a private one)"
        raise UserError(Problem("dataset_name", name, remedy)) from None
    except (DatasetGenerationError, StopIteration, *UNREADABLE) as error:
        raise UserError(*locate_error(path, error)) from None
    if builder == "text":
        source = source.map(_join_lines, batched=True, batch_size=LINES_PER_DOCUMENT)
    return source


def _choose_builder(name: str, path: Path, config: str | None) -> tuple[str, dict[str, Any]]:
    """Return the first argument of `load_dataset`, a builder for files or the name of a repository, and the others."""

    def refuse(remedy: str) -> UserError:
        return UserError(Problem("dataset_name", name, remedy))

    # `datasets` reads paths as patterns.
    literal = glob.escape(str(path.absolute()))
    if path.is_dir():
        # `datasets` caches a folder with a card under the name of the folder, whatever its path and content: from the
        # common cache it would return the rows of another run's `data`, or of this one's before it was generated again.
        cache = Path(datasets.config.HF_DATASETS_CACHE, "folders", digest_of(path))
        options: dict[str, Any] = {"cache_dir": str(cache)}
        has_card = config is not None or (path / "README.md").exists()
        if not has_card and any(".txt" in file.suffixes for file in path.rglob("*")):
            return "text", {**options, "data_dir": literal, "keep_linebreaks": True}
        if glob.has_magic(str(path.resolve())):
            raise refuse("contains one of the characters *?[ in its path, which `datasets` cannot read; rename it")
        return str(path), {**options, "name": config}

    if not path.exists():
        if is_missing_path(name) or path.suffix in {*BUILDERS, *COMPRESSIONS}:
            raise refuse("there is no such file or folder; correct the path")
        repo_id, revision = split_revision(name)
        return repo_id, {"name": config, "revision": revision}

    if not path.is_file():
        raise refuse("is neither a file nor a folder; give one of them")
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix not in COMPRESSIONS), "")
    if suffix not in BUILDERS:
        raise refuse(f"files of this type are not supported; give one of {', '.join(BUILDERS)}, also compressed (.gz)")
    if path.stat().st_size == 0:
        raise refuse("is an empty file; give one that has rows")
    if path.suffix == ".json":
        # Any value but a list or an object crashes pyarrow's reader.
        with path.open("rb") as file:
            first = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if first not in (b"[", b"{"):
            raise refuse("must contain a list of rows, or an object; correct the file")

    options = {"data_files": {"train": literal}}
    if BUILDERS[suffix] == "text":
        options["keep_linebreaks"] = True
    if suffix == ".tsv":
        options["sep"] = "\t"
    return BUILDERS[suffix], options


def _choose_fetched(repo_id: str, revision: str | None, config: str | None) -> tuple[str, dict[str, Any]]:
    """Return the folder of a repository that `run --download` has fetched, and the options of `load_dataset` for it.

    Raises:
        LocalEntryNotFoundError: If it has not been fetched.
    """
    place = {"repo_type": "dataset", "revision": revision, "local_files_only": True}
    folder = snapshot_download(repo_id, allow_patterns="README.md", **place)
    # Without file names, `datasets` looks for the files of the first configuration, which may not have been fetched.
    files = None
    card = Path(folder, "README.md")
    if card.exists():
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)
        files = configs.get(config or "default", {}).get("data_files")
    return folder, {"name": config, "data_files": files}


def digest_of(path: Path) -> str:
    """Return a digest of the names, sizes and times of a file, or of the files in a folder."""
    path = path.resolve()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def _join_lines(batch: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Make one document of consecutive lines. The last line of a file may lack its end."""
    return {"text": ["".join(line if line.endswith("\n") else line + "\n" for line in batch["text"])]}


def _check_config(builder: str, config: str | None, revision: str | None) -> None:
    """Report a configuration that does not exist before anything is read."""
    try:
        known = datasets.get_dataset_config_names(builder, revision=revision)
    except (DatasetNotFoundError, *UNREADABLE):
        # Loading the data gives a better message.
        return
    if config is None and len(known) > 1 and "default" not in known:
        raise UserError(Problem("dataset_config", "nothing", f"must be given; choose from: {', '.join(known)}"))
    if config is not None and config not in known:
        remedy = f"there is no such configuration; choose from: {', '.join(known)}"
        remedy += ", or set it to null" if len(known) == 1 else ""
        raise UserError(Problem("dataset_config", config, remedy))


def locate_error(path: Path, error: Exception) -> list[Problem]:
    """Find the lines of local files that cannot be parsed, for an error of `datasets`, which names at most the file."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    problems = []
    for file in files:
        if not file.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
            continue
        opener = gzip.open if file.suffix == ".gz" else open
        # A file that cannot be read at all is reported below.
        with contextlib.suppress(OSError, EOFError, zlib.error), opener(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line if line.strip() else "null")
                except (ValueError, RecursionError) as fault:
                    remedy = f"is not valid JSON ({fault}); correct or remove it"
                    problems.append(Problem("dataset_name", f"{file}, line {number}", remedy))
                    break
    if problems:
        return problems
    cause = error.__cause__ or error
    return [Problem("dataset_name", path, f"cannot be read ({_first_line(cause)}); correct the file")]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
