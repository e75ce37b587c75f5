"""The files of an output directory that are published on the Hub, without paths and tokens of this machine.

A path may stand in a text as it is, in JSON, in HTML, in a URL (`al%20ice`) or in a command (`--config=/home/x.yaml`).
Paths are removed in three passes: the current directory; the home directory and the paths that the settings and records
of the run name, with any characters (`places`); and anything else that begins with a directory of the root of this
machine, up to the first space, quote or bracket.
"""

import contextlib
import html
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
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
# Files that serve a reader. Pickles, locks, unfinished files and the logs of trackers are not among them.
SUFFIXES = (
    ".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".gguf", ".md", ".parquet", ".html",
)  # fmt: skip

TEXTS = (".json", ".md", ".html", ".txt", ".jinja")
# Files of a tokenizer, which have to stay as they are.
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
# Files with fields that name other models and data.
SETTINGS = ("arguments.json", "adapter_config.json")
# Beginnings of names of files and folders that are for resuming and for debugging.
UNPUBLISHED = ("checkpoint-", "completions", "manifest.json", ".")


def publishable(folder: Path, ids: Mapping[Path, str] | None = None) -> Files:
    """Return what is pushed of a folder: a model, a checkpoint, a data set or a report.

    What the settings name in folders of `ids` (by absolute path) is named by the id that the folder has on the Hub.
    """
    files: Files = {}
    known = places(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        unread = any(part.startswith(UNPUBLISHED) for part in name.parts)
        if unread or path.suffix not in SUFFIXES or not path.is_file():
            continue
        try:
            if path.resolve().is_relative_to(folder.resolve()):
                files[name.as_posix()] = public_content(path, known, ids)
            else:
                logger.warning("%s is not pushed: it is a link to a file outside of %s.", path, folder)
        except UnicodeDecodeError:
            logger.warning("%s is not pushed: it is not UTF-8 text, and may name paths of this machine.", path)
    return files


def public_content(path: Path, known: set[str], ids: Mapping[Path, str] | None = None) -> Path | bytes:
    """Return a file as it is published: the file itself, or its text if that names places of this machine.

    `known` are paths that may occur in it, from `places`. A text that is not UTF-8 raises a `UnicodeDecodeError`.
    """
    if path.suffix not in TEXTS or path.name in WORDS:
        return path
    raw = path.read_bytes()
    text = raw.decode()
    if ids and path.name in SETTINGS:
        text = json.dumps(rename(json.loads(text), lambda found: ids.get(Path(found).absolute())), indent=1)
    if path.suffix == ".json":
        with contextlib.suppress(ValueError):
            known = known | _named_paths(json.loads(text))
    cleaned = to_bytes(without_paths(text, known))
    return path if cleaned == raw else cleaned


def to_bytes(text: str) -> bytes:
    """Return a text in UTF-8, with question marks for what it cannot encode, such as half of a surrogate pair."""
    return text.encode("utf-8", "replace")


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without tokens and variables of the environment, which may be secrets."""
    return {name: value for name, value in settings.items() if name != "env" and not name.endswith("_token")}


def rename(value: Any, find: Callable[[str], str | None]) -> Any:
    """Return settings with ids on the Hub, as `find` returns them, for all names except the folder that was written."""
    if isinstance(value, dict):
        return {key: item if key == "output_dir" else rename(item, find) for key, item in value.items()}
    if isinstance(value, list):
        return [rename(item, find) for item in value]
    return (find(value) or value) if isinstance(value, str) and value else value


def places(folder: Path) -> set[str]:
    """Return the absolute paths that a folder and the settings in it and around it name, with any characters."""
    found = {str(folder.absolute()), str(folder.resolve())}
    for around in (folder, *folder.absolute().parents[:3]):
        for name in ("run.json", *SETTINGS):
            found |= _named_paths(read_json(around / name))
    return found


def _named_paths(value: Any) -> set[str]:
    """Return the absolute paths among the texts of a JSON value, and among the words of its commands."""
    found: set[str] = set()
    texts = map(json.loads, re.findall(r'"(?:[^"\\]|\\.)*"', json.dumps(value)))
    for text in (text for text in texts if os.sep in text):
        words = [text]
        # A text with an open quotation mark is not a command.
        with contextlib.suppress(ValueError):
            words += shlex.split(text)
        for word in words:
            path = re.sub("/+", "/", re.sub(r"^(--?[\w-]+=|-[A-Za-z]|file://)(?=/)", "", word))
            if re.fullmatch(r"/[^/\n][^\n]*/[^\n]+", path):
                found.add(path.rstrip("/"))
    return found


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """Replace the absolute paths of this machine, by what lies below the current directory or home, or by a name.

    Tokens of the Hub are replaced as well. `known` are paths that may occur in the text, from `places`.
    """
    text = TOKEN.sub("hf_***", text)
    # The user's own tokens may have another form. A very short one would also match ordinary words.
    for token in {get_token() or "", *get_stored_tokens().values()}:
        text = text.replace(token, "hf_***") if len(token) >= 8 else text
    text = re.sub(r"\bfile://[\w.-]*(?=/)", "", text)
    text = _replace(text, {f"{Path.cwd()}/": "", str(Path.cwd()): "."} if len(Path.cwd().parts) > 1 else {})
    names = {str(root): "~" for root in {Path.home(), Path.home().resolve()} if len(root.parts) > 1}
    # `/data/team/runs/x` becomes `x`, and `/data/team/other` becomes `other`, because its parent is known as well.
    for path in map(Path, known):
        names[str(path)] = path.name
        for parent in path.parents:
            # The directories of the root are everybody's.
            if len(parent.parts) > 2:
                names |= {f"{parent}/": "", str(parent): names.get(str(parent), ".")}
    text = _replace(text, names)
    tops = "|".join(map(re.escape, os.listdir(os.sep)))
    return re.sub(rf"{BEFORE}/+(?:{tops})(?:/+{INNER})+", lambda match: match.group().rsplit("/", 1)[-1], text)


def _replace(text: str, names: Mapping[str, str]) -> str:
    """Replace paths by names, as they stand in a text, in JSON, in HTML or in a URL; the longest that fits."""
    spelled: dict[str, str] = {}
    for path, name in names.items():
        spellings = (path, json.dumps(path)[1:-1], html.escape(path), quote(path))
        spelled |= {spelling: name for spelling in spellings if spelling in text}
    if not spelled:
        return text
    longest_first = sorted(spelled, key=len, reverse=True)
    pattern = "|".join(re.escape(path) + ("" if path.endswith("/") else GOES_ON) for path in longest_first)
    return re.sub(f"{BEFORE}(?:{pattern})", lambda match: spelled[match.group()], text)


# Not before a path: the rest of a URL, of a relative path, or of an HTML tag that is closed. A line that ends in JSON
# and an option of one letter are before one. Two slashes begin a path as well, but after a colon they begin a host.
BEFORE = r"(?:(?<![\w/.~<-])|(?<=\\[nrt])|(?<=(?<![\w-])-[A-Za-z]))(?!(?<=:)//(?!/))"
# Not after the name of a file or a folder: the rest of a longer name.
GOES_ON = r"(?![\w-]|\.\w)"
# Characters of a part of a path that no setting names.
INNER = r"[^\s\"'`<>|;:,()\[\]{}\\/]+"
