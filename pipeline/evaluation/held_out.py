"""The data that stages are measured on: the run's test splits or data that the user names, and fixed prompts."""

from __future__ import annotations

import argparse
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.arguments import DataArguments
from pipeline.data.messages import ShapeError, is_informative, read_messages, read_pair, read_prompt, shorten
from pipeline.data.splits import load_splits
from pipeline.errors import Problem, UserError
from pipeline.rewards.grading import validate_rule
from pipeline.rewards.sandbox.run import validate_sandbox

logger = logging.getLogger(__name__)

Example = dict[str, Any]
"""A row of a test split, with its index in the split as `id`."""

MAX_EXAMPLES = {"texts": 400, "instructions": 400, "problems": 300, "longer": 150, "prompts": 200, "pairs": 1000}
"""Largest number of examples used: intervals a few hundredths wide, in seconds of CPU time."""

RULE_COLUMNS = ("require", "reject", "max_words", "test")
"""Columns by which an answer to an instruction is graded, see `pipeline.rewards.grading`."""

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
"""Every stage answers these greedily; the answers are in `evaluations/<stage>.json`, in this order."""


@dataclass(frozen=True)
class HeldOut:
    """Test examples; without data of a kind, its list is empty.

    Attributes:
        texts: `text` and `kind`, for bits per byte.
        instructions: `messages`, `kind` and how they are graded, for instruction accuracy.
        problems: `prompt`, `answer` and `kind`, for pass@k.
        longer: Problems that are longer than those of the training split.
        majority: Most frequent answer of each kind of problem in the training split.
        prompts: `prompt`, `kind` and how they are graded, for the win rate.
        validation: Prompts of the validation split whose answers are not code, for the baseline `constant`.
        pairs: `prompt`, `chosen` and `rejected`, for reward models.
    """

    texts: list[Example] = field(default_factory=list)
    instructions: list[Example] = field(default_factory=list)
    problems: list[Example] = field(default_factory=list)
    longer: list[Example] = field(default_factory=list)
    majority: dict[str, str] = field(default_factory=dict)
    prompts: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    pairs: list[Example] = field(default_factory=list)


def subsample(rows: Sequence[Example], most: int) -> list[Example]:
    """Return at most `most` rows, drawn with a fixed seed and kept in their order.

    Neither the first rows nor every n-th one would do: data sets are sorted by kind, or their kinds alternate.
    """
    if len(rows) <= most:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]


def read_held_out(run: Path, args: argparse.Namespace) -> HeldOut:
    """Read the test splits in RUN/data and RUN/3_preferences, and what `--text` and `--reasoning` name.

    Raises:
        UserError: If there is nothing to measure on, or a data set cannot be read.
    """
    data = run / "data"
    most = {name: min(n, args.limit or n) for name, n in MAX_EXAMPLES.items()}
    texts = _read_named(args, "text", "text") if args.text else _read_split(data / "pretrain", "text")
    splits = ("test", "test_longer", "train")
    problems, longer, train = (_read_split(data / "reasoning", "prompt", "answer", split=split) for split in splits)
    if args.reasoning:
        problems, longer, train = _read_named(args, "reasoning", "prompt"), [], []
    # Problems have metrics of their own, which compare final answers instead of looking for words.
    instructions = [row for row in _read_split(data / "sft", "messages", *RULE_COLUMNS) if row["kind"] != "reasoning"]
    validation = [row for row in _read_split(data / "preferences", "prompt", split="validation") if not row.get("test")]
    pairs = subsample(_read_split(run / "3_preferences"), most["pairs"])
    found = HeldOut(
        texts=subsample(texts, most["texts"]),
        instructions=subsample(drop_ungradable(instructions), most["instructions"]),
        problems=subsample(problems, most["problems"]),
        longer=subsample(longer, most["longer"]),
        majority=_most_frequent_answers(train),
        prompts=subsample(drop_ungradable(_read_split(data / "preferences", "prompt")), most["prompts"]),
        validation=subsample(validation, most["prompts"]),
        pairs=_to_messages(pairs),
    )
    if not any((found.texts, found.instructions, found.problems, found.prompts, found.pairs)):
        remedy = "does not contain a test split of pretrain, sft, reasoning or preferences; use --text or --reasoning"
        raise UserError(Problem("RUN", data, remedy))
    return found


def drop_ungradable(rows: Sequence[Example]) -> list[Example]:
    """Leave out rows whose answers are code, with one line in the log, where code cannot be graded."""
    if any(row.get("test") for row in rows) and (fault := validate_sandbox()):
        logger.warning("answers that are code are left out: %s", fault)
        return [row for row in rows if not row.get("test")]
    return list(rows)


def _most_frequent_answers(problems: Iterable[Example]) -> dict[str, str]:
    """Return the most frequent answer to each kind of problem."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in problems:
        counts[row["kind"]][row["answer"]] += 1
    return {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}


def _read_split(folder: Path, *columns: str, split: str = "test") -> list[Example]:
    path = folder / f"{split}.parquet"
    if not path.is_file():
        return []
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).split("\n")[0]
        raise UserError(Problem("RUN", path, f"cannot be read ({reason}); generate the data again")) from None
    if missing := [column for column in columns if column not in table.column_names]:
        raise UserError(Problem("RUN", path, f"lacks the column {missing[0]}; generate the data again"))
    rows = _with_ids(table.to_pylist())
    for row in rows:
        try:
            _standardise(row, *columns)
        except ShapeError as error:
            remedy = f"{error}; correct or remove that row"
            raise UserError(Problem("RUN", f"{path}, row {row['id']}", remedy)) from None
    return rows


def _standardise(row: Example, *columns: str) -> None:
    """Check the columns of a row, and convert them to the types that the metrics expect.

    Raises:
        ShapeError: If a column does not contain what its name says.
    """
    for column in {"text", "answer"}.intersection(columns):
        if row[column] is None or not str(row[column]).strip():
            raise ShapeError(f"{column} is {shorten(row[column])}, not text")
        row[column] = str(row[column])
    if "prompt" in columns:
        row["prompt"] = read_prompt(row["prompt"], "prompt")
    if "messages" in columns:
        row["messages"] = read_messages(row["messages"], "messages")
        if len(row["messages"]) < 2 or row["messages"][-1]["role"] != "assistant":
            raise ShapeError("messages do not end with an answer of the assistant")
    if set(RULE_COLUMNS) & set(row):
        if fault := validate_rule(row):
            raise ShapeError(fault)
        defaults = {"require": [], "reject": [], "max_words": 0, "test": ""}
        row.update({column: row.get(column) or defaults[column] for column in RULE_COLUMNS})


def _to_messages(pairs: Sequence[Example]) -> list[Example]:
    """Convert pairs in any format of TRL's to messages; pairs without a preference are dropped."""
    standard = []
    for row in pairs:
        try:
            pair = read_pair(row)
            for column in ("taste_chosen", "taste_rejected"):
                if not isinstance(row.get(column, 0.0), int | float | None):
                    raise ShapeError(f"{column} is {shorten(row[column])}, not a number")
        except (ShapeError, KeyError) as error:
            remedy = f"row {row['id']} is not a valid pair ({error}); correct it"
            raise UserError(Problem("RUN", "3_preferences/test.parquet", remedy)) from None
        if is_informative(pair):
            standard.append({**row, **pair})
    return standard


def _read_named(args: argparse.Namespace, name_option: str, kind: Any) -> list[Example]:
    """Read the data set that an option names: all of a file, unless `--split` is given."""
    name = getattr(args, name_option)
    whole_file = args.split is None and Path(name).is_file()
    wanted = DataArguments(
        dataset_name=name,
        dataset_config=args.config,
        dataset_test_split=args.split or "test",
        max_train_samples=None if whole_file else 1,
        validation_share=0.0,
        text_column=args.text_column,
        prompt_column=args.prompt_column,
        answer_column=args.answer_column,
        answer_pattern=args.answer_pattern,
    )
    try:
        train, test = load_splits(wanted, kind, evaluation=not whole_file)
    except UserError as error:
        options = {"dataset_name": name_option, "dataset_config": "config", "dataset_test_split": "split"}
        problems = [replace(p, field=f"--{options.get(p.field, p.field)}") for p in error.problems]
        raise UserError(*problems) from error
    rows = _with_ids((train if whole_file else test) or ())
    if kind == "prompt" and rows and "answer" not in rows[0]:
        columns = ", ".join(column for column in rows[0] if column != "id")
        raise UserError(Problem("--answer_column", args.answer_column, f"does not exist; choose from: {columns}"))
    return rows


def _with_ids(rows: Iterable[Mapping[str, Any]]) -> list[Example]:
    return [{**row, "kind": row.get("kind") or "", "id": index} for index, row in enumerate(rows)]
