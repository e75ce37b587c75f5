"""Documents of plain text files: which part of a file is one, the same in memory, in a stream and in shards.

By default, a document is a file. One of more than `LONGEST` characters is cut at blank lines, or at line ends where
there are none. The only file of a split is cut as well, so that a part of it can be held out:

    poems/a.txt    1,200 characters    1 document
    poems/b.txt    9,000 characters    3 documents, each of whole stanzas
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, Features, IterableDataset, NamedSplit, Value

from pipeline.data.arguments import OLD
from pipeline.errors import Problem, UserError

LONGEST = 4096
"""Characters of the longest document that is not cut, about a thousand tokens."""

PARTS, SHORTEST = 40, 256
"""The only file of a split is cut into so many documents at least, unless they had fewer characters than these."""

PART_BYTES = 4 << 20
"""Bytes of small files that make one file of a stream. Rows are held out of the first one."""

TO_UTF8 = "if it is text, convert it to UTF-8: `iconv -f WINDOWS-1252 -t UTF-8`, or from the encoding that it has"
"""Remedy for a file that is not UTF-8."""

LINES = re.compile(r"lines:[1-9]\d*")


def open_documents(
    files: Sequence[Path], rule: str | None, streaming: bool, split: str, is_single: bool = False
) -> Dataset | IterableDataset:
    """Open the documents of text files, as rows with the column `text`.

    Args:
        files: The files of a split, in order; compressed if their names say so.
        rule: `file`, `blank_line`, `lines:N` or `OLD`; None for the default.
        streaming: Whether to read documents only when they are asked for.
        split: Name of the split.
        is_single: Whether the split has no other file, of any type.

    Raises:
        UserError: If a file cannot be read as text, or there is no such rule.
    """
    if rule not in (None, "file", "blank_line", OLD) and not LINES.fullmatch(rule):
        raise UserError(Problem("document", rule, "must be file, blank_line or lines:N, such as lines:64"))
    parts: list[list[str]] = [[]]
    size = 0
    for file in files:
        if size > PART_BYTES and rule != OLD:
            parts.append([])
            size = 0
        parts[-1].append(str(file))
        size += file.stat().st_size
    longest = LONGEST
    if is_single:
        with open_text(files[0]) as text:
            longest = min(LONGEST, max(SHORTEST, len(text.read(PARTS * LONGEST)) // PARTS))
    options = {"parts": parts, "rule": rule or "auto", "longest": longest}
    features, name = Features({"text": Value("string")}), NamedSplit(split)
    if streaming:
        return IterableDataset.from_generator(_documents, features, options, name)
    # What is cached is of these files and of this module.
    digest = hashlib.sha256(repr([options, split, digest_of(Path(__file__), *files)]).encode()).hexdigest()[:16]
    return Dataset.from_generator(_documents, features, gen_kwargs=options, split=name, fingerprint=digest)


def digest_of(*paths: Path) -> str:
    """Return a digest of the names, sizes and times of files, and of the files in folders."""
    found = [path.resolve() for path in paths]
    files = [file for path in found for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def open_bytes(path: Path) -> Any:
    """Open a file, compressed or not."""
    return fsspec.open(str(path), "rb", compression="infer")


def is_utf16(path: Path) -> bool:
    """Return whether a file, compressed or not, begins with a byte order mark of UTF-16, as Excel writes it."""
    with open_bytes(path) as file:
        return file.read(2) in (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a text file, compressed or not, in UTF-8 or in UTF-16 with a byte order mark.

    Raises:
        UserError: If it is not text, or damaged.
    """
    try:
        encoding = "utf-16" if is_utf16(path) else "utf-8-sig"
        with open_bytes(path) as file, io.TextIOWrapper(file, encoding) as text:
            yield text
    except UnicodeError as error:
        raise UserError(Problem("dataset_name", path, f"cannot be read ({error}); {TO_UTF8}")) from None
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(Problem("dataset_name", path, f"cannot be read ({error}); correct the file")) from None


def _documents(parts: list[list[str]], rule: str, longest: int) -> Iterator[dict[str, str]]:
    """Yield the documents of files, but no blank ones."""
    for files in parts:
        # A document ends with its file, except in runs of earlier releases.
        for joined in [files] if rule == OLD else [[file] for file in files]:
            pieces = chain.from_iterable(_pieces(file, rule, longest) for file in joined)
            yield from ({"text": text} for text in _cut(pieces, rule, longest) if text.strip())


def _pieces(file: str, rule: str, longest: int) -> Iterator[str]:
    """Yield the lines of a file. By default, longer ones than a document are cut, after a space if they have any."""
    path = Path(file)
    with open_text(path) as text:
        rest, is_first = "", True
        while piece := rest + text.readline(longest - len(rest) if rule == "auto" else -1):
            if "\0" in piece:
                raise UserError(Problem("dataset_name", path, "is not text, or is UTF-16 without a byte order mark"))
            if is_first and (remedy := _not_text(piece, text.encoding)):
                raise UserError(Problem("dataset_name", path, f"is not plain text; {remedy}"))
            is_first = False
            end = len(piece)
            if rule == "auto" and end == longest and not piece.endswith("\n"):
                end = piece.rfind(" ", longest // 2) + 1 or end
            elif rule == OLD and not piece.endswith("\n"):
                piece, end = piece + "\n", end + 1
            rest = piece[end:]
            yield piece[:end]


def _not_text(line: str, encoding: str) -> str:
    """Return what to do with a file that is named as a text file and is something else, by its first line."""
    # Excel's "Unicode text" is a table of this encoding.
    if encoding == "utf-16" and "\t" in line.strip():
        return "rename it to .tsv"
    if line.startswith("version https://git-lfs"):
        return "git lfs pull"
    try:
        return "rename it to .jsonl" if isinstance(json.loads(line), dict) else ""
    except (ValueError, RecursionError):
        return ""


def _cut(pieces: Iterable[str], rule: str, longest: int) -> Iterator[str]:
    """Yield documents, which are joined from lines."""
    if rule == "file":
        yield "".join(pieces)
    elif rule not in ("auto", "blank_line"):
        pieces, number = iter(pieces), int(rule.partition(":")[2])
        while document := "".join(islice(pieces, number)):
            yield document
    else:
        # The lines of the present document, their characters, and how many of them the last blank line ends.
        lines: list[str] = []
        size, ended = 0, 0
        for piece in pieces:
            is_blank = not piece.strip()
            while lines and (size + len(piece) > longest if rule == "auto" else ended and not is_blank):
                end = ended or len(lines)
                yield "".join(lines[:end])
                lines, ended = lines[end:], 0
                size = sum(map(len, lines))
            lines.append(piece)
            size += len(piece)
            ended = len(lines) if is_blank else ended
        yield "".join(lines)
