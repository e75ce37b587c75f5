"""What a stage is measured on: the test splits of the run's data, or data that the user names."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.arguments import DataArguments
from pipeline.data.messages import ShapeError, read_pair, teaches
from pipeline.errors import Problem, UserError

Row = dict[str, Any]

MOST_EXAMPLES = {"texts": 400, "instructions": 400, "problems": 300, "prompts": 200, "pairs": 1000}
"""Most rows used of each kind: intervals of some hundredths, in seconds of CPU time."""


@dataclass(frozen=True)
class HeldOut:
    """Test rows, each with its index in the split as `id`; empty where there is no such data.

    Args:
        texts: `text` and `kind`, for bits per byte.
        instructions: `messages`, `kind` and how they are graded, for instruction accuracy.
        problems: `prompt`, `answer` and `kind`, for pass@k.
        prompts: `prompt`, `kind` and how they are graded, for the win rate.
        pairs: `prompt`, `chosen` and `rejected`, for reward models.
    """

    texts: list[Row] = field(default_factory=list)
    instructions: list[Row] = field(default_factory=list)
    problems: list[Row] = field(default_factory=list)
    prompts: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)


def pick(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` rows in their order, always the same ones, drawn at random.

    Neither the first rows nor every n-th one: data sets are sorted by kind, or their kinds alternate.
    """
    if len(rows) <= most:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]


def read_held_out(run: Path, args: argparse.Namespace) -> HeldOut:
    """Read the test splits in RUN/data and RUN/3_preferences, and what `--text` and `--reasoning` name.

    Args:
        run: the run directory.
        args: of `pipeline.evaluation.cli`.

    Raises:
        UserError: there is nothing to measure on, or a named data set cannot be read.
    """
    data = run / "data"
    most = {name: min(n, args.limit or n) for name, n in MOST_EXAMPLES.items()}
    texts = _named(args, "text", "text") if args.text else _split(data / "pretrain")
    problems = _named(args, "reasoning", "prompt") if args.reasoning else _split(data / "reasoning")
    # Problems have metrics of their own: final answers are compared there, not looked for in the text.
    instructions = [row for row in _split(data / "sft") if row["kind"] != "reasoning"]
    found = HeldOut(
        texts=pick(texts, most["texts"]),
        instructions=pick(instructions, most["instructions"]),
        problems=pick(problems, most["problems"]),
        prompts=pick(_split(data / "preferences"), most["prompts"]),
        pairs=_conversational(pick(_split(run / "3_preferences"), most["pairs"])),
    )
    if not any((found.texts, found.instructions, found.problems, found.prompts, found.pairs)):
        remedy = "holds no test split of pretrain, sft, reasoning or preferences: name --text or --reasoning"
        raise UserError(Problem("RUN", data, remedy))
    return found


def _split(folder: Path) -> list[Row]:
    path = folder / "test.parquet"
    try:
        return _numbered(pq.read_table(path).to_pylist()) if path.is_file() else []
    except (OSError, pa.ArrowException) as error:
        reason = str(error).split("\n")[0]
        raise UserError(Problem("RUN", path, f"cannot be read ({reason}); make the data again")) from None


def _conversational(pairs: Sequence[Row]) -> list[Row]:
    """The pairs with prompt and answers as messages, whatever format of TRL's they are in; none that says nothing."""
    standard = []
    for row in pairs:
        try:
            pair = read_pair(row, DataArguments())
        except (ShapeError, KeyError) as error:
            remedy = f"has in row {row['id']} no pair ({error}); correct it"
            raise UserError(Problem("RUN", "3_preferences/test.parquet", remedy)) from None
        if teaches(pair):
            standard.append({**row, **pair})
    return standard


def _named(args: argparse.Namespace, name_option: str, kind: Any) -> list[Row]:
    """The rows of the data set that an option names; of a file all, unless a split is asked for."""
    from pipeline.data.splits import load_splits

    name = getattr(args, name_option)
    whole_file = args.split is None and Path(name).is_file()
    wanted = DataArguments(
        dataset_name=name,
        dataset_config=args.config,
        dataset_test_split=args.split or "test",
        max_train_samples=None if whole_file else 1,
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
    rows = _numbered((train if whole_file else test) or ())
    if kind == "prompt" and rows and "answer" not in rows[0]:
        remedy = f"there is no such column; choose from: {', '.join(name for name in rows[0] if name != 'id')}"
        raise UserError(Problem("--answer_column", args.answer_column, remedy))
    return rows


def _numbered(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [{**row, "kind": row.get("kind") or "", "id": index} for index, row in enumerate(rows)]
