"""What of an output directory is of use on the Hub, without the paths of this machine."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from pipeline.errors import TOKEN

Files = dict[str, Path | bytes]
"""Path in a repository -> the local file, or its content."""

SUFFIXES = (
    ".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".gguf", ".md", ".parquet", ".html",
)  # fmt: skip
"""Files that serve a reader. Pickles, locks, unfinished files and the logs of trackers are not among them."""

TEXTS = (".json", ".md", ".html")
WORDS = ("tokenizer.json", "vocab.json")
"""Files of a tokenizer, which have to stay as they are."""

SETTINGS = ("arguments.json", "adapter_config.json")
"""Files with fields that name other models and data."""

LEFT_OUT = ("checkpoint-", "completions", "manifest.json", ".")
"""Beginnings of names of files and folders that are for resuming and for debugging."""


def publishable(folder: Path, ids: Mapping[Path, str] | None = None) -> Files:
    """Return what is pushed of a folder: a model, a checkpoint, a data set or a report.

    Args:
        folder: The folder.
        ids: Ids on the Hub of other folders, by absolute path; what the settings name there is then named by its id.
    """
    files: Files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        unread = any(part.startswith(LEFT_OUT) for part in name.parts)
        if unread or path.suffix not in SUFFIXES or not path.is_file():
            continue
        files[name.as_posix()] = path
        if path.suffix in TEXTS and path.name not in WORDS:
            text = path.read_text(encoding="utf-8", errors="replace")
            public = rename(text, ids) if ids and path.name in SETTINGS else text
            if (public := without_paths(public)) != text:
                files[name.as_posix()] = to_bytes(public)
    return files


def to_bytes(text: str) -> bytes:
    """Return a text in UTF-8, with question marks for what that cannot encode, such as half of a surrogate pair."""
    return text.encode("utf-8", "replace")


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that may hold secrets: tokens, and variables of the environment."""
    return {name: value for name, value in settings.items() if name != "env" and not name.endswith("_token")}


def rename(text: str, ids: Mapping[Path, str]) -> str:
    """Replace folders by their ids on the Hub in the JSON `text`, except for the folder that was written."""

    def replace(value: Any) -> Any:
        if isinstance(value, list):
            return [replace(item) for item in value]
        return ids.get(Path(value).absolute(), value) if isinstance(value, str) and value else value

    values = json.loads(text)
    return json.dumps(
        {key: value if key == "output_dir" else replace(value) for key, value in values.items()}, indent=1
    )


def without_paths(text: str) -> str:
    """Replace the absolute paths of this machine, by what lies below the current directory or home, or by a name.

    Tokens of the Hub are replaced as well.
    """
    text = TOKEN.sub("hf_***", text)
    if (token := get_token() or "").startswith("hf_"):  # it may be of another form
        text = text.replace(token, "hf_***")
    for root, short in ((Path.cwd(), "."), (Path.home(), "~")):
        for spelled in {str(root), str(root.resolve()), json.dumps(str(root))[1:-1]}:
            if len(root.parts) > 1 and spelled in text:
                text = re.sub(rf"{BEFORE}{re.escape(spelled)}[/\\]+(?=\w)", "~/" if short == "~" else "", text)
                text = re.sub(rf"{BEFORE}{re.escape(spelled)}(?![\w.-])", short, text)
    return _absolute_path().sub(lambda match: Path(match.group()).name, text)


BEFORE = r"(?:(?<![\w/.~<-])|(?<=\\[nrt]))"
"""Not before a path: the rest of a URL, of a relative path, or of an HTML tag that is closed. A line that ends in JSON
is before one."""


@functools.cache
def _absolute_path() -> re.Pattern[str]:
    """Return a pattern of paths that begin with a directory of this machine's root."""
    tops = "|".join(re.escape(name) for name in sorted(os.listdir(os.sep)))
    return re.compile(rf"{BEFORE}/(?:{tops})(?:/[^\s\"'`<>|;:,()\[\]{{}}\\]+)+")
