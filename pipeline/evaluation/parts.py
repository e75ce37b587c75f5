"""The parts of data sets that evaluations read: the rows that are held out, or the rows that are trained on.

    Source     a data set of evaluate.yaml, or of a stage
      | Reader.find
    Part       its held-out rows, or the rows that are trained on
      | Reader.read
    Example    a row, with the columns that metrics expect

Training divides a single split by the same two functions (`is_divided` and `is_held_out` in `pipeline.data.splits`), so
no stage is measured on rows that it trains on.
"""

import logging
import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from pipeline.data.columns import ColumnPlan, Split, column_names, plan_columns
from pipeline.data.conversion import may_drop
from pipeline.data.messages import ShapeError
from pipeline.data.shards import documents_of
from pipeline.data.sources import open_source
from pipeline.data.splits import first_file, is_divided, is_held_out, keep_rows, row_filter
from pipeline.data.votes import VOTES_FILE, update_data_set
from pipeline.errors import Problem, UserError, problems_of
from pipeline.evaluation.evaluate_yaml import Settings, Source
from pipeline.rewards.graders import COMPARED
from pipeline.rewards.grading import validate_rule
from pipeline.stages import HELD_OUT
from pipeline.tools.loading import load_environment

logger = logging.getLogger(__name__)

T = TypeVar("T")

Example = dict[str, Any]
"""A row of a data set, with its index as `id`, and its `kind` or ""."""
Rows = Sequence[Example]


@dataclass(frozen=True)
class Part:
    """The rows of a split that are held out, or the rows that are trained on.

    A data set may have a split for each, or a single split that is divided by row number:

        splits train, test                                        Part(test)
        one split, of which a share of 0.05 is held out           Part(train, share=0.05)
        the other rows of that split, which are trained on        Part(train, share=0.05, trained_on=True)

    Attributes:
        data: All rows of the split. If a stream is divided, only its first file.
        source: The data set, and the names of its columns.
        place: What messages call the split.
        share: Share of the rows of a single split that are held out; 0 if all rows of `data` belong to the part.
        trained_on: Which side of a divided split the part is: False for the rows that are held out, True for the
            others. It has no effect if `share` is 0.
        numbers: Number of each row of `data` in the data set, from 0, by which it is divided; `keep_rows` may have left
            some rows out. None: rows are numbered as they come.
    """

    data: Split
    source: Source
    place: str
    share: float = 0.0
    trained_on: bool = False
    numbers: Sequence[int] | None = None

    def sample(self, most: int, without: str | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield at most `most` rows of the part in order, each with its number in the data set.

        They are drawn at random with a fixed seed, except for a stream, which gives its first rows. Rows whose column
        `kind` is `without` are omitted; None omits none.
        """
        if isinstance(self.data, Dataset):
            yield from self._sample_stored(self.data, most, without)
        else:
            yield from islice(self._rows_of_stream(without), most)

    def _sample_stored(self, data: Dataset, most: int, without: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield a random sample of stored rows, as `sample` does."""
        # These are arrays, because a list of millions of row numbers takes seconds.
        numbers: Any = np.arange(len(data))
        if self.numbers is not None:
            numbers = np.array(self.numbers, dtype=int)
        places: Any = np.flatnonzero(self.contains(numbers))
        if without and "kind" in data.column_names:
            kinds = np.array(data["kind"][:])
            places = places[kinds[places] != without]
        chosen = np.array(subsample(places, most), dtype=int)
        yield from zip(map(int, numbers[chosen]), data.select(chosen), strict=True)

    def _rows_of_stream(self, without: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield all rows of a stream that belong to the part, as `sample` does."""
        is_kept = row_filter(self.source, column_names(self.data))
        for number, row in enumerate(self.data):
            if not self.contains(number) or not is_kept(row):
                continue
            if not without or row.get("kind") != without:
                yield number, row

    def contains(self, numbers: Any) -> Any:
        """Return whether the rows with these numbers belong to the part.

        Args:
            numbers: The number of a row in the data set, or an array of such numbers.

        Returns:
            A truth value, or an array of truth values.
        """
        if not self.share:
            # All rows belong to it. This is an array if `numbers` is.
            return numbers >= 0
        return is_held_out(numbers, self.share) != self.trained_on


def subsample(rows: Sequence[T], most: int) -> list[T]:
    """Return at most `most` rows, drawn with a fixed seed and kept in their order."""
    # Neither the first rows nor every n-th one would be representative: kinds may be sorted, or alternate.
    if len(rows) <= most:
        return list(rows)
    places = random.Random(0).sample(range(len(rows)), most)
    return [rows[place] for place in sorted(places)]


class Reader:
    """Opens data sets, each once, and reads the rows that are held out or trained on.

    Attributes:
        run: Directory of the run.
        sources: The data sets that stages are measured on, by key of `evaluate.yaml`.
        trained_on: The data sets that stages are trained on, by the key of `evaluate.yaml` under which their held-out
            rows would be measured, or by the name of the stage (as in `RunFacts.trained_on`).
        keys_of_options: Keys whose data an option of the command names, such as `--problems FILE`.
        named_by_user: These keys, and the keys whose data `evaluate.yaml` names. If no stage trains on such data, all
            their rows are measured.
        environment: Name of the environment in which models answer problems, None if there is none.
    """

    def __init__(self, settings: Settings, keys_of_options: Collection[str]) -> None:
        self.run = settings.run
        self.keys_of_options = keys_of_options
        sources = {key: settings.requested.source(key) for key in HELD_OUT}
        self.sources = {key: documents_of(Source(**source)) for key, source in sources.items() if source}
        trained_on = settings.facts.trained_on
        self.trained_on = {key: documents_of(Source(**source)) for key, source in trained_on.items()}
        self.named_by_user: set[str] = set()
        for key, source in self.sources.items():
            default = self.trained_on.get(key)
            if default is not None:
                # Of several data sets, a stage is measured on the first.
                default = replace(default, dataset_name=default.dataset_names[0])
            if key in keys_of_options or source != default:
                self.named_by_user.add(key)
        tools = settings.facts.called.get("problems") or {}
        self.environment = tools.get("environment")
        self._opened: dict[tuple[str | None, ...], DatasetDict | IterableDatasetDict] = {}

    def is_made(self, source: Source) -> bool:
        """Return whether the run makes this data set itself."""
        return Path(source.dataset_names[0]).is_relative_to(self.run)

    def _is_trained_on(self, source: Source) -> bool:
        """Return whether a stage trains on this data set."""
        place = (os.path.realpath(source.dataset_names[0]), source.dataset_config)
        for trained_on in self.trained_on.values():
            for name in trained_on.dataset_names:
                if (os.path.realpath(name), trained_on.dataset_config) == place:
                    return True
        return False

    def find(
        self, key: str, split: str | None = None, trained_on: bool = False, source: Source | None = None
    ) -> Part | None:
        """Return the rows of a data set that are held out, or the rows that are trained on; None if there are none.

        Args:
            key: Key of `evaluate.yaml`.
            split: Name of a split of which all rows are returned. None: the held-out rows are found wherever they
                are, or the training rows if `trained_on` is set.
            trained_on: Whether to return the rows that a stage trains on.
            source: The data set. None: the first one of the key.

        Raises:
            UserError: If a split that the user names does not exist, or the data set cannot be opened.
        """
        if source is None and trained_on:
            source = self.trained_on.get(key)
        elif source is None:
            source = self.sources.get(key)
        if source is None:
            return None
        train = source.dataset_train_split
        test = source.dataset_test_split
        name = source.dataset_names[0]
        test_names = [test, "test", "validation"]
        if key in self.named_by_user and test:
            test_names = [test]
        with problems_of(key):
            splits = self._open(source, [split or "", *test_names, train])
            if split is None and is_divided(splits, source):
                return self._divide(splits[train], source, trained_on)
        if split is not None:
            names = [split]
        elif trained_on:
            names = [train]
        else:
            names = test_names
            if key in self.named_by_user and len(splits) == 1 and not test:
                # A plain file of the user has one split, whatever its name. Its rows may be measured although a stage
                # trains on all of them, if an option names the file: to see how well they have been learned.
                if key not in self.keys_of_options and self._is_trained_on(source):
                    remedy = "is trained on, and holds out no rows (validation_share); give other data"
                    raise UserError(Problem(f"{key}: dataset_name", name, remedy))
                names = list(splits)
        existing = [name for name in names if name in splits]
        if existing:
            return self._whole_split(splits[existing[0]], source, existing[0])
        if splits and split is None and not trained_on and key in self.named_by_user:
            remedy = f"there is no such split; choose from: {', '.join(splits)}"
            raise UserError(Problem(f"{key}: dataset_test_split", test or "test", remedy))
        return None

    def _divide(self, rows: Any, source: Source, trained_on: bool) -> Part:
        """Return one side of the only split of a data set, as training divides it: held out, or trained on."""
        place = f"{source.dataset_names[0]}, split {source.dataset_train_split}"
        if isinstance(rows, Dataset):
            rows, numbers = keep_rows(rows, source)
            return Part(rows, source, place, source.validation_share, trained_on, numbers)
        return Part(first_file(rows), source, place, source.validation_share, trained_on)

    def _whole_split(self, rows: Split | Path, source: Source, split: str) -> Part:
        """Return all rows of a split, which may be a Parquet file."""
        place = f"{source.dataset_names[0]}, split {split}"
        if isinstance(rows, Path):
            place = str(rows)
            rows = _read_parquet(rows)
        if isinstance(rows, Dataset):
            rows, _ = keep_rows(rows, source)
        return Part(rows, source, place)

    def _open(self, source: Source, split_names: Sequence[str]) -> Mapping[str, Split | Path]:
        """Return the splits of a data set by name, or {} if a step of the run has not made it yet.

        The steps of a run write a Parquet file for each split. `datasets` would copy these into its cache, so the files
        of `split_names` are returned instead.
        """
        name = source.dataset_names[0]
        path = Path(name)
        if (path / VOTES_FILE).is_file():
            update_data_set(path)
        files = {split: path / (source.dataset_config or "") / f"{split}.parquet" for split in split_names}
        files = {split: file for split, file in files.items() if file.is_file()}
        if files.keys() - {source.dataset_train_split}:
            return files
        if self.is_made(source) and not path.exists():
            return {}
        opened = (name, source.dataset_config, source.document)
        if opened not in self._opened:
            self._opened[opened] = open_source(name, source.dataset_config, source.dataset_streaming, source.document)
        return self._opened[opened]

    def read(self, key: str, part: Part | None, most: int, without: str | None = None) -> list[Example]:
        """Return at most `most` rows of a part, to which the columns that metrics expect are added.

        A few malformed rows are skipped where training skips them too: in a data set from the Hub.

        Args:
            key: Key of `evaluate.yaml`, which says what the rows have to contain.
            part: The rows. None: there are none, and the result is [].
            most: Maximum number of rows, as for `Part.sample`.
            without: Kind of rows that are omitted, as for `Part.sample`.

        Raises:
            UserError: If a column is missing, or a row is malformed.
        """
        if part is None:
            return []
        plan = self._plan(key, part)
        examples: list[Example] = []
        faults: dict[int, ShapeError] = {}
        for number, row in part.sample(most, without):
            try:
                example = {**row, **plan.read(row)}
                fault = validate_rule(example)
                if fault:
                    raise ShapeError(fault)
            except ShapeError as error:
                faults[number] = error
                continue
            # A row with a part of a rule gets the other parts, which require nothing.
            empty_rule: dict[str, Any] = {"require": [], "reject": [], "max_words": 0, "test": ""}
            if example.keys() & empty_rule.keys():
                example |= {column: example.get(column) or default for column, default in empty_rule.items()}
            examples.append({**example, "kind": str(row.get("kind") or ""), "id": number})
        if faults:
            number, first = next(iter(faults.items()))
            count = len(faults) + len(examples)
            if not may_drop(part.source, len(faults), count):
                remedy = f"{first}; correct or remove that row"
                raise UserError(Problem(f"{key}: dataset_name", f"{part.place}, row {number}", remedy))
            what = f"{part.place}: {len(faults)} of {count} rows are omitted"
            logger.warning("%s, as in training; row %d, for instance: %s.", what, number, first)
        return examples

    def _plan(self, key: str, part: Part) -> ColumnPlan:
        """Decide which column of a part contains what. Raise a `UserError` if a column that metrics need is missing."""
        columns = column_names(part.data)
        rows = part.data
        with problems_of(key):
            if not isinstance(rows, Dataset):
                rows, _ = keep_rows(rows, part.source)
            plan = plan_columns(rows, part.source, HELD_OUT[key].data, columns)
            lacks_answer = key == "problems" and part.source.grade in COMPARED and "answer" not in plan.outputs
            if lacks_answer and not hasattr(load_environment(self.environment), "get_reward"):
                remedy = f"does not exist; choose from: {', '.join(columns)}"
                raise UserError(Problem("answer_column", part.source.answer_column, remedy))
        return plan


def _read_parquet(file: Path) -> Dataset:
    """Return the rows of a Parquet file that a step of the run has written."""
    try:
        # For larger files, `datasets` keeps a copy in its cache rather than in memory.
        if file.stat().st_size <= 64 << 20:
            return Dataset(pq.read_table(file))
        return load_dataset("parquet", data_files=str(file), split="train")
    except (OSError, pa.ArrowException, DatasetGenerationError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(Problem("RUN", file, f"cannot be read ({reason}); generate the data again")) from None
