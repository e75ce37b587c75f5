"""Earlier output of a step that starts again: it moves to the run's trash, or is deleted if the user forces that."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

TRASH = ".trash"
"""Folder in the directory of a run; each command that moves something there makes a folder in it, named by the time."""


def clear(paths: Sequence[Path], trash: Path | None, kept: str = "") -> list[str]:
    """Move files, and the content of directories, to the same place below `trash`, or delete them without one.

    The run's record is copied there, because it says with which settings they were made. Paths that do not exist are
    skipped. What matches the pattern `kept` stays in its directory. Return what became of each path, one line each.
    """
    lines = []
    for path in filter(Path.exists, paths):
        # The folder itself stays: it may be a link to another disk.
        children = list(path.iterdir()) if path.is_dir() else [path]
        if trash is None:
            for child in children:
                # A link goes, and what it points to stays.
                if child.is_dir() and not child.is_symlink():
                    shutil.rmtree(child)
                else:
                    child.unlink()
            lines.append(f"removed {path}")
            continue
        # `trash` is <run>/.trash/<time>.
        run_dir = trash.parents[1]
        target = trash / path.relative_to(run_dir)
        if not trash.exists():
            trash.mkdir(parents=True)
            shutil.copy2(run_dir / "run.json", trash)
        folder = target if path.is_dir() else target.parent
        folder.mkdir(parents=True, exist_ok=True)
        for child in children:
            if not fnmatch(child.name, kept):
                shutil.move(child, folder / child.name)
        lines.append(f"moved {path} to {target}" + (f", without {kept}" if kept else ""))
    return lines
