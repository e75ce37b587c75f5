"""The manifest of a checkpoint: a list of its files with sizes and checksums, which shows whether it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import TrainerState

from pipeline.errors import Problem, UserError
from pipeline.files import fsync, write_text

MANIFEST = "manifest.json"
STATE = "trainer_state.json"

SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "num_labels",
)  # fmt: skip

BLOCK = 1 << 28
"""Bytes of a file that one thread hashes. A larger file has the checksum of its blocks' checksums, `sha256_of_blocks`,
so that all cores work on it: weights and optimizer of a large model are few files."""

PIECE = 1 << 20
"""Bytes that are read at a time."""

_completing: dict[Path, Future[None]] = {}
"""What completes the latest checkpoint of an output directory in this process, while training goes on."""


def complete_in_background(output_dir: str | Path, complete: Callable[[], None]) -> None:
    """Call `complete` in a thread, which `end_completion` waits for."""
    pool = ThreadPoolExecutor(1)
    _completing[Path(output_dir).absolute()] = pool.submit(complete)
    pool.shutdown(wait=False)


def completion_has_failed(output_dir: str | Path) -> bool:
    """Return, without waiting, whether something has prevented the latest checkpoint from being completed."""
    completing = _completing.get(Path(output_dir).absolute())
    return completing is not None and completing.done() and completing.exception() is not None


def wait_for_completion(output_dir: str | Path) -> BaseException | None:
    """Wait until the latest checkpoint of an output directory is complete, or return what has prevented that."""
    completing = _completing.get(Path(output_dir).absolute())
    return None if completing is None else completing.exception()


def end_completion(output_dir: str | Path) -> None:
    """Wait until the latest checkpoint of an output directory is complete, and raise what prevented that."""
    if (completing := _completing.pop(Path(output_dir).absolute(), None)) is not None:
        completing.result()


def validate_checkpoint(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest, and return the first damage found, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if state["global_step"] != manifest["step"]:
            return f"{STATE} is of step {state['global_step']}"
        if _sha256(checkpoint / STATE) not in manifest["states"]:
            return f"{STATE} has changed"
        entries = manifest["files"].items()
        for name, entry in entries:
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        whole = ["sha256" in entry for _, entry in entries]
        found = _checksums([checkpoint / name for name, _ in entries], whole)
        for (name, entry), checksum in zip(entries, found, strict=True):
            if checksum.items() != {key: entry[key] for key in checksum}.items():
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({error})"
    return None


def check_architecture(checkpoint: Path, config: Any) -> None:
    """Reject a checkpoint of a different model, whose weights would be loaded only in part.

    Adapters pass, because their checkpoints do not contain a model configuration.

    Raises:
        UserError: If the model type or a size differs.
    """
    path = checkpoint / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    present = config.to_dict()
    changed = [
        f"{name} {saved[name]} instead of {present[name]}"
        for name in SIZES
        if name in saved and name in present and saved[name] != present[name]
    ]
    if changed:
        remedy = f"has a different architecture ({', '.join(changed)}); choose another checkpoint or output_dir"
        raise UserError(Problem("resume_from_checkpoint", checkpoint, remedy))


def write_manifest(checkpoint: Path, step: int, evaluation_due: bool) -> None:
    """List a checkpoint's files, and flush all of them to the disk.

    Args:
        checkpoint: Directory of a finished checkpoint, whatever its name.
        step: Optimizer steps so far.
        evaluation_due: Whether an evaluation of the same step comes next.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != STATE]
    checksums = _checksums(files, [path.stat().st_size <= BLOCK for path in files])
    entries = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, **checksum}
        for path, checksum in zip(files, checksums, strict=True)
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


def _checksums(paths: Sequence[Path], whole: Sequence[bool]) -> list[dict[str, str]]:
    """Return the checksum of each file by its kind, computed by all cores.

    Args:
        paths: The files.
        whole: Whether a file's checksum is that of its content, in one piece.
    """
    sizes = [path.stat().st_size for path in paths]
    starts = [range(0, 1) if one else range(0, size, BLOCK) for one, size in zip(whole, sizes, strict=True)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        blocks = [
            [pool.submit(_sha256, path, start, size if one else BLOCK) for start in own]
            for path, own, size, one in zip(paths, starts, sizes, whole, strict=True)
        ]
    digests = [[block.result() for block in own] for own in blocks]
    return [
        {"sha256": own[0]} if one else {"sha256_of_blocks": hashlib.sha256("".join(own).encode()).hexdigest()}
        for own, one in zip(digests, whole, strict=True)
    ]


def _sha256(path: Path, start: int = 0, size: int | None = None) -> str:
    """Return the checksum of a file from `start` on, of `size` bytes or of all that follow."""
    left = path.stat().st_size if size is None else size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while left > 0 and (piece := file.read(min(PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
