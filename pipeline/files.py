"""Locks, files that are written whole or not at all, and what may be replaced."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.errors import Problem, UserError

logger = logging.getLogger(__name__)


def check_replaceable(
    output_dir: str | Path, own: Iterable[str], title: str = "", read: str | Path | None = None
) -> list[Problem]:
    """Find out whether a step that replaces its whole output directory may, and would delete only what is its own.

    Args:
        output_dir: The directory; it need not exist.
        own: Names of the files and folders that the step writes there.
        title: What its README.md says, by which it is known; "" if it writes none.
        read: A directory that the step reads, if it reads one.

    Returns:
        Why it may not be replaced: other files, it is a file or what is read, or nothing can be written there.
    """
    path = Path(output_dir)
    if problem := below_a_file(path):
        return [problem]
    if read is not None and Path(read).exists() and path.resolve().is_relative_to(Path(read).resolve()):
        return [Problem("output_dir", output_dir, "is, or lies in, what dataset_name names; choose another folder")]
    if path.resolve() == Path.cwd():
        return [Problem("output_dir", output_dir, "is the current directory, which cannot be replaced; name another")]
    if path.exists() and not (path.is_dir() and _is_own(path, set(own), title)):
        return [Problem("output_dir", output_dir, "holds other files; give a new or an empty folder")]
    problem = unwritable(output_dir, path.absolute().parents)
    return [problem] if problem else []


def _is_own(folder: Path, own: set[str], title: str) -> bool:
    """Whether all that a folder holds was written by the step that writes `own`."""
    found = {inner.name for inner in folder.iterdir()}
    if not found <= own:
        return False
    card = folder / "README.md"
    return not found or not title or (card.is_file() and title in card.read_text(encoding="utf-8", errors="replace"))


def unwritable(output_dir: str | Path, folders: Iterable[Path]) -> Problem | None:
    """The problem of an output directory if nothing can be written to the first of `folders` that is there.

    It is tried: not every file system goes by its permissions.
    """
    nearest = next(folder for folder in folders if folder.exists())
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        remedy = f"no permission to write to {nearest} ({error.strerror}); choose another directory"
        return Problem("output_dir", output_dir, remedy)
    return None


def below_a_file(path: Path, field: str = "output_dir") -> Problem | None:
    """The problem of a directory that cannot be made, because a part of its path is a file."""
    file = next((part for part in (path, *path.parents) if part.is_file()), None)
    return Problem(field, path, f"{file} is a file; choose a directory") if file else None


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, either whole or not at all.

    Args:
        path: The file. Its folder is created if it does not exist; an earlier file is replaced.
        text: Its content. Lone surrogates, which UTF-8 cannot encode, become question marks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_file = path.with_name(f".{path.name}.tmp")
    tmp_file.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    fsync(tmp_file)
    os.replace(tmp_file, path)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Write a folder, either whole or not at all.

    Args:
        path: The folder. An earlier one is replaced once the block has ended without an error.

    Yields:
        An empty folder to write to, beside `path`.
    """
    tmp_dir = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(tmp_dir, ignore_errors=True)
    tmp_dir.mkdir(parents=True)
    try:
        yield tmp_dir
        replace_folder(path, tmp_dir)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def replace_folder(path: Path, new: Path) -> None:
    """Rename the folder `new` to `path`, and delete an earlier folder of that name.

    Args:
        path: The name to give.
        new: A complete folder on the same file system.
    """
    trash_dir = new.with_name(f".{path.name}.trash")
    shutil.rmtree(trash_dir, ignore_errors=True)
    if path.exists():
        os.replace(path, trash_dir)
    os.replace(new, path)
    fsync(path.parent)
    shutil.rmtree(trash_dir, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk; Windows cannot flush folders."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LOCK = ".lock"


WAIT_FOR_LOCK = 120.0
"""Seconds that a run waits for an earlier one to let go of its output directory (it may be saving)."""


def lock(output_dir: str) -> IO[Any]:
    """Keep other runs out of an output directory until this process ends, however it ends.

    Args:
        output_dir: An existing directory.

    Returns:
        The lock; it is held as long as this object lives.

    Raises:
        UserError: If another run still holds it after `WAIT_FOR_LOCK`.
    """
    file = open(Path(output_dir) / LOCK, "w")  # noqa: SIM115 (being open is what holds the lock)
    deadline = time.monotonic() + WAIT_FOR_LOCK
    waiting = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                remedy = "another run writes there; wait for it, stop it, or choose another directory"
                raise UserError(Problem("output_dir", output_dir, remedy)) from None
            if not waiting:
                logger.warning("Another run writes to %s: waiting for it to end.", output_dir)
                waiting = True
            time.sleep(0.5)
