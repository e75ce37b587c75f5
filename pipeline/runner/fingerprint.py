"""Fingerprints of configurations and of the files that they name: how the runner tells what has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# A larger file is known by its size and time of change: reading a whole corpus at every start takes minutes.
READ_WHOLE_BYTES = 64 * 2**20
# What a setting is called whose value is nobody's business.
SECRETS = ("hub_token", "push_to_hub_token", "token", "api_key", "password")


def fingerprint(content: Mapping[str, Any]) -> str:
    """Hash of a mapping, whatever the order of its keys (what JSON does not know counts by its text).

    Returns:
        64 hexadecimal digits.
    """
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may be written down and hashed."""
    plain = {key: value for key, value in values.items() if key not in SECRETS}
    if isinstance(variables := plain.get("env"), Mapping):  # any of which may be a key
        plain["env"] = sorted(map(str, variables))
    return plain


def fingerprint_path(path: Path) -> str:
    """Hash of a file, or of all files in a folder: what is in them, and of large ones the size and time.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        name = file.relative_to(path).as_posix() if file != path else ""
        status = file.stat()
        digest.update(f"{name}\0{status.st_size}\0".encode())
        if status.st_size <= READ_WHOLE_BYTES:
            digest.update(file.read_bytes())
        else:
            digest.update(str(status.st_mtime_ns).encode())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for directory, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(directory, name)
            if file.is_file():
                yield file
