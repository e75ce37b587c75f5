"""Fingerprints of the files that a step reads, and its settings without secrets, by which the runner sees changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

READ_WHOLE_BYTES = 64 * 2**20
"""A larger file is identified by its size and modification time, because reading a whole corpus takes minutes."""

SECRETS = ("hub_token", "push_to_hub_token", "token", "api_key", "password")
"""Settings that are neither written to disk nor hashed."""


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that may be written down and hashed."""
    plain = {key: value for key, value in values.items() if key not in SECRETS}
    if isinstance(variables := plain.get("env"), Mapping):  # any of which may be a key
        plain["env"] = sorted(map(str, variables))
    return plain


def fingerprint_path(path: Path) -> str:
    """Hash the content of a file or of all files in a folder; for large or unreadable ones, their size and time.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file()):
        name = file.relative_to(path).as_posix() if file != path else ""
        status = file.stat()
        digest.update(f"{name}\0{status.st_size}\0".encode())
        try:
            content = file.read_bytes() if status.st_size <= READ_WHOLE_BYTES else None
        except OSError:  # the step itself will report it
            content = None
        digest.update(str(status.st_mtime_ns).encode() if content is None else content)
    return digest.hexdigest()
