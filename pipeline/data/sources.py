"""Sources of data: a Hub id, a local data set repository, or plain files, opened with errors that say where."""

import contextlib
import glob
import json
import logging
import lzma
import os
import re
import zlib
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pyarrow as pa
import yaml
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, Json, NamedSplit, Value, concatenate_datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pipeline.data.arguments import SPLITS
from pipeline.data.columns import Split, Splits, column_names
from pipeline.data.documents import (
    NO_TEXT,
    TO_UTF8,
    choose_table,
    digest_of,
    is_blank,
    open_bytes,
    open_documents,
    open_text,
    rows_of_json,
)
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
CONVERSIONS = {
    ".zip": "unzip it",
    **dict.fromkeys((".tar", ".tgz", ".7z", ".rar"), "unpack it"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV"),
    **dict.fromkeys(
        (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".html", ".htm"), "save it as plain text (.txt)"
    ),
}
"""What to do with files that are often given and cannot be read, by their suffix."""
NO_DATA = re.compile(
    r"(?i)(readme|licen[cs]e|copying|citation)([-_.][\w.-]*)?|(config|dataset_infos?|dataset_dict|state)\.json"
    r"|cache-\w+\.arrow"
)
"""Files of a folder that describe the data, or that `datasets` has made from them."""
SPLIT_NAMES = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
SPLIT = re.compile(rf"(?:.*[-._ 0-9])?({'|'.join(SPLIT_NAMES)})(?:[-._ 0-9].*)?", re.IGNORECASE)
"""Names of files and folders that indicate a split: `test.jsonl` and `my-train-1.csv`, but not `contest.txt`."""
SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
"""Names of the files of a split in repositories of the Hub, such as `data/train_sft-00000-of-00003.parquet`."""
UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, RuntimeError, LookupError, ImportError, zlib.error, lzma.LZMAError,
    yaml.YAMLError, StopIteration, DatasetGenerationError,
)  # fmt: skip
"""Exceptions that the libraries raise for files whose content does not match their names."""


def open_source(
    name: str | None, config: str | None = None, streaming: bool = False, document: str | None = None
) -> Splits:
    """Open all splits of a data set.

    Args:
        name: A Hub id, also with a revision (`NAME/repo@revision`), a file or a folder: the argument `dataset_name`.
        config: Configuration of a data set repository; plain files ignore it.
        streaming: Whether rows are read only when they are needed. The splits are streams then.
        document: What is a document of a text file: see `pipeline.data.documents`.

    Returns:
        The splits by name; a plain file is one split, `train`.

    Raises:
        UserError: If the data set or the configuration does not exist, or a file cannot be parsed (with the number of
            the line in JSON Lines).
    """
    if not name:
        raise UserError(Problem("dataset_name", "nothing", "give a Hub id, a file or a folder"))
    path = Path(name).expanduser()
    if (path / VOTES_FILE).is_file() and not update_data_set(path):
        remedy = "does not yet contain a vote for one of two answers; collect some with"
        raise UserError(Problem("dataset_name", name, f"{remedy} `{as_typed('app')}`"))
    if is_shards(path):
        if not streaming:
            remedy = f"must be true, because the shards in {name} are read during training"
            raise UserError(Problem("dataset_streaming", streaming, remedy))
        return open_shards(path)
    # `datasets` writes every file that it converts to its cache.
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    if check_directory(cache):
        remedy = "this cache of data sets is not writable; set HF_HOME to a writable directory"
        raise UserError(Problem("HF_HOME", cache, remedy))
    # `datasets` logs the traceback of a file that cannot be parsed; the error is reported below in one line.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if not path.exists():
        if glob.glob(str(path), recursive=True):
            raise UserError(Problem("dataset_name", name, "is a pattern; give the folder, or a list of the files"))
        if is_missing_path(name) or _suffix(path) in BUILDERS or path.suffix in COMPRESSIONS:
            raise UserError(Problem("dataset_name", name, "there is no such file or folder; correct the path"))
        return _open_of_hub(name, config, streaming)
    try:
        # A data set repository, whose README.md says which files belong to which split.
        if path.is_dir() and (config is not None or _read_configs(path)):
            _check_card(path, name)
            _check_config(str(path), config, None)
            # `datasets` caches a folder with a card under the name of the folder, whatever its path and content: from
            # the common cache, it would return the rows of another run's `data`, or outdated ones of this run's.
            cache_of_folder = str(cache / "folders" / digest_of(path))
            return datasets.load_dataset(str(path), config, cache_dir=cache_of_folder, streaming=streaming)
        if config is not None:
            # A recipe's data set was replaced on the command line, but its configuration was not.
            logger.info("dataset_config %s is ignored: plain files do not have configurations", config)
        return _open_files(path, document, streaming)
    except UNREADABLE as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(*locate_error(path, error)) from None


def _open_of_hub(name: str, config: str | None, streaming: bool) -> Splits:
    """Open a data set from the Hub, or only its files that `run --download` has fetched."""
    repo_id, revision = split_revision(name)
    options: dict[str, Any] = {"name": config, "revision": revision}
    folder = None
    # `datasets` downloads the card as well, and reports why it cannot.
    with contextlib.suppress(HfHubHTTPError, OSError, ValueError):
        folder = Path(hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision)).parent
    if streaming and constants.HF_HUB_OFFLINE:
        with contextlib.suppress(LocalEntryNotFoundError):
            download_options = {"repo_type": "dataset", "revision": revision, "local_files_only": True}
            # From here on, `repo_id` is the folder of the downloaded files, which `datasets` reads as a data set.
            repo_id = snapshot_download(repo_id, allow_patterns="README.md", **download_options)
            # Without file names, `datasets` looks for the first configuration, which may not be the fetched one.
            files = _read_configs(Path(repo_id)).get(config or "default", {}).get("data_files")
            options = {"name": config, "data_files": files}
    _check_config(repo_id, config, options.get("revision"))
    try:
        if folder is not None:
            _check_card(folder, name)
        return datasets.load_dataset(repo_id, streaming=streaming, **options)
    except ConnectionError:
        remedy = HUB_UNREACHABLE
    except (DatasetNotFoundError, FileNotFoundError):
        what = "a public data set on the Hub"
        if revision:
            what += f" with a revision {revision}"
        remedy = f"is neither a local path nor {what} (log in for a private one)"
        if constants.HF_HUB_OFFLINE:
            remedy = HUB_UNREACHABLE
    except UNREADABLE as error:
        raise UserError(*locate_error(Path(name), error)) from None
    raise UserError(Problem("dataset_name", name, remedy))


def _read_configs(folder: Path) -> dict[str, Any]:
    """Return the configurations that the card of a folder describes, by name."""
    card = folder / "README.md"
    if not (card.is_file() and card.read_bytes().startswith(b"---")):
        return {}
    return MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)


def _check_card(folder: Path, name: str) -> None:
    """Raise a `UserError` if the card of a data set says that its rows are in files outside of its folder.

    `datasets` would read them: whoever wrote the card would choose which files of this machine are data.
    """
    for settings in _read_configs(folder).values():
        # {"data_files": "a.csv"}, {"data_files": [{"split": "test", "path": ["a.csv"]}]}: all strings count as paths,
        # because a name of a split or a key does not look like a path outside of the folder.
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps([settings.get("data_files"), settings.get("data_dir")]))
        for text in texts:
            if Path(text).is_absolute() or text.startswith("~") or ".." in Path(text).parts or "://" in text:
                remedy = f"its README.md names {text}, which is outside of it; name that file in dataset_name"
                raise UserError(Problem("dataset_name", name, f"{remedy}, or copy it"))


def _check_config(builder: str, config: str | None, revision: str | None) -> None:
    """Report a configuration that is missing or does not exist, before anything is read."""
    try:
        names = datasets.get_dataset_config_names(builder, revision=revision)
    except (DatasetNotFoundError, *UNREADABLE):
        # Loading the data gives a better message.
        return
    if config in names or (config is None and (len(names) < 2 or "default" in names)):
        return
    remedy = f"choose from: {', '.join(names)}"
    if len(names) == 1:
        remedy += ", or set it to null"
    raise UserError(Problem("dataset_config", config or "nothing", f"there is no such configuration; {remedy}"))


def _open_files(path: Path, document: str | None, streaming: bool) -> Splits:
    """Open a file, or the files in a folder by their suffixes, and join the files of a split. Log the others."""
    files, unread = _list_files(path)
    if not files:
        _refuse_unreadable(path, unread)
    descriptions = [str(file.relative_to(path)) for file in unread if NO_DATA.fullmatch(file.name)]
    text_names = [name for name in descriptions if _suffix(Path(name)) in (".txt", ".md")]
    if text_names:
        what = "not read, because of its name; if it is a document, rename it"
        logger.info("%-11s %s: %s: %s", "data", path, ", ".join(text_names[:5]), what)
    if unread:
        logger.info("%s: not read, because they are not data, or empty: %s", path, _name_some(unread))

    split_of = {file: _split_of(file.relative_to(path)) for file in files}
    without_split = [file for file in files if split_of[file] is None]
    if without_split and "train" in split_of.values():
        example = next(file for file in files if split_of[file] is not None)
        remedy = f"does not name a split, as {example} does ({split_of[example]}); rename or move one of them"
        raise UserError(Problem("dataset_name", without_split[0], remedy))
    # The splits train, validation and test come first. Some of them may have no files.
    split_names = dict.fromkeys((*SPLITS, *sorted(filter(None, split_of.values()))))
    joined: dict[str, Split] = {}
    for split in split_names:
        files_of_split = [file for file in files if (split_of[file] or "train") == split]
        if files_of_split:
            joined[split] = _open_split(files_of_split, split, document, streaming)
            rows = "a stream" if streaming else f"{len(joined[split]):,} rows"
            logger.info("%-11s %s, split %s: read %d files, %s", "data", path, split, len(files_of_split), rows)
    if streaming:
        return IterableDatasetDict(joined)
    return DatasetDict(joined)


def _list_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the files that have data at a path, which is a file or a folder, and the other files; both sorted.

    Files and folders whose names begin with `.` or `__` are left out. Raise a `UserError` if the path is a file of
    another type.
    """
    if path.is_file():
        if _suffix(path) not in BUILDERS:
            remedy = CONVERSIONS.get(_suffix(path), f"save it as one of {_supported_types()}")
            raise UserError(Problem("dataset_name", path, f"this type of file is not supported; {remedy}"))
        if path.stat().st_size == 0:
            return [], [path]
        if is_blank(path):
            raise UserError(Problem("dataset_name", path, NO_TEXT))
        return [path], []
    paths: list[Path] = []
    visited: set[str] = set()
    for root, folders, names in os.walk(path, followlinks=True):
        real_path = os.path.realpath(root)
        # Links to folders may form a loop.
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        # `os.walk` enters the folders that stay in this list.
        folders[:] = sorted(folder for folder in folders if not folder.startswith((".", "__")))
        paths += [Path(root, name) for name in names if not name.startswith((".", "__"))]
    files: list[Path] = []
    unread: list[Path] = []
    for file in sorted(filter(Path.is_file, paths)):
        if _suffix(file) in BUILDERS and not NO_DATA.fullmatch(file.name) and _has_rows(file):
            files.append(file)
        else:
            unread.append(file)
    return files, unread


def _has_rows(file: Path) -> bool:
    """Return whether a file of a folder may have rows, by its first characters or the first lines of a table."""
    if is_blank(file):
        # An empty file of JSON Lines stays in a folder, because each file of a stream has a number.
        return _suffix(file) in JSON_LINES
    if BUILDERS.get(_suffix(file)) != "csv":
        return True
    # A table may consist of just a header.
    with open_text(file) as lines:
        first_lines = list(islice(filter(str.strip, lines), 2))
    return len(first_lines) == 2


def _supported_types() -> str:
    return f"{', '.join(BUILDERS)}, also compressed (.gz)"


def _name_some(files: list[Path]) -> str:
    """Return the names of the first five files, and how many more there are."""
    names = ", ".join(file.name for file in files[:5])
    return f"{names} and {len(files) - 5} more" if len(files) > 5 else names


def _refuse_unreadable(path: Path, unread: list[Path]) -> NoReturn:
    """Raise a `UserError` for a file or folder without data; it says how to convert the first file for which it can."""
    advice = ""
    for file in unread:
        if _suffix(file) in CONVERSIONS:
            advice = f"{CONVERSIONS[_suffix(file)]}, or "
            break
    remedy = f"does not contain data ({_name_some(unread) or 'no files'}); "
    raise UserError(Problem("dataset_name", path, f"{remedy}{advice}give a file or folder of {_supported_types()}"))


def _split_of(name: Path) -> str | None:
    """Return the split that a file belongs to by the names of its folders or its own, or None if they name none."""
    # "dev" is one of the names of the split `validation`.
    match = SHARDED.fullmatch(name.as_posix())
    if match:
        return SPLIT_NAMES.get(match[1].lower(), match[1])
    for part in name.parts:
        match = SPLIT.fullmatch(part)
        if match:
            return SPLIT_NAMES.get(match[1].lower(), match[1])
    return None


def _suffix(path: Path) -> str:
    """Return the lower-case suffix that says how a file is read, ignoring a suffix such as `.gz`."""
    for suffix in reversed(path.suffixes):
        if suffix.lower() not in COMPRESSIONS:
            return suffix.lower()
    return ""


def _open_split(files: list[Path], split: str, document: str | None, streaming: bool) -> Split:
    """Open the files of a split, and join their rows or, if columns differ, their texts."""
    # Each part is the first of some files, which messages name, and their rows. JSON files that are a single object
    # come first, each as a part.
    parts: list[tuple[Path, Split]] = []
    # Then come groups of files that have the same builder and options, and so are opened together.
    groups: dict[str, tuple[str, dict[str, Any], list[Path]]] = {}
    for file in files:
        _refuse_lfs_pointer(file)
        builder = BUILDERS[_suffix(file)]
        if builder == "json":
            object_rows = rows_of_json(file, is_lines=_suffix(file) in JSON_LINES)
            if object_rows:
                rows = Dataset.from_list(object_rows, split=NamedSplit(split))
                parts.append((file, rows.to_iterable_dataset() if streaming else rows))
                continue
        options: dict[str, Any] = {}
        if builder == "csv":
            options = choose_table(file)
        # Options are a dictionary, which cannot be a key.
        _, _, group = groups.setdefault(repr((builder, options)), (builder, options, []))
        group.append(file)
    for builder, options, group in groups.values():
        if builder == "text":
            rows = open_documents(group, document, streaming, split, is_single=len(files) == 1)
            parts.append((group[0], rows))
        else:
            parts += _open_group(group, builder, split, options, streaming)
    return _join_parts(parts)


def _refuse_lfs_pointer(file: Path) -> None:
    with file.open("rb") as content:
        begin = content.read(32)
    if begin.startswith(b"version https://git-lfs"):
        remedy = "is only a Git LFS pointer; fetch the file with `git lfs pull`"
        raise UserError(Problem("dataset_name", file, remedy))


def _open_group(
    files: list[Path], builder: str, split: str, options: dict[str, Any], streaming: bool
) -> list[tuple[Path, Split]]:
    """Open files that one `builder` reads with the same `options`, together if their types can be made the same.

    Return the parts, each the first of its files and their rows.
    """
    load = partial(_load, builder=builder, split=split, options={**options, "streaming": streaming})
    parts: list[tuple[Path, Split]] = []
    if streaming and len(files) > 1:
        # A stream fails at a file with other types than its first one. The first rows of each file show its types.
        sample = {**options, "streaming": True}
        if builder == "json":
            sample["chunksize"] = 1 << 17
        for file in files:
            if file.stat().st_size > 0:
                # Even for a single stream, joining determines the types of a table.
                parts.append((file, concatenate_datasets([load([file], options=sample)])))
    # There are no parts yet if the files are stored, or there is only one.
    if all(rows.features == parts[0][1].features for _, rows in parts):
        try:
            return [(files[0], load(files))]
        except UNREADABLE:
            # The types come from the first file, in which a column may have no values.
            parts = [(file, load([file])) for file in files if file.stat().st_size > 0]
    columns = set(column_names(parts[0][1]))
    if all(rows.features and set(column_names(rows)) == columns for _, rows in parts):
        typed = {**options, "streaming": streaming, "features": _unify(parts, is_json=builder == "json")}
        if builder == "csv":
            # The types of a table take the place of its converters.
            typed["converters"] = None
        return [(files[0], load(files, options=typed))]
    return parts


def _join_parts(parts: list[tuple[Path, Split]]) -> Split:
    """Join rows of several files: with equal columns, after making their types equal; with others, only their texts."""
    first, rows_of_first = parts[0]
    columns = set(column_names(rows_of_first))
    differ = False
    for file, rows in parts:
        other_columns = set(column_names(rows))
        if other_columns == columns:
            continue
        differ = True
        if "text" not in other_columns & columns:
            names = ", ".join(sorted(columns))
            other_names = ", ".join(sorted(other_columns))
            remedy = f"has the columns {names}, and {file} has {other_names}; rename or remove columns, or put the "
            remedy += "files into folders of their own, and name both in dataset_name"
            raise UserError(Problem("dataset_name", first, remedy))
    if differ:
        logger.warning("%s and other files have different columns; only `text` is read", first)
        parts = [(file, rows.select_columns("text")) for file, rows in parts]
    if len(parts) > 1:
        # Joining a single stream determines its types.
        parts = [(file, concatenate_datasets([rows])) for file, rows in parts]
        common = _unify(parts)
        parts = [(file, rows if rows.features == common else rows.cast(common)) for file, rows in parts]
    return concatenate_datasets([rows for _, rows in parts])


def _unify(parts: list[tuple[Path, Split]], is_json: bool = False) -> Features:
    """Return types that fit the columns of all files, which have the same columns.

    - A column without values in one file gets the type that it has in the other files, and integers next to floats
      become floats.
    - Any other types that differ become `Json` if `is_json`, and otherwise text.

    Raise a `UserError` if they cannot become text, because they are lists or dictionaries.
    """
    first, rows_of_first = parts[0]
    common = Features(rows_of_first.features)
    for file, rows in parts[1:]:
        for name, feature in rows.features.items():
            if common[name] == feature:
                continue
            types = (common[name], feature)
            try:
                schemas = [Features({name: type_}).arrow_schema.remove_metadata() for type_ in types]
                common |= Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                if is_json:
                    common[name] = Json()
                elif all(isinstance(type_, Value) for type_ in types):
                    common[name] = Value("string")
                else:
                    remedy = f"its column {name} has a different type in {file}; give it the same type in both files, "
                    raise UserError(Problem("dataset_name", first, remedy + "or remove it")) from None
    return common


def _load(files: list[Path], builder: str, split: str, options: dict[str, Any]) -> Split:
    """Open files with a builder of `datasets`. Raise a `UserError` if a single file cannot be read."""
    # `datasets` interprets paths as patterns.
    names = {split: [glob.escape(str(file)) for file in files]}
    try:
        return datasets.load_dataset(builder, data_files=names, split=split, **options)
    except UNREADABLE as error:
        if len(files) > 1:
            raise
        raise UserError(*locate_error(files[0], error)) from None


def locate_error(path: Path, error: Exception) -> list[Problem]:
    """Explain an error of `datasets`: name the first faulty line of each JSON Lines file, or else repeat the reason."""
    problems = []
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    for file in files:
        if _suffix(file) in JSON_LINES:
            problem = _find_faulty_line(file)
            if problem is not None:
                problems.append(problem)
    if problems:
        return problems
    cause = error.__cause__ or error
    reason = str(cause).strip().split("\n")[0][:200] or type(cause).__name__
    advice = TO_UTF8 if isinstance(cause, UnicodeError) else "correct the file"
    return [Problem("dataset_name", path, f"cannot be read ({reason}); {advice}")]


def _find_faulty_line(file: Path) -> Problem | None:
    """Return the first line of JSON Lines that is not a row; None if there is none, or the file cannot be opened."""
    # A file that cannot be read at all is reported by its reason.
    with contextlib.suppress(OSError, EOFError, zlib.error), open_bytes(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it must be an object, not {row!r:.60}")
            except (ValueError, RecursionError) as fault:
                advice = TO_UTF8 if isinstance(fault, UnicodeError) else "correct or remove it"
                remedy = f"is not valid JSON for a row ({fault}); {advice}"
                return Problem("dataset_name", f"{file}, line {number}", remedy)
    return None
