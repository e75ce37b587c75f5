"""The files of an output directory to publish on the Hub, without this machine's paths and tokens.

A text may contain a path as it is, in JSON, in HTML, in a URL (`al%20ice`) or in a command (`--config=/home/x.yaml`).
Paths are removed in three passes: the current directory; the home directory and the paths that the settings and records
of the run name, with any characters (`places`); and anything else that begins with a top-level directory of this
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

    In settings, folders in `ids` (by absolute path) are replaced by their id on the Hub.
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
                logger.warning("%s is not pushed: it links to a file outside of %s.", path, folder)
        except UnicodeDecodeError:
            logger.warning("%s is not pushed: it is not UTF-8 text, and may name paths of this machine.", path)
    return files


def public_content(path: Path, known: set[str], ids: Mapping[Path, str] | None = None) -> Path | bytes:
    """Return a file as it is published: unchanged or, if it contains paths of this machine, as text without them.

    `known` are paths that may occur in it, from `places`. Text that is not UTF-8 raises a `UnicodeDecodeError`.
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
    """Encode a text in UTF-8, with question marks for what cannot be encoded, such as half of a surrogate pair."""
    return text.encode("utf-8", "replace")


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without tokens and environment variables, which may be secrets."""
    return {name: value for name, value in settings.items() if name != "env" and not name.endswith("_token")}


def rename(value: Any, find: Callable[[str], str | None]) -> Any:
    """Return settings with Hub ids, as `find` returns them, in place of all names but the output folder."""
    if isinstance(value, dict):
        return {key: item if key == "output_dir" else rename(item, find) for key, item in value.items()}
    if isinstance(value, list):
        return [rename(item, find) for item in value]
    return (find(value) or value) if isinstance(value, str) and value else value


def places(folder: Path) -> set[str]:
    """Return the absolute paths of a folder, and those that the settings in and around it name, with any characters."""
    found = {str(folder.absolute()), str(folder.resolve())}
    for around in (folder, *folder.absolute().parents[:3]):
        for name in ("run.json", *SETTINGS):
            found |= _named_paths(read_json(around / name))
    return found


def _named_paths(value: Any) -> set[str]:
    """Return the absolute paths among the strings of a JSON value, and among the words of its commands."""
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
    """Replace absolute paths of this machine by the part below the current directory or home, or by a name.

    Hub tokens are replaced as well. `known` are paths that may occur in the text, from `places`.
    """
    text = TOKEN.sub("hf_***", text)
    # The user's own tokens may look different. Very short ones would also match ordinary words.
    for token in {get_token() or "", *get_stored_tokens().values()}:
        text = text.replace(token, "hf_***") if len(token) >= 8 else text
    text = re.sub(r"\bfile://[\w.-]*(?=/)", "", text)
    text = _replace(text, {f"{Path.cwd()}/": "", str(Path.cwd()): "."} if len(Path.cwd().parts) > 1 else {})
    names = {str(root): "~" for root in {Path.home(), Path.home().resolve()} if len(root.parts) > 1}
    # `/data/team/runs/x` becomes `x`, and `/data/team/other` becomes `other`, because its parent is known as well.
    for path in map(Path, known):
        names[str(path)] = path.name
        for parent in path.parents:
            # Top-level directories are the same on most machines.
            if len(parent.parts) > 2:
                names |= {f"{parent}/": "", str(parent): names.get(str(parent), ".")}
    text = _replace(text, names)
    tops = "|".join(map(re.escape, os.listdir(os.sep)))
    return re.sub(rf"{BEFORE}/+(?:{tops})(?:/+{INNER})+", lambda match: match.group().rsplit("/", 1)[-1], text)


def _replace(text: str, names: Mapping[str, str]) -> str:
    """Replace paths by names, however they are written (text, JSON, HTML or URL), the longest match first."""
    spelled: dict[str, str] = {}
    for path, name in names.items():
        spellings = (path, json.dumps(path)[1:-1], html.escape(path), quote(path))
        spelled |= {spelling: name for spelling in spellings if spelling in text}
    if not spelled:
        return text
    longest_first = sorted(spelled, key=len, reverse=True)
    pattern = "|".join(re.escape(path) + ("" if path.endswith("/") else GOES_ON) for path in longest_first)
    return re.sub(f"{BEFORE}(?:{pattern})", lambda match: spelled[match.group()], text)


# What must not precede a path: part of a URL, of a relative path, or of a closing HTML tag. An escaped line end in JSON
# and a one-letter option may precede it. Two slashes also begin a path, but after a colon they begin a host.
BEFORE = r"(?:(?<![\w/.~<-])|(?<=\\[nrt])|(?<=(?<![\w-])-[A-Za-z]))(?!(?<=:)//(?!/))"
# What must not follow the name of a file or a folder: the rest of a longer name.
GOES_ON = r"(?![\w-]|\.\w)"
# Characters in a component of a path that no setting names.
INNER = r"[^\s\"'`<>|;:,()\[\]{}\\/]+"
