"""What tells a complete checkpoint from a damaged one: a list of its files with sizes and checksums."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "trainer_state.json"


def find_damage(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest.

    Args:
        checkpoint: A checkpoint's directory.

    Returns:
        What is wrong with it, or `None`.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        state = json.loads((checkpoint / STATE).read_text())
        if state["global_step"] != manifest["step"]:
            return f"{STATE} is of step {state['global_step']}"
        if _sha256(checkpoint / STATE) not in manifest["states"]:
            return f"{STATE} has changed"
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def write_manifest(checkpoint: Path, step: int, evaluation_due: bool) -> None:
    """List a checkpoint's files, and bring all of them to the disk.

    Args:
        checkpoint: A finished checkpoint's directory, under whatever name.
        step: Optimizer steps so far.
        evaluation_due: Whether an evaluation of the same step comes next.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != STATE]
    entries = {
        str(path.relative_to(checkpoint)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    states = [_sha256(checkpoint / STATE)]
    content = {"step": step, "evaluation_due": evaluation_due, "states": states, "files": entries}
    _write(checkpoint, content)
    for path in [*files, checkpoint / STATE]:
        bring_to_disk(path)
    bring_to_disk(checkpoint)


def replace_state(checkpoint: Path, new: Path) -> None:
    """Replace the trainer's state of a checkpoint, which an evaluation of the same step changes.

    Args:
        checkpoint: A complete checkpoint.
        new: The new state, a file in the same directory.
    """
    bring_to_disk(new)
    content = json.loads((checkpoint / MANIFEST).read_text())
    # Both are good until the new one has taken the place of the old one.
    content["states"] = [*content["states"][-1:], _sha256(new)]
    _write(checkpoint, content)
    os.replace(new, checkpoint / STATE)


def _write(checkpoint: Path, content: dict[str, Any]) -> None:
    aside = checkpoint / f".{MANIFEST}"
    aside.write_text(json.dumps(content, indent=1) + "\n")
    bring_to_disk(aside)
    os.replace(aside, checkpoint / MANIFEST)


def bring_to_disk(path: Path) -> None:
    """Have the kernel write a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
