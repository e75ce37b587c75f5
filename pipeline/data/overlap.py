"""Is test data inside the training data? Word n-grams, between any two data sets.

A test example overlaps if one of its n-grams of words (case and punctuation ignored), or all of it if it has
fewer words, occurs anywhere in the training data: the method of Brown et al. 2020 (GPT-3), appendix C. The
n-grams of the test data are kept as 64-bit hashes, about 100 bytes each; the training data is read once, row
by row, and not kept.

Not found: paraphrases, translations, and text in languages written without spaces.
"""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Problem, UserError

PROMPT_COLUMNS = (
    "messages", "prompt", "question", "problem", "instruction", "input", "passage", "text", "document",
    "content",
)  # fmt: skip
ANSWER_COLUMNS = ("completion", "answer", "solution", "response", "output", "chosen", "rejected")


@dataclass(frozen=True)
class Match:
    """A test example found in the training data.

    Attributes:
        test_row: its position, from 0.
        train_row: position of the first training row that shares something with it.
        shared: the first words that they share.
    """

    test_row: int
    train_row: int
    shared: str


@dataclass(frozen=True)
class Overlap:
    """How much of a test data set is in the training data.

    Attributes:
        matches: the test examples found, in order.
        test_rows: how many test examples there are.
        train_rows: how many training rows were read.
        n: words of an n-gram.
    """

    matches: tuple[Match, ...]
    test_rows: int
    train_rows: int
    n: int

    @property
    def share(self) -> float:
        """Overlapping test examples / all of them (0.0 if there are none)."""
        return len(self.matches) / self.test_rows if self.test_rows else 0.0


def overlap(train_rows: Iterable[Mapping[str, Any]], test_rows: Iterable[Mapping[str, Any]], n: int = 8) -> Overlap:
    """Looks for every test row in the training rows.

    Args:
        train_rows: read once.
        test_rows: read once.
        n: words that must agree in a row, at least 1. A test text of fewer words must occur as a whole.

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    wanted: dict[int, set[int]] = {}
    of_rows: list[list[int]] = []
    for row in test_rows:
        hashes: list[int] = []
        for text in texts(row):
            tokens = _tokens(text)
            size = min(n, len(tokens))
            if size:
                found = list(_hashes(tokens, size))
                wanted.setdefault(size, set()).update(found)
                hashes += found
        of_rows.append(hashes)
    first: dict[int, tuple[int, str]] = {}
    train_count = 0
    for number, row in enumerate(train_rows):
        train_count += 1
        for text in texts(row):
            tokens = _tokens(text)
            for size, hashed in wanted.items():
                if hashed.isdisjoint(_hashes(tokens, size)):
                    continue
                for start, value in enumerate(_hashes(tokens, size)):
                    if value in hashed:
                        first.setdefault(value, (number, " ".join(tokens[start : start + size])))
    matches = []
    for number, hashes in enumerate(of_rows):
        shared = next((value for value in hashes if value in first), None)
        if shared is not None:
            matches.append(Match(number, *first[shared]))
    return Overlap(tuple(matches), len(of_rows), train_count, n)


def texts(row: Mapping[str, Any]) -> list[str]:
    """The texts of one row: what is asked alone, and with each answer. Columns of unknown names count if none
    is known."""
    asked = " ".join(filter(None, (_flat(row[name]) for name in PROMPT_COLUMNS if name in row)))
    answers = [text for name in ANSWER_COLUMNS if name in row and (text := _flat(row[name]))]
    if not asked and not answers:
        return [value for value in row.values() if isinstance(value, str)]
    found = [asked, *(f"{asked} {answer}" for answer in answers)]
    if isinstance(row.get("messages"), list | tuple):  # the question of a conversation, without its answer
        found.append(_flat([message for message in row["messages"] if message.get("role") != "assistant"]))
    return list(dict.fromkeys(text for text in found if text))


def _flat(value: object) -> str:
    """A text, or the contents of a list of messages in order."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return " ".join(str(item.get("content") or "") for item in value if isinstance(item, Mapping))
    return ""


def _tokens(text: str) -> list[str]:
    return words(unicodedata.normalize("NFKC", text))


def _hashes(tokens: list[str], size: int) -> Iterator[int]:
    """A hash of every run of `size` words."""
    return map(hash, zip(*(tokens[offset:] for offset in range(size)), strict=False))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments to `parser`."""
    where = "data set, as DATASET[:CONFIG[:SPLIT]]: a Hub id, a folder or a file"
    parser.add_argument("--train", nargs="+", required=True, metavar="DATASET", help=f"training {where} (split: train)")
    parser.add_argument("--test", nargs="+", required=True, metavar="DATASET", help=f"test {where} (split: test)")
    parser.add_argument("--n", type=int, default=8, help="words that must agree in a row (default: 8)")
    parser.add_argument(
        "--max_share",
        type=float,
        default=0.0,
        help="share of test rows that may overlap, 0 to 1 (default: 0)",
    )
    parser.add_argument("--examples", type=int, default=5, help="overlapping rows to show (default: 5)")


def main(args: argparse.Namespace) -> int:
    """Prints the overlap of every test data set with all the training data. Returns 1 if one is above
    `--max_share`."""
    problems = []
    if args.n < 1:
        problems.append(Problem("n", args.n, "must be at least 1"))
    if args.examples < 0:
        problems.append(Problem("examples", args.examples, "must be at least 0"))
    if not 0 <= args.max_share <= 1:
        problems.append(Problem("max_share", args.max_share, "must be between 0 and 1"))
    if problems:
        raise UserError(*problems)
    tests = [(name, _rows(name, "test", "test")) for name in args.test]
    trains = [_rows(name, "train", "train") for name in args.train]
    too_much = False
    for name, rows in tests:
        found = overlap((row for train in trains for row in train), rows, args.n)
        too_much |= found.share > args.max_share
        print(
            f"{name}: {len(found.matches)} of {found.test_rows} rows ({found.share:.2%}) share {args.n} "
            f"words in a row, or all their words, with {found.train_rows} training rows"
        )
        for match in found.matches[: args.examples]:
            print(f"  test row {match.test_row}, training row {match.train_row}: {match.shared}")
    return int(too_much)


def _rows(name: str, field: str, default_split: str) -> Sequence[Mapping[str, Any]]:
    """The rows of DATASET[:CONFIG[:SPLIT]].

    Raises:
        UserError: there is no such data set, configuration or split, or its rows hold no text.
    """
    from pipeline.data.arguments import DataArguments
    from pipeline.data.sources import open_source

    dataset, config, split = (name, "", "") if Path(name).exists() else (*name.split(":"), "", "")[:3]
    if config and Path(dataset).is_file():
        raise UserError(Problem(field, name, f"plain files have no configurations; leave {config!r} out"))
    splits = open_source(DataArguments(dataset_name=dataset, dataset_config=config or None))
    if not split:
        split = next(iter(splits)) if len(splits) == 1 else default_split
    if split not in splits:
        raise UserError(Problem(field, name, f"there is no split {split}; choose from: {', '.join(splits)}"))
    rows = splits[split]
    if len(rows) == 0 or not texts(rows[0]):
        why = f"its columns {', '.join(rows.column_names)} hold no text" if len(rows) else "has no rows"
        raise UserError(Problem(field, name, why))
    if name.count(":") > 2 and not Path(name).exists():
        print(f"{name}: only DATASET:CONFIG:SPLIT is read", file=sys.stderr)
    return rows


_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-cased words of a text; punctuation and white space do not count."""
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int) -> Iterator[str]:
    """The n-grams of a text, words joined by a space. A text of fewer than `n` words has none."""
    tokens = words(text)
    return (" ".join(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


class NgramIndex:
    """The n-grams of a set of texts, to look other texts up in.

    A text of fewer than `n` words is indexed whole, and overlaps with every text that contains it.

    Args:
        n (`int`): words of an n-gram.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._grams: dict[int, set[str]] = {n: set()}

    def add(self, texts: Iterable[str]) -> None:
        """Adds the n-grams of `texts`."""
        for text in texts:
            size = min(self.n, len(words(text)))
            if size:
                self._grams.setdefault(size, set()).update(ngrams(text, size))

    def shared(self, text: str) -> Iterator[str]:
        """The indexed n-grams that `text` contains, in order, shorter indexed texts last."""
        for size, grams in self._grams.items():
            yield from (gram for gram in ngrams(text, size) if gram in grams)

    def overlaps(self, text: str) -> bool:
        """Whether `text` shares an n-gram with, or contains, an indexed text."""
        return next(self.shared(text), None) is not None
