"""Overlap of test data with training data, by word n-grams: the method of Brown et al. 2020 (GPT-3), appendix C.

A test row overlaps if one of its n-grams of words, or all of it if it has fewer words, occurs anywhere in the training
data. The n-grams of the test data are kept as 64-bit hashes, about 100 bytes each; the training data are read once, row
by row, and not kept. Paraphrases and translations are not found.
"""

import argparse
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.arguments import ANSWERS, CONTEXTS, CONVERSATIONS, PROMPTS
from pipeline.errors import Problem, UserError

PROMPT_COLUMNS = tuple(dict.fromkeys((*CONVERSATIONS, *PROMPTS, *CONTEXTS, "passage", "text", "document", "content")))
"""Columns whose texts, in this order, precede the answers."""
ANSWER_COLUMNS = (*ANSWERS, "chosen", "rejected")

# Kana and Chinese characters, each of which is a word, because these languages are written without spaces.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


class Match(NamedTuple):
    """A test row that was found in the training data.

    Attributes:
        test_row: Its number, from 0.
        train_row: Number of the first training row that shares words with it.
        shared: The first words that they share.
    """

    test_row: int
    train_row: int
    shared: str


class Overlap(NamedTuple):
    """How much of a test data set occurs in the training data.

    Attributes:
        matches: The test rows that were found, in order.
        test_rows: Number of test rows.
        train_rows: Number of training rows.
    """

    matches: list[Match]
    test_rows: int
    train_rows: int

    @property
    def share(self) -> float:
        """Share of the test rows that overlap; 0.0 without test rows."""
        return len(self.matches) / self.test_rows if self.test_rows else 0.0


class NgramIndex:
    """The n-grams of a set of texts, as hashes, in which other texts are looked up.

    A text of fewer than `n` words is indexed as a whole, and overlaps with every text that contains it.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        # Hashes of n-grams, by their length in words.
        self._hashes: dict[int, set[int]] = {n: set()}

    def add(self, texts: Iterable[str]) -> list[int]:
        """Index the n-grams of texts, and return their hashes in order."""
        hashes_of_texts: list[int] = []
        for text in texts:
            tokens = words(text)
            size = min(self.n, len(tokens))
            if size:
                hashes = [hash(ngram) for ngram in ngrams(tokens, size)]
                self._hashes.setdefault(size, set()).update(hashes)
                hashes_of_texts += hashes
        return hashes_of_texts

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the hash and words of each indexed n-gram in a text, in order, shorter indexed texts last."""
        tokens = words(text)
        for size, indexed in self._hashes.items():
            # Almost no text overlaps, and `isdisjoint` runs in C.
            if not indexed.isdisjoint(map(hash, ngrams(tokens, size))):
                for ngram in ngrams(tokens, size):
                    if hash(ngram) in indexed:
                        yield hash(ngram), " ".join(ngram)

    def overlaps(self, text: str) -> bool:
        """Return whether a text shares an n-gram with, or contains, an indexed text."""
        return next(self.find(text), None) is not None


def words(text: str) -> list[str]:
    """Return the lower-cased words of a text; punctuation and white space do not count."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield the n-grams of a list of words, in order."""
    return zip(*(tokens[offset:] for offset in range(n)), strict=False)


def overlap(train_rows: Iterable[Mapping[str, Any]], test_rows: Iterable[Mapping[str, Any]], n: int = 8) -> Overlap:
    """Look for test rows with `n` consecutive words in common with a training row; both are read once.

    A test row of fewer words overlaps with a training row that contains all of them. `n` is at least 1.
    """
    index = NgramIndex(n)
    hashes_per_row = [index.add(texts(row)) for row in test_rows]
    # For the hash of each n-gram of the test data: the first training row that contains it, and its words.
    first_matches: dict[int, tuple[int, str]] = {}
    train_count = 0
    for row in train_rows:
        for text in texts(row):
            for ngram_hash, shared in index.find(text):
                first_matches.setdefault(ngram_hash, (train_count, shared))
        train_count += 1
    matches = []
    for test_row, hashes in enumerate(hashes_per_row):
        for ngram_hash in hashes:
            if ngram_hash in first_matches:
                train_row, shared = first_matches[ngram_hash]
                matches.append(Match(test_row, train_row, shared))
                break
    return Overlap(matches, len(hashes_per_row), train_count)


def texts(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row: the prompt alone, and with each answer. Without known columns, all text columns."""
    # {"question": "2 + 3?", "answer": "5", "chosen": "Five."}  ->  "2 + 3?", "2 + 3? 5", "2 + 3? Five."
    row = {name.strip().casefold(): value for name, value in row.items()}
    prompts = [_flatten(row[name]) for name in PROMPT_COLUMNS if name in row]
    prompt = " ".join(text for text in prompts if text)
    answers = [_flatten(row[name]) for name in ANSWER_COLUMNS if name in row]
    answers = [answer for answer in answers if answer]
    if not prompt and not answers:
        return [value for value in row.values() if isinstance(value, str)]
    row_texts = [prompt]
    row_texts += [f"{prompt} {answer}" for answer in answers]
    for name in CONVERSATIONS:
        turns = row.get(name)
        if isinstance(turns, list | tuple):
            # All that the user says, without the answers, may be a prompt of the test data.
            questions = []
            for turn in turns:
                if turn.get("role") != "assistant" and turn.get("from") != "gpt":
                    questions.append(turn)
            row_texts.append(_flatten(questions))
    return list(dict.fromkeys(text for text in row_texts if text))


def _flatten(value: object) -> str:
    """Return a text, or the contents of a message or of a list of messages in order; "" for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return str(value.get("content") or value.get("value") or "")
    if isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value):
        return " ".join(_flatten(message) for message in value)
    return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = "data set, as DATASET[:CONFIG[:SPLIT]]: a Hub id, a folder or a file"
    for name in ("train", "test"):
        help = f"{name} {where} (split: {name})"
        parser.add_argument(f"--{name}", nargs="+", required=True, metavar="DATASET", help=help)
    parser.add_argument("--document", help="document of a text file, as in training: file, blank_line or lines:64")
    parser.add_argument("--n", type=int, default=8, help="consecutive words that must agree (default: 8)")
    parser.add_argument("--max_share", type=float, default=0.0, help="share of test rows that may overlap (default: 0)")
    parser.add_argument("--examples", type=int, default=5, help="overlapping rows to show (default: 5)")


def main(args: argparse.Namespace) -> int:
    """Print the overlap of each test data set with all training data. Return 1 if one is above `--max_share`."""
    if args.n < 1:
        raise UserError(Problem("n", args.n, "must be at least 1"))
    if not 0 <= args.max_share <= 1:
        raise UserError(Problem("max_share", args.max_share, "must be between 0 and 1"))
    test_sets = {name: _open_rows(name, "test", args.document) for name in args.test}
    train_sets = [_open_rows(name, "train", args.document) for name in args.train]
    too_much = False
    for name, rows in test_sets.items():
        result = overlap(chain.from_iterable(train_sets), rows, args.n)
        if result.share > args.max_share:
            too_much = True
        shared = f"{len(result.matches)} of {result.test_rows} rows ({result.share:.2%}) share {args.n} words in a row"
        line = f"{name}: {shared}, or all their words, with {result.train_rows} training rows"
        if result.matches:
            line += "; rows count from 0"
        print(line)
        for match in result.matches[: args.examples]:
            print(f"  test row {match.test_row}, training row {match.train_row}: {match.shared}")
    return int(too_much)


def _open_rows(name: str, field: str, document: str | None) -> Sequence[Mapping[str, Any]]:
    """Return the rows of DATASET[:CONFIG[:SPLIT]], by default of the split `field` if there are several.

    Raise a `UserError` if the data set, configuration or split does not exist, or its rows do not contain text.
    """
    # Imported here, because `datasets` takes seconds, and `--help` does not need it.
    from pipeline.data.sources import open_source

    dataset = name
    config = ""
    split = ""
    if not Path(name).exists():
        dataset, _, rest = name.partition(":")
        config, _, rest = rest.partition(":")
        split = rest.partition(":")[0]
    splits = open_source(dataset, config or None, document=document)
    if not split:
        split = next(iter(splits)) if len(splits) == 1 else field
    if split not in splits:
        raise UserError(Problem(field, name, f"there is no split {split}; choose from: {', '.join(splits)}"))
    rows = splits[split]
    if not len(rows) or not texts(rows[0]):
        remedy = f"its columns {', '.join(rows.column_names)} do not contain text; choose other data"
        raise UserError(Problem(field, name, remedy))
    return rows
