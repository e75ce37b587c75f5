"""Text files: how they are cut into documents, whether in memory, in a stream or in shards; how a table is read.

By default, a document is a file. One of more than `LONGEST` characters is cut at blank lines, or at line ends where
there are none: a file of 9,000 characters makes 3 documents, each of whole stanzas. The only file of a split is cut as
well, so that a part of it can be held out.
"""

import csv
import hashlib
import io
import logging
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, NamedSplit, Value
from fsspec.implementations.local import LocalFileSystem

from pipeline.data.columns import TEXT_COLUMNS, normalise
from pipeline.errors import Problem, UserError

logger = logging.getLogger(__name__)

LONGEST = 4096
"""Characters of the longest document that is not cut, about a thousand tokens."""
PARTS, SHORTEST, PART_BYTES = 40, 256, 4 << 20
"""The only file of a split is cut into at least this many documents, unless they would have fewer characters than the
second number. In a stream, small files are joined up to the third number of bytes."""
TO_UTF8 = "if it is text, convert it to UTF-8: `iconv -f WINDOWS-1252 -t UTF-8`, with the encoding that it has"
"""Remedy for a file that is not UTF-8."""
ZERO_FIRST = re.compile(r"0\d")
NULLS = ("", "NULL", "null", "NaN", "nan", "<NA>", "#N/A", r"\N")
"""Cells of a table without a value. pandas also takes None and NA for such cells, but they may be answers."""

HEADER = re.compile(r'(?:"[^"]*"|[^"\n])+(?:\n|\Z)')
"""The first line of a table whose quotes are in pairs."""
FRONT_MATTER, FRONT_MATTER_CHARACTERS = (
    re.compile(r"---[ \t]*\n(?:[ \t]*\n|#.*\n)*(?:[\w \"'-]+:(?:[ \t].*)?\n(?:.*\n)*?)?(?:---|\.\.\.)[ \t]*(?:\n|\Z)"),
    1 << 16,
)
"""The block of settings with which notes in Markdown often begin, such as `---`, `title: Whales` and `---`, and the
number of characters in which it must end. A rule of dashes before other text is none."""

JSON = re.compile(r'(\[\s*)?\{[ \t]*"[^"\n]*"[ \t]*:')
"""The beginning of rows in JSON, such as `{"text":`, but not of an object that spans several lines."""


def open_documents(
    files: Sequence[Path], rule: str | None, streaming: bool, split: str, is_single: bool
) -> Dataset | IterableDataset:
    """Open the documents of a split's text files, as rows with the column `text`.

    `rule` is `file`, `blank_line`, `lines:N` or None for the default; `is_single` says that the split has no other
    file. Raise a `UserError` if a file cannot be read as text, or there is no such rule.
    """
    if rule not in (None, "file", "blank_line") and not re.fullmatch(r"lines:[1-9]\d*", rule):
        raise UserError(Problem("document", rule, "must be file, blank_line or lines:N, such as lines:64"))
    parts: list[list[str]] = [[]]
    size, longest = 0, LONGEST
    with_settings = 0
    for file in files:
        with_settings += skipped_characters(file) > 0
        with open_text(file) as text:
            sample = text.read(LONGEST).lstrip()
            # Excel saves a table as "Unicode text".
            is_table = text.encoding == "utf-16" and "\t" in sample.partition("\n")[0]
            if (rows := JSON.match(sample)) or is_table:
                what, suffix = ("rows in JSON", ".json" if rows[1] else ".jsonl") if rows else ("a table", ".tsv")
                remedy = f"contains {what}, not plain text; rename it to {suffix}"
                raise UserError(Problem("dataset_name", file, remedy))
        if size > PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(str(file))
        size += file.stat().st_size
    if with_settings:
        logger.info("%-11s %d files begin with front matter (---), which is not read", "data", with_settings)
    if is_single:
        with open_text(files[0]) as text:
            longest = min(LONGEST, max(SHORTEST, len(text.read(PARTS * LONGEST)) // PARTS))
    options = {"parts": parts, "rule": rule or "auto", "longest": longest}
    features, name = Features({"text": Value("string")}), NamedSplit(split)
    if streaming:
        return IterableDataset.from_generator(_documents, features, options, name)
    # The cache depends on these files and on this module.
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


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a text file in UTF-8, or in UTF-16 with a byte order mark. Raise a `UserError` if it is not, or damaged."""
    try:
        with open_bytes(path) as file:
            # This is how Excel begins a text in Unicode.
            encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with open_bytes(path) as file, io.TextIOWrapper(file, encoding) as text:
            yield text
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        advice = TO_UTF8 if isinstance(error, UnicodeError) else "correct the file"
        raise UserError(Problem("dataset_name", path, f"cannot be read ({error}); {advice}")) from None


def skipped_characters(path: Path) -> int:
    """Return the number of characters of the front matter of a file in Markdown, 0 without any."""
    if ".md" not in map(str.lower, path.suffixes):
        return 0
    with open_text(path) as text:
        block = FRONT_MATTER.match(text.read(FRONT_MATTER_CHARACTERS))
    return len(block[0]) if block else 0


def _documents(parts: list[list[str]], rule: str, longest: int) -> Iterator[dict[str, str]]:
    """Yield the documents of files, except blank ones."""
    for file in chain.from_iterable(parts):
        lines = _read_lines(Path(file), longest if rule == "auto" else None)
        if rule == "file":
            documents = iter(["".join(lines)])
        elif rule.startswith("lines:"):
            documents = ("".join([line, *islice(lines, int(rule.removeprefix("lines:")) - 1)]) for line in lines)
        else:
            documents = _join_lines(lines, longest if rule == "auto" else None)
        yield from ({"text": text} for text in documents if text.strip())


def _read_lines(path: Path, longest: int | None) -> Iterator[str]:
    """Yield the lines of a file. A line of more than `longest` characters is cut, after a space if it has one."""
    skipped = skipped_characters(path)
    with open_text(path) as text:
        text.read(skipped)
        rest = ""
        while line := rest + text.readline(-1 if longest is None else longest - len(rest)):
            if "\0" in line:
                raise UserError(Problem("dataset_name", path, "is not text in UTF-8; save it as such"))
            end = len(line)
            if end == longest and not line.endswith("\n"):
                end = line.rfind(" ", longest // 2) + 1 or end
            rest = line[end:]
            yield line[:end]


def _join_lines(pieces: Iterator[str], longest: int | None) -> Iterator[str]:
    """Yield paragraphs or, with `longest`, as many at a time as fit into that many characters."""
    # The lines of the current document, their characters, and the number of lines up to the last blank one.
    lines: list[str] = []
    size, ended = 0, 0
    for piece in pieces:
        is_blank = not piece.strip()
        while lines and (ended and not is_blank if longest is None else size + len(piece) > longest):
            end = ended or len(lines)
            yield "".join(lines[:end])
            lines, ended = lines[end:], 0
            size = sum(map(len, lines))
        lines.append(piece)
        size += len(piece)
        ended = len(lines) if is_blank else ended
    yield "".join(lines)


def _header_of(table: str) -> str:
    """Return the header of a table, which is a line, or several if a name in quotes has line breaks."""
    # "Time","What is the answer?
    # (one or two sentences)"
    table = table.lstrip("\r\n")
    header = HEADER.match(table)
    return header[0] if header else next(filter(str.strip, io.StringIO(table)), "")


def choose_table(file: Path) -> dict[str, Any]:
    """Return the options with which the builder `csv` of `datasets` reads a table."""
    with open_text(file) as text:
        # Excel names an unusual separator in a line before the header, such as "sep=;".
        (sample, skipped), encoding = re.subn(r"\Asep=.*\n", "", text.read(1 << 24)), text.encoding
    if "\0" in sample:
        raise UserError(Problem("dataset_name", file, "is not text in UTF-8; save it as such"))
    # The separator is the most frequent one of the header outside quotes.
    line = _header_of(sample)
    names = re.sub('"[^"]*"', "", line)
    separator = "\t" if ".tsv" in map(str.lower, file.suffixes) else max(",;\t|", key=names.count)
    header = next(csv.reader(io.StringIO(line, newline=""), delimiter=separator), [])
    rows = csv.reader(io.StringIO(sample, newline=""), delimiter=separator, strict=True)
    stray, texts = 0, {place for place, name in enumerate(header) if normalise(name) in TEXT_COLUMNS}
    try:
        row = next(islice(filter(None, rows), 1, None), [])
        if not row:
            raise UserError(Problem("dataset_name", file, "does not have rows; give a file that has some"))
        # pandas would take the first fields of such rows for row names.
        if len(row) > len(header):
            remedy = f"cannot be read: row 0 has {len(row)} fields, separated by {separator!r}, and the header "
            remedy += f"{len(header)}; put fields that contain it in quotes"
            raise UserError(Problem("dataset_name", file, remedy))
        # Text is not converted to numbers, which would turn 007 into 7.
        texts |= {place for one in [row, *rows] for place, cell in enumerate(one) if ZERO_FIRST.match(cell)}
    except csv.Error as error:
        # Other errors: a field is too long for Python's limit, or is cut at the end of the sample.
        stray = rows.line_num + skipped if "expected after" in str(error) else 0
    # pandas would read all lines up to the next quote as one field.
    if stray and separator != "\t":
        remedy = "has a quote within a field in quotes, or text after it; double the quote, or save the file as JSONL"
        raise UserError(Problem("dataset_name", f"{file}, line {stray}", remedy))
    verbatim = [name for place, name in enumerate(header) if place in texts]
    return {
        "sep": separator,
        # In tab-separated fields, a quote may be part of the text.
        "quoting": csv.QUOTE_NONE if stray else csv.QUOTE_MINIMAL,
        "encoding": encoding,
        "skiprows": skipped,
        "keep_default_na": False,
        "na_values": NULLS,
        "converters": dict.fromkeys(verbatim, lambda cell: None if cell in NULLS else cell),
    }
