"""The columns of a data set: each row checked, and renamed to the columns that TRL expects."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value

from pipeline.data.arguments import DataArguments
from pipeline.data.messages import (
    ShapeError,
    answer_message,
    as_answer,
    has_prompt,
    is_informative,
    read_messages,
    read_pair,
    read_prompt,
    refuse_special_tokens,
    shorten,
)
from pipeline.data.writing import MESSAGES
from pipeline.errors import Problem, UserError

logger = logging.getLogger(__name__)

TOKENS = "input_ids"
"""Column of blocks, and of documents that are tokens already: `bos + text + eos`."""

Kind = Literal["text", "tokens", "conversation", "preference", "prompt"]
Split: TypeAlias = Dataset | IterableDataset
Row = Mapping[str, Any]

FEATURES = {"text": Value("string"), "answer": Value("string"), "margin": Value("float64")} | dict.fromkeys(
    ("messages", "prompt", "chosen", "rejected"), MESSAGES
)

FEW, MOST_LEFT_OUT = 50, 0.1
"""Number of the first rows of a stream, and share of the rows of another data set of the Hub, that may not have the
expected shape. With more, it is rather the wrong column."""

RESERVED = (
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "image", "images",
)  # fmt: skip
"""Columns of prompts that are left out: trainers pass arguments of these names to rewards, or read images in them."""

GSM8K_ANSWER = re.compile(r"####\s*(.+)")


def column_names(split: Split) -> list[str]:
    """Return the columns of a split; a stream may not know them before its first row."""
    return list(split.column_names or next(iter(split)))


def is_of_hub(args: DataArguments) -> bool:
    """Return whether the rows are those of others, which a user cannot correct."""
    return not Path(args.dataset_names[0]).expanduser().exists()


def place_of(split: Split, args: DataArguments) -> str:
    """Name the data set and the split, for messages."""
    return f"{args.dataset_name}, split {split.split or args.dataset_train_split}"


def standardise(split: Split, args: DataArguments, kind: Kind, tokens: re.Pattern[str] | None = None) -> Split:
    """Rename the columns to TRL's, and check every row (of a stream, when it is read).

    Args:
        split: The rows as the source has them.
        args: Names of the columns.
        kind, tokens: As for `pipeline.data.splits.load_splits`.

    Returns:
        The rows with the columns of `kind`; pairs that do not say which answer is better are left out. So are rows of
        the Hub that do not have the expected shape, which its readers cannot correct, up to `MOST_LEFT_OUT`; in a
        stream, of which only documents may be without it, these are empty.

    Raises:
        UserError: If a column does not exist, or a row does not have the expected shape.
    """
    columns = column_names(split)
    if kind == "tokens":
        if columns != [TOKENS]:
            remedy = "has text, and others of dataset_name have tokens; give data sets of one kind"
            raise UserError(Problem("dataset_name", place_of(split, args), remedy))
        return split
    convert, kept = converter(split, columns, args, kind)
    if kind == "text" and isinstance(split, Dataset) and _is_text(split, args.text_column):
        only = split.select_columns(args.text_column)  # without a copy
        return only if args.text_column == "text" else only.rename_column(args.text_column, "text")
    place, seen = place_of(split, args), [0, 0]  # rows that have the expected shape, and others
    may_be_empty = kind == "text" and isinstance(split, IterableDataset) and is_of_hub(args)

    def shaped(row: Row) -> dict[str, Any]:
        converted = convert(row)
        if tokens is not None:
            refuse_special_tokens(converted, tokens)
        return converted

    def checked(row: Row, index: int) -> Row:
        try:
            converted = shaped(row)
        except ShapeError as error:
            seen[1] += 1
            if may_be_empty and (seen[0] or seen[1] <= FEW):  # a run that is resumed among them must go on
                if seen[1] == 1:
                    logger.warning("%s, row %d: %s; such documents are read as empty ones.", place, index, error)
                return {"text": ""}
            remedy = f"{error}; correct or remove that row"
            raise UserError(Problem("dataset_name", f"{place}, row {index}", remedy)) from None
        seen[0] += 1
        return converted

    if isinstance(split, Dataset) and is_of_hub(args):
        split = _keep_shaped(split, shaped, place)
    # Without features a stream would not know its columns, and a numeric answer would stay a number.
    features = {name: FEATURES[name] for name in kept if name in FEATURES}
    if kind == "prompt":  # the other columns stay, for rewards
        kept += [column for column in columns if column not in RESERVED]
        others = {name: split.features[name] for name in kept if name not in features} if split.features else {}
        features = others | features if split.features else {}
    removed = [column for column in columns if column not in kept]
    known = Features(features) if features else None
    standard = split.map(checked, with_indices=True, remove_columns=removed, features=known)
    return _keep_informative(standard, place) if kind == "preference" else standard


def converter(
    split: Split, columns: list[str], args: DataArguments, kind: Kind
) -> tuple[Callable[[Row], dict[str, Any]], list[str]]:
    """Return the function that converts a row, and the columns that it makes."""
    if columns == [TOKENS]:
        remedy = "has tokens, which only recipes.pretrain reads; give the documents that they were made from"
        raise UserError(Problem("dataset_name", place_of(split, args), remedy))
    if kind == "text":
        _require(columns, text_column=args.text_column)
        return lambda row: {"text": _text(row[args.text_column])}, ["text"]
    if kind == "conversation":
        return _conversation_converter(args, columns), ["messages"]
    if kind == "prompt":
        answers = ["answer"] if args.answer_column in columns else []
        return _prompt_converter(args, columns), ["prompt", *answers]
    _require(columns, chosen_column="chosen", rejected_column="rejected")
    if args.prompt_column not in columns and isinstance(next(iter(split))["chosen"], str):
        _require(columns, prompt_column=args.prompt_column)
    made = ["prompt", "chosen", "rejected", *(["margin"] if "margin" in columns else [])]
    return lambda row: read_pair(row, args.prompt_column, args.system_prompt), made


def are_few(lost: int, rows: int) -> bool:
    """Return whether so many of the rows of a data set of the Hub may be left out."""
    return lost < min(rows, 2 + MOST_LEFT_OUT * rows)


def _keep_shaped(rows: Dataset, convert: Callable[[Row], object], place: str) -> Dataset:
    """Leave out the rows that cannot be converted, if they are few; the first of many is for the caller to refuse."""

    def fault(row: Row) -> str:
        try:
            convert(row)
        except ShapeError as error:
            return str(error)
        return ""

    kept = rows.filter(lambda row: not fault(row))
    lost = len(rows) - len(kept)
    if not lost or not are_few(lost, len(rows)):
        return rows
    index, first = next((index, found) for index, row in enumerate(rows) if (found := fault(row)))
    logger.warning("%s: %d of %d rows are left out; row %d, for instance: %s.", place, lost, len(rows), index, first)
    return kept


def _keep_informative(pairs: Split, place: str) -> Split:
    """Leave out pairs that do not say which answer is better; machine-made collections contain some."""
    kept = pairs.filter(is_informative)
    if isinstance(pairs, Dataset) and len(kept) < len(pairs):
        if not len(kept):
            raise UserError(Problem("dataset_name", place, "in all pairs an answer is empty, or both are the same"))
        logger.warning(
            "%s: %d of %d pairs are left out, because an answer is empty or both are the same.",
            *(place, len(pairs) - len(kept), len(pairs)),
        )
    return kept


def _is_text(split: Dataset, column: str) -> bool:
    """Return whether each row of a column is text."""
    batches = split.select_columns(column).with_format("arrow").iter(10_000)
    return split.features[column] == Value("string") and not any(batch[column].null_count for batch in batches)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ShapeError(f"the text is {shorten(value)}")
    return value


def _require(columns: list[str], **expected: str) -> None:
    problems = [
        Problem(field, name, f"there is no such column; choose from: {', '.join(columns)}")
        for field, name in expected.items()
        if name not in columns
    ]
    if problems:
        raise UserError(*problems)


def _conversation_converter(args: DataArguments, columns: list[str]) -> Callable[[Row], dict[str, Any]]:
    """Return what reads conversations, or joins a prompt and a completion (by default also `question` and `answer`)."""
    pairs = [(args.prompt_column, args.completion_column), ("question", "answer"), ("prompt", "completion")]
    found = [(p, c) for p, c in pairs if c is not None and p in columns and c in columns]
    if args.completion_column is None and args.messages_column in columns:

        def from_messages(row: Row) -> dict[str, Any]:
            messages = read_messages(row[args.messages_column], args.messages_column, args.system_prompt)
            if messages[-1]["role"] != "assistant":
                raise ShapeError(f"{args.messages_column} ends with the role {messages[-1]['role']}, not assistant")
            if next(m["role"] for m in messages if m["role"] != "system") == "assistant":
                raise ShapeError(f"{args.messages_column} begins with the assistant: there is no prompt")
            return {"messages": messages}

        return from_messages
    if args.completion_column is not None and found[:1] != [pairs[0]]:
        _require(columns, prompt_column=args.prompt_column, completion_column=args.completion_column)
    if not found:
        _require(columns, messages_column=args.messages_column)
    prompt, completion = found[0]

    def from_pair(row: Row) -> dict[str, Any]:
        messages = read_prompt(row[prompt], prompt, args.system_prompt)
        return {"messages": [*messages, answer_message(row[completion], completion)]}

    return from_pair


def _prompt_converter(args: DataArguments, columns: list[str]) -> Callable[[Row], dict[str, Any]]:
    prompt = args.prompt_column
    if prompt not in columns and prompt == "prompt" and "question" in columns:
        prompt = "question"
    pairs = prompt == "prompt" and {"chosen", "rejected"} <= set(columns)
    if not pairs:
        _require(columns, prompt_column=prompt)
    if args.answer_pattern is not None or args.answer_column != "answer":
        _require(columns, answer_column=args.answer_column)
    try:
        pattern = re.compile(args.answer_pattern) if args.answer_pattern is not None else None
    except (re.error, RecursionError, OverflowError) as error:
        remedy = f"is not a regular expression ({error})"
        raise UserError(Problem("answer_pattern", args.answer_pattern, remedy)) from None

    def convert(row: Row) -> dict[str, Any]:
        if pairs and not has_prompt(row, prompt):  # it is in the answers
            messages = read_pair(row, prompt, args.system_prompt)["prompt"]
        else:
            messages = read_prompt(row[prompt], prompt, args.system_prompt)
        if args.answer_column not in columns:
            return {"prompt": messages}
        if row[args.answer_column] is None:
            raise ShapeError(f"{args.answer_column} is None")
        answer = str(as_answer(row[args.answer_column]))
        match = (pattern or GSM8K_ANSWER).search(answer)
        if match:
            answer = match.group(1) if match.re.groups else match.group(0)
            if answer is None:
                raise ShapeError(f"the group of answer_pattern finds nothing in {shorten(row[args.answer_column])}")
        elif pattern is not None:
            raise ShapeError(f"answer_pattern does not occur in {shorten(answer)}")
        return {"prompt": messages, "answer": answer.strip()}

    return convert
