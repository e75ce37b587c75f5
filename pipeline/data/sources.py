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
from typing import Any

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
from pipeline.data.columns import CONVERSATIONS, TEXT_COLUMNS, Split, Splits, column_names, find_column
from pipeline.data.documents import TO_UTF8, choose_table, digest_of, open_bytes, open_documents, open_text
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
    """Open all splits of a data set; a plain file is one split, `train`. A `UserError` says why it cannot be opened.

    Args:
        name: A Hub id, also with a revision (`NAME/repo@revision`), a file or a folder: the argument `dataset_name`.
        config: Configuration of a data set repository; plain files ignore it.
        document: What is a document of a text file: see `pipeline.data.documents`.
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
    if check_directory(cache := Path(datasets.config.HF_DATASETS_CACHE)):
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
            place = {"repo_type": "dataset", "revision": revision, "local_files_only": True}
            repo_id = snapshot_download(repo_id, allow_patterns="README.md", **place)
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
        what = f"a public data set on the Hub{f' with a revision {revision}' if revision else ''}"
        unknown = f"is neither a local path nor {what} (log in for a private one)"
        remedy = HUB_UNREACHABLE if constants.HF_HUB_OFFLINE else unknown
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
        # {"data_files": "a.csv"}, {"data_files": [{"split": "test", "path": ["a.csv"]}]}
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps([settings.get("data_files"), settings.get("data_dir")]))
        for text in texts:
            if Path(text).is_absolute() or text.startswith("~") or ".." in Path(text).parts or "://" in text:
                remedy = f"its README.md names {text}, which is outside of it; name that file in dataset_name"
                raise UserError(Problem("dataset_name", name, f"{remedy}, or copy it"))


def _check_config(builder: str, config: str | None, revision: str | None) -> None:
    """Report a configuration that is missing or does not exist, before anything is read."""
    try:
        known = datasets.get_dataset_config_names(builder, revision=revision)
    except (DatasetNotFoundError, *UNREADABLE):
        # Loading the data gives a better message.
        return
    if config in known or (config is None and (len(known) < 2 or "default" in known)):
        return
    remedy = f"choose from: {', '.join(known)}{', or set it to null' if len(known) == 1 else ''}"
    raise UserError(Problem("dataset_config", config or "nothing", f"there is no such configuration; {remedy}"))


def _open_files(path: Path, document: str | None, streaming: bool) -> Splits:
    """Open a file, or the files in a folder by their suffixes, and join the files of a split. Log the others."""
    kinds = f"{', '.join(BUILDERS)}, also compressed (.gz)"
    if path.is_file() and _suffix(path) not in BUILDERS:
        remedy = f"this type of file is not supported; {CONVERSIONS.get(_suffix(path), f'save it as one of {kinds}')}"
        raise UserError(Problem("dataset_name", path, remedy))
    listed, entered = [path] if path.is_file() else [], set()
    for root, folders, names in os.walk(path, followlinks=True):
        # Links to folders may form a loop.
        is_new = (real := os.path.realpath(root)) not in entered
        entered.add(real)
        folders[:] = sorted(one for one in folders if not one.startswith((".", "__"))) if is_new else []
        listed += [Path(root, name) for name in names if is_new]
    is_data: dict[Path, bool] = {}
    for file in sorted(filter(Path.is_file, listed)):
        if not any(part.startswith((".", "__")) for part in file.relative_to(path).parts):
            suffix, is_about_data = _suffix(file), file != path and NO_DATA.fullmatch(file.name)
            # An empty file of JSON Lines stays in a folder, because each file of a stream has a number.
            is_filled = file.stat().st_size > 0 or (file != path and suffix in JSON_LINES)
            if BUILDERS.get(suffix) == "csv" and is_filled and file != path:
                # A table may consist of just a header.
                with open_text(file) as lines:
                    is_filled = len([*islice(filter(str.strip, lines), 2)]) == 2
            is_data[file] = suffix in BUILDERS and not is_about_data and is_filled
    files = [file for file in is_data if is_data[file]]
    unread = [file.name for file in is_data if not is_data[file]]
    named = ", ".join(unread[:5]) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")
    if not files:
        advice = next((CONVERSIONS[_suffix(file)] + ", or " for file in is_data if _suffix(file) in CONVERSIONS), "")
        remedy = f"does not contain data ({named or 'no files'}); {advice}give a file or folder of {kinds}"
        raise UserError(Problem("dataset_name", path, remedy))
    about_data = [str(file.relative_to(path)) for file in is_data if NO_DATA.fullmatch(file.name) and file != path]
    if texts := [name for name in about_data if _suffix(Path(name)) in (".txt", ".md")]:
        what = "not read, because of its name; if it is a document, rename it"
        logger.info("%-11s %s: %s: %s", "data", path, ", ".join(texts[:5]), what)
    if unread:
        logger.info("%s: not read, because they are not data, or empty: %s", path, named)

    found: dict[Path, str | None] = {}
    for file in files:
        # The split that a file belongs to, if any, by the names of its folders or its own.
        name = file.relative_to(path)
        match = SHARDED.fullmatch(name.as_posix()) or next(filter(None, map(SPLIT.fullmatch, name.parts)), None)
        found[file] = SPLIT_NAMES.get(match[1].lower(), match[1]) if match else None
    other = next((file for file, split in found.items() if split is None), None)
    if other is not None and "train" in found.values():
        known = next(file for file, split in found.items() if split)
        remedy = f"does not name a split, as {known} does ({found[known]}); rename or move one of them"
        raise UserError(Problem("dataset_name", other, remedy))
    joined: dict[str, Split] = {}
    for split in dict.fromkeys((*SPLITS, *sorted(filter(None, found.values())))):
        if own := [file for file in files if (found[file] or "train") == split]:
            joined[split] = _open_split(own, split, document, streaming)
            rows = "a stream" if streaming else f"{len(joined[split]):,} rows"
            logger.info("%-11s %s, split %s: read %d files, %s", "data", path, split, len(own), rows)
    return (IterableDatasetDict if streaming else DatasetDict)(joined)


def _suffix(path: Path) -> str:
    """Return the lower-case suffix that says how a file is read, ignoring a suffix such as `.gz`."""
    return next((one for one in reversed(path.suffixes) if one.lower() not in COMPRESSIONS), "").lower()


def _open_split(files: list[Path], split: str, document: str | None, streaming: bool) -> Split:
    """Open the files of a split, and join their rows or, if columns differ, their texts."""
    # Files that are read in the same way are opened together.
    groups: dict[str, tuple[str, dict[str, Any], list[Path]]] = {}
    # The first file of each part, and its rows.
    parts: list[tuple[Path, Split]] = []
    for file in files:
        with file.open("rb") as content:
            if content.read(32).startswith(b"version https://git-lfs"):
                remedy = "is only a Git LFS pointer; fetch the file with `git lfs pull`"
                raise UserError(Problem("dataset_name", file, remedy))
        if (builder := BUILDERS[_suffix(file)]) == "json":
            with open_bytes(file) as content:
                sample = content.read(1 << 16)
            if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(Problem("dataset_name", file, "is UTF-16; convert it: `iconv -f UTF-16 -t UTF-8`"))
            # Any value but a list or an object crashes pyarrow's reader.
            if _suffix(file) == ".json" and sample.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"[", b"{"):
                remedy = "must contain a list of rows, or an object; correct the file"
                raise UserError(Problem("dataset_name", file, remedy))
            if _suffix(file) == ".json" and (rows := _rows_of_object(file, sample)):
                own = Dataset.from_list(rows, split=NamedSplit(split))
                parts.append((file, own.to_iterable_dataset() if streaming else own))
                continue
        options = choose_table(file) if builder == "csv" else {}
        groups.setdefault(repr((builder, options)), (builder, options, []))[2].append(file)
    for builder, options, some in groups.values():
        if builder == "text":
            parts.append((some[0], open_documents(some, document, streaming, split, is_single=len(files) == 1)))
            continue
        load = partial(_load, builder=builder, split=split, options={**options, "streaming": streaming})
        # A stream fails at a file with other types than its first one. The first rows of each file show its types.
        filled = [file for file in some if file.stat().st_size > 0] if streaming and len(some) > 1 else []
        sample = {**options, "streaming": True} | ({"chunksize": 1 << 17} if builder == "json" else {})
        # Even for a single stream, joining determines the types of a table.
        alone = [(file, concatenate_datasets([load([file], options=sample)])) for file in filled]
        if all(part.features == alone[0][1].features for _, part in alone):
            try:
                parts.append((some[0], load(some)))
                continue
            except UNREADABLE:
                # The types come from the first file, in which a column may have no values.
                alone = [(file, load([file])) for file in some if file.stat().st_size > 0]
        columns = set(column_names(alone[0][1]))
        if all(part.features and set(column_names(part)) == columns for _, part in alone):
            # The types of a table take the place of its converters.
            typed = options | ({"converters": None} if builder == "csv" else {})
            typed |= {"streaming": streaming, "features": _unify(alone, is_json=builder == "json")}
            alone = [(some[0], load(some, options=typed))]
        parts += alone
    first, columns = parts[0][0], set(column_names(parts[0][1]))
    for file, part in parts:
        others = set(column_names(part))
        if others != columns and "text" not in others & columns:
            names, other_names = ", ".join(sorted(columns)), ", ".join(sorted(others))
            remedy = f"has the columns {names}, and {file} has {other_names}; rename or remove columns, or put the "
            remedy += "files into folders of their own, and name both in dataset_name"
            raise UserError(Problem("dataset_name", first, remedy))
    if any(set(column_names(part)) != columns for _, part in parts):
        logger.warning("%s and other files have different columns; only `text` is read", first)
        parts = [(file, part.select_columns("text")) for file, part in parts]
    if len(parts) > 1:
        parts = [(file, concatenate_datasets([part])) for file, part in parts]
        common = _unify(parts)
        parts = [(file, part if part.features == common else part.cast(common)) for file, part in parts]
    return concatenate_datasets([part for _, part in parts])


def _rows_of_object(file: Path, sample: bytes) -> list[dict[str, Any]]:
    """Return the rows of a JSON file that is a single object containing all of them; return [] for any other file."""
    # {"question": ["2 + 3?", ...], "answer": ["5", ...]}, {"version": 1, "data": [{"question": "2 + 3?", ...}, ...]}
    # or rows by their ids, {"q1": {"question": "2 + 3?", ...}, ...}. Between lines of JSON Lines, there is no comma.
    if re.match(rb"[^{]*\[", sample) or re.search(rb"\}\s*\n\s*\{", sample):
        return []
    with contextlib.suppress(ValueError, RecursionError), open_bytes(file) as content:
        table = json.load(content)
        lists = [value for value in table.values() if isinstance(value, list) and value]
        tables = [rows for rows in lists if all(isinstance(row, dict) for row in rows)]
        if not tables and len(lists) == len(table) and len({*map(len, lists)}) == 1:
            return [dict(zip(table, row, strict=True)) for row in zip(*lists, strict=True)]
        if len(table) > 1 and all(isinstance(row, dict) for row in table.values()):
            tables = [[*table.values()]]
        # A single row may have a list as well.
        if len(tables) == 1 and not find_column(table, *CONVERSATIONS, *TEXT_COLUMNS):
            return tables[0]
    return []


def _unify(parts: list[tuple[Path, Split]], is_json: bool = False) -> Features:
    """Return types that fit the columns of all files. Types that do not match become `Json` in JSON, otherwise text.

    A column without values in one file has the type of the others. Raise a `UserError` if nothing fits.
    """
    first, common = parts[0][0], Features(parts[0][1].features)
    for file, part in parts[1:]:
        for name in [name for name, feature in part.features.items() if common[name] != feature]:
            pair = [Features({name: one}) for one in (common[name], part.features[name])]
            try:
                schemas = [one.arrow_schema.remove_metadata() for one in pair]
                common |= Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                if not is_json and not all(isinstance(one[name], Value) for one in pair):
                    remedy = f"its column {name} has a different type in {file}; give it the same type in both files, "
                    raise UserError(Problem("dataset_name", first, remedy + "or remove it")) from None
                common[name] = Json() if is_json else Value("string")
    return common


def _load(files: list[Path], builder: str, split: str, options: dict[str, Any]) -> Split:
    # `datasets` interprets paths as patterns.
    names = {split: [glob.escape(str(file)) for file in files]}
    try:
        return datasets.load_dataset(builder, data_files=names, split=split, **options)
    except UNREADABLE as error:
        if len(files) > 1:
            raise
        raise UserError(*locate_error(files[0], error)) from None


def locate_error(path: Path, error: Exception) -> list[Problem]:
    """Explain an error of `datasets`: name the lines of JSON Lines that cannot be parsed, or else repeat its reason."""
    problems = []
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if _suffix(file) not in JSON_LINES:
            continue
        # A file that cannot be read at all is reported below.
        with contextlib.suppress(OSError, EOFError, zlib.error), open_bytes(file) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip() and not isinstance(row := json.loads(line), dict):
                        raise ValueError(f"it must be an object, not {row!r:.60}")
                except (ValueError, RecursionError) as fault:
                    advice = TO_UTF8 if isinstance(fault, UnicodeError) else "correct or remove it"
                    remedy = f"is not valid JSON for a row ({fault}); {advice}"
                    problems.append(Problem("dataset_name", f"{file}, line {number}", remedy))
                    break
    cause = error.__cause__ or error
    reason = str(cause).strip().split("\n")[0][:200] or type(cause).__name__
    advice = TO_UTF8 if isinstance(cause, UnicodeError) else "correct the file"
    return problems or [Problem("dataset_name", path, f"cannot be read ({reason}); {advice}")]
