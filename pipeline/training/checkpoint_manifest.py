"""The manifest of a checkpoint: a list of its files with sizes and checksums, which shows whether it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from transformers import TrainerState

from pipeline.files import fsync, write_text

MANIFEST = "manifest.json"
STATE = "trainer_state.json"


def validate_checkpoint(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest, and return the first damage found, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
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
    """List a checkpoint's files, and flush all of them to the disk.

    Args:
        checkpoint: Directory of a finished checkpoint, whatever its name.
        step: Optimizer steps so far.
        evaluation_due: Whether an evaluation of the same step comes next.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != STATE]
    entries = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    states = [_sha256(checkpoint / STATE)]
    content = {"step": step, "evaluation_due": evaluation_due, "states": states, "files": entries}
    write_text(checkpoint / MANIFEST, json.dumps(content, indent=1) + "\n")
    for path in [*files, checkpoint / STATE, checkpoint]:
        fsync(path)


def save_state(state: TrainerState, path: Path) -> None:
    """Write a trainer's state, in which the best checkpoint has its name only: it may be read on another machine."""
    best = state.best_model_checkpoint
    state.best_model_checkpoint = Path(best).name if best is not None else None
    state.save_to_json(str(path))
    state.best_model_checkpoint = best


def replace_state(checkpoint: Path, new: Path) -> None:
    """Replace the trainer's state in a complete checkpoint by the file `new`, which lies in the same directory."""
    fsync(new)
    content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    # Both states are valid until the new file has replaced the old one.
    content["states"] = [*content["states"][-1:], _sha256(new)]
    write_text(checkpoint / MANIFEST, json.dumps(content, indent=1) + "\n")
    os.replace(new, checkpoint / STATE)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
