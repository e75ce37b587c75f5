"""The files of an output directory to publish on the Hub, without this machine's paths and tokens.

A text may contain a path as it is, in JSON, in HTML, in a URL (`al%20ice`) or in a command (`--config=/home/x.yaml`).
Paths are replaced in three passes:

1. the current directory, so that `/home/alice/work/runs/x` becomes `runs/x`;
2. the home directory, and the paths that the settings and records of the run name (`local_paths`), which may contain
   any characters: `/data/Kunde Müller/run 1/2_sft` becomes `2_sft`;
3. anything else that begins with a top-level directory of this machine, up to the first space, quote or bracket.

Guarded by tests/hub/test_published_files.py.
"""

import contextlib
import html
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import get_token
from huggingface_hub.utils import get_stored_tokens

from pipeline.errors import TOKEN
from pipeline.files import read_json

logger = logging.getLogger(__name__)

# Path in a repository -> the local file, or its content.
Files = dict[str, Path | bytes]
# Files that are useful to others, unlike pickles, locks, unfinished files and logs of trackers.
SUFFIXES = (
    ".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".gguf", ".md", ".parquet", ".html",
)  # fmt: skip

TEXTS = (".json", ".md", ".html", ".txt", ".jinja")
# Tokenizer files, which must not be changed.
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
# Files with fields that name other models and data.
SETTINGS = ("arguments.json", "adapter_config.json")
# Prefixes of files and folders that are for resuming and debugging.
UNPUBLISHED = ("checkpoint-", "completions", "manifest.json", ".")


def publishable(folder: Path, ids: Mapping[Path, str] | None = None) -> Files:
    """Return the files to push from a folder: a model, a checkpoint, a data set or a report.

    Args:
        folder: The folder.
        ids: Hub ids of other folders, by absolute path. Settings name these folders by their ids.
    """
    files: Files = {}
    paths = local_paths(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_internal = any(part.startswith(UNPUBLISHED) for part in name.parts)
        if is_internal or path.suffix not in SUFFIXES or not path.is_file():
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            logger.warning("%s is not pushed: it links to a file outside of %s.", path, folder)
            continue
        try:
            files[name.as_posix()] = public_content(path, paths, ids)
        except UnicodeDecodeError:
            logger.warning("%s is not pushed: it is not UTF-8 text, and may name paths of this machine.", path)
    return files


def public_content(path: Path, paths: set[str], ids: Mapping[Path, str] | None = None) -> Path | bytes:
    """Return a file as it is published: unchanged or, if it contains paths of this machine, as text without them.

    Args:
        path: The file.
        paths: Paths that may occur in it, of `local_paths`.
        ids: Hub ids of other folders, by absolute path.

    Raises:
        UnicodeDecodeError: If it is a text that is not in UTF-8.
    """
    if path.suffix not in TEXTS or path.name in WORDS:
        return path
    content = path.read_bytes()
    text = content.decode()
    if ids and path.name in SETTINGS:
        settings = with_hub_ids(json.loads(text), lambda name: ids.get(Path(name).absolute()))
        text = json.dumps(settings, indent=1)
    if path.suffix == ".json":
        # A damaged file is published as a text.
        with contextlib.suppress(ValueError):
            paths = paths | _absolute_paths(json.loads(text))
    public = to_bytes(without_paths(text, paths))
    if public == content:
        return path
    return public


def to_bytes(text: str) -> bytes:
    """Encode a text in UTF-8, with question marks for what cannot be encoded, such as half of a surrogate pair."""
    return text.encode("utf-8", "replace")


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without tokens and environment variables, which may be secrets."""
    return {name: value for name, value in settings.items() if name != "env" and not name.endswith("_token")}


def with_hub_ids(settings: Any, find_id: Callable[[str], str | None]) -> Any:
    """Return settings (any JSON value) in which names are replaced by Hub ids, except for the output folder.

    Example:
        {"model_name_or_path": "runs/x/1_pretrain"} -> {"model_name_or_path": "alice/x-1_pretrain"}

    Args:
        settings: The settings.
        find_id: Returns the Hub id of a name, or None to leave it as it is.
    """
    if isinstance(settings, dict):
        renamed = {key: with_hub_ids(value, find_id) for key, value in settings.items()}
        if "output_dir" in settings:
            renamed["output_dir"] = settings["output_dir"]
        return renamed
    if isinstance(settings, list):
        return [with_hub_ids(item, find_id) for item in settings]
    if isinstance(settings, str) and settings:
        return find_id(settings) or settings
    return settings


def local_paths(folder: Path) -> set[str]:
    """Return the absolute paths of a folder, and the paths that the settings and records in and around it name.

    Such a path may contain any characters, so it cannot be recognised in a text otherwise.
    """
    paths = {str(folder.absolute()), str(folder.resolve())}
    for directory in (folder, *folder.absolute().parents[:3]):
        for name in ("run.json", *SETTINGS):
            paths |= _absolute_paths(read_json(directory / name))
    return paths


def _absolute_paths(value: Any) -> set[str]:
    """Return the absolute paths among the strings of a JSON value, and among the words of its commands.

    Example:
        {"command": "python -m recipes.sft --config=/home/alice/2_sft.yaml"} -> {"/home/alice/2_sft.yaml"}
    """
    paths: set[str] = set()
    for text in _strings(value):
        if os.sep not in text:
            continue
        words = [text]
        # A text with an open quotation mark is not a command.
        with contextlib.suppress(ValueError):
            words += shlex.split(text)
        for word in words:
            # An option (`--config=/x/y`, `-o/x/y`) or a URL may begin with the path.
            path = re.sub(r"^(--?[\w-]+=|-[A-Za-z]|file://)(?=/)", "", word)
            path = re.sub("/+", "/", path)
            # A path has at least two parts, and is on one line.
            if re.fullmatch(r"/[^/\n][^\n]*/[^\n]+", path):
                paths.add(path.rstrip("/"))
    return paths


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings of a JSON value, the keys of its objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)


def without_paths(text: str, paths: Iterable[str] = ()) -> str:
    """Return a text without the Hub tokens and the absolute paths of this machine.

    A path is replaced by the part of it below the current directory or `~`, or by its last part.

    Args:
        text: The text, which may be Markdown, JSON, HTML or a template.
        paths: Paths that may occur in the text, of `local_paths`.
    """
    text = _without_tokens(text)
    text = re.sub(r"\bfile://[\w.-]*(?=/)", "", text)
    current = Path.cwd()
    # The root directory is part of every path, also of paths that are no secrets.
    if len(current.parts) > 1:
        text = _replace(text, {f"{current}/": "", str(current): "."})
    text = _replace(text, _short_names(paths))
    top_directories = "|".join(map(re.escape, os.listdir(os.sep)))
    path = rf"{BEFORE_PATH}/+(?:{top_directories})(?:/+{PATH_PART})+"
    return re.sub(path, lambda match: match.group().rsplit("/", 1)[-1], text)


def _without_tokens(text: str) -> str:
    """Replace the Hub tokens in a text by "hf_***"."""
    text = TOKEN.sub("hf_***", text)
    # The user's own tokens may look different. Very short ones would also match ordinary words.
    for token in {get_token() or "", *get_stored_tokens().values()}:
        if len(token) >= 8:
            text = text.replace(token, "hf_***")
    return text


def _short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return what stands for the home directory, for `paths` and for the directories around them: path -> name.

    For the path `/data/team/runs/x`, this is

        /data/team/runs/x   x
        /data/team/runs/    ""     so that /data/team/runs/other becomes other
        /data/team/runs     .
        /data/team/         ""     so that /data/team/config.yaml becomes config.yaml
        /data/team          .
    """
    names = {str(home): "~" for home in (Path.home(), Path.home().resolve()) if len(home.parts) > 1}
    for path in map(Path, paths):
        names[str(path)] = path.name
        for parent in path.parents:
            # Top-level directories, such as /data, are the same on most machines.
            if len(parent.parts) > 2:
                names[f"{parent}/"] = ""
                names.setdefault(str(parent), ".")
    return names


def _replace(text: str, names: Mapping[str, str]) -> str:
    """Replace paths by names, however they are written (text, JSON, HTML or URL), the longest match first."""
    spellings: dict[str, str] = {}
    for path, name in names.items():
        for spelling in (path, json.dumps(path)[1:-1], html.escape(path), quote(path)):
            if spelling in text:
                spellings[spelling] = name
    if not spellings:
        return text
    patterns = []
    for spelling in sorted(spellings, key=len, reverse=True):
        pattern = re.escape(spelling)
        if not spelling.endswith("/"):
            pattern += END_OF_NAME
        patterns.append(pattern)
    return re.sub(f"{BEFORE_PATH}(?:{'|'.join(patterns)})", lambda match: spellings[match.group()], text)


# Where a path may begin: not within a URL, a relative path or a closing HTML tag, but after a line end that is escaped
# in JSON ("\n/home") or an option of one letter ("-o/home"). Two slashes also begin a path, but a host after a colon.
BEFORE_PATH = r"(?:(?<![\w/.~<-])|(?<=\\[nrt])|(?<=(?<![\w-])-[A-Za-z]))(?!(?<=:)//(?!/))"
# Where a path may end: not within a longer name ("/data/x" is no part of "/data/x-2" or "/data/x.yaml").
END_OF_NAME = r"(?![\w-]|\.\w)"
# A part of a path that no setting names, up to a space, a quote or a bracket.
PATH_PART = r"[^\s\"'`<>|;:,()\[\]{}\\/]+"
