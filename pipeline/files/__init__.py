"""Locks, files that are written whole or not at all, and checks of what may be replaced.

check_directory, check_replaceable, ...   what is wrong with a path that the user names, before anything is written
check_links, open_regular                 writing to a folder from a stranger, without leaving it by a link
append_line, write_text, write_folder     writing that a killed process cannot leave half done
lock, is_locked                           one process at a time writes to a folder
read_json, read_run, read_shapes          reading of files that may be damaged, or come from a stranger
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import psutil
from safetensors import safe_open

from pipeline.errors import Problem, UserError, as_typed
from pipeline.stages import stage_order

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
"""File of a checkpoint with the trainer's state."""
MANIFEST = "manifest.json"
"""File of a checkpoint that lists all others, which makes it complete."""
BASE = "base"
"""Folder next to an adapter with its base model, if that was merged from another adapter."""
LOCK_SECONDS = 120.0
"""Seconds to wait for an earlier run, which may still be saving, to release a lock."""


def check_replaceable(
    output_dir: str | Path, written: Iterable[str], title: str = "", read: str | Path | None = None
) -> Problem | None:
    """Return what is wrong with the output directory of a step that replaces the whole directory.

    Replacing it must delete nothing but what the step wrote there earlier.

    Args:
        output_dir: The directory; it need not exist.
        written: Names of the files and folders that the step writes.
        title: Text that identifies the step's README.md, "" if it writes none.
        read: A directory that the step reads, which may not contain the output; None if there is none.
    """
    path = Path(output_dir)
    # The whole directory is replaced, with all links in it.
    problem = next(iter(check_links(path, inner=False)), None) or check_directory(path)
    if problem is not None:
        return problem
    remedy = ""
    if read is not None and Path(read).exists() and path.resolve().is_relative_to(Path(read).resolve()):
        remedy = "is or lies inside the folder of dataset_name; choose another one"
    elif path.resolve() == Path.cwd():
        remedy = "is the current directory, which cannot be replaced; name another"
    elif path.exists() and not _is_written_by(path, written, title):
        remedy = "contains other files; give a new or an empty folder"
    if remedy:
        return Problem("output_dir", output_dir, remedy)
    # The folder itself is replaced, so its parent must be writable.
    return check_directory(path.absolute().parent)


def _is_written_by(folder: Path, written: Iterable[str], title: str) -> bool:
    """Return whether a folder is empty, or has only files that a step writes and the step's own card.

    Arguments are as for `check_replaceable`. A step without a title writes no card.
    """
    names = {inner.name for inner in folder.iterdir()}
    if not names:
        return True
    if not names <= set(written):
        return False
    if not title:
        return True
    card = folder / "README.md"
    return card.is_file() and title in card.read_text(encoding="utf-8", errors="replace")


def check_directory(path: str | Path, field: str = "output_dir", writable: bool = True) -> Problem | None:
    """Return what is wrong with a path that is to be a directory, or None.

    It must be a directory, or one that can be created, and files can be written to it.

    Args:
        path: The directory; it need not exist.
        field: The field that names it, for the problem.
        writable: Whether to try writing to it. Permissions alone do not tell, as not every file system honours them.
    """
    path = Path(path)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        return Problem(field, path, f"is not a valid path ({getattr(error, 'strerror', error)}); choose another one")
    existing = nearest_existing(path)
    where = "" if existing == path else f"{existing} "
    if existing.is_symlink() and not existing.exists():
        return Problem(field, path, f"{where}is a dangling symlink; create its target")
    if not existing.is_dir():
        return Problem(field, path, f"{where}is not a directory; choose another one")
    try:
        status = existing.stat()
        if writable:
            tempfile.TemporaryDirectory(dir=existing).cleanup()
            # Leave the folder as it was.
            os.utime(existing, ns=(status.st_atime_ns, status.st_mtime_ns))
    except OSError as error:
        remedy = f"no permission to write to {existing} ({error.strerror}); choose another directory"
        return Problem(field, path, remedy)
    return None


def check_new_directory(path: Path, field: str) -> Problem | None:
    """Return what is wrong with a path that is to be a new or an empty directory, or None.

    Arguments are as for `check_directory`.
    """
    problem = next(iter(check_links(path, field=field, inner=False)), None) or check_directory(path, field)
    if problem is not None:
        return problem
    if path.is_dir() and any(path.iterdir()):
        return Problem(field, path, "is not empty; name a new directory")
    return None


def check_links(
    *written: Path, home: Path | None = None, field: str = "output_dir", inner: bool = True
) -> list[Problem]:
    """Return a problem for each link by which writing to a run would change something outside of it.

    A run may have been downloaded from a stranger, whose links may lead to any file of the machine. Pipes and devices
    are problems as well, because writing to a pipe may wait forever.

    Args:
        written: The files and folders that are written to; they need not exist.
        home: The folder that they must stay in. It may itself be a link, for instance to another disk. Default: the run
            that each lies in, which is the nearest parent with a `run.json`, or itself without one.
        field: The field that names them, for the problems.
        inner: Whether all files and folders in them are written to as well, so that links there are problems.
    """
    problems: list[Problem] = []
    for path in written:
        if "\0" in str(path):
            # `check_directory` rejects it.
            continue
        folder = home or _run_of(path)
        real_home = os.path.realpath(folder)
        pending = [path]
        visited: set[str] = set()
        while pending:
            current = pending.pop()
            target = os.path.realpath(current)
            if target in visited:
                continue
            visited.add(target)
            if not Path(target).is_relative_to(real_home):
                link = _first_outside(current, folder)
                remedy = f"is a link to {os.path.realpath(link)}, outside of the run; delete it"
                problems.append(Problem(field, link, f"{remedy}, or choose another directory"))
            elif os.path.isdir(target):
                pending += _special_entries(current) if inner else []
            elif os.path.lexists(target) and not os.path.isfile(target):
                problems.append(Problem(field, current, "is neither a file nor a folder; delete it"))
    return problems


def _run_of(path: Path) -> Path:
    """Return the run that a path lies in, or the path itself if it is in none. Links are not followed."""
    parents = Path(os.path.abspath(path)).parents
    # Unlike Path.is_file(), this does not raise for a name that is too long.
    return next((folder for folder in parents if os.path.isfile(folder / "run.json")), path)


def _first_outside(path: Path, home: Path) -> Path:
    """Return the first part of a path in the folder `home` that is a link out of it."""
    depth = len(Path(os.path.abspath(home)).parts)
    for part in (*reversed(path.parents), path):
        is_inside = len(Path(os.path.abspath(part)).parts) > depth
        if is_inside and not Path(os.path.realpath(part)).is_relative_to(os.path.realpath(home)):
            return part
    return path


def _special_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder that are anything but regular files, sorted; [] if it cannot be read."""
    entries: list[Path] = []
    # Another process may delete it meanwhile.
    with suppress(OSError), os.scandir(folder) as all_entries:
        entries += [folder / entry.name for entry in all_entries if not entry.is_file(follow_symlinks=False)]
    return sorted(entries)


def open_regular(path: Path, mode: str) -> FileIO:
    """Open a regular file without a buffer, with a `mode` of `open`.

    Raises:
        UserError: If it is a link, a pipe or a device, as it may be in a folder from a stranger.
        OSError: If it cannot be opened.
    """
    return FileIO(path, mode, opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file, as the `opener` of `open`; a link is not followed, and a pipe is not waited for."""
    remedy = "is a link, a pipe or a device, which is not written to; delete it"
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        # A link, and a pipe that nobody reads.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UserError(Problem("output_dir", path, remedy)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(Problem("output_dir", path, remedy))
    return descriptor


def nearest_existing(path: Path) -> Path:
    """Return a path or, if it does not exist, its nearest existing parent."""
    return next(part for part in (path, *path.parents) if os.path.lexists(part))


def is_missing_path(name: str) -> bool:
    """Return whether a name is a path to something that does not exist (`runs/x`), rather than an id on the Hub."""
    # A revision may contain slashes.
    repo, _ = split_revision(name)
    is_path = name.startswith((".", "/", "~", "runs/")) or repo.count("/") > 1
    return is_path and not os.path.exists(name)


def describe_folder(path: str | Path) -> str:
    """Return what to name instead, if a path that should be a model or a data set is a run or a recipe.

    Example:
        runs/pocket      -> "is a run; name one of its stages, such as runs/pocket/4_grpo"
        recipes/pocket   -> "is a recipe; its run is runs/pocket (`fourstage run recipes/pocket`)"
        any other path   -> ""
    """
    # Unlike Path.is_dir(), this does not raise for a name that is too long.
    if not os.path.isdir(path):
        return ""
    path = Path(path)
    if (path / "run.json").is_file():
        stages = [inner for inner in path.glob("[0-9]*_*") if holds_model(inner)]
        if not stages:
            return "is a run without a model yet"
        last = max(stages, key=lambda stage: stage_order(stage.name))
        return f"is a run; name one of its stages, such as {last}"
    files = sorted(path.glob("[0-9]*_*.y*ml"))
    if not files:
        return ""
    text = files[0].read_text(encoding="utf-8", errors="replace")
    match = re.search(r"^output_dir: *['\"]?([^'\"#\s]+)", text, re.MULTILINE)
    if match is None:
        return ""
    return f"is a recipe; its run is {Path(match[1]).parent} (`{as_typed('run', path)}`)"


def relocate(value: Any, home: str | Path, to: str | Path) -> Any:
    """Return a setting in which all paths inside the folder `home` are replaced by paths inside the folder `to`.

    Paths in lists and mappings are replaced as well; any other value is returned as it is.
    """
    if isinstance(value, Mapping):
        return {key: relocate(item, home, to) for key, item in value.items()}
    if isinstance(value, list):
        return [relocate(item, home, to) for item in value]
    if isinstance(value, str) and Path(value).is_relative_to(home):
        return str(to / Path(value).relative_to(home))
    return value


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `NAME/repo@revision` into id and revision, which is None for a path or a name without a revision."""
    repo, _, revision = name.partition("@")
    if not revision or os.path.exists(name):
        return name, None
    return repo, revision


def append_line(file: FileIO, line: bytes) -> None:
    """Append a line to an unbuffered file, and flush it to the disk.

    `line` has no newline, which is added. If an `OSError` is raised, the file is as it was.
    """
    end = os.fstat(file.fileno()).st_size
    try:
        # A disk that fills up may write only the beginning of the line, without an error.
        if file.write(line + b"\n") != len(line) + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def open_log(path: Path) -> FileIO:
    """Open a file of JSON lines for `append_line`, and repair its last line.

    Half a line is left if the process or the machine dies while it writes: that is removed. A line that only lacks its
    newline gets it. The caller has to keep other processes from writing.
    """
    file = open_regular(path, "a+b")
    try:
        content = path.read_bytes()
        repaired = whole_lines(content)
        if len(repaired) < len(content):
            file.truncate(len(repaired))
        else:
            file.write(repaired[len(content) :])
        os.fsync(file.fileno())
    except BaseException:
        file.close()
        raise
    return file


def whole_lines(content: bytes) -> bytes:
    """Return the complete lines of a file of JSON lines, each with its newline.

    A last line without a newline is complete if it is valid JSON.
    """
    end_of_lines = content.rfind(b"\n") + 1
    last_line = content[end_of_lines:]
    try:
        json.loads(last_line)
    except ValueError:
        # This includes an empty last line.
        return content[:end_of_lines]
    return content + b"\n"


def write_text(path: Path, text: str, is_named: bool = False) -> None:
    """Write a text to a UTF-8 file, which then has either its old or its new content, even if this process is killed.

    The folder is created if there is none. Lone surrogates become question marks. A link is replaced by the file.

    Args:
        path: The file. A device or a pipe is written to: /dev/null must not be replaced by a file.
        text: Its content.
        is_named: Whether the user has named this very file. A link to a device or a pipe, such as /dev/stdout, is then
            followed, and a pipe is waited for. In a folder from a stranger, neither is done.

    Raises:
        UserError: If it is a pipe that nobody reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode("utf-8", errors="replace")
    is_special = path.exists() and not path.is_file()
    if is_special and is_named:
        path.write_bytes(content)
        return
    if is_special and not path.is_symlink():
        with open(path, "wb", opener=_open_special) as special:
            special.write(content)
        return
    tmp_file = path.with_name(f".{path.name}.tmp")
    # In a folder from a stranger, it may be a link to any file.
    tmp_file.unlink(missing_ok=True)
    with tmp_file.open("xb") as new:
        new.write(content)
    # Otherwise, some file systems rename the file before its content is on the disk.
    fsync(tmp_file)
    os.replace(tmp_file, path)


def _open_special(path: str, flags: int) -> int:
    """Open a device or a pipe to write to it; raise a `UserError` for a pipe that nobody reads."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UserError(Problem("output_dir", path, "is a pipe that nobody reads; delete it")) from None
        raise
    os.set_blocking(descriptor, True)
    return descriptor


def delete(path: Path) -> None:
    """Delete a file, a folder with its content, or a link, but not its target. A missing path is ignored.

    What cannot be deleted in a folder stays there.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path`, which replaces it once the block has ended without an error."""
    tmp_dir = path.with_name(f".{path.name}.tmp")
    delete(tmp_dir)
    tmp_dir.mkdir(parents=True)
    try:
        yield tmp_dir
        replace_folder(path, tmp_dir)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def replace_folder(path: Path, new: Path) -> None:
    """Rename the folder `new` to `path`, on the same file system, and delete an earlier folder of that name."""
    # A folder cannot be replaced in one step. Between the two renames it is missing, but it is never partial.
    trash_dir = new.with_name(f".{path.name}.trash")
    delete(trash_dir)
    if os.path.lexists(path):
        os.replace(path, trash_dir)
    os.replace(new, path)
    fsync(path.parent)
    delete(trash_dir)


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock file `path`; False if the file system has no locks."""
    # Windows lacks it, but also imports this module.
    import fcntl

    try:
        check_regular(path)
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


@contextmanager
def lock(path: Path, orphans_only: bool = False) -> Iterator[tuple[int, ...]]:
    """Hold a lock file, and so reserve its folder, until the block or this process ends in any way.

    If another process holds the lock, wait for it, up to `LOCK_SECONDS`.

    Args:
        path: The lock file, which contains the id of the process that holds it.
        orphans_only: Whether to wait only if that process has died and its children still hold the lock. If it is
            alive, the error is raised at once.

    Yields:
        File descriptors. A child process that inherits them holds the lock as well.

    Raises:
        UserError: If another process still holds the lock, or the folder cannot be written to, or the file is a link.
    """
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_regular(path, "a+b")
    except OSError as error:
        remedy = f"cannot be written to ({error.strerror}); choose another directory"
        raise UserError(Problem("output_dir", path.parent, remedy)) from error
    with file:
        _wait_for_lock(file, path, orphans_only)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        try:
            yield (file.fileno(),)
        finally:
            # Unlocking explicitly releases the lock even if children still have the descriptor.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _wait_for_lock(file: FileIO, path: Path, orphans_only: bool) -> None:
    """Lock an open file, with arguments and errors as for `lock`.

    On a file system without locks, log a warning and lock nothing.
    """
    import fcntl

    deadline = time.monotonic() + LOCK_SECONDS
    # Process id in the last message, to print one message for each process.
    reported_holder = 0
    while True:
        # The lock ends with the last process that has the descriptor. That may be a child that continues to write
        # after its parent was killed, and whose files the next run must not touch.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = int(path.read_bytes() or 0)
        except OSError as error:
            logger.warning("%s is not locked (%s): make sure that no other run writes there.", path.parent, error)
            return
        if time.monotonic() > deadline or (orphans_only and psutil.pid_exists(holder)):
            remedy = f"process {holder} is writing there; wait for it, stop it, or choose another directory"
            raise UserError(Problem("output_dir", path.parent, remedy))
        if holder != reported_holder:
            logger.warning("Waiting for process %s, which is writing to %s.", holder, path.parent)
            reported_holder = holder
        time.sleep(0.2)


def as_list(value: Any) -> list[Any]:
    """Return the values of a field that accepts one or several: a list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a finished model or adapter: its configuration and its weights."""
    configured = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return configured and any(folder.glob("*.safetensors"))


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if the file is missing or damaged.

    If `notes` is given, a line that says what is wrong with a damaged file is appended to it.
    """
    content, fault = _read_object(path)
    if fault and notes is not None:
        notes.append(f"{path}: {fault}; skipped")
    return content


def read_run(run: Path, field: str = "RUN") -> dict[str, Any]:
    """Return the record of a run, its run.json; {} if there is none.

    `pipeline.runner.records.RunRecord` says what is in it.

    Args:
        run: Directory of the run.
        field: Field or argument that names the directory, for the error.

    Raises:
        UserError: If the file is damaged, or is no such record: the folder may be a stranger's.
    """
    path = run / "run.json"
    content, fault = _read_object(path)
    steps = content.get("steps", {})
    if not isinstance(steps, dict) or not all(map(_is_step, steps.values())):
        fault = "is not the record of a run"
    if fault:
        raise UserError(Problem(field, path, f"{fault}; remove it"))
    return content


def _is_step(entry: Any) -> bool:
    """Return whether a JSON value has the types of a step's entry in run.json, so that reading it raises no error."""
    if not isinstance(entry, dict):
        return False
    for key in ("values", "inputs", "data", "files"):
        if not isinstance(entry.get(key, {}), dict):
            return False
    for key in ("seconds", "peak_memory"):
        number = entry.get(key, 0)
        if not isinstance(number, int | float) or not 0 <= number < 2**60:
            return False
    # Seconds that are infinite, or more than a century, cannot be shown as a time.
    return bool(entry.get("seconds", 0) < 3.2e9)


def _read_object(path: Path) -> tuple[dict[str, Any], str]:
    """Return the JSON object in a file and "", or {} and what is wrong with the file; a missing file is not wrong."""
    try:
        if not path.exists():
            return {}, ""
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"cannot be read ({error})"
    if not isinstance(content, dict):
        return {}, "is not a JSON object"
    return content, ""


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of each weight in a safetensors file, from its header.

    Raises:
        OSError: If it cannot be read, or has a longer header than any model needs.
        SafetensorError: If it is not a safetensors file.
    """
    check_regular(file)
    # The first eight bytes are the length of the header.
    with file.open("rb") as start:
        header_bytes = int.from_bytes(start.read(8), "little")
    # 4 MiB suffice for 30,000 weights. Each one takes time whenever the file is read.
    if header_bytes > 4 << 20:
        raise OSError(f"its header has {header_bytes:,} bytes, which is more than any model file needs")
    with safe_open(file, framework="np") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


def check_regular(path: Path) -> None:
    """Raise an `OSError` for anything but a regular file: reading a pipe, for instance, could wait forever."""
    if not path.is_file():
        raise OSError("is not a file")
