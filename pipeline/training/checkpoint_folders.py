"""Checkpoints on disk: a folder is complete if every file matches its manifest.

runs/pocket/2_sft/
  checkpoint-100/             a complete checkpoint
    model.safetensors, optimizer.pt, ...
    trainer_state.json        replaced once, after the evaluation of the same step
    manifest.json             size and checksum of each file, and the checksums of one or two states
  .unfinished/                may be left incomplete by a kill; never resumed from
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pipeline import hardware
from pipeline.files import MANIFEST, STATE, fsync, hash_file, write_text

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"

BLOCK = 1 << 28
"""Number of bytes that one thread hashes. A larger file has a checksum of its blocks' checksums, `sha256_of_blocks`, so
that all cores can work on it: the weights and optimizer state of a large model are in few files."""


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return all checkpoints in an output directory, damaged or not, ordered by step."""
    start = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {}
    for path in Path(output_dir).glob(f"{start}*"):
        step = path.name.removeprefix(start)
        # Other programs may write folders such as checkpoint-best.
        if path.is_dir() and step.isdecimal():
            steps[path] = int(step)
    return sorted(steps, key=lambda path: steps[path])


def newest_complete(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step, or None. Skip damaged ones with a warning."""
    for checkpoint in reversed(checkpoints(output_dir)):
        damage = validate_checkpoint(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is skipped because it is damaged: %s", checkpoint, damage)
    return None


# ---- The manifest


def write_manifest(checkpoint: Path, step: int, evaluation_due: bool, seconds: float = 0.0) -> None:
    """Write the manifest of a checkpoint, and flush all files to the disk.

    Args:
        checkpoint: The folder, with all other files.
        step: The step that it was saved after.
        evaluation_due: Whether this step is also evaluated, which happens after the checkpoint is written.
        seconds: For how long the run has trained so far, also before it was resumed.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != STATE]
    checksums = _checksums({path: path.stat().st_size <= BLOCK for path in files})
    entries = {}
    for path in files:
        entries[str(path.relative_to(checkpoint))] = {"size": path.stat().st_size, **checksums[path]}
    content = {
        "step": step,
        "evaluation_due": evaluation_due,
        "seconds": seconds,
        "states": [hash_file(checkpoint / STATE)],
        "files": entries,
    }
    write_text(checkpoint / MANIFEST, json.dumps(content, indent=1) + "\n")
    # The folder comes last: when its entries are on the disk, so are the files that they name.
    for path in [*files, checkpoint / STATE, checkpoint]:
        fsync(path)


def validate_checkpoint(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest, and return its first damage in words, or None if it is complete."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if state["global_step"] != manifest["step"]:
            return f"{STATE} is from step {state['global_step']}"
        if hash_file(checkpoint / STATE) not in manifest["states"]:
            return f"{STATE} has changed"
        # Compare the sizes of all files before reading any of them.
        entries = {checkpoint / name: entry for name, entry in manifest["files"].items()}
        for path, entry in entries.items():
            name = path.relative_to(checkpoint)
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        checksums = _checksums({path: "sha256" in entry for path, entry in entries.items()})
        for path, entry in entries.items():
            if entry != {"size": entry["size"], **checksums[path]}:
                return f"{path.relative_to(checkpoint)} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({error})"
    return None


def save_state(state: TrainerState, path: Path) -> None:
    """Write the state of a trainer. The best checkpoint is saved without its path, which another machine lacks."""
    best = state.best_model_checkpoint
    state.best_model_checkpoint = Path(best).name if best is not None else None
    # In a folder from a stranger, it may be a link to any file.
    path.unlink(missing_ok=True)
    state.save_to_json(str(path))
    state.best_model_checkpoint = best


def replace_state(checkpoint: Path, state: TrainerState) -> None:
    """Replace the state in a complete checkpoint, which remains complete even if the process is killed."""
    new = checkpoint / f".{STATE}"
    save_state(state, new)
    fsync(new)
    manifest = checkpoint / MANIFEST
    content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    # Both states count as valid until the new file has replaced the old one.
    content["states"] = [*content["states"][-1:], hash_file(new)]
    write_text(manifest, json.dumps(content, indent=1) + "\n")
    os.replace(new, checkpoint / STATE)


def _checksums(files: Mapping[Path, bool]) -> dict[Path, dict[str, str]]:
    """Compute the checksum of each file, on all cores.

    Args:
        files: For each file, whether the checksum is of its whole content (`sha256`), or of the checksums of its blocks
            (`sha256_of_blocks`).
    """
    checksums = {}
    with ThreadPoolExecutor(hardware.cores()) as pool:
        # Start hashing all files before waiting for the first checksum.
        hashing = {}
        for path, is_whole in files.items():
            if is_whole:
                hashing[path] = pool.map(hash_file, [path])
            else:
                hashing[path] = pool.map(partial(_hash_block, path), range(0, path.stat().st_size, BLOCK))
        for path, digests in hashing.items():
            if files[path]:
                checksums[path] = {"sha256": next(digests)}
            else:
                checksums[path] = {"sha256_of_blocks": hashlib.sha256("".join(digests).encode()).hexdigest()}
    return checksums


def _hash_block(path: Path, start: int) -> str:
    """Return the SHA-256 of the block of a file that begins at `start`, as hexadecimal digits."""
    digest = hashlib.sha256()
    remaining = BLOCK
    with path.open("rb") as file:
        file.seek(start)
        while remaining > 0 and (piece := file.read(min(1 << 20, remaining))):
            digest.update(piece)
            remaining -= len(piece)
    return digest.hexdigest()
