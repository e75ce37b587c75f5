"""Earlier output of a step that starts again: it moves to the run's trash, or is deleted if the user forces that."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

TRASH = ".trash"
"""Folder in the directory of a run; each command that moves something there makes a folder in it, named by the time."""


def new_trash(run_dir: Path) -> Path:
    """Return the folder for what a command that starts now replaces. The folder is not created yet."""
    now = datetime.now(UTC).replace(tzinfo=None)
    return run_dir / TRASH / now.isoformat(timespec="milliseconds").replace(":", "-")


def move(paths: Sequence[Path], trash: Path, kept: str = "") -> list[str]:
    """Move files, and the content of directories, to the same place below `trash`, with a copy of their run's record.

    Paths that do not exist are skipped. What matches the pattern `kept` stays in its directory. Return what was moved
    where, one line each.
    """
    # `trash` is <run>/.trash/<time>.
    run_dir = trash.parents[1]
    lines = []
    for path in filter(Path.exists, paths):
        target = trash / path.relative_to(run_dir)
        # The record says with which settings the files were made.
        if not trash.exists():
            trash.mkdir(parents=True)
            shutil.copy2(run_dir / "run.json", trash)
        if path.is_dir():
            # The folder itself stays: it may be a link to another disk.
            target.mkdir(parents=True, exist_ok=True)
            for child in list(path.iterdir()):
                if not fnmatch(child.name, kept):
                    shutil.move(child, target / child.name)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        lines.append(f"moved {path} to {target}" + (f", without {kept}" if kept else ""))
    return lines


def delete(paths: Sequence[Path]) -> list[str]:
    """Delete files, and the content of directories. Return what was deleted, one line each."""
    lines = []
    for path in filter(Path.exists, paths):
        for child in list(path.iterdir()) if path.is_dir() else [path]:
            # A link goes, and what it points to stays.
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
        lines.append(f"removed {path}")
    return lines
