"""Sources of data: a Hub id, a local data set repository, or plain files, opened with errors that name the place."""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import io
import json
import logging
import lzma
import os
import pickle
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, DatasetDict, IterableDatasetDict, concatenate_datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.data.arguments import SPLITS
from pipeline.data.columns import CONVERSATIONS, TEXT_COLUMNS, Split, column_names, find_column, normalise
from pipeline.data.documents import TO_UTF8, digest_of, encoding_of, open_bytes, open_documents
from pipeline.data.shards import is_shards, open_shards
from pipeline.data.votes import VOTES_FILE, update_data_set
from pipeline.errors import HUB_UNREACHABLE, Problem, UserError
from pipeline.files import check_directory, is_missing_path, split_revision

logger = logging.getLogger(__name__)

Reader: TypeAlias = tuple[str, tuple[tuple[str, Any], ...], tuple[str, ...]]
"""Builder of `datasets`, its options, and the columns of a table or of Parquet, which may differ between files."""

SUFFIXES = {
    "parquet": ".parquet",
    "json": ".jsonl .ndjson .json",
    "csv": ".csv .tsv",
    "text": ".txt .md",
    "arrow": ".arrow",
}
BUILDERS = {suffix: builder for builder, suffixes in SUFFIXES.items() for suffix in suffixes.split()}

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

NO_DATA = re.compile(
    r"(readme|licen[cs]e|copying|citation)([-_.][\w.-]*)?|(config|dataset_infos?|dataset_dict|state)\.json",
    re.IGNORECASE,
)
"""Files of a folder that are about the data."""

SPLIT_NAMES = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
SPLIT = re.compile(rf"(?:.*[-._ 0-9])?({'|'.join(SPLIT_NAMES)})(?:[-._ 0-9].*)?", re.IGNORECASE)
"""Names of files and folders that belong to a split: `test.jsonl` and `my-train-1.csv`, but not `contest.txt`."""

SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
"""Names of the files of a split in repositories of the Hub, such as `data/train_sft-00000-of-00003.parquet`."""

SAMPLE = 1 << 16
"""Bytes of a table by which its separator is found."""

NULLS = ("", "NULL", "null", "NaN", "nan", "<NA>", "#N/A", r"\N")
"""Cells of a table without a value. Others that pandas takes for such, None and NA, may be answers."""

NAMED = 5
"""Files that are not read and that the log names."""

UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, RuntimeError, LookupError, ImportError, zlib.error, lzma.LZMAError,
    yaml.YAMLError, pickle.PickleError, tarfile.TarError,
)  # fmt: skip
"""Exceptions that the libraries raise for files whose content does not match their names."""


def open_source(
    name: str | None, config: str | None = None, streaming: bool = False, document: str | None = None
) -> DatasetDict | IterableDatasetDict:
    """Open all splits of a data set.

    Args:
        name: A Hub id, also with a revision (`NAME/repo@revision`), a file or a folder: the argument `dataset_name`.
        config: Configuration of a data set repository; plain files ignore it.
        streaming: Whether to read the rows only when they are asked for.
        document: What is a document of a text file: see `pipeline.data.documents`.

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

    # `datasets` converts every file into its cache.
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    if check_directory(cache):
        remedy = "this cache of data sets is not writable; set HF_HOME to a writable directory"
        raise UserError(Problem("HF_HOME", cache, remedy))
    # It logs the traceback of a file that cannot be parsed, which is reported below in one line.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if not path.exists():
        if glob.glob(str(path), recursive=True):
            remedy = "is a pattern; give the folder, or a list of the files"
            raise UserError(Problem("dataset_name", name, remedy))
        if is_missing_path(name) or _suffix(path) in BUILDERS or path.suffix in COMPRESSIONS:
            raise UserError(Problem("dataset_name", name, "there is no such file or folder; correct the path"))
        return _open_of_hub(name, config, streaming)
    if not (path.is_file() or path.is_dir()):
        raise UserError(Problem("dataset_name", name, "is neither a file nor a folder; give one of them"))
    try:
        if path.is_dir() and (config is not None or _has_configs(path)):
            return _open_folder(path, config, streaming)
        if config is not None:
            # A recipe's data set was replaced on the command line, but its configuration was not.
            logger.info("dataset_config %s is ignored: plain files do not have configurations", config)
        return _open_files(path, document, streaming)
    except FileNotFoundError as error:
        remedy = f"does not contain data ({_first_line(error)}); give a file or folder of {', '.join(BUILDERS)}"
        raise UserError(Problem("dataset_name", name, remedy)) from None
    except (DatasetGenerationError, StopIteration, *UNREADABLE) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(*locate_error(path, error)) from None


def _open_of_hub(name: str, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """Open a data set of the Hub, or the files of it that `run --download` has fetched."""
    repo_id, revision = split_revision(name)
    options: dict[str, Any] = {"name": config, "revision": revision}
    if streaming and constants.HF_HUB_OFFLINE:
        with contextlib.suppress(LocalEntryNotFoundError):
            repo_id, options = _choose_fetched(repo_id, revision, config)
    _check_config(repo_id, config, options.get("revision"))
    try:
        return datasets.load_dataset(repo_id, streaming=streaming, **options)
    except ConnectionError:
        remedy = HUB_UNREACHABLE
    except (DatasetNotFoundError, FileNotFoundError):
        if constants.HF_HUB_OFFLINE:
            remedy = HUB_UNREACHABLE
        elif revision is not None:
            remedy = f"there is no such data set with a revision {revision} on the Hub (log in for a private one)"
        else:
            remedy = "is neither a local path nor a public data set on the Hub (log in for a private one)"
    except (DatasetGenerationError, StopIteration, *UNREADABLE) as error:
        raise UserError(*locate_error(Path(name), error)) from None
    raise UserError(Problem("dataset_name", name, remedy))


def _open_folder(path: Path, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """Open a data set repository, whose README.md says which files belong to which split."""
    if glob.has_magic(str(path.resolve())):
        remedy = "contains one of the characters *?[ in its path, which `datasets` cannot read; rename it"
        raise UserError(Problem("dataset_name", path, remedy))
    _check_config(str(path), config, None)
    # `datasets` caches a folder with a card under the name of the folder, whatever its path and content: from the
    # common cache it would return the rows of another run's `data`, or of this one's before it was generated again.
    cache = Path(datasets.config.HF_DATASETS_CACHE, "folders", digest_of(path))
    return datasets.load_dataset(str(path), config, cache_dir=str(cache), streaming=streaming)


def _has_configs(path: Path) -> bool:
    """Return whether a folder has a card that names the files of configurations."""
    card = path / "README.md"
    if not (card.is_file() and card.read_bytes().lstrip(b"\xef\xbb\xbf").startswith(b"---")):
        return False
    return bool(MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data))


def _open_files(path: Path, document: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """Open a file, or those in a folder, each by its suffix, and join the files of a split."""
    splits = _assign_splits(path, _list_files(path))
    readers: dict[Reader, dict[str, list[Path]]] = {}
    for split, files in splits.items():
        for file in files:
            readers.setdefault(_choose_reader(file), {}).setdefault(split, []).append(file)

    parts: dict[str, list[tuple[Path, Split]]] = {split: [] for split in splits}
    for (builder, options, columns), own in readers.items():
        for split, files in own.items() if builder == "text" else ():
            is_single = len(splits[split]) == 1
            parts[split].append((files[0], open_documents(files, document, streaming, split, is_single)))
        for split, files in own.items() if builder == "object" else ():
            rows = Dataset.from_list(_rows_of_object(files[0]))
            parts[split].append((files[0], rows.to_iterable_dataset() if streaming else rows))
        if builder in ("text", "object"):
            continue
        # `datasets` reads paths as patterns.
        names = {split: [glob.escape(str(file)) for file in files] for split, files in own.items()}
        more = dict(options)
        if builder == "csv":
            # Texts are not converted to numbers, which lose the zeros of 007.
            more["converters"] = {name: _read_cell for name in columns if normalise(name) in TEXT_COLUMNS}
        opened = datasets.load_dataset(builder, data_files=names, streaming=streaming, **more)
        for split, files in own.items():
            parts[split].append((files[0], opened[split]))
    joined = {split: _join(found) for split, found in parts.items()}
    what = "documents" if any(builder == "text" for builder, *_ in readers) else "rows"
    for split, rows in joined.items():
        count = f"{len(rows):,} {what}" if isinstance(rows, Dataset) else f"a stream of {what}"
        logger.info("%-11s %s, split %s: read %d files, %s", "data", path, split, len(splits[split]), count)
    return (IterableDatasetDict if streaming else DatasetDict)(joined)


def _list_files(path: Path) -> list[Path]:
    """Return the files to read: the file itself, or those of a folder and its folders, in order. The log names others.

    Raises:
        UserError: If there are none.
    """
    if path.is_file():
        if _suffix(path) not in BUILDERS:
            remedy = f"files of this type are not supported; save it as one of {', '.join(BUILDERS)}"
            raise UserError(Problem("dataset_name", path, f"{remedy}, also compressed (.gz)"))
        if path.stat().st_size == 0:
            raise UserError(Problem("dataset_name", path, "is an empty file; give one that has rows"))
        return [path]
    files: list[Path] = []
    others: list[Path] = []
    entered: set[str] = set()
    for root, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        # Links to folders may form a loop.
        if (real := os.path.realpath(root)) in entered:
            others.append(Path(root))
            folders.clear()
            continue
        entered.add(real)
        for file in (Path(root, name) for name in names if not name.startswith(".")):
            is_data = _suffix(file) in BUILDERS and not NO_DATA.fullmatch(file.name) and file.is_file()
            # An empty file of JSON Lines stays, because each file of a stream has a number.
            is_filled = is_data and (file.stat().st_size or _suffix(file) in (".jsonl", ".ndjson"))
            (files if is_filled else others).append(file)
    names = sorted(str(file.relative_to(path)) for file in others)
    named = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    if not files:
        remedy = f"does not contain data ({named or 'no files'}); give a file or folder of {', '.join(BUILDERS)}"
        raise UserError(Problem("dataset_name", path, f"{remedy}, also compressed (.gz)"))
    if others:
        level = logging.INFO if all(NO_DATA.fullmatch(file.name) for file in others) else logging.WARNING
        logger.log(level, "%s: not read, because they are not data, or empty: %s", path, named)
    return sorted(files, key=str)


def _suffix(path: Path) -> str:
    """Return the suffix that says how a file is read, in lower case, before the one of its compression."""
    return next((one for one in reversed(path.suffixes) if one.lower() not in COMPRESSIONS), "").lower()


def _assign_splits(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the files of each split, by the names of their folders or their own, as `datasets` does.

    Raises:
        UserError: If some files belong to `train` by their names, and others to no split.
    """

    names = {file: file.relative_to(path) for file in files} if path.is_dir() else {}
    found: dict[Path, str] = {}
    # The names of shards come first, then those of folders, and then those of files.
    for pattern, parts in (
        (SHARDED, lambda name: [name.as_posix()]),
        (SPLIT, lambda name: name.parts[:-1]),
        (SPLIT, lambda name: [name.name]),
    ):
        matches = {file: next(filter(None, map(pattern.fullmatch, parts(name))), None) for file, name in names.items()}
        found = {file: SPLIT_NAMES.get(match[1].lower(), match[1]) for file, match in matches.items() if match}
        if found:
            break
    other = next((file for file in files if file not in found), None)
    if other is not None and "train" in found.values():
        known = next(iter(found))
        remedy = f"does not belong to a split by its name, as {known} does ({found[known]}); rename or move one of them"
        raise UserError(Problem("dataset_name", other, remedy))
    if other is not None and found:
        named = ", ".join(f"{file.name} ({split})" for file, split in list(found.items())[:NAMED])
        logger.warning("%s: files that are named after a split are not trained on: %s", path, named)
    ordered = dict.fromkeys((*SPLITS, *sorted(found.values())))
    splits = {str(split): [file for file in files if found.get(file, "train") == split] for split in ordered}
    return {split: own for split, own in splits.items() if own}


def _choose_reader(file: Path) -> Reader:
    """Return how a file is read.

    Raises:
        UserError: If it cannot be, which its first bytes say.
    """

    def refuse(remedy: str) -> UserError:
        return UserError(Problem("dataset_name", file, remedy))

    builder = BUILDERS[_suffix(file)]
    if file.suffix.lower() == ".parquet":
        return builder, (), tuple(pq.read_schema(file).names)
    if builder not in ("json", "csv"):
        return builder, (), ()
    with open_bytes(file) as content:
        head = content.read(SAMPLE)
    encoding = encoding_of(head)
    if builder == "json":
        if encoding == "utf-16":
            raise refuse("is UTF-16; convert it: `iconv -f UTF-16 -t UTF-8`")
        first = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        # Any value but a list or an object crashes pyarrow's reader.
        if _suffix(file) == ".json" and first not in (b"[", b"{"):
            raise refuse("must contain a list of rows, or an object; correct the file")
        is_object = _suffix(file) == ".json" and first == b"{" and _rows_of_object(file)
        return ("object", (("file", file),), ()) if is_object else (builder, (), ())
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeError as error:
        raise refuse(f"cannot be read ({error}); {TO_UTF8}") from None
    if "\0" in text:
        raise refuse("is not text, or is UTF-16 without a byte order mark; save it as UTF-8")

    # Excel writes and reads a first line such as "sep=;".
    skipped = 1 if text.startswith("sep=") else 0
    tables = []
    for separator in text[4] if skipped else "\t" if _suffix(file) == ".tsv" else ",;\t|":
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row][skipped:]
        tables.append((separator, rows[:-1] if len(head) == SAMPLE else rows))
    # The first separator by which all rows have the same number of fields, and more than one, or else the most.
    tables = [(separator, rows) for separator, rows in tables if rows]
    regular = [table for table in tables if len(table[1][0]) > 1 and len({*map(len, table[1])}) == 1]
    separator, rows = (regular or sorted(tables, key=lambda table: -len(table[1][0])) or [(",", [[""]])])[0]
    # pandas takes the first fields of such rows for names of rows.
    if longer := next((number for number, row in enumerate(rows) if len(row) > len(rows[0])), None):
        remedy = f"cannot be read: row {longer - 1} (the first is row 0) has {len(rows[longer])} fields, separated by "
        raise refuse(f"{remedy}{separator!r}, and the header {len(rows[0])}; put fields that contain it in quotes")
    options = {
        "sep": separator,
        "encoding": encoding,
        "skiprows": skipped,
        "keep_default_na": False,
        "na_values": NULLS,
    }
    return builder, tuple(options.items()), tuple(rows[0])


def _rows_of_object(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON file that is a single object with all of them; none of another object.

    {"question": ["2 + 3?", ...], "answer": ["5", ...]} or {"version": 1, "data": [{"question": "2 + 3?", ...}, ...]}
    """
    with contextlib.suppress(ValueError, RecursionError, AttributeError), open_bytes(file) as content:
        first = content.readline()
        with contextlib.suppress(ValueError):
            # Another line after a whole object is another row.
            if json.loads(first) and content.peek(1):
                return []
        table: dict[str, Any] = json.loads(first + content.read())
        lists = [value for value in table.values() if isinstance(value, list) and value]
        of_rows = [rows for rows in lists if isinstance(rows[0], dict)]
        if not of_rows and len(lists) == len(table) and len({*map(len, lists)}) == 1:
            return [dict(zip(table, row, strict=True)) for row in zip(*lists, strict=True)]
        # A row may have a list as well.
        if len(of_rows) == 1 and find_column(table, *CONVERSATIONS, *TEXT_COLUMNS) is None:
            return list(of_rows[0])
    return []


def _read_cell(cell: str) -> str | None:
    return None if cell in NULLS else cell


def _join(parts: list[tuple[Path, Split]]) -> Split:
    """Join the rows of files of several types, which have the same columns or have texts.

    Args:
        parts: The first file of each type, and its rows.
    """
    first = parts[0][0]
    columns = [column_names(part) for _, part in parts]
    other = next((number for number, found in enumerate(columns) if set(found) != set(columns[0])), None)
    if other is not None and not all("text" in found for found in columns):
        raise _differ(first, columns[0], parts[other][0], columns[other])
    if other is not None:
        logger.warning("%s and %s have different columns, of which `text` is read", first, parts[other][0])
        parts = [(file, part.select_columns("text")) for file, part in parts]
    try:
        features = parts[0][1].features
        return concatenate_datasets([part.cast(features) if features else part for _, part in parts])
    except (ValueError, TypeError, pa.ArrowException) as error:
        remedy = f"and {parts[1][0]} have columns of different types ({_first_line(error)}); convert one of them"
        raise UserError(Problem("dataset_name", first, remedy)) from None


def _differ(first: Path, columns: list[str], other: Path, others: list[str]) -> UserError:
    """Return the error of files that do not have the same columns."""
    remedy = f"has the columns {', '.join(columns)}, and {other} has {', '.join(others)}; "
    remedy += "rename or remove columns, or put the files into folders of their own, and name both in dataset_name"
    return UserError(Problem("dataset_name", first, remedy))


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
    """Find the files, and the lines in them, that cannot be parsed, for an error of `datasets`."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    problems = []
    for file in files:
        if _suffix(file) not in (".jsonl", ".ndjson"):
            continue
        # A file that cannot be read at all is reported below.
        with contextlib.suppress(OSError, EOFError, zlib.error), open_bytes(file) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line if line.strip() else "null")
                except (ValueError, RecursionError) as fault:
                    advice = TO_UTF8 if isinstance(fault, UnicodeError) else "correct or remove it"
                    remedy = f"is not valid JSON ({fault}); {advice}"
                    problems.append(Problem("dataset_name", f"{file}, line {number}", remedy))
                    break
    if problems:
        return problems
    first: tuple[Path, list[str]] | None = None
    for file in files:
        builder = BUILDERS.get(_suffix(file), "text")
        if builder == "text" or NO_DATA.fullmatch(file.name):
            continue
        try:
            rows = datasets.load_dataset(builder, data_files=glob.escape(str(file)), streaming=True)["train"]
            columns = [f"{name}: {rows.features[name]}" if rows.features else name for name in column_names(rows)]
        except (StopIteration, *UNREADABLE) as fault:
            path, error = file, fault
            break
        first = first or (file, columns)
        if set(columns) != set(first[1]):
            return list(_differ(*first, file, columns).problems)
    cause = error.__cause__ or error
    advice = TO_UTF8 if isinstance(cause, UnicodeError) else "correct the file"
    return [Problem("dataset_name", path, f"cannot be read ({_first_line(cause)}); {advice}")]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
