"""The data sets that stages are measured on: which of their rows are held out, and a sample of these.

However large a data set is, only the sample is kept in memory.
"""

from __future__ import annotations

import logging
import random
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from pipeline.data.columns import Split, are_few, column_names, converter, is_of_hub
from pipeline.data.messages import ShapeError, shorten
from pipeline.data.shards import documents_of
from pipeline.data.sources import open_source
from pipeline.data.splits import keep_rows, load_splits
from pipeline.data.votes import VOTES_FILE, update_data_set
from pipeline.errors import Problem, UserError
from pipeline.evaluation.graders import COMPARED
from pipeline.evaluation.settings import Source
from pipeline.rewards.grading import RULE_COLUMNS, validate_rule
from pipeline.stages import HELD_OUT

logger = logging.getLogger(__name__)

T = TypeVar("T")

Example = dict[str, Any]
"""A row of a data set, with its index as `id` and its `kind`, "" if it has none."""

HELD_OUT_SPLITS = ("test", "validation")
"""Splits on which stages are measured, the better one first."""

READ_WHOLE_BYTES = 64 << 20
"""Size of Parquet files up to which they are read as they are; `datasets` copies larger ones into its cache."""


@dataclass(frozen=True)
class Part:
    """The rows of a split that are held out, or those that are trained on.

    Attributes:
        data: The split.
        source: The data set that it is of.
        field: What messages call the data set.
        place: And the split.
        period: One row in so many is held out; 1 if the rows are all those of `data`.
        trained_on: Whether the rows are those that are trained on.
        divided: Whether one split has rows of both kinds.
    """

    data: Split
    source: Source
    field: str
    place: str
    period: int = 1
    trained_on: bool = False
    divided: bool = False

    def sample(self, most: int, left_out: str | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the number in the split and the content of at most `most` rows, in order; of a stream, the first ones.

        Rows of the kind `left_out` are left out.
        """
        if not isinstance(self.data, Dataset):
            numbered = (item for item in enumerate(self.data) if self.period == 1 or self._takes(item[0]))
            yield from islice((item for item in numbered if not left_out or item[1].get("kind") != left_out), most)
            return
        size = len(self.data)
        numbers: Sequence[int] = range(0, size, self.period)
        if left_out and "kind" in self.data.column_names:
            batches = self.data.select_columns("kind").iter(1000)
            kinds = enumerate(chain.from_iterable(batch["kind"] for batch in batches))
            numbers = array("q", (number for number, kind in kinds if self._takes(number) and kind != left_out))
        elif self.trained_on and self.period > 1:  # the others, in constant memory
            drawn = subsample(range(size - len(numbers)), most)
            numbers = [number + number // (self.period - 1) + 1 for number in drawn]
        chosen = subsample(numbers, most)
        yield from zip(chosen, self.data.select(chosen), strict=True)

    def _takes(self, number: int) -> bool:
        return self.period == 1 or (number % self.period > 0) == self.trained_on


def subsample(rows: Sequence[T], most: int) -> list[T]:
    """Return at most `most` rows, drawn with a fixed seed and kept in their order.

    Neither the first rows nor every n-th one would do: data sets are sorted by kind, or their kinds alternate.
    """
    if len(rows) <= most:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]


class Reader:
    """Opens data sets, each once."""

    def __init__(self, run: Path, settings: Mapping[str, Any], flags: Collection[str]) -> None:
        self.run, self.flags = run, flags
        self.sources = {key: documents_of(Source(**settings[key])) for key in HELD_OUT if settings.get(key)}
        self.own = {key: documents_of(Source(**source)) for key, source in settings["trained_on"].items()}
        self.named = {key for key in self.sources if key in flags or self.sources[key] != self.own.get(key)}
        self._opened: dict[tuple[str | None, ...], DatasetDict | IterableDatasetDict] = {}

    def find(self, key: str, split: str | None = None, trained_on: bool = False) -> Part | None:
        """Return the held-out rows of `key`, those of a split, or those that are trained on; None if there are none."""
        source = (self.own if trained_on else self.sources).get(key)
        if source is None:
            return None
        with self._naming(key):
            return self._find(key, source, split, trained_on)

    def _find(self, key: str, source: Source, split: str | None, trained_on: bool) -> Part | None:
        name, train = source.dataset_names[0], source.dataset_train_split
        is_exact = key in self.named and bool(source.dataset_test_split)
        wanted = [source.dataset_test_split, *([] if is_exact else HELD_OUT_SPLITS)]
        path = Path(name)
        if (path / VOTES_FILE).is_file():
            update_data_set(path)
        folder = path / (source.dataset_config or "")
        files = {one: folder / f"{one}.parquet" for one in (split, *wanted, train) if one}
        files = {one: file for one, file in files.items() if file.is_file()}
        if set(files) - {train}:  # several splits
            one = train if trained_on else split or next(one for one in wanted if one in files)
            return Part(_read_parquet(files[one]), source, "RUN", str(files[one])) if one in files else None
        if path.is_relative_to(self.run) and not path.exists():
            return None
        opened = (name, source.dataset_config, *(source.keep_rows or []))
        if opened not in self._opened:
            whole = open_source(name, source.dataset_config, source.dataset_streaming)
            self._opened[opened] = keep_rows(whole, source)
        splits = self._opened[opened]
        field = f"--{key}" if key in self.flags else f"{key}: dataset_name"
        if split is None and list(splits) == [train] and source.validation_share > 0:
            if key == "pairs":  # pairs that say nothing are left out before the others are divided
                divided = load_splits(replace(source, dataset_test_split="validation"), "preference", True)
                standard = replace(source, prompt_column="prompt")
                return Part(divided[0 if trained_on else 1], standard, field, name, 1, trained_on, divided=True)
            period = round(1 / source.validation_share)
            rows = splits[train]
            if not isinstance(rows, Dataset):  # rows of its first file are held out
                rows = rows.shard(rows.num_shards, 0)
            return Part(rows, source, field, f"{name}, split {train}", period, trained_on, divided=True)
        if trained_on or split is not None:
            one = train if trained_on else str(split)
        else:
            one = next((one for one in wanted if one in splits), "")
            if not one and len(splits) == 1 and key in self.named and not source.dataset_test_split:
                (one,) = splits  # which no stage trains on
        if one in splits:
            return Part(splits[one], source, field, f"{name}, split {one}", trained_on=trained_on)
        if key in self.named and split is None and not trained_on:
            remedy = f"there is no such split; choose from: {', '.join(splits)}"
            raise UserError(Problem("dataset_test_split", source.dataset_test_split or "test", remedy))
        return None

    def read(self, key: str, part: Part, most: int, left_out: str | None = None) -> list[Example]:
        """Return rows with the columns that metrics expect, beside their own."""
        examples: list[Example] = []
        faults: list[tuple[int, ShapeError]] = []
        with self._naming(key):
            columns = column_names(part.data)
            convert, _ = converter(part.data, columns, part.source, HELD_OUT[key].data)
            if key == "problems" and part.source.grade in COMPARED and part.source.answer_column not in columns:
                remedy = f"does not exist; choose from: {', '.join(columns)}"
                raise UserError(Problem("answer_column", part.source.answer_column, remedy))
        for number, row in part.sample(most, left_out):
            try:
                example = {**row, **convert(row)}
                _check_columns(example)
            except ShapeError as error:
                faults.append((number, error))
                continue
            examples.append({**example, "kind": str(row.get("kind") or ""), "id": number})
        if faults:
            number, fault = faults[0]
            read = len(faults) + len(examples)
            if not is_of_hub(part.source) or not are_few(len(faults), read):
                raise UserError(
                    Problem(part.field, f"{part.place}, row {number}", f"{fault}; correct or remove that row")
                )
            what = f"{part.place}: {len(faults)} of {read} rows are left out"
            logger.warning("%s, as in training; row %d, for instance: %s.", what, number, fault)
        return examples

    def read_validation(self, most: int) -> list[Example]:
        """Return prompts, whose answers are not code, that stages are not measured on: of the validation split, or, if
        there is none or the others are of it, of those that are trained on.
        """
        part, prompts = self.find("prompts", "validation"), self.find("prompts")
        if part is None or prompts is None or part.place == prompts.place:
            part = self.find("prompts", trained_on=True)
        return [row for row in self.read("prompts", part, most) if not row.get("test")] if part and prompts else []

    def suspects(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """Return what stages train on, for held-out rows of the same split and for data that the user names."""
        keys = [key for key in parts if parts[key].divided or (key in self.named and key in self.own)]
        found = {key: self.find(key, trained_on=True) for key in keys}
        return {key: part for key, part in found.items() if part is not None}

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Name the option or the key of the file in problems with a data set."""
        try:
            yield
        except UserError as error:
            options = {"dataset_name": key, "dataset_test_split": "split"}
            names = [
                f"--{options.get(one.field, one.field)}" if key in self.flags else f"{key}: {one.field}"
                for one in error.problems
            ]
            problems = [replace(one, field=name) for one, name in zip(error.problems, names, strict=True)]
            raise UserError(*problems) from None


def _read_parquet(path: Path) -> Dataset:
    try:
        if path.stat().st_size <= READ_WHOLE_BYTES:
            return Dataset(pq.read_table(path))
        return load_dataset("parquet", data_files=str(path), split="train")
    except (OSError, pa.ArrowException, DatasetGenerationError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(Problem("RUN", path, f"cannot be read ({reason}); generate the data again")) from None


def _check_columns(row: Example) -> None:
    """Check the columns by which a row is graded, and fill in those that it lacks.

    Raises:
        ShapeError: If a column does not contain what its name says.
    """
    for column in ("taste_chosen", "taste_rejected"):
        if not isinstance(row.get(column, 0.0), int | float | None):
            raise ShapeError(f"{column} is {shorten(row[column])}, not a number")
    if set(RULE_COLUMNS) & set(row):
        if fault := validate_rule(row):
            raise ShapeError(fault)
        defaults = {"require": [], "reject": [], "max_words": 0, "test": ""}
        row.update({column: row.get(column) or defaults[column] for column in RULE_COLUMNS})
