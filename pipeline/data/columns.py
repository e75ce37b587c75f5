"""The columns of a data set: each row is checked, and converted to the columns that TRL expects."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
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

PROMPTS = ("prompt", "question", "instruction", "problem", "query", "q", "input")
ANSWERS = ("completion", "response", "output", "solution", "answer", "a")
PAIRS = (("question", "answer"), ("prompt", "completion"), *product(PROMPTS, ANSWERS))
"""Columns of a prompt and its answer, the most usual first; names are found in any case, and with spaces around."""

CONTEXTS = ("input", "context")
"""Columns of Alpaca and of Dolly that belong to the prompt, after the instruction."""

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns of conversations, the second one ShareGPT's."""

TEXT_COLUMNS = frozenset({"text", "chosen", "rejected", *PROMPTS, *ANSWERS, *CONTEXTS})
"""Columns of a table that are text, whatever they look like."""

RESERVED = (
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "image", "images",
)  # fmt: skip
"""Columns of prompts that are dropped: trainers pass arguments of these names to rewards, or read images in them."""

CORRECT = "correct or remove that row"
DROP = "rows count from 0, and drop_bad_rows drops such rows"

GSM8K_ANSWER = re.compile(r"####\s*(.+)")


def column_names(split: Split) -> list[str]:
    """Return the columns of a split; a stream may not know them before its first row."""
    return list(split.column_names or next(iter(split)))


def normalise(name: str) -> str:
    """Return the name of a column without what makes no difference."""
    return name.strip().casefold()


def find_column(columns: Iterable[str], *names: str) -> str | None:
    """Return the first of some names that is a column, as the data set spells it."""
    spelled = {normalise(column): column for column in columns} | {column: column for column in columns}
    return next((spelled[one] for name in names for one in (name, normalise(name)) if one in spelled), None)


def drops_rows(args: DataArguments) -> bool:
    """Return whether rows without the expected shape are dropped."""
    return args.drop_bad_rows or is_of_hub(args)


def is_of_hub(args: DataArguments) -> bool:
    """Return whether a data set comes from the Hub, so that the user cannot correct its rows."""
    return not Path(args.dataset_names[0]).expanduser().exists()


def place_of(split: Split, args: DataArguments) -> str:
    """Name the data set and the split, for messages."""
    return f"{args.dataset_name}, split {split.split or args.dataset_train_split}"


def standardise(split: Split, args: DataArguments, kind: Kind, tokens: re.Pattern[str] | None = None) -> Split:
    """Convert every row to TRL's columns; the rows of a stream are converted when they are read.

    A row without the expected shape is an error, unless `drop_bad_rows` is set, or the data come from the Hub, whose
    users cannot correct them: such rows are dropped, of the Hub up to `MOST_LEFT_OUT`. In a stream, documents that are
    not text become empty instead: dropping them would change the numbers of the rows after them, and with these which
    rows are held out.

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

    read, made, used = converter(split, columns, args, kind)
    if unused := ", ".join(repr(column) for column in columns if column not in used):
        use = "are passed to rewards, and not part of the prompts" if kind == "prompt" else "are not used"
        _log_once(f"{'data':<11} {args.dataset_name}: the columns {unused} {use}")
    if kind == "text" and isinstance(split, Dataset) and _is_text(split, used[0]):
        # There is nothing to convert, and so nothing to copy.
        return split.select_columns(used[0]).rename_columns({used[0]: "text"})

    def convert(row: Row) -> dict[str, Any]:
        converted = read(row)
        if tokens is not None:
            refuse_special_tokens(converted, tokens)
        return converted

    if drops_rows(args) and isinstance(split, Dataset):
        split = _drop_faults(split, convert, place, args)
    elif args.drop_bad_rows and kind != "text":
        remedy = "rows of a stream cannot be dropped; turn dataset_streaming off, or correct them"
        raise UserError(Problem("drop_bad_rows", True, remedy))

    # Without features a stream would not know its columns, and a numeric answer would stay a number.
    features = {name: FEATURES[name] for name in made}
    if kind == "prompt":
        # Rewards read the other columns.
        others = [column for column in columns if column not in (*made, *RESERVED)]
        made += others
        features = {name: split.features[name] for name in others} | features if split.features else {}
    # The rows of a stream are not counted beforehand, so that a few without text are read as empty documents.
    may_be_empty = kind == "text" and drops_rows(args) and not isinstance(split, Dataset)
    try:
        standard = split.map(
            _checker(convert, place, may_be_empty),
            with_indices=True,
            remove_columns=[column for column in columns if column not in made],
            features=Features(features) if features else None,
        )
    except UserError:
        if not isinstance(split, Dataset):
            raise
        raise UserError(_count_faults(split, convert, place)) from None
    return _keep_informative(standard, place) if kind == "preference" else standard


def may_drop(args: DataArguments, lost: int, rows: int) -> bool:
    """Return whether so many of the rows of a data set may be dropped."""
    return drops_rows(args) and lost < (rows if args.drop_bad_rows else min(rows, 2 + MOST_LEFT_OUT * rows))


@cache
def _log_once(line: str) -> None:
    """Log a line that is the same for several splits and stages of a process."""
    logger.info("%s", line)


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
                remedy = f"{error}; {CORRECT}; {DROP}"
                raise UserError(Problem("dataset_name", f"{place}, row {index}", remedy)) from None
            if faults == 1:
                logger.warning("%s, row %d: %s; such documents are read as empty ones.", place, index, error)
            return {"text": ""}
        texts += 1
        return converted

    return checked


def _fault(row: Row, convert: Convert) -> str:
    """Return why a row cannot be converted; empty if it can be."""
    try:
        convert(row)
    except ShapeError as error:
        return str(error)
    return ""


def _count_faults(rows: Dataset, convert: Convert, place: str) -> Problem:
    """Return the problem of rows that cannot be converted, with the numbers of the first five."""
    faults = {index: fault for index, row in enumerate(rows) if (fault := _fault(row, convert))}
    index, *others = faults
    shown = ", ".join(map(str, others[:4])) + (", ..." if len(others) > 4 else "")
    more = f" and {len(others)} more of {len(rows)} ({shown})" if others else ""
    return Problem("dataset_name", f"{place}, row {index}", f"{faults[index]}; {CORRECT}{more}; {DROP}")


def _drop_faults(rows: Dataset, convert: Convert, place: str, args: DataArguments) -> Dataset:
    """Drop the rows that cannot be converted, if they are few. If they are many, the caller refuses the first."""

    kept = rows.filter(lambda row: not _fault(row, convert))
    lost = len(rows) - len(kept)
    if not lost or not may_drop(args, lost, len(rows)):
        return rows
    index, first = next((index, found) for index, row in enumerate(rows) if (found := _fault(row, convert)))
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


def _require(columns: list[str], remedy: str = "", **expected: str) -> list[str]:
    """Return the columns that arguments name, and report those that do not exist."""
    found = [find_column(columns, name) for name in expected.values()]
    # Names with spaces around them are quoted, because those would not be seen.
    choices = ", ".join(name if name == name.strip() else repr(name) for name in columns)
    remedy = f"there is no such column; {remedy}{' ' if remedy else ''}choose from: {choices}"
    problems = [
        Problem(field, value, remedy)
        for (field, value), column in zip(expected.items(), found, strict=True)
        if column is None
    ]
    if problems:
        raise UserError(*problems)
    return [str(column) for column in found]


def converter(
    split: Split, columns: list[str], args: DataArguments, kind: Kind
) -> tuple[Convert, list[str], list[str]]:
    """Return the function that converts a row, the columns that it makes, and those that it reads.

    Raises:
        UserError: If a column that it needs does not exist.
    """
    if columns == [TOKENS]:
        remedy = "has tokens, which only recipes.pretrain reads; give the documents that they were made from"
        raise UserError(Problem("dataset_name", place_of(split, args), remedy))

    # What is read and what is made, with optional columns in brackets:
    #
    #   text           text_column                                                  text
    #   conversation   messages_column, or a prompt [context] and its completion    messages
    #   prompt         prompt_column [context] [answer_column]                      prompt [answer], and all others
    #   preference     [prompt_column] [context] chosen rejected [margin]           prompt chosen rejected [margin]
    if kind == "text":
        (text,) = _require(columns, text_column=args.text_column)
        return lambda row: {"text": _read_text(row[text])}, ["text"], [text]
    if kind == "conversation":
        return _conversation_converter(args, columns)
    if kind == "prompt":
        return _prompt_converter(args, columns, split)

    chosen, rejected = _require(columns, chosen_column="chosen", rejected_column="rejected")
    prompt = _find_prompt(args, columns, split)
    # Answers that are conversations contain their prompt; texts do not.
    if prompt is None and isinstance(next(iter(split))[chosen], str):
        _require(columns, prompt_column=args.prompt_column)
    read, used = _prompt_reader(args, columns, prompt or args.prompt_column)
    made = [name for name in ("prompt", "chosen", "rejected", "margin") if name != "margin" or name in columns]
    name = prompt or args.prompt_column

    def from_pair(row: Row) -> dict[str, Any]:
        pair = {**row, "chosen": row[chosen], "rejected": row[rejected]}
        return read_pair({**pair, name: read(row)} if prompt else pair, name, args.system_prompt)

    return from_pair, made, [*used, chosen, rejected, "margin"]


def _read_text(value: object) -> str:
    if not isinstance(value, str):
        raise ShapeError(f"the text is {shorten(value)}")
    return value


def _find_prompt(args: DataArguments, columns: list[str], pairs: Split | None = None) -> str | None:
    """Return the column of the prompts: the one that is named, or by default one with a usual name.

    Args:
        args, columns: As for `converter`.
        pairs: Pairs of answers, whose prompt may be a conversation.
    """
    if args.prompt_column != "prompt":
        return find_column(columns, args.prompt_column)
    chosen = find_column(columns, "chosen")
    answer = next(iter(pairs))[chosen] if pairs is not None and chosen else []
    # Whole conversations contain their prompt.
    is_whole = isinstance(answer, list) and len(answer) != 1
    return find_column(columns, *PROMPTS, *(() if is_whole else CONVERSATIONS))


def _prompt_reader(
    args: DataArguments, columns: list[str], prompt: str, completion: str | None = None
) -> tuple[Callable[[Row], Any], list[str]]:
    """Return the function that returns a prompt with its context, and the columns that it reads."""
    contexts = [name for name in columns if normalise(name) in CONTEXTS and name not in (prompt, completion)]
    if contexts:
        _log_once(f"{'data':<11} {args.dataset_name}: prompts are made of the columns {prompt}, {', '.join(contexts)}")

    def read(row: Row) -> Any:
        texts = [row[prompt], *(row[name] for name in contexts)]
        # A prompt that consists of messages is complete.
        if not isinstance(texts[0], str) or not texts[0].strip():
            return texts[0]
        return "\n\n".join(text for text in texts if isinstance(text, str) and text.strip())

    return read, [prompt, *contexts]


def _conversation_converter(args: DataArguments, columns: list[str]) -> tuple[Convert, list[str], list[str]]:
    """Return the function that reads conversations, or joins a prompt and its completion; as for `converter`.

    By default, the columns of `PAIRS` are joined if there are no messages.
    """
    default = args.messages_column == "messages"
    messages_column = find_column(columns, args.messages_column, *(CONVERSATIONS if default else ())) or ""

    def from_messages(row: Row) -> dict[str, Any]:
        messages = read_messages(row[messages_column], messages_column, args.system_prompt)
        if messages[-1]["role"] != "assistant":
            raise ShapeError(f"{messages_column} ends with the role {messages[-1]['role']}, not assistant")
        if next(message["role"] for message in messages if message["role"] != "system") == "assistant":
            raise ShapeError(f"{messages_column} begins with the assistant: there is no prompt")
        return {"messages": messages}

    if args.completion_column is not None:
        named = {"prompt_column": args.prompt_column, "completion_column": args.completion_column}
        found = [_find_prompt(args, columns) or "", find_column(columns, args.completion_column) or ""]
        prompt, completion = found if all(found) else _require(columns, **named)
    elif messages_column:
        return from_messages, ["messages"], [messages_column]
    else:
        pairs = [(find_column(columns, one), find_column(columns, other)) for one, other in PAIRS]
        found = next(([one, other] for one, other in pairs if one and other and default), [])
        prompt, completion = found or _require(
            columns, "name prompt_column and completion_column, or", messages_column=args.messages_column
        )
    read, used = _prompt_reader(args, columns, prompt, completion)

    def from_pair(row: Row) -> dict[str, Any]:
        messages = read_prompt(read(row), prompt, args.system_prompt)
        return {"messages": [*messages, answer_message(row[completion], completion)]}

    return from_pair, ["messages"], [*used, completion]


def _prompt_converter(args: DataArguments, columns: list[str], split: Split) -> tuple[Convert, list[str], list[str]]:
    """Return the function that reads prompts, with their final answers if there is a column; as for `converter`."""
    prompt = _find_prompt(args, columns, split) or ""
    # Pairs of conversations are read as well: their prompt is what both begin with.
    sides = [find_column(columns, side) or "" for side in ("chosen", "rejected")]
    has_pairs = all(sides) and args.prompt_column == "prompt"
    if not prompt and not has_pairs:
        _require(columns, prompt_column=args.prompt_column)
    answer = find_column(columns, args.answer_column, *(("answer", "a") if args.answer_column == "answer" else ()))
    if answer is None and (args.answer_pattern is not None or args.answer_column != "answer"):
        _require(columns, answer_column=args.answer_column)
    final_answer = _answer_finder(args)
    read, used = _prompt_reader(args, columns, prompt or args.prompt_column, answer)

    def convert(row: Row) -> dict[str, Any]:
        if has_pairs:
            row = {**row, **dict(zip(("chosen", "rejected"), (row[side] for side in sides), strict=True))}
        if has_pairs and not (prompt and has_prompt(row, prompt)):
            messages = read_pair(row, prompt or args.prompt_column, args.system_prompt)["prompt"]
        else:
            messages = read_prompt(read(row), prompt, args.system_prompt)
        return {"prompt": messages} if answer is None else {"prompt": messages, "answer": final_answer(row[answer])}

    return convert, ["prompt", *(["answer"] if answer else [])], [*used, answer or ""]


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
