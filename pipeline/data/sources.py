"""Sources of data: a Hub id, a local data set repository, or plain files, opened with errors that name the place."""

from __future__ import annotations

import contextlib
import glob
import io
import json
import logging
import lzma
import os
import re
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.json as pa_json
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, Value, concatenate_datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.table import CastError
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.data.arguments import SPLITS
from pipeline.data.columns import CONVERSATIONS, TEXT_COLUMNS, Split, column_names, common_features, find_column
from pipeline.data.documents import (
    TO_UTF8,
    check_fetched,
    choose_table,
    digest_of,
    is_utf16,
    open_bytes,
    open_documents,
)
from pipeline.data.messages import shorten
from pipeline.data.shards import is_shards, open_shards
from pipeline.data.votes import VOTES_FILE, update_data_set
from pipeline.errors import HUB_UNREACHABLE, Problem, UserError, as_typed
from pipeline.files import check_directory, is_missing_path, split_revision

logger = logging.getLogger(__name__)

JSON_LINES = (".jsonl", ".ndjson")
BUILDERS = {
    ".parquet": "parquet",
    **dict.fromkeys((*JSON_LINES, ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".md"), "text"),
    ".arrow": "arrow",
}
"""The builder of `datasets` for each suffix; text is read by `pipeline.data.documents`."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

NO_DATA = re.compile(
    r"(readme|licen[cs]e|copying|citation)([-_.][\w.-]*)?|(config|dataset_infos?|dataset_dict|state)\.json"
    r"|cache-\w+\.arrow",
    re.IGNORECASE,
)
"""Files of a folder that are about the data, or what `datasets` has made of them."""

SPLIT_NAMES = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
SPLIT = re.compile(rf"(?:.*[-._ 0-9])?({'|'.join(SPLIT_NAMES)})(?:[-._ 0-9].*)?", re.IGNORECASE)
"""Names of files and folders that belong to a split: `test.jsonl` and `my-train-1.csv`, but not `contest.txt`."""

SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
"""Names of the files of a split in repositories of the Hub, such as `data/train_sft-00000-of-00003.parquet`."""

SAMPLE = 1 << 16
"""Characters or bytes by which it is decided how a file is read."""

NAMED = 5
"""Number of unread files that the log names."""

UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, RuntimeError, LookupError, ImportError, zlib.error, lzma.LZMAError,
    yaml.YAMLError, StopIteration, DatasetGenerationError,
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
        UserError: If the data set or the configuration does not exist, or a file cannot be parsed (with the line).
    """
    if not name:
        raise UserError(Problem("dataset_name", "nothing", "give a Hub id, a file or a folder"))
    path = Path(name).expanduser()
    if (path / VOTES_FILE).is_file() and not update_data_set(path):
        remedy = "does not contain a vote that prefers one of two answers yet; collect some with"
        raise UserError(Problem("dataset_name", name, f"{remedy} `{as_typed('app')}`"))
    if is_shards(path):
        if not streaming:
            remedy = f"must be true for the shards of {name}, which are read during training"
            raise UserError(Problem("dataset_streaming", streaming, remedy))
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
    try:
        # A data set repository, whose README.md says which files belong to which split.
        if path.is_dir() and (config is not None or _read_configs(path)):
            _check_config(str(path), config, None)
            # `datasets` caches a folder with a card under the name of the folder, whatever its path and content: from
            # the common cache it would return the rows of another run's `data`, or of this one's before it was
            # generated again.
            own_cache = str(cache / "folders" / digest_of(path))
            return datasets.load_dataset(str(path), config, cache_dir=own_cache, streaming=streaming)
        if config is not None:
            # A recipe's data set was replaced on the command line, but its configuration was not.
            logger.info("dataset_config %s is ignored: plain files do not have configurations", config)
        return _open_files(path, document, streaming)
    except UNREADABLE as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(*locate_error(path, error)) from None


def _open_of_hub(name: str, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """Open a data set of the Hub, or the files of it that `run --download` has fetched."""
    repo_id, revision = split_revision(name)
    options: dict[str, Any] = {"name": config, "revision": revision}
    if streaming and constants.HF_HUB_OFFLINE:
        with contextlib.suppress(LocalEntryNotFoundError):
            place = {"repo_type": "dataset", "revision": revision, "local_files_only": True}
            folder = snapshot_download(repo_id, allow_patterns="README.md", **place)
            # Without file names, `datasets` looks for those of the first configuration, maybe another than was fetched.
            files = _read_configs(Path(folder)).get(config or "default", {}).get("data_files")
            repo_id, options = folder, {"name": config, "data_files": files}
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
    except UNREADABLE as error:
        raise UserError(*locate_error(Path(name), error)) from None
    raise UserError(Problem("dataset_name", name, remedy))


def _read_configs(folder: Path) -> dict[str, Any]:
    """Return the configurations that the card of a folder describes, by name."""
    card = folder / "README.md"
    if not (card.is_file() and card.read_bytes().startswith(b"---")):
        return {}
    return MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)


def _open_files(path: Path, document: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """Open a file, or the files in a folder, each by its suffix, and join the files of a split."""
    splits = _assign_splits(path, _list_files(path))
    # Files that are read in the same way are opened together.
    groups: dict[str, tuple[str, dict[str, Any], dict[str, list[Path]]]] = {}
    for split, files in splits.items():
        for file in files:
            builder, options, columns = _choose_reader(file)
            group = groups.setdefault(repr((builder, options, columns)), (builder, options, {}))
            group[2].setdefault(split, []).append(file)

    parts: dict[str, list[tuple[Path, Split]]] = {split: [] for split in splits}
    for builder, options, own in groups.values():
        opened: dict[str, Split]
        if builder == "text":
            opened = {
                split: open_documents(files, document, streaming, split, is_single=len(splits[split]) == 1)
                for split, files in own.items()
            }
        elif builder == "object":
            ((split, (file,)),) = own.items()
            rows = Dataset.from_list(_rows_of_object(file))
            opened = {split: rows.to_iterable_dataset() if streaming else rows}
        else:
            opened = _load(builder, own, streaming, options)
        for split, files in own.items():
            parts[split].append((files[0], opened[split]))
    joined = {split: _join(found) for split, found in parts.items()}
    what = "documents" if any(builder == "text" for builder, *_ in groups.values()) else "rows"
    for split, rows in joined.items():
        count = f"{len(rows):,} {what}" if isinstance(rows, Dataset) else f"a stream of {what}"
        logger.info("%-11s %s, split %s: read %d files, %s", "data", path, split, len(splits[split]), count)
    return (IterableDatasetDict if streaming else DatasetDict)(joined)


def _load(builder: str, own: dict[str, list[Path]], streaming: bool, options: dict[str, Any]) -> dict[str, Split]:
    """Open the files of splits, with types that fit all of them.

    `datasets` takes the types of the first file, where a column may be without values, and fails at the first value.
    """
    files = [file for some in own.values() for file in some]
    # `datasets` reads paths as patterns.
    names = {split: [glob.escape(str(file)) for file in some] for split, some in own.items()}

    def load(names: Any = names, **features: Any) -> Any:
        return datasets.load_dataset(builder, data_files=names, streaming=streaming, **options, **features)

    if streaming and builder == "parquet":
        found = [Features.from_arrow_schema(pq.read_schema(file)) for file in files]
    else:
        try:
            opened = load()
            found = _features_of_rows(files, opened) if streaming and builder == "json" else []
            if all(one == found[0] and Value("null") not in one.values() for one in found):
                return opened
        except DatasetGenerationError as error:
            # Such files have other columns.
            if len(files) == 1 or isinstance(error.__cause__, CastError):
                raise
            found = [load(glob.escape(str(file)))["train"].features for file in files]
    return load(features=common_features(files, found, is_json=builder == "json"))


def _list_files(path: Path) -> list[Path]:
    """Return the files to read: the file itself, or the ones in a folder and its folders, in order. Log the others."""
    kinds = f"{', '.join(BUILDERS)}, also compressed (.gz)"
    if path.is_file():
        if _suffix(path) not in BUILDERS:
            remedy = f"files of this type are not supported; save it as one of {kinds}"
            raise UserError(Problem("dataset_name", path, remedy))
        if _is_empty(path):
            raise UserError(Problem("dataset_name", path, "does not have rows; give a file that has"))
        return [path]
    files: list[Path] = []
    others: list[str] = []
    entered: set[str] = set()
    for root, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        # Links to folders may form a loop.
        if (real := os.path.realpath(root)) in entered:
            others.append(os.path.relpath(root, path))
            folders.clear()
            continue
        entered.add(real)
        for file in (Path(root, name) for name in names if not name.startswith(".")):
            is_data = _suffix(file) in BUILDERS and not NO_DATA.fullmatch(file.name) and file.is_file()
            # An empty file of JSON Lines stays, because each file of a stream has a number.
            if is_data and (_suffix(file) in JSON_LINES or not _is_empty(file)):
                files.append(file)
            else:
                others.append(str(file.relative_to(path)))
    named = ", ".join(sorted(others)[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
    if not files:
        remedy = f"does not contain data ({named or 'no files'}); give a file or folder of {kinds}"
        raise UserError(Problem("dataset_name", path, remedy))
    if others:
        logger.info("%s: not read, because they are not data, or empty: %s", path, named)
    return sorted(files, key=str)


def _is_empty(file: Path) -> bool:
    """Return whether a file has no rows; a table without rows still has the names of its columns."""
    if not file.stat().st_size or file.suffix.lower() == ".parquet":
        return not (file.stat().st_size and pq.read_metadata(file).num_rows)
    if BUILDERS[_suffix(file)] != "csv":
        return False
    with open_bytes(file) as content:
        return len([*islice(filter(bytes.strip, content), 2)]) < 2


def _suffix(path: Path) -> str:
    """Return the suffix that says how a file is read, in lower case, before the one of its compression."""
    return next((one for one in reversed(path.suffixes) if one.lower() not in COMPRESSIONS), "").lower()


def _assign_splits(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the files of each split, by the names of their folders or their own, as `datasets` does."""
    names = {file: file.relative_to(path) for file in files} if path.is_dir() else {}
    found: dict[Path, str] = {}
    # The names of shards come first, then the names of folders, and then the names of files.
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
    ordered = dict.fromkeys((*SPLITS, *sorted(found.values())))
    splits = {str(split): [file for file in files if found.get(file, "train") == split] for split in ordered}
    return {split: own for split, own in splits.items() if own}


def _choose_reader(file: Path) -> tuple[str, dict[str, Any], list[str]]:
    """Return the builder that reads a file, its options, and the columns of a table or of Parquet."""
    builder = BUILDERS[_suffix(file)]
    check_fetched(file)
    if file.suffix.lower() == ".parquet":
        return builder, {}, pq.read_schema(file).names
    if builder == "json" and is_utf16(file):
        raise UserError(Problem("dataset_name", file, "is UTF-16; convert it: `iconv -f UTF-16 -t UTF-8`"))
    if _suffix(file) == ".json":
        with open_bytes(file) as content:
            first = content.read(SAMPLE).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        # Any value but a list or an object crashes pyarrow's reader.
        if first not in (b"[", b"{"):
            remedy = "must contain a list of rows, or an object; correct the file"
            raise UserError(Problem("dataset_name", file, remedy))
        if first == b"{" and _rows_of_object(file):
            return "object", {"file": file}, []
    return choose_table(file) if builder == "csv" else (builder, {}, [])


def _rows_of_object(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON file that is a single object with all of them; none of another object.

    {"question": ["2 + 3?", ...], "answer": ["5", ...]} or {"version": 1, "data": [{"question": "2 + 3?", ...}, ...]},
    or rows by their ids, {"q1": {"question": "2 + 3?", ...}, ...}
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
        if len(table) > 1 and all(isinstance(row, dict) for row in table.values()):
            of_rows = [[*table.values()]]
        # A row may have a list as well.
        if len(of_rows) == 1 and not find_column(table, *CONVERSATIONS, *TEXT_COLUMNS):
            return list(of_rows[0])
    return []


def _features_of_rows(files: list[Path], opened: dict[str, Split]) -> list[Features]:
    """Return the types in a stream of the first file, and in the first rows of other files of JSON Lines.

    Such a row with columns that the first file lacks is refused: the stream would stop there. Without streaming,
    `datasets` reads all files, and finds such columns in any row.
    """
    stream = next(iter(opened.values()))
    features = [stream.features]
    columns = column_names(stream) if len(files) > 1 else []
    for file in files[1:]:
        own = stream.features
        if _suffix(file) in JSON_LINES:
            with open_bytes(file) as lines:
                line = next(filter(bytes.strip, lines), b"{}")
            if set(row := json.loads(line)) - set(columns):
                raise _differ(files[0], columns, file, list(row))
            with contextlib.suppress(pa.ArrowInvalid):
                own = Features.from_arrow_schema(pa_json.read_json(io.BytesIO(line)).schema)
        features.append(own)
    # The types of a list are not known before it is read.
    return features if stream.features else []


def _join(parts: list[tuple[Path, Split]]) -> Split:
    """Join the first file and the rows of each type, which have the same columns or have texts."""
    first, columns = parts[0][0], column_names(parts[0][1])
    for file, part in parts[1:]:
        others = column_names(part)
        if set(others) != set(columns) and "text" not in {*others} & {*columns}:
            raise _differ(first, columns, file, others)
    if any(set(column_names(part)) != set(columns) for _, part in parts):
        logger.warning("%s and %s have different columns; only `text` is read", first, parts[1][0])
        parts = [(file, part.select_columns("text")) for file, part in parts]
    features = [part.features for _, part in parts]
    if all(features):
        common = common_features([file for file, _ in parts], features)
        parts = [(file, part if part.features == common else part.cast(common)) for file, part in parts]
    return concatenate_datasets([part for _, part in parts])


def _differ(first: Path, columns: list[str], other: Path, others: list[str]) -> UserError:
    """Return the error of files that do not have the same columns."""
    remedy = f"has the columns {', '.join(columns)}, and {other} has {', '.join(others)}; "
    remedy += "rename or remove columns, or put the files into folders of their own, and name both in dataset_name"
    return UserError(Problem("dataset_name", first, remedy))


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
        check_fetched(file)
        if _suffix(file) not in JSON_LINES:
            continue
        # A file that cannot be read at all is reported below.
        with contextlib.suppress(OSError, EOFError, zlib.error), open_bytes(file) as lines:
            for number, line in enumerate(lines, start=1):
                remedy = ""
                try:
                    row = json.loads(line if line.strip() else "{}")
                    if not isinstance(row, dict):
                        remedy = f'is {shorten(row)}; it must be an object, such as {{"text": "..."}}'
                except (ValueError, RecursionError) as fault:
                    advice = TO_UTF8 if isinstance(fault, UnicodeError) else "correct or remove it"
                    remedy = f"is not valid JSON ({fault}); {advice}"
                if remedy:
                    problems.append(Problem("dataset_name", f"{file}, line {number}", remedy))
                    break
    if problems:
        return problems
    first: tuple[Path, list[str]] | None = None
    for file in files:
        if _suffix(file) not in BUILDERS or NO_DATA.fullmatch(file.name):
            continue
        try:
            builder, options, _ = _choose_reader(file)
            if builder in ("text", "object"):
                continue
            opened = datasets.load_dataset(builder, data_files=glob.escape(str(file)), streaming=True, **options)
            columns = column_names(opened["train"])
        except UNREADABLE as fault:
            path, error = file, fault
            break
        first = first or (file, columns)
        if set(columns) != set(first[1]):
            return list(_differ(*first, file, columns).problems)
    cause = error.__cause__ or error
    reason = str(cause).strip().split("\n")[0][:200] or type(cause).__name__
    advice = TO_UTF8 if isinstance(cause, UnicodeError) else "correct the file"
    return [Problem("dataset_name", path, f"cannot be read ({reason}); {advice}")]
