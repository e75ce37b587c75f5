"""The held-out rows that stages are measured on.

A `Source` is a data set of evaluate.yaml, or of a stage; a `Part` is its held-out rows, or the rows that are trained
on; an `Example` is a row with the columns that metrics expect. Training divides a single split in the same way
(`pipeline.data.splits`), so no stage is measured on rows that it trains on.
"""

from __future__ import annotations

import logging
import os
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from pipeline.data.arguments import DIVISION, DataArguments
from pipeline.data.columns import Split, column_names, converter, may_drop
from pipeline.data.messages import ShapeError, is_informative
from pipeline.data.shards import documents_of
from pipeline.data.sources import open_source
from pipeline.data.splits import is_held_out, keep_rows, load_splits, row_filter
from pipeline.data.votes import VOTES_FILE, update_data_set
from pipeline.errors import Problem, UserError, problems_of
from pipeline.evaluation.evaluate_yaml import CALLED, SOURCE_FIELDS, Source
from pipeline.evaluation.graders import COMPARED, Grader, grade_rows, load_grader
from pipeline.files import as_list, read_run
from pipeline.rewards.grading import validate_rule
from pipeline.rewards.sandbox.run import validate_sandbox
from pipeline.stages import HELD_OUT, STAGES
from pipeline.tools.loading import load_environment

logger = logging.getLogger(__name__)

T = TypeVar("T")

Example = dict[str, Any]
"""A row of a data set, with its index as `id`, and its `kind` or ""."""
Rows = Sequence[Example]

EXAMPLES = {"text": 400, "instructions": 400, "problems": 300, "longer": 150, "prompts": 200, "pairs": 1000}
"""Number of examples used without a `limit`, for intervals a few hundredths wide within seconds on a CPU."""
MAX_TRAINING_ROWS = 10_000
"""Training rows that are searched for held-out rows and the most frequent answers, in a few seconds."""
FIXED_PROMPTS: tuple[str, ...] = (
    "What is an LLM?",
    "Can you explain what a fox is?",
    "I would like to know where to find a piano.",
    "Can you say what a hedgehog does?",
    "I would like to know how big a lion is.",
    "Can you tell me something about a tokenizer?",
    "Can you summarise this in one sentence? It was warm. One day Julia painted a hedgehog in the park. "
    "Carl had never painted a hedgehog. You know a hedgehog by sharp spines. Carl found Julia in the park.",
    "I would like a function add_7 that adds 7 to a number.",
    "Sam has 14 coins. Sam finds 5 coins. Sam sells 3 coins. Sam gets 4 coins. How many are left?",
    "Greta has children of ages 3, 2, 9, 1, 6. Which age comes third?",
)
"""Stages answer these greedily if the run generates its data; otherwise held-out prompts or, without any, the first."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples, in a list for each key of `evaluate.yaml`; the list is empty without data.

    Attributes:
        longer: Problems that are longer than any in the training split.
        majority: Most frequent answer of each kind of problem in the training split.
        validation: Other prompts, whose answers are not code, for the baseline `constant`.
        trials, shots: Other problems, and beginnings of conversations with solved problems, for `elicited`.
        grader, can_vote: Grades `problems`, and whether samples can vote on an answer.
        graded: Whether `problems` are graded at all. Otherwise they have nothing but the reward of an environment.
        fixed_prompts: Conversations that every stage answers.
        remarks: Doubts about the data, for the report.
        suspects: Key of training rows -> the rows, and the keys of held-out data that they might contain copies of.
    """

    text: list[Example] = field(default_factory=list)
    instructions: list[Example] = field(default_factory=list)
    problems: list[Example] = field(default_factory=list)
    longer: list[Example] = field(default_factory=list)
    majority: dict[str, str] = field(default_factory=dict)
    prompts: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    trials: list[Example] = field(default_factory=list)
    shots: list[list[dict[str, str]]] = field(default_factory=list)
    pairs: list[Example] = field(default_factory=list)
    grader: Grader = grade_rows
    graded: bool = True
    can_vote: bool = True
    fixed_prompts: Sequence[Sequence[dict[str, str]]] = ()
    remarks: Sequence[str] = ()
    suspects: Mapping[str, tuple[Part, list[str]]] = field(default_factory=dict)


def read_held_out(run: Path, settings: Mapping[str, Any], flags: Collection[str], baselines: bool) -> HeldOut:
    """Read the held-out rows of the data in the settings and, for `baselines`, the rows that only these need.

    A UserError is raised if a data set cannot be read, or if the data that options name, the `flags`, have no rows.
    """
    reader = Reader(run, settings, flags)
    most = {name: settings.get("limit") or n for name, n in EXAMPLES.items()}
    parts = {key: part for key in HELD_OUT if (part := reader.find(key)) is not None}
    # Problems have metrics of their own, which compare final answers instead of looking for words.
    without = {"instructions": "reasoning"}
    rows = {key: reader.read(key, part, most[key], without.get(key)) for key, part in parts.items()}
    trained = next((source.system_prompt for source in reader.own.values() if source.system_prompt), None)
    for key in sorted(reader.named & rows.keys() - {"text"}) if trained else ():
        column = "messages" if key == "instructions" else "prompt"
        if any(row[column][0]["role"] != "system" for row in rows[key]):
            logger.warning("%s: has no system prompt, and a stage was trained with %r (system_prompt)", key, trained)

    grade = parts["problems"].source.grade if "problems" in parts else None
    # By default, fixed prompts are held-out prompts, unless the run generates its data.
    texts: Sequence[str] = settings.get("fixed_prompts") or (FIXED_PROMPTS if (run / "data").is_dir() else ())
    fixed = [[{"role": "user", "content": text}] for text in texts]
    if not fixed:
        fixed = [row["messages"][:-1] for row in rows.get("instructions", ())[:5]]
        fixed += [row["prompt"] for key in ("problems", "prompts") for row in rows.get(key, ())[:4]]
        fixed = (fixed or [[{"role": "user", "content": FIXED_PROMPTS[0]}]])[: len(FIXED_PROMPTS)]

    # Pairs, for instance, may be made from test problems; only data that the run generates itself cannot contain
    # copies. A stream is only searched for its own held-out rows.
    suspects = {}
    own = [(key, replace(one, dataset_name=name)) for key, one in reader.own.items() for name in one.dataset_names]
    for name, source in own:
        keys = [key for key, part in parts.items() if not (reader.is_made(source) and reader.is_made(part.source))]
        # An evaluation does not need the training data, which may be on another machine.
        with suppress(UserError):
            part = reader.find(name, trained_on=True, own=source) if keys else None
            if part is not None and not isinstance(part.data, Dataset):
                keys = [key for key in keys if key == name]
            if part is not None and keys:
                suspects[name if name not in suspects else f"{name} ({source.dataset_name})"] = part, keys
    problems = rows.get("problems", [])
    for_baselines = _read_for_baselines(reader, parts, problems, settings, most["prompts"]) if baselines else {}
    found = HeldOut(
        text=[row for row in rows.get("text", ()) if row["text"].strip()],
        instructions=drop_ungradable(rows.get("instructions", ())),
        problems=problems,
        longer=reader.read("problems", reader.find("problems", "test_longer"), most["longer"]),
        prompts=drop_ungradable(rows.get("prompts", ())),
        pairs=[row for row in rows.get("pairs", ()) if is_informative(row)],
        grader=load_grader(grade),
        graded=grade not in COMPARED or all("answer" in row for row in problems),
        can_vote=grade in COMPARED,
        fixed_prompts=fixed,
        remarks=list(_divided_otherwise(run)),
        suspects=suspects,
        **for_baselines,
    )
    if flags and not any(getattr(found, key) for key in HELD_OUT):
        remedy = "has no rows to measure on"
        raise UserError(*(Problem(f"{key}: dataset_name", settings[key]["dataset_name"], remedy) for key in flags))
    return found


def _divided_otherwise(run: Path) -> Iterator[str]:
    """Yield remarks on stages that an earlier release trained, which held out other rows of their data."""
    for step, entry in read_run(run).get("steps", {}).items():
        kind, values = STAGES.get(step.partition("_")[2].partition("_")[0]), entry.get("values", {})
        share = values.get("validation_share", DataArguments.validation_share)
        if entry.get("division") == DIVISION or kind is None or not values.get("dataset_name") or not share:
            continue
        are_pairs = kind.data in ("preference", "unpaired")
        read = {name: values[name] for name in SOURCE_FIELDS if values.get(name) is not None}
        for name in as_list(read["dataset_name"]):
            # Data that the run makes have splits. Of pairs, only files of the user were divided after some had gone.
            is_made = Path(name).resolve().is_relative_to(run.resolve())
            if is_made or not (values.get("keep_rows") or (are_pairs and Path(name).exists())):
                continue
            # The data may be on another machine.
            with suppress(UserError):
                source = Source(**{**read, "dataset_name": name, "validation_share": 0.0})
                splits = open_source(name, source.dataset_config, source.dataset_streaming, source.document)
                rows = splits.get(source.dataset_train_split)
                if len(splits) > 1 or rows is None:
                    continue
                # The number of rows of a stream is not known.
                if not source.keep_rows and isinstance(rows, Dataset):
                    left, _ = load_splits(source, "preference" if kind.data == "preference" else "unpaired", False)
                    if len(left) == len(rows):
                        continue
                remark = (
                    f"{step}: an earlier release trained it, which held out other rows of {name}, so that it knows "
                )
                yield remark + "rows that are measured; train it again to measure it on rows that it has not seen"


def _read_for_baselines(
    reader: Reader, parts: Mapping[str, Part], problems: Rows, settings: Mapping[str, Any], most: int
) -> dict[str, Any]:
    """Return the fields of `HeldOut` that only baselines need; of the prompts for validation, at most `most`."""
    # The user's own problems have no training split here whose answers would be informative.
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    part = reader.find("problems", trained_on=True) if "problems" not in reader.named else None
    for row in reader.read("problems", part, MAX_TRAINING_ROWS):
        if row.get("answer"):
            counts[row["kind"]][row["answer"]] += 1

    # Solved problems are among the conversations that a stage trains on.
    shots: list[list[dict[str, str]]] = []
    if (number := settings["shots"]) > 0:
        kinds = {"reasoning", *(row["kind"] for row in problems)}
        rows = reader.read("instructions", reader.find("instructions", trained_on=True), MAX_TRAINING_ROWS)
        solved = [row["messages"][-2:] for row in rows if row["kind"] in kinds]
        draw = random.Random(0)
        for _ in range(2) if len(solved) >= number else ():
            shots.append([message for messages in draw.sample(solved, number) for message in messages])

    def others(key: str, most: int) -> list[Example]:
        """Return rows to choose a baseline on: of a separate validation split if there is one, else of training."""
        part = reader.find(key, "validation")
        if key in parts and (part is None or part.place == parts[key].place):
            part = reader.find(key, trained_on=True)
        return reader.read(key, part, most)

    return {
        "majority": {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()},
        "shots": shots,
        "validation": [row for row in others("prompts", most) if not row.get("test")],
        "trials": others("problems", 64) if len(as_list(settings["elicit"] or [])) + len(shots) > 1 else [],
    }


def drop_ungradable(rows: Rows) -> list[Example]:
    """If code cannot be graded, drop the rows whose answers are code, and log that."""
    if any(row.get("test") for row in rows) and (fault := validate_sandbox()):
        logger.warning("answers that are code are omitted: %s", fault)
        return [row for row in rows if not row.get("test")]
    return list(rows)


@dataclass(frozen=True)
class Part:
    """The rows of a split that are held out, or the rows that are trained on; `place` is what messages call the split.

    With a `share`, only one side of a single split that `is_held_out` divides belongs to the part: by default the rows
    that are held out, or those that are `trained_on`. `numbers` are those of the rows in their data set, which are
    fewer if `keep_rows` leaves some out. Default: all rows of `data`, or those that a stream keeps.
    """

    data: Split
    source: Source
    place: str
    share: float = 0.0
    trained_on: bool = False
    numbers: Sequence[int] | None = None

    def sample(self, most: int, without: str | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the number and content of at most `most` rows that are not of the kind `without`."""
        if not isinstance(self.data, Dataset):
            is_kept = row_filter(self.source, column_names(self.data))
            numbered = ((number, row) for number, row in enumerate(self.data) if self.measures(number) and is_kept(row))
            yield from islice((item for item in numbered if not without or item[1].get("kind") != without), most)
            return
        # These are arrays, because a list of millions of row numbers takes seconds.
        numbers: Any = np.arange(len(self.data)) if self.numbers is None else np.array(self.numbers, dtype=int)
        places: Any = np.flatnonzero(self.measures(numbers))
        if without and "kind" in self.data.column_names:
            places = places[np.array(self.data["kind"][:])[places] != without]
        chosen = np.array(subsample(places, most), dtype=int)
        yield from zip(map(int, numbers[chosen]), self.data.select(chosen), strict=True)

    def measures(self, numbers: Any) -> Any:
        """Return which of the rows with these numbers belong to the part; an array for an array."""
        if not self.share:
            return numbers >= 0
        return is_held_out(numbers, self.share) != self.trained_on


def subsample(rows: Sequence[T], most: int) -> list[T]:
    """Return at most `most` rows, drawn with a fixed seed and kept in their order."""
    # Neither the first rows nor every n-th one would be representative: kinds may be sorted, or alternate.
    if len(rows) <= most:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]


class Reader:
    """Opens data sets, each once, and reads the rows that are held out or trained on.

    `sources` and `own` are what stages are measured on and trained on, by key of `evaluate.yaml`. `named` are the keys
    whose data the user names: no stage may train on them, so all their rows may be measured.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any], flags: Collection[str]) -> None:
        self.run, self.flags = run, flags
        self.sources = {key: documents_of(Source(**settings[key])) for key in HELD_OUT if settings.get(key)}
        self.own = {key: documents_of(Source(**source)) for key, source in settings["trained_on"].items()}
        # Of several data sets, a stage is measured on the first.
        measured = {key: replace(source, dataset_name=source.dataset_names[0]) for key, source in self.own.items()}
        self.named = {key for key in self.sources if key in flags or self.sources[key] != measured.get(key)}
        self.environment = ((settings.get(CALLED) or {}).get("problems") or {}).get("environment")
        self._opened: dict[tuple[str | None, ...], DatasetDict | IterableDatasetDict] = {}

    def is_made(self, source: Source) -> bool:
        """Return whether the run makes this data set itself."""
        return Path(source.dataset_names[0]).is_relative_to(self.run)

    def _is_trained_on(self, source: Source) -> bool:
        """Return whether a stage trains on this data set."""
        place = (os.path.realpath(source.dataset_names[0]), source.dataset_config)
        trained = (
            (os.path.realpath(name), one.dataset_config) for one in self.own.values() for name in one.dataset_names
        )
        return place in trained

    def find(
        self, key: str, split: str | None = None, trained_on: bool = False, own: Source | None = None
    ) -> Part | None:
        """Return rows of `own`, by default the first data set of a key of `evaluate.yaml`, or None if there is none.

        By default they are the held-out rows, wherever they are; otherwise a split, or what a stage is `trained_on`. A
        UserError is raised if a split that the user names does not exist.
        """
        if not (source := own or (self.own if trained_on else self.sources).get(key)):
            return None
        name, train, named = source.dataset_names[0], source.dataset_train_split, source.dataset_test_split
        held_out = [named] if key in self.named and named else [named, "test", "validation"]
        with problems_of(key):
            splits = self._open(source, [split or "", *held_out, train])
            if split is None and list(splits) == [train] and source.validation_share > 0:
                single: Any = splits[train]
                if isinstance(single, Dataset):
                    rows, numbers = keep_rows(single, source)
                    return Part(rows, source, f"{name}, split {train}", source.validation_share, trained_on, numbers)
                # Training holds out rows of the stream's first file only.
                first = single.shard(single.num_shards, 0)
                return Part(first, source, f"{name}, split {train}", source.validation_share, trained_on)
        wanted = [split] if split else [train] if trained_on else held_out
        if wanted is held_out and key in self.named and len(splits) == 1 and not named:
            # A plain file of the user has one split, whatever its name.
            # Who names data for this one evaluation may want to know how well they have been learned.
            if key not in self.flags and self._is_trained_on(source):
                remedy = "is trained on, and holds out no rows (validation_share); give other data"
                raise UserError(Problem(f"{key}: dataset_name", name, remedy))
            wanted = list(splits)
        found = next((one for one in wanted if one in splits), None)
        if found is None:
            if splits and wanted is held_out and key in self.named:
                remedy = f"there is no such split; choose from: {', '.join(splits)}"
                raise UserError(Problem(f"{key}: dataset_test_split", named or "test", remedy))
            return None
        rows = splits[found]
        if not isinstance(rows, Path):
            kept = keep_rows(rows, source)[0] if isinstance(rows, Dataset) else rows
            return Part(kept, source, f"{name}, split {found}")
        try:
            # For larger files, `datasets` keeps a copy in its cache rather than in memory.
            if rows.stat().st_size <= 64 << 20:
                data = Dataset(pq.read_table(rows))
            else:
                data = load_dataset("parquet", data_files=str(rows), split="train")
        except (OSError, pa.ArrowException, DatasetGenerationError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(Problem("RUN", rows, f"cannot be read ({reason}); generate the data again")) from None
        return Part(keep_rows(data, source)[0], source, str(rows))

    def _open(self, source: Source, wanted: Sequence[str]) -> Mapping[str, Split | Path]:
        """Return the splits of a data set by name, or {} if a step of the run has not made it yet.

        `datasets` would copy a folder with a Parquet file per split: the files of `wanted` splits are returned instead.
        """
        name, train = source.dataset_names[0], source.dataset_train_split
        path = Path(name)
        if (path / VOTES_FILE).is_file():
            update_data_set(path)
        files = {split: path / (source.dataset_config or "") / f"{split}.parquet" for split in wanted}
        files = {split: file for split, file in files.items() if file.is_file()}
        if files.keys() - {train}:
            return files
        if self.is_made(source) and not path.exists():
            return {}
        opened = (name, source.dataset_config, source.document)
        if opened not in self._opened:
            self._opened[opened] = open_source(name, source.dataset_config, source.dataset_streaming, source.document)
        return self._opened[opened]

    def read(self, key: str, part: Part | None, most: int, without: str | None = None) -> list[Example]:
        """Return at most `most` rows, with the columns that metrics expect added; arguments as for `sample`.

        A UserError is raised if a column is missing or a row is malformed. In a data set from the Hub, where training
        skips a few malformed rows, they are skipped here too.
        """
        if part is None:
            return []
        columns = column_names(part.data)
        with problems_of(key):
            rows, _ = keep_rows(part.data, part.source) if not isinstance(part.data, Dataset) else (part.data, ())
            convert, made, _ = converter(rows, columns, part.source, HELD_OUT[key].data)
            lacks_answer = key == "problems" and part.source.grade in COMPARED and "answer" not in made
            if lacks_answer and not hasattr(load_environment(self.environment), "get_reward"):
                remedy = f"does not exist; choose from: {', '.join(columns)}"
                raise UserError(Problem("answer_column", part.source.answer_column, remedy))
        examples: list[Example] = []
        faults: list[tuple[int, ShapeError]] = []
        for number, row in part.sample(most, without):
            try:
                example = {**row, **convert(row)}
                if fault := validate_rule(example):
                    raise ShapeError(fault)
            except ShapeError as error:
                faults.append((number, error))
                continue
            # If a row has some of these columns, the missing ones require nothing.
            nothing = {"require": [], "reject": [], "max_words": 0, "test": ""}
            if example.keys() & nothing.keys():
                example |= {column: example.get(column) or default for column, default in nothing.items()}
            examples.append({**example, "kind": str(row.get("kind") or ""), "id": number})
        if faults:
            (number, first), count = faults[0], len(faults) + len(examples)
            if not may_drop(part.source, len(faults), count):
                remedy = f"{first}; correct or remove that row"
                raise UserError(Problem(f"{key}: dataset_name", f"{part.place}, row {number}", remedy))
            what = f"{part.place}: {len(faults)} of {count} rows are omitted"
            logger.warning("%s, as in training; row %d, for instance: %s.", what, number, first)
        return examples
