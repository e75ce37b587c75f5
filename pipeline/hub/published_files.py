"""The files of an output directory that are published on the Hub, without paths and tokens of this machine.

A path may stand in a text as it is, in JSON (`\\/home\\/alice`), in HTML, in a URL (`file:///home/al%20ice`) or in a
command (`--config=/home/alice/x.yaml`). Paths are therefore removed in three passes:

1. the paths that the settings and records of the run name, with any characters (`places`),
2. the current directory and the home directory,
3. anything else that begins with a directory of the root of this machine (`_replace_others`).
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import get_token
from huggingface_hub.utils import get_stored_tokens

from pipeline.errors import TOKEN
from pipeline.files import read_json

logger = logging.getLogger(__name__)

Files = dict[str, Path | bytes]
"""Path in a repository -> the local file, or its content."""

SUFFIXES = (
    ".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".gguf", ".md", ".parquet", ".html",
)  # fmt: skip
"""Files that serve a reader. Pickles, locks, unfinished files and the logs of trackers are not among them."""

TEXTS = (".json", ".md", ".html", ".txt", ".jinja")
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
"""Files of a tokenizer, which have to stay as they are."""

SETTINGS = ("arguments.json", "adapter_config.json")
"""Files with fields that name other models and data."""

SHORTEST_TOKEN = 8
"""Characters of a token. A shorter one would also match ordinary words."""

UNPUBLISHED = ("checkpoint-", "completions", "manifest.json", ".")
"""Beginnings of names of files and folders that are for resuming and for debugging."""


def publishable(folder: Path, ids: Mapping[Path, str] | None = None) -> Files:
    """Return what is pushed of a folder: a model, a checkpoint, a data set or a report.

    Args:
        folder: The folder.
        ids: Ids on the Hub of other folders, by absolute path; what the settings name there is then named by its id.
    """
    files: Files = {}
    known = places(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        unread = any(part.startswith(UNPUBLISHED) for part in name.parts)
        if unread or path.suffix not in SUFFIXES or not path.is_file():
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            logger.warning("%s is not pushed: it is a link to a file outside of %s.", path, folder)
            continue
        content: Path | bytes = path
        if is_cleaned(path):
            raw = path.read_bytes()
            try:
                text = raw.decode(json.detect_encoding(raw))
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:
                logger.warning("%s is not pushed: it is not UTF-8 text, and may name paths of this machine.", path)
                continue
            public = rename(text, ids) if ids and path.name in SETTINGS else text
            cleaned = to_bytes(clean(public, path.suffix, known))
            content = path if cleaned == raw else cleaned
        files[name.as_posix()] = content
    return files


def is_cleaned(path: Path) -> bool:
    """Return whether a file is a text that may name places of this machine."""
    return path.suffix in TEXTS and path.name not in WORDS


def clean(text: str, suffix: str, known: set[str]) -> str:
    """Return the text of a file without the paths of this machine, including the paths that its own JSON names."""
    if suffix == ".json":
        # JSON may escape slashes: `\/` and `\u002f` mean `/`, unless the backslash is itself escaped.
        text = re.sub(r"(?<!\\)((?:\\\\)*)\\(?:/|u002[fF])", r"\1/", text)
        with contextlib.suppress(ValueError, RecursionError):
            known = known | _named_paths(json.loads(text))
    return without_paths(text, known)


def to_bytes(text: str) -> bytes:
    """Return a text in UTF-8, with question marks for what that cannot encode, such as half of a surrogate pair."""
    return text.encode("utf-8", "replace")


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without tokens and variables of the environment, which may be secrets."""
    return {name: value for name, value in settings.items() if name != "env" and not name.endswith("_token")}


def rename(text: str, ids: Mapping[Path, str]) -> str:
    """Replace folders by their ids on the Hub in the JSON `text`, except for the folder that was written.

    A text that is not a JSON object, as in a damaged file, stays as it is.
    """

    def replace(value: Any) -> Any:
        if isinstance(value, list):
            return [replace(item) for item in value]
        return ids.get(Path(value).absolute(), value) if isinstance(value, str) and value else value

    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(values := json.loads(text), dict):
            renamed = {key: value if key == "output_dir" else replace(value) for key, value in values.items()}
            return json.dumps(renamed, indent=1)
    return text


def places(folder: Path) -> set[str]:
    """Return the absolute paths that a folder and its settings name; they may contain any characters.

    Args:
        folder: A run, an output directory, or a folder in it; the settings of the directories around it count as well.
    """
    found = {str(folder.absolute()), str(folder.resolve())}
    for around in (folder, *folder.absolute().parents[:3]):
        for name in ("run.json", *SETTINGS):
            found |= _named_paths(read_json(around / name))
    return found


def _named_paths(value: Any) -> set[str]:
    """Return the absolute paths among the texts of a JSON value, and among the words of its commands."""
    found: set[str] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and os.sep in value:
            words = [value]
            # A text with an open quotation mark is not a command.
            with contextlib.suppress(ValueError):
                words += shlex.split(value)
            for word in words:
                path = re.sub(r"^(--?[\w-]+=|-[A-Za-z]|file://)(?=/)", "", word)
                path = re.sub("/+", "/", path)
                if re.fullmatch(r"/[^/\n][^\n]*/[^\n]+", path):
                    found.add(path.rstrip("/"))
    return found


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """Replace the absolute paths of this machine, by what lies below the current directory or home, or by a name.

    Tokens of the Hub are replaced as well.

    Args:
        text: The text.
        known: Paths that may occur in it, from `places`. Of others, characters that also end a path are recognised as
            parts of it only if it exists.
    """
    text = TOKEN.sub("hf_***", text)
    # The user's own tokens may have another form.
    for token in {get_token() or "", *get_stored_tokens().values()}:
        text = text.replace(token, "hf_***") if len(token) >= SHORTEST_TOKEN else text
    text = re.sub(r"\bfile://[\w.-]*(?=/)", "", text)
    text = _replace(text, {f"{Path.cwd()}/": "", str(Path.cwd()): "."} if len(Path.cwd().parts) > 1 else {})
    # `/data/team/runs/x` becomes `x`, and `/data/team/other` becomes `other`, because its parent is known as well.
    names: dict[str, str] = {}
    for path in map(Path, known):
        names[str(path)] = path.name
        for parent in path.parents:
            # The directories of the root are everybody's.
            if len(parent.parts) > 2:
                names |= {f"{parent}/": "", str(parent): names.get(str(parent), ".")}
    text = _replace(text, names)
    text = _replace(text, {str(root): "~" for root in {Path.home(), Path.home().resolve()} if len(root.parts) > 1})
    return _replace_others(text)


def _replace(text: str, names: Mapping[str, str]) -> str:
    """Replace paths by names, as they stand in a text, in JSON, in HTML or in a URL; the longest that fits."""
    spelled = {found: name for path, name in names.items() for found in _spellings(path)}
    # A doubled slash means the same as a single one.
    single = re.sub("/+", "/", text)
    found = [path for path in sorted(spelled, key=len, reverse=True) if path in single]
    if not found:
        return text
    pattern = "|".join(
        re.escape(path).replace("/", "/+") + ("" if path.endswith("/") else f"(?!{GOES_ON.pattern})") for path in found
    )
    return re.sub(f"{BEFORE}(?:{pattern})", lambda match: spelled[re.sub("/+", "/", match.group())], text)


def _spellings(path: str) -> set[str]:
    """Return how a path is written in texts."""
    escaped = {path.replace(" ", "\\ "), path.replace("/", "\\/")}
    return {path, json.dumps(path)[1:-1], html.escape(path), quote(path), *escaped}


BEFORE = r"(?:(?<![\w/.~<-])|(?<=\\[nrt])|(?<=(?<![\w-])-[A-Za-z]))(?!(?<=:)//(?!/))"
"""Not before a path: the rest of a URL, of a relative path, or of an HTML tag that is closed. A line that ends in JSON
and an option of one letter are before one. Two slashes begin a path as well, but after a colon they begin a host."""

GOES_ON = re.compile(r"[\w-]|\.\w")
"""Not after the name of a file or a folder: the rest of a longer name."""

INNER = r"[^\s\"'`<>|;:,()\[\]{}\\/]+"
"""Characters that are parts of a path whether it exists or not."""


def _replace_others(text: str) -> str:
    """Replace the paths that begin with a directory of this machine's root by their last names."""
    tops = "|".join(re.escape(spelled) for name in sorted(_names(os.sep)) for spelled in _spellings(name))
    begins = re.compile(rf"{BEFORE}/+(?:{tops})/+(?=[^/\s])")
    kept, position = [], 0
    while match := begins.search(text, position):
        end = _existing(text, match.start())
        rest = re.compile(rf"(?:{INNER})?(?:/+{INNER})*").match(text, end)
        end = rest.end() if rest else end
        kept += [text[position : match.start()], text[match.start() : end].rstrip("/").rsplit("/", 1)[-1]]
        position = end
    return "".join([*kept, text[position:]])


def _existing(text: str, start: int) -> int:
    """Return where the longest path of this machine ends that begins there, which may contain any characters."""
    # In `/home/al ice/notes and more`, the path could end at any space. Directories are therefore followed from the
    # root, each time by the longest name in the directory that the text goes on with: `home`, `al ice`, `notes`.
    folder, end = os.sep, start
    while text.startswith("/", end):
        while text.startswith("/", end):
            end += 1
        fits = {
            spelled: name
            for name in _names(folder)
            for spelled in _spellings(name)
            if text.startswith(spelled, end) and not GOES_ON.match(text, end + len(spelled))
        }
        if not fits:
            return end
        longest = max(fits, key=len)
        folder, end = os.path.join(folder, fits[longest]), end + len(longest)
    return end


@functools.cache
def _names(folder: str) -> tuple[str, ...]:
    """Return the names in a directory, none if it cannot be read."""
    try:
        return tuple(os.listdir(folder))
    except OSError:
        return ()
