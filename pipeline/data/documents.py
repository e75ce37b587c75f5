"""Files of text: which part of one is a document, in memory, in a stream and in shards alike; how a table is read.

By default, a document is a file. One of more than `LONGEST` characters is cut at blank lines, or at line ends where
there are none. The only file of a split is cut as well, so that a part of it can be held out:

    poems/a.txt    1,200 characters    1 document
    poems/b.txt    9,000 characters    3 documents, each of whole stanzas
"""

from __future__ import annotations

import csv
import hashlib
import io
import lzma
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, NamedSplit, Value
from fsspec.implementations.local import LocalFileSystem

from pipeline.data.arguments import OLD
from pipeline.data.columns import TEXT_COLUMNS, normalise
from pipeline.errors import Problem, UserError

LONGEST = 4096
"""Characters of the longest document that is not cut, about a thousand tokens."""

PARTS, SHORTEST = 40, 256
"""The only file of a split is cut into so many documents at least, unless they had fewer characters than these."""

PART_BYTES = 4 << 20
"""Bytes of small files that make one file of a stream. Rows are held out of the first one."""

TO_UTF8 = "if it is text, convert it to UTF-8: `iconv -f WINDOWS-1252 -t UTF-8`, or from the encoding that it has"
"""Remedy for a file that is not UTF-8."""

NULLS = ("", "NULL", "null", "NaN", "nan", "<NA>", "#N/A", r"\N")
"""Cells of a table without a value. pandas also takes None and NA for such cells, but they may be answers."""

SAMPLE, QUOTED = 1 << 16, 1 << 24
"""Characters of a table by which its separator is found, and in which quotes are looked at."""

POINTER = b"version https://git-lfs"
"""The beginning of a file that Git LFS has not fetched."""

JSON = re.compile(r'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')
"""The beginning of rows as JSON."""


def open_documents(
    files: Sequence[Path], rule: str | None, streaming: bool, split: str, is_single: bool
) -> Dataset | IterableDataset:
    """Open the documents of text files, as rows with the column `text`.

    Args:
        files: The files of a split, in order; compressed if their names say so.
        rule: `file`, `blank_line`, `lines:N` or `OLD`; None for the default.
        is_single: Whether the split has no other file, of any type.

    Raises:
        UserError: If a file cannot be read as text, or there is no such rule.
    """
    if rule not in (None, "file", "blank_line", OLD) and not re.fullmatch(r"lines:[1-9]\d*", rule):
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
    """Open a file, compressed or not. Its name may contain `::`, which `fsspec.open` would split."""
    return LocalFileSystem().open(str(path), "rb", compression="infer")


def is_utf16(path: Path) -> bool:
    """Return whether a file, compressed or not, begins with a byte order mark of UTF-16, as Excel writes it."""
    with open_bytes(path) as file:
        return file.read(2) in (b"\xff\xfe", b"\xfe\xff")


def check_fetched(file: Path) -> None:
    """Refuse a file of a repository that was cloned without Git LFS."""
    with file.open("rb") as content:
        if content.read(len(POINTER)) == POINTER:
            remedy = "is only a pointer of Git LFS; fetch the file: `git lfs pull`"
            raise UserError(Problem("dataset_name", file, remedy))


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
            if is_first:
                # Excel's "Unicode text" is a table of this encoding.
                is_table = text.encoding == "utf-16" and "\t" in piece.strip()
                if is_table or JSON.match(piece):
                    remedy = f"is not plain text; rename it to {'.tsv' if is_table else '.jsonl'}"
                    raise UserError(Problem("dataset_name", path, remedy))
            is_first = False
            end = len(piece)
            if rule == "auto" and end == longest and not piece.endswith("\n"):
                end = piece.rfind(" ", longest // 2) + 1 or end
            elif rule == OLD and not piece.endswith("\n"):
                piece, end = piece + "\n", end + 1
            rest = piece[end:]
            yield piece[:end]


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


def choose_table(file: Path) -> tuple[str, dict[str, Any], list[str]]:
    """Return the builder of `datasets` for a table, its options, and the columns of the table."""
    with open_text(file) as text:
        sample, encoding = text.read(SAMPLE), text.encoding
    if "\0" in sample:
        remedy = "is not text, or is UTF-16 without a byte order mark; save it as UTF-8"
        raise UserError(Problem("dataset_name", file, remedy))
    # Excel writes and reads a first line such as "sep=;".
    skipped = 1 if sample.startswith("sep=") else 0
    tables = []
    for separator in sample[4] if skipped else "\t" if ".tsv" in map(str.lower, file.suffixes) else ",;\t|":
        rows = filter(None, csv.reader(io.StringIO(sample, newline=""), delimiter=separator))
        first: list[list[str]] = [*islice(rows, skipped, skipped + 2), [], []]
        header, row = first[:2]
        tables.append((len(header) == len(row) > 1, len(header), separator, header, row))
    # The separator by which the first row has as many fields as the header, or else the most frequent in the header.
    *_, separator, header, row = max(tables, key=itemgetter(0, 1))
    # pandas would take the first fields of such rows for names of rows.
    if len(row) > len(header):
        remedy = f"cannot be read: row 0 has {len(row)} fields, separated by {separator!r}, and the header "
        remedy += f"{len(header)}; put fields that contain it in quotes"
        raise UserError(Problem("dataset_name", file, remedy))
    line = _find_stray_quote(file, separator)
    if line and separator != "\t":
        remedy = "has a quote within a field in quotes, or text after them; write it twice, or save the file as JSONL"
        raise UserError(Problem("dataset_name", f"{file}, line {line}", remedy))
    options = {
        "sep": separator,
        # In fields that are separated by tabs, a quote may be one of the text.
        "quoting": csv.QUOTE_NONE if line else csv.QUOTE_MINIMAL,
        "encoding": encoding,
        "skiprows": skipped,
        "keep_default_na": False,
        "na_values": NULLS,
        # Texts are not converted to numbers, which lose the zeros of 007.
        "converters": {name: _read_cell for name in header if normalise(name) in TEXT_COLUMNS},
    }
    return "csv", options, header


def _find_stray_quote(file: Path, separator: str) -> int:
    """Return the first line of a table where quotes do not surround a field; 0 if there is none.

    pandas would take all lines up to the next quote for one field.
    """
    with open_text(file) as text:
        rows = csv.reader(io.StringIO(text.read(QUOTED), newline=""), delimiter=separator, strict=True)
    try:
        deque(rows, maxlen=0)
    except csv.Error as error:
        # The others are a field that is too long for Python's limit, and one that is cut.
        return rows.line_num if "expected after" in str(error) else 0
    return 0


def _read_cell(cell: str) -> str | None:
    return None if cell in NULLS else cell
