"""Data sets from the Hub or from local files, checked, with the column names that TRL expects."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value

from pipeline.arguments import DataArguments
from pipeline.errors import Problem, UserError
from pipeline.sources import broken_files, open_source

logger = logging.getLogger(__name__)

Kind = Literal["text", "conversation", "preference", "prompt"]
Split: TypeAlias = Dataset | IterableDataset
Row = dict[str, Any]

SHUFFLE_BUFFER = 1000
"""Rows among which a stream is shuffled."""

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = {"text": Value("string"), "answer": Value("string")} | dict.fromkeys(
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
            `"preference"`: `prompt`, `chosen` and `rejected`, lists of messages.
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
        convert, kept = lambda row: _preference(row, args), ["prompt", "chosen", "rejected"]
    else:
        convert, kept = _prompt_converter(args, columns), [*columns, "prompt", "answer"]

    def checked(row: Row, index: int) -> Row:
        try:
            return convert(row)
        except _ShapeError as error:
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
    return split.map(checked, with_indices=True, remove_columns=removed, features=features if known else None)


def _require(columns: list[str], **wanted: str) -> None:
    problems = [
        Problem(field, name, f"there is no such column; choose from: {', '.join(columns)}")
        for field, name in wanted.items()
        if name not in columns
    ]
    if problems:
        raise UserError(*problems)


class _ShapeError(ValueError):
    """What is wrong with one row."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _ShapeError(f"the text is {_short(value)}")
    return value


def _messages(value: object, args: DataArguments, name: str) -> list[dict[str, str]]:
    """A conversation from a list of messages, or from the text of one user's message."""
    if isinstance(value, str) and value.strip():
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise _ShapeError(f"{name} is {_short(value)}, not a list of messages")
    messages: list[dict[str, str]] = []
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise _ShapeError(f"{name} holds {_short(message)}, not {{role, content}}")
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise _ShapeError(f"{name} has the role {_short(message['role'])}, not system, user or assistant")
        if not isinstance(message["content"], str):
            raise _ShapeError(f"{name} has the content {_short(message['content'])}, not text")
        if not message["content"].strip() and message["role"] in ("user", "assistant"):
            raise _ShapeError(f"{name} has an empty message of the {message['role']}")
        if messages and message["role"] == messages[-1]["role"] == "assistant":
            raise _ShapeError(f"{name} has two messages of the assistant in a row")
        messages.append({"role": message["role"], "content": message["content"]})
    if args.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    return messages


def _prompt(value: object, args: DataArguments, name: str) -> list[dict[str, str]]:
    """Messages that the assistant is to answer."""
    messages = _messages(value, args, name)
    if messages[-1]["role"] == "assistant":
        raise _ShapeError(f"{name} ends with the role assistant, which leaves nothing to answer")
    return messages


def _answer_message(value: object, name: str) -> dict[str, str]:
    if not isinstance(value, str) or not value.strip():
        raise _ShapeError(f"{name} is {_short(value)}, not text")
    return {"role": "assistant", "content": value}


def _conversation_converter(args: DataArguments, columns: list[str]) -> Callable[[Row], Row]:
    """Conversations as they are, or of a prompt and a completion column (`question` and `answer` are tried
    too)."""
    pairs = [(args.prompt_column, args.completion_column), ("question", "answer"), ("prompt", "completion")]
    found = [(p, c) for p, c in pairs if c is not None and p in columns and c in columns]
    if args.completion_column is None and args.messages_column in columns:

        def from_messages(row: Row) -> Row:
            messages = _messages(row[args.messages_column], args, args.messages_column)
            if messages[-1]["role"] != "assistant":
                raise _ShapeError(f"{args.messages_column} ends with the role {messages[-1]['role']}, not assistant")
            if next(m["role"] for m in messages if m["role"] != "system") == "assistant":
                raise _ShapeError(f"{args.messages_column} begins with the assistant: there is no prompt")
            return {"messages": messages}

        return from_messages
    if args.completion_column is not None and found[:1] != [pairs[0]]:
        _require(columns, prompt_column=args.prompt_column, completion_column=args.completion_column)
    if not found:
        _require(columns, messages_column=args.messages_column)
    prompt, completion = found[0]
    return lambda row: {"messages": [*_prompt(row[prompt], args, prompt), _answer_message(row[completion], completion)]}


def _preference(row: Row, args: DataArguments) -> Row:
    """A prompt with two answers; a prompt that both conversations begin with is taken out of them."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get(args.prompt_column) is not None:
        prompt = _prompt(row[args.prompt_column], args, args.prompt_column)
    else:
        whole, other = _messages(chosen, args, "chosen"), _messages(rejected, args, "rejected")
        prompt, chosen, rejected = whole[:-1], whole[-1:], other[-1:]
        if not prompt:
            raise _ShapeError("there is no prompt")
        if prompt != other[:-1]:
            raise _ShapeError("chosen and rejected do not answer the same prompt")
    answers = []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, str):
            value = [_answer_message(value, name)]
        if isinstance(value, list) and len(value) > 1 and _messages(value[:-1], args, name) == prompt:
            value = value[-1:]  # the prompt is told twice
        if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping):
            raise _ShapeError(f"{name} is {_short(value)}, not one answer to the prompt")
        if value[0].get("role") != "assistant":
            raise _ShapeError(f"{name} has the role {_short(value[0].get('role'))}, not assistant")
        answers.append([_answer_message(value[0].get("content"), name)])
    if answers[0] == answers[1]:
        raise _ShapeError("chosen and rejected are the same")
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


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
        messages = _prompt(row[prompt], args, prompt)
        if args.answer_column not in columns:
            return {"prompt": messages}
        if row[args.answer_column] is None:
            raise _ShapeError(f"{args.answer_column} is None")
        answer = str(row[args.answer_column])
        match = (pattern or GSM8K_ANSWER).search(answer)
        if match:
            answer = match.group(1) if match.re.groups else match.group(0)
        elif pattern is not None:
            raise _ShapeError(f"answer_pattern does not occur in {_short(answer)}")
        return {"prompt": messages, "answer": answer.strip()}

    return convert


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
