"""Data sets from the Hub or from local files, checked, with the column names that TRL expects."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value

from pipeline.data.arguments import DataArguments
from pipeline.data.messages import ShapeError, answer_message, read_messages, read_pair, read_prompt, short, teaches
from pipeline.data.sources import broken_files, open_source
from pipeline.errors import Problem, UserError

logger = logging.getLogger(__name__)

Kind = Literal["text", "conversation", "preference", "prompt"]
Split: TypeAlias = Dataset | IterableDataset
Row = dict[str, Any]

SHUFFLE_BUFFER = 1000
"""Rows among which a stream is shuffled."""

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = {"text": Value("string"), "answer": Value("string"), "margin": Value("float64")} | dict.fromkeys(
    ("messages", "prompt", "chosen", "rejected"), MESSAGES
)

GSM8K_ANSWER = re.compile(r"####\s*(.+)")


def load_splits(args: DataArguments, kind: Kind, evaluation: bool) -> tuple[Split, Split | None]:
    """Load what a stage trains on and, if wanted, what it is evaluated on meanwhile.

    Args:
        args: Names the data set, its splits and its columns. A data set that has one split only (a plain
            file, say) gives every `1 / validation_share`-th row to the evaluation.
        kind: What the rows hold, and the columns that come out:
            `"text"`: `text`, a document.
            `"conversation"`: `messages`, which end with the assistant's; also made of a question and an
            answer column.
            `"preference"`: `prompt`, `chosen` and `rejected`, lists of messages, and `margin` if there is one.
            `"prompt"`: `prompt`, a list of messages, `answer` if there is one, and all other columns, for
            rewards.
        evaluation: Whether the second split is wanted.

    Returns:
        The training split, and the evaluation split or `None`. Iterable data sets if
        `args.dataset_streaming`.

    Raises:
        UserError: If the data set, a split or a column isn't there, a split is empty, or a row has another
            shape.
    """
    source = open_source(args)
    try:
        return _load_splits(source, args, kind, evaluation)
    except UnicodeDecodeError as error:  # of a file that was only opened so far
        raise UserError(*broken_files(Path(str(args.dataset_name)), error)) from None


def _load_splits(
    source: DatasetDict | IterableDatasetDict, args: DataArguments, kind: Kind, evaluation: bool
) -> tuple[Split, Split | None]:
    if evaluation and _holds_out(args, list(source)):
        # Checked before it is divided, so that row numbers are those of the file.
        train, test = _hold_out(args, _standardise(source[args.dataset_train_split], args, kind))
        splits = [_limit(args, train, "max_train_samples"), _limit(args, test, "max_eval_samples")]
    else:
        _check_splits(args, list(source), evaluation)
        splits = [_limit(args, source[args.dataset_train_split], "max_train_samples")]
        if evaluation:
            splits.append(_limit(args, source[args.dataset_test_split], "max_eval_samples"))
        splits = [_standardise(split, args, kind) for split in splits]
    if isinstance(splits[0], IterableDataset):
        # Trainers shuffle what has a length only. The order depends on the epoch and on nothing else.
        splits[0] = splits[0].shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
    return splits[0], splits[1] if len(splits) > 1 else None


def _holds_out(args: DataArguments, names: list[str]) -> bool:
    """Whether the evaluation's rows are to be taken from a data set's only split."""
    only = names == [args.dataset_train_split]
    return only and args.dataset_test_split != args.dataset_train_split and args.validation_share > 0


def _hold_out(args: DataArguments, only: Split) -> tuple[Split, Split]:
    """Divide rows into those to train on and those to evaluate on, the same in every run."""
    period = round(1 / args.validation_share)
    logger.info("The data set has no split %s: every %dth row is held out for it.", args.dataset_test_split, period)
    if isinstance(only, Dataset):
        if len(only) < 2:
            remedy = f"has {len(only)} row, which leaves nothing to hold out; give more, or --eval_strategy no"
            raise UserError(Problem("dataset_name", args.dataset_name, remedy))
        rows = range(len(only))
        held_out = rows[::period]
        return only.select([row for row in rows if row not in held_out]), only.select(held_out)

    def is_held_out(_: Row, index: int) -> bool:
        return index % period == 0

    def is_kept(_: Row, index: int) -> bool:
        return index % period != 0

    return only.filter(is_kept, with_indices=True), only.filter(is_held_out, with_indices=True)


def _check_splits(args: DataArguments, names: list[str], evaluation: bool) -> None:
    there = f"there is no such split; choose from: {', '.join(names)}"
    train, test = args.dataset_train_split, args.dataset_test_split
    problems = []
    if train not in names:
        problems.append(Problem("dataset_train_split", train, there))
    if evaluation and test not in names and (train in names or len(names) > 1):
        problems.append(Problem("dataset_test_split", test, there))
    if evaluation and train == test:
        problems.append(Problem("dataset_test_split", test, "is the training split; choose another"))
    if problems:
        raise UserError(*problems)


def _limit(args: DataArguments, split: Split, field: str) -> Split:
    samples = getattr(args, field)
    if samples is None:
        limited = split
    elif samples < 1:
        raise UserError(Problem(field, samples, "must be at least 1"))
    else:
        limited = split.take(min(samples, len(split)) if isinstance(split, Dataset) else samples)
    first = next(iter(limited.take(1) if isinstance(limited, IterableDataset) else limited), None)
    if first is None:
        name = f"{args.dataset_name}, split {split.split or args.dataset_train_split}"
        raise UserError(Problem("dataset_name", name, "is empty; choose one that has rows"))
    return limited


def _standardise(split: Split, args: DataArguments, kind: Kind) -> Split:
    """Bring the columns under TRL's names, and check every row (as it is read, if it is streamed)."""
    columns = list(split.column_names or next(iter(split)))
    convert: Callable[[Row], Row]
    if kind == "text":
        _require(columns, text_column=args.text_column)
        convert, kept = lambda row: {"text": _text(row[args.text_column])}, ["text"]
    elif kind == "conversation":
        convert, kept = _conversation_converter(args, columns), ["messages"]
    elif kind == "preference":
        _require(columns, chosen_column="chosen", rejected_column="rejected")
        if args.prompt_column not in columns and isinstance(next(iter(split))["chosen"], str):
            _require(columns, prompt_column=args.prompt_column)
        convert, kept = lambda row: read_pair(row, args), ["prompt", "chosen", "rejected"]
        kept += ["margin"] if "margin" in columns else []
    else:
        convert, kept = _prompt_converter(args, columns), [*columns, "prompt", "answer"]

    def checked(row: Row, index: int) -> Row:
        try:
            return convert(row)
        except ShapeError as error:
            name = f"{args.dataset_name}, split {split.split or args.dataset_train_split}, row {index}"
            raise UserError(Problem("dataset_name", name, f"{error}; correct or remove that row")) from None

    removed = [column for column in columns if column not in kept]
    # Without features a stream would not know its columns, and an answer that is a number would stay one.
    features = Features({name: FEATURES[name] for name in kept if name in FEATURES})
    if kind == "prompt":
        if args.answer_column not in columns:
            del features["answer"]
        others = {name: split.features[name] for name in columns if name not in features} if split.features else {}
        features = Features({**others, **features})
    known = kind != "prompt" or split.features is not None
    standard = split.map(checked, with_indices=True, remove_columns=removed, features=features if known else None)
    return _comparable(standard, args) if kind == "preference" else standard


def _comparable(pairs: Split, args: DataArguments) -> Split:
    """The pairs that say which of two answers is better. Collections made by machines hold others too."""
    kept = pairs.filter(teaches)
    if isinstance(pairs, Dataset) and len(kept) < len(pairs):
        left_out, name = len(pairs) - len(kept), f"{args.dataset_name}, split {pairs.split or args.dataset_train_split}"
        if not len(kept):
            raise UserError(Problem("dataset_name", name, "all pairs have an empty answer or two that are the same"))
        logger.warning(
            "%s: %d of %d pairs are left out, in which an answer is empty or both are the same.",
            *(name, left_out, len(pairs)),
        )
    return kept


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ShapeError(f"the text is {short(value)}")
    return value


def _require(columns: list[str], **wanted: str) -> None:
    problems = [
        Problem(field, name, f"there is no such column; choose from: {', '.join(columns)}")
        for field, name in wanted.items()
        if name not in columns
    ]
    if problems:
        raise UserError(*problems)


def _conversation_converter(args: DataArguments, columns: list[str]) -> Callable[[Row], Row]:
    """Conversations as they are, or of a prompt and a completion column (`question` and `answer` are tried
    too)."""
    pairs = [(args.prompt_column, args.completion_column), ("question", "answer"), ("prompt", "completion")]
    found = [(p, c) for p, c in pairs if c is not None and p in columns and c in columns]
    if args.completion_column is None and args.messages_column in columns:

        def from_messages(row: Row) -> Row:
            messages = read_messages(row[args.messages_column], args, args.messages_column)
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
    return lambda row: {
        "messages": [*read_prompt(row[prompt], args, prompt), answer_message(row[completion], completion)]
    }


def _prompt_converter(args: DataArguments, columns: list[str]) -> Callable[[Row], Row]:
    prompt = args.prompt_column
    if prompt not in columns and prompt == "prompt" and "question" in columns:
        prompt = "question"
    _require(columns, prompt_column=prompt)
    if args.answer_pattern is not None or args.answer_column != "answer":
        _require(columns, answer_column=args.answer_column)
    try:
        pattern = re.compile(args.answer_pattern) if args.answer_pattern is not None else None
    except re.error as error:
        raise UserError(
            Problem("answer_pattern", args.answer_pattern, f"is not a regular expression ({error})")
        ) from None

    def convert(row: Row) -> Row:
        messages = read_prompt(row[prompt], args, prompt)
        if args.answer_column not in columns:
            return {"prompt": messages}
        if row[args.answer_column] is None:
            raise ShapeError(f"{args.answer_column} is None")
        answer = str(row[args.answer_column])
        match = (pattern or GSM8K_ANSWER).search(answer)
        if match:
            answer = match.group(1) if match.re.groups else match.group(0)
        elif pattern is not None:
            raise ShapeError(f"answer_pattern does not occur in {short(answer)}")
        return {"prompt": messages, "answer": answer.strip()}

    return convert
