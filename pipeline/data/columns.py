"""The columns of a data set: each row is checked, and converted to the columns that TRL expects."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value

from pipeline.data.arguments import DataArguments
from pipeline.data.messages import (
    Row,
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
from pipeline.progress import report_lost

logger = logging.getLogger(__name__)

TOKENS = "input_ids"
"""Column of blocks, and of documents that are tokens already: `bos + text + eos`."""

Kind = Literal["text", "tokens", "conversation", "preference", "prompt"]
Split: TypeAlias = Dataset | IterableDataset
Convert = Callable[[Row], dict[str, Any]]

FEATURES = {
    "text": Value("string"),
    "messages": MESSAGES,
    "prompt": MESSAGES,
    "chosen": MESSAGES,
    "rejected": MESSAGES,
    "answer": Value("string"),
    "margin": Value("float64"),
}
"""Types of the columns that converters make."""

FEW = 50
"""Number of the first documents of a stream of the Hub that may be without text. With more, it is the wrong column."""

MOST_LEFT_OUT = 0.1
"""Share of the rows of a data set of the Hub that may lack the expected shape. With more, it is the wrong column."""

RESERVED = (
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "image", "images",
)  # fmt: skip
"""Columns of prompts that are dropped: trainers pass arguments of these names to rewards, or read images in them."""

GSM8K_ANSWER = re.compile(r"####\s*(.+)")


def column_names(split: Split) -> list[str]:
    """Return the columns of a split; a stream may not know them before its first row."""
    return list(split.column_names or next(iter(split)))


def is_of_hub(args: DataArguments) -> bool:
    """Return whether a data set comes from the Hub, so that the user cannot correct its rows."""
    return not Path(args.dataset_names[0]).expanduser().exists()


def place_of(split: Split, args: DataArguments) -> str:
    """Name the data set and the split, for messages."""
    return f"{args.dataset_name}, split {split.split or args.dataset_train_split}"


def standardise(split: Split, args: DataArguments, kind: Kind, tokens: re.Pattern[str] | None = None) -> Split:
    """Convert every row to TRL's columns; the rows of a stream are converted when they are read.

    A row without the expected shape is an error, unless it comes from the Hub, whose users cannot correct it. Such rows
    are dropped, up to `MOST_LEFT_OUT`. In a stream, documents that are not text become empty instead: dropping them
    would change the numbers of the rows after them, and with these which rows are held out.

    Args:
        split: The rows as the source has them.
        args: Names of the columns, and of this data set alone.
        kind, tokens: As for `pipeline.data.splits.load_splits`.

    Returns:
        The rows with the columns of `kind`, without pairs that do not say which answer is better.

    Raises:
        UserError: If a column does not exist, or a row does not have the expected shape.
    """
    columns, place = column_names(split), place_of(split, args)
    if kind == "tokens":
        if columns != [TOKENS]:
            remedy = "has text, and others of dataset_name have tokens; give data sets of one kind"
            raise UserError(Problem("dataset_name", place, remedy))
        return split

    read, made = converter(split, columns, args, kind)
    if kind == "text" and isinstance(split, Dataset) and _is_text(split, args.text_column):
        # There is nothing to convert, and so nothing to copy.
        return split.select_columns(args.text_column).rename_columns({args.text_column: "text"})

    def convert(row: Row) -> dict[str, Any]:
        converted = read(row)
        if tokens is not None:
            refuse_special_tokens(converted, tokens)
        return converted

    if is_of_hub(args) and isinstance(split, Dataset):
        split = _drop_faults(split, convert, place)

    # Without features a stream would not know its columns, and a numeric answer would stay a number.
    features = {name: FEATURES[name] for name in made}
    if kind == "prompt":
        # Rewards read the other columns.
        others = [column for column in columns if column not in (*made, *RESERVED)]
        made += others
        features = {name: split.features[name] for name in others} | features if split.features else {}
    # The rows of a stream are not counted beforehand, so that a few without text are read as empty documents.
    may_be_empty = kind == "text" and is_of_hub(args) and not isinstance(split, Dataset)
    standard = split.map(
        _checker(convert, place, may_be_empty),
        with_indices=True,
        remove_columns=[column for column in columns if column not in made],
        features=Features(features) if features else None,
    )
    return _keep_informative(standard, place) if kind == "preference" else standard


def are_few(lost: int, rows: int) -> bool:
    """Return whether so many of the rows of a data set of the Hub may be dropped."""
    return lost < min(rows, 2 + MOST_LEFT_OUT * rows)


def _checker(convert: Convert, place: str, may_be_empty: bool) -> Callable[[Row, int], dict[str, Any]]:
    """Return a function that converts a row, and reports one without the expected shape by its number.

    Args:
        convert: Converts a row.
        place: The data set and the split.
        may_be_empty: Whether documents that are not text are read as empty ones. Without any text before it, the one
            after the first `FEW` is reported. (These few are not, because a run may be resumed among such documents.)
    """
    texts, faults = 0, 0

    def checked(row: Row, index: int) -> dict[str, Any]:
        nonlocal texts, faults
        try:
            converted = convert(row)
        except ShapeError as error:
            faults += 1
            if not may_be_empty or (not texts and faults > FEW):
                remedy = f"{error}; correct or remove that row"
                raise UserError(Problem("dataset_name", f"{place}, row {index}", remedy)) from None
            if faults == 1:
                logger.warning("%s, row %d: %s; such documents are read as empty ones.", place, index, error)
            return {"text": ""}
        texts += 1
        return converted

    return checked


def _drop_faults(rows: Dataset, convert: Convert, place: str) -> Dataset:
    """Drop the rows that cannot be converted, if they are few. If they are many, the caller refuses the first."""

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
    report_lost(lost, len(rows), f"rows are dropped; row {index}, for instance: {first}", f"correct {place}")
    return kept


def _keep_informative(pairs: Split, place: str) -> Split:
    """Drop pairs that do not say which answer is better; machine-made collections contain some."""
    kept = pairs.filter(is_informative)
    if isinstance(pairs, Dataset) and len(kept) < len(pairs):
        if not len(kept):
            raise UserError(Problem("dataset_name", place, "in all pairs an answer is empty, or both are the same"))
        what = "pairs are dropped, because an answer is empty or both are the same"
        report_lost(len(pairs) - len(kept), len(pairs), what, f"correct {place}")
    return kept


def _is_text(split: Dataset, column: str) -> bool:
    """Return whether each row of a column is text."""
    if split.features[column] != Value("string"):
        return False
    batches = split.select_columns(column).with_format("arrow").iter(10_000)
    return not any(batch[column].null_count for batch in batches)


def _require(columns: list[str], **expected: str) -> None:
    """Report the arguments that name columns which do not exist."""
    problems = [
        Problem(field, name, f"there is no such column; choose from: {', '.join(columns)}")
        for field, name in expected.items()
        if name not in columns
    ]
    if problems:
        raise UserError(*problems)


def converter(split: Split, columns: list[str], args: DataArguments, kind: Kind) -> tuple[Convert, list[str]]:
    """Return the function that converts a row, and the columns that it makes.

    Raises:
        UserError: If a column that it needs does not exist.
    """
    if columns == [TOKENS]:
        remedy = "has tokens, which only recipes.pretrain reads; give the documents that they were made from"
        raise UserError(Problem("dataset_name", place_of(split, args), remedy))

    # What is read and what is made, with optional columns in brackets:
    #
    #   text           text_column                                        text
    #   conversation   messages_column, or a prompt and its completion    messages
    #   prompt         prompt_column [answer_column]                      prompt [answer], and all others
    #   preference     [prompt_column] chosen rejected [margin]           prompt chosen rejected [margin]
    if kind == "text":
        _require(columns, text_column=args.text_column)
        return lambda row: {"text": _read_text(row[args.text_column])}, ["text"]
    if kind == "conversation":
        return _conversation_converter(args, columns), ["messages"]
    if kind == "prompt":
        answers = ["answer"] if args.answer_column in columns else []
        return _prompt_converter(args, columns), ["prompt", *answers]

    _require(columns, chosen_column="chosen", rejected_column="rejected")
    # Answers that are conversations contain their prompt; texts do not.
    if args.prompt_column not in columns and isinstance(next(iter(split))["chosen"], str):
        _require(columns, prompt_column=args.prompt_column)
    made = [name for name in ("prompt", "chosen", "rejected", "margin") if name != "margin" or name in columns]
    return lambda row: read_pair(row, args.prompt_column, args.system_prompt), made


def _read_text(value: object) -> str:
    if not isinstance(value, str):
        raise ShapeError(f"the text is {shorten(value)}")
    return value


def _conversation_converter(args: DataArguments, columns: list[str]) -> Convert:
    """Return the function that reads conversations, or joins a prompt and its completion.

    By default, the columns `question` and `answer` or `prompt` and `completion` are joined if there are no messages.
    """

    def from_messages(row: Row) -> dict[str, Any]:
        messages = read_messages(row[args.messages_column], args.messages_column, args.system_prompt)
        if messages[-1]["role"] != "assistant":
            raise ShapeError(f"{args.messages_column} ends with the role {messages[-1]['role']}, not assistant")
        if next(message["role"] for message in messages if message["role"] != "system") == "assistant":
            raise ShapeError(f"{args.messages_column} begins with the assistant: there is no prompt")
        return {"messages": messages}

    if args.completion_column is not None:
        pairs = [(args.prompt_column, args.completion_column)]
        _require(columns, prompt_column=args.prompt_column, completion_column=args.completion_column)
    elif args.messages_column in columns:
        return from_messages
    else:
        pairs = [pair for pair in (("question", "answer"), ("prompt", "completion")) if set(pair) <= set(columns)]
        if not pairs:
            _require(columns, messages_column=args.messages_column)
    prompt, completion = pairs[0]

    def from_pair(row: Row) -> dict[str, Any]:
        messages = read_prompt(row[prompt], prompt, args.system_prompt)
        return {"messages": [*messages, answer_message(row[completion], completion)]}

    return from_pair


def _prompt_converter(args: DataArguments, columns: list[str]) -> Convert:
    """Return the function that reads prompts, with their final answers if there is a column of answers."""
    prompt = args.prompt_column
    if prompt not in columns and prompt == "prompt" and "question" in columns:
        prompt = "question"
    # Pairs of conversations are read as well: their prompt is what both begin with.
    has_pairs = prompt == "prompt" and {"chosen", "rejected"} <= set(columns)
    if not has_pairs:
        _require(columns, prompt_column=prompt)
    if args.answer_pattern is not None or args.answer_column != "answer":
        _require(columns, answer_column=args.answer_column)
    final_answer = _answer_finder(args)

    def convert(row: Row) -> dict[str, Any]:
        if has_pairs and not has_prompt(row, prompt):
            messages = read_pair(row, prompt, args.system_prompt)["prompt"]
        else:
            messages = read_prompt(row[prompt], prompt, args.system_prompt)
        if args.answer_column not in columns:
            return {"prompt": messages}
        return {"prompt": messages, "answer": final_answer(row[args.answer_column])}

    return convert


def _answer_finder(args: DataArguments) -> Callable[[object], str]:
    """Return the function that finds the final answer in the content of `answer_column`, by `answer_pattern`."""
    try:
        pattern = re.compile(args.answer_pattern) if args.answer_pattern is not None else None
    except (re.error, RecursionError, OverflowError) as error:
        remedy = f"is not a regular expression ({error})"
        raise UserError(Problem("answer_pattern", args.answer_pattern, remedy)) from None

    def find(value: object) -> str:
        if value is None:
            raise ShapeError(f"{args.answer_column} is None")
        answer = str(as_answer(value))
        match = (pattern or GSM8K_ANSWER).search(answer)
        if match:
            answer = match.group(1) if match.re.groups else match.group(0)
            if answer is None:
                raise ShapeError(f"the group of answer_pattern finds nothing in {shorten(value)}")
        elif pattern is not None:
            raise ShapeError(f"answer_pattern does not occur in {shorten(answer)}")
        return answer.strip()

    return find
