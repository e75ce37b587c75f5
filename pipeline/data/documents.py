"""Text files: how they are cut into documents, whether in memory, in a stream or in shards; how a table is read.

By default, a document is a file. One of more than `LONGEST` characters is cut at blank lines, or at line ends where
there are none: a file of 9,000 characters makes 3 documents, each of whole stanzas. The only file of a split is cut as
well, so that a part of it can be held out.
"""

import csv
import hashlib
import io
import json
import logging
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, NamedSplit, Value
from fsspec.implementations.local import LocalFileSystem

from pipeline.data.arguments import CONVERSATIONS
from pipeline.data.columns import TEXT_COLUMNS, find_column, normalise
from pipeline.errors import Problem, UserError

logger = logging.getLogger(__name__)

LONGEST = 4096
"""Characters of the longest document that is not cut, about a thousand tokens."""
PARTS = 40
"""The only file of a split is cut into at least this many documents, unless they would be shorter than `SHORTEST`."""
SHORTEST = 256
"""Characters of a document below which the only file of a split is cut into fewer `PARTS`."""
PART_BYTES = 4 << 20
"""Bytes up to which small files are joined in a stream."""
BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")
"""White space, also without width."""
NO_TEXT = "contains nothing but white space; give one with text"
"""Remedy for a data set that is blank."""
TO_UTF8 = "if it is text, convert it to UTF-8: `iconv -f WINDOWS-1252 -t UTF-8`, with the encoding that it has"
"""Remedy for a file that is not UTF-8."""
ZERO_FIRST = re.compile(r"0\d")
"""The beginning of a cell such as 007, which is not a number but an id."""
NULLS = ("", "NULL", "null", "NaN", "nan", "<NA>", "#N/A", r"\N")
"""Cells of a table without a value. pandas also takes None and NA for such cells, but they may be answers."""

SAMPLE_CHARACTERS = 1 << 24
"""Characters of a table by which the options for reading it are chosen."""
HEADER = re.compile(r'(?:"[^"]*"|[^"\n])+(?:\n|\Z)')
"""The first line of a table whose quotes are in pairs."""
FRONT_MATTER = re.compile(
    r"---[ \t]*\n(?:[ \t]*\n|#.*\n)*(?:[\w \"'-]+:(?:[ \t].*)?\n(?:.*\n)*?)?(?:---|\.\.\.)[ \t]*(?:\n|\Z)"
)
"""The block of settings with which notes in Markdown often begin, such as `---`, `title: Whales` and `---`. A rule of
dashes before other text is none."""
FRONT_MATTER_CHARACTERS = 1 << 16
"""Number of characters in which the front matter must end."""

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
    # A stream reads each part as one of its files.
    parts: list[list[str]] = [[]]
    size = 0
    front_matter_count = 0
    for file in files:
        if skipped_characters(file) > 0:
            front_matter_count += 1
        _check_is_prose(file)
        if size > PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(str(file))
        size += file.stat().st_size
    if front_matter_count:
        logger.info("%-11s %d files begin with front matter (---), which is not read", "data", front_matter_count)
    longest = LONGEST
    if is_single:
        with open_text(files[0]) as text:
            # A file with more characters than these has parts of `LONGEST`.
            characters = len(text.read(PARTS * LONGEST))
        longest = max(SHORTEST, characters // PARTS)
        longest = min(longest, LONGEST)
    options = {"parts": parts, "rule": rule or "auto", "longest": longest}
    features = Features({"text": Value("string")})
    name = NamedSplit(split)
    if streaming:
        return IterableDataset.from_generator(_documents, features, options, name)
    # The cache depends on these files and on this module.
    digest = hashlib.sha256(repr([options, split, digest_of(Path(__file__), *files)]).encode()).hexdigest()[:16]
    return Dataset.from_generator(_documents, features, gen_kwargs=options, split=name, fingerprint=digest)


def _check_is_prose(file: Path) -> None:
    """Raise a `UserError` if a text file begins as rows in JSON, or as a table from Excel."""
    with open_text(file) as text:
        sample = text.read(LONGEST).lstrip()
        encoding = text.encoding
    rows = JSON.match(sample)
    if rows:
        suffix = ".json" if rows[1] else ".jsonl"
        raise UserError(Problem("dataset_name", file, f"contains rows in JSON, not plain text; rename it to {suffix}"))
    # Excel saves a table as "Unicode text".
    if encoding == "utf-16" and "\t" in sample.partition("\n")[0]:
        raise UserError(Problem("dataset_name", file, "contains a table, not plain text; rename it to .tsv"))


def digest_of(*paths: Path) -> str:
    """Return a digest of the names, sizes and times of files, and of the files in folders."""
    files: list[Path] = []
    for path in paths:
        path = path.resolve()
        files += sorted(path.rglob("*")) if path.is_dir() else [path]
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


def is_blank(path: Path) -> bool:
    """Return whether a file is empty, or has nothing but white space. One that cannot be read is not blank."""
    try:
        with open_bytes(path) as file, io.TextIOWrapper(file, "utf-8", errors="replace") as text:
            # Most files end this loop after their first characters.
            while part := text.read(1 << 16):
                if not BLANK.fullmatch(part):
                    return False
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return False
    return True


def skipped_characters(path: Path) -> int:
    """Return the number of characters of the front matter of a file in Markdown, 0 without any."""
    if ".md" not in map(str.lower, path.suffixes):
        return 0
    with open_text(path) as text:
        block = FRONT_MATTER.match(text.read(FRONT_MATTER_CHARACTERS))
    return len(block[0]) if block else 0


def _documents(parts: list[list[str]], rule: str, longest: int) -> Iterator[dict[str, str]]:
    """Yield the documents of files, except blank ones; `rule` as for `open_documents`, or "auto" for the default."""
    for file in chain.from_iterable(parts):
        for text in _cut(Path(file), rule, longest):
            if not BLANK.fullmatch(text):
                yield {"text": text}


def _cut(file: Path, rule: str, longest: int) -> Iterator[str]:
    """Yield the documents of a file."""
    if rule == "auto":
        yield from _join_lines(_read_lines(file, longest), longest)
        return
    lines = _read_lines(file, None)
    if rule == "file":
        yield "".join(lines)
    elif rule == "blank_line":
        yield from _join_lines(lines, None)
    else:
        number = int(rule.removeprefix("lines:"))
        # The loop takes the first line of each document, and `islice` the next ones from the same iterator.
        for line in lines:
            yield "".join([line, *islice(lines, number - 1)])


def _read_lines(path: Path, longest: int | None) -> Iterator[str]:
    """Yield the lines of a file. A line of more than `longest` characters is cut, after a space if it has one."""
    skipped = skipped_characters(path)
    with open_text(path) as text:
        text.read(skipped)
        # What follows the place where a line was cut.
        rest = ""
        while line := rest + text.readline(-1 if longest is None else longest - len(rest)):
            if "\0" in line:
                raise UserError(Problem("dataset_name", path, "is not text in UTF-8; save it as such"))
            end = len(line)
            if end == longest and not line.endswith("\n"):
                # The last space, if it is in the second half.
                space = line.rfind(" ", longest // 2)
                if space >= 0:
                    end = space + 1
            rest = line[end:]
            yield line[:end]


def _join_lines(lines: Iterator[str], longest: int | None) -> Iterator[str]:
    """Join lines into documents, and yield these.

    Args:
        lines: Lines of a file, each of at most `longest` characters.
        longest: Maximum number of characters of a document. It ends after the last blank line within this limit or, if
            there is none, after the last line. None makes each paragraph a document.
    """
    # The lines of the current document, and their number of characters.
    document: list[str] = []
    size = 0
    # Index after the last blank line of the document; 0 if it has none.
    paragraphs_end = 0

    def is_full(line: str) -> bool:
        """Return whether the current document has to end before this line."""
        if longest is None:
            return paragraphs_end > 0 and bool(line.strip())
        return size + len(line) > longest

    for line in lines:
        while document and is_full(line):
            end = paragraphs_end or len(document)
            yield "".join(document[:end])
            # An unfinished paragraph begins the next document.
            document = document[end:]
            size = sum(map(len, document))
            paragraphs_end = 0
        document.append(line)
        size += len(line)
        if not line.strip():
            paragraphs_end = len(document)
    yield "".join(document)


def _header_of(table: str) -> str:
    """Return the header of a table, which is a line, or several if a name in quotes has line breaks."""
    # "Time","What is the answer?
    # (one or two sentences)"
    table = table.lstrip("\r\n")
    header = HEADER.match(table)
    if header:
        return header[0]
    return next(filter(str.strip, io.StringIO(table)), "")


def choose_table(file: Path) -> dict[str, Any]:
    """Return the options with which the builder `csv` of `datasets` reads a table.

    Raise a `UserError` if it has no rows, or a row that does not fit its header.
    """
    with open_text(file) as text:
        # Excel names an unusual separator in a line before the header, such as "sep=;".
        sample, skipped = re.subn(r"\Asep=.*\n", "", text.read(SAMPLE_CHARACTERS))
        encoding = text.encoding
    if "\0" in sample:
        raise UserError(Problem("dataset_name", file, "is not text in UTF-8; save it as such"))
    header_line = _header_of(sample)
    if ".tsv" in map(str.lower, file.suffixes):
        separator = "\t"
    else:
        # The separator is the most frequent one of the header outside quotes.
        unquoted = re.sub('"[^"]*"', "", header_line)
        separator = max(",;\t|", key=unquoted.count)
    header = next(csv.reader(io.StringIO(header_line, newline=""), delimiter=separator), [])
    rows = csv.reader(io.StringIO(sample, newline=""), delimiter=separator, strict=True)
    # Places of columns whose cells stay text.
    text_places = {place for place, name in enumerate(header) if normalise(name) in TEXT_COLUMNS}
    faulty_line = 0
    try:
        # The first row after the header. Blank lines are [].
        row = next(islice(filter(None, rows), 1, None), [])
        if not row:
            raise UserError(Problem("dataset_name", file, "does not have rows; give a file that has some"))
        # pandas would take the first fields of such rows for row names.
        if len(row) > len(header):
            remedy = f"cannot be read: row 0 has {len(row)} fields, separated by {separator!r}, and the header "
            remedy += f"{len(header)}; put fields that contain it in quotes"
            raise UserError(Problem("dataset_name", file, remedy))
        for cells in chain([row], rows):
            # A conversion would turn 007 into 7.
            text_places |= {place for place, cell in enumerate(cells) if ZERO_FIRST.match(cell)}
    except csv.Error as error:
        # Only a misplaced quote, such as in `"a"b,c`, is a fault of the table. Other errors mean that the sample ends
        # within a field, or that a field is too long for Python.
        if "expected after" in str(error):
            faulty_line = rows.line_num + skipped
    # pandas would read all lines up to the next quote as one field. In tab-separated fields, a quote may be text.
    if faulty_line and separator != "\t":
        remedy = "has a quote within a field in quotes, or text after it; double the quote, or save the file as JSONL"
        raise UserError(Problem("dataset_name", f"{file}, line {faulty_line}", remedy))
    text_columns = [name for place, name in enumerate(header) if place in text_places]
    return {
        "sep": separator,
        "quoting": csv.QUOTE_NONE if faulty_line else csv.QUOTE_MINIMAL,
        "encoding": encoding,
        "skiprows": skipped,
        "keep_default_na": False,
        "na_values": NULLS,
        "converters": dict.fromkeys(text_columns, lambda cell: None if cell in NULLS else cell),
    }


def rows_of_json(file: Path, is_lines: bool) -> list[dict[str, Any]]:
    """Return the rows of a JSON file that `datasets` cannot read, [] for any other.

    `is_lines` says that the file is JSON Lines. Raise a `UserError` for a file that would crash the reader.
    """
    with open_bytes(file) as content:
        sample = content.read(1 << 16)
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(Problem("dataset_name", file, "is UTF-16; convert it: `iconv -f UTF-16 -t UTF-8`"))
    if is_lines:
        return []
    # Any value but a list or an object crashes pyarrow's reader.
    if sample.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"[", b"{"):
        raise UserError(Problem("dataset_name", file, "must contain a list of rows, or an object; correct the file"))
    return _rows_of_object(file, sample)


def _rows_of_object(file: Path, sample: bytes) -> list[dict[str, Any]]:
    """Return the rows of a JSON file that is a single object containing all of them; return [] for any other file.

    Args:
        file: The file.
        sample: Its beginning.
    """
    # The objects that contain rows:
    #
    #   columns        {"question": ["2 + 3?", ...], "answer": ["5", ...]}
    #   a list         {"version": 1, "data": [{"question": "2 + 3?", ...}, ...]}
    #   rows by id     {"q1": {"question": "2 + 3?", ...}, ...}
    if re.match(rb"[^{]*\[", sample):
        # The file is a list of rows.
        return []
    if re.search(rb"\}\s*\n\s*\{", sample):
        # The file is JSON Lines in spite of its name: there is no comma between two objects.
        return []
    with suppress(ValueError, RecursionError), open_bytes(file) as content:
        table = json.load(content)
        lists = [value for value in table.values() if isinstance(value, list) and value]
        tables = [rows for rows in lists if all(isinstance(row, dict) for row in rows)]
        lengths = {len(values) for values in lists}
        if not tables and len(lists) == len(table) and len(lengths) == 1:
            # Each value is a column.
            return [dict(zip(table, row, strict=True)) for row in zip(*lists, strict=True)]
        if len(table) > 1 and all(isinstance(row, dict) for row in table.values()):
            tables = [[*table.values()]]
        # With a column of text, the object is itself a single row, one of whose values is a list.
        if len(tables) == 1 and not find_column(table, *CONVERSATIONS, *TEXT_COLUMNS):
            return tables[0]
    return []
