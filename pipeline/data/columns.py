"""The columns of a data set: each row is checked, and converted to the columns that TRL expects."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from datasets.fingerprint import Hasher

from pipeline.data.arguments import DataArguments
from pipeline.data.messages import (
    Messages,
    Row,
    ShapeError,
    as_answer,
    has_prompt,
    is_informative,
    is_whole,
    read_answer,
    read_functions,
    read_messages,
    read_pair,
    read_prompt,
    refuse_special_tokens,
    unread_keys,
    without_none,
)
from pipeline.data.writing import ANSWERED, CALLING, MESSAGES
from pipeline.errors import Problem, UserError, refuse
from pipeline.progress import report_lost

logger = logging.getLogger(__name__)
TOKENS = "input_ids"
"""Column of blocks, and of documents that are tokens already: `bos + text + eos`."""
Kind = Literal["text", "tokens", "conversation", "preference", "unpaired", "prompt"]
Split: TypeAlias = Dataset | IterableDataset
Splits: TypeAlias = DatasetDict | IterableDatasetDict
Converter: TypeAlias = tuple[Callable[[Row], dict[str, Any]], list[str], list[str]]
"""A function that converts a row, the columns that it makes, and the columns that it reads."""

FEATURES = {
    **dict.fromkeys(("text", "answer", "tools"), Value("string")),
    **dict.fromkeys(("messages", "prompt", "chosen", "rejected", "completion"), MESSAGES),
    "margin": Value("float64"),
    "label": Value("bool"),
}
"""Types of the columns that converters make."""
MOST_LEFT_OUT = 0.1
"""Share of a Hub data set's rows that may lack the expected shape. If more do, it is the wrong column."""

PROMPTS = ("prompt", "question", "instruction", "problem", "query", "q", "input")
ANSWERS = ("completion", "response", "output", "solution", "answer", "a")
PAIRS = (("question", "answer"), ("prompt", "completion"), *product(PROMPTS, ANSWERS))
"""Columns of a prompt and its answer, the most usual first; case and surrounding spaces of the names do not matter."""
CONTEXTS, CONVERSATIONS = ("input", "context"), ("messages", "conversations", "conversation")
"""Columns of Alpaca and Dolly that belong to the prompt, after the instruction; columns of conversations."""
TEXT_COLUMNS = frozenset({"text", "chosen", "rejected", *PROMPTS, *ANSWERS, *CONTEXTS})
"""Columns of a table that are always read as text."""

PASSED_BY_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that TRL passes to every reward function besides the columns of the data."""
NAME_OR_CONVERT = "name prompt_column and completion_column, convert the rows (docs/data.md, “Rows”), or "
CONVERT = "convert them (docs/data.md, “Rows”), or name other columns"
CORRECT, DROP = "correct or remove that row", "rows count from 0, and drop_bad_rows drops such rows"
FAULT, HAS_CALLS, UNINFORMATIVE = "_fault", "calls a tool", "says nothing"
"""Temporary column that says why a row cannot be converted; its value for a row that must be converted to `CALLING`,
and for a pair that does not say which answer is better."""
_log_once = cache(logger.log)
"""Log a line once, with its level, although several splits and stages of a process may repeat it."""


def column_names(split: Split) -> list[str]:
    """Return the columns of a split; a stream may not know them before its first row."""
    return list(split.column_names or next(iter(split)))


def normalise(name: str) -> str:
    """Return the name of a column without differences in case, line breaks and spaces around it."""
    return " ".join(name.split()).casefold()


def find_column(columns: Iterable[str], *names: str) -> str:
    """Return the first of some names that is a column, as the data set spells it; "" if there is none."""
    spelled = {normalise(column): column for column in columns} | {column: column for column in columns}
    return next((spelled[one] for name in names for one in (name, normalise(name)) if one in spelled), "")


def drops_rows(args: DataArguments) -> bool:
    """Return whether rows without the expected shape are dropped: on demand, or because they come from the Hub."""
    return args.drop_bad_rows or not Path(args.dataset_names[0]).expanduser().exists()


def may_drop(args: DataArguments, lost: int, rows: int) -> bool:
    """Return whether `lost` of a data set's `rows` may be dropped."""
    return drops_rows(args) and lost < (rows if args.drop_bad_rows else min(rows, 2 + MOST_LEFT_OUT * rows))


def standardise(split: Split, args: DataArguments, kind: Kind, tokens: re.Pattern[str] | None = None) -> Split:
    """Convert every row to TRL's columns as `convert_rows` does, and drop pairs without information."""
    rows, _ = convert_rows(split, args, kind, tokens)
    return drop_uninformative(rows, kind)


def drop_uninformative(rows: Split, kind: Kind) -> Split:
    """Drop the pairs of a stream that do not say which answer is better; `convert_rows` drops those of other data."""
    are_pairs = kind in ("preference", "unpaired") and "chosen" in column_names(rows)
    return rows.filter(is_informative) if are_pairs and isinstance(rows, IterableDataset) else rows


def convert_rows(
    split: Split,
    args: DataArguments,
    kind: Kind,
    tokens: re.Pattern[str] | None = None,
    numbers: Sequence[int] | None = None,
    calls: bool = False,
) -> tuple[Split, Sequence[int]]:
    """Convert every row to TRL's columns; the rows of a stream are converted when they are read.

    A row without the expected shape raises a `UserError`, unless `drop_bad_rows` is set, or the data come from the Hub,
    whose users cannot correct them: such rows are dropped, up to a share of `MOST_LEFT_OUT` for the Hub. So are pairs
    that do not say which answer is better. In a stream, documents that are not text become empty instead, and all pairs
    stay: dropping them would renumber later rows, and so change which rows are held out. `args` names only this data
    set. If a row calls a tool, all rows are converted again with `calls`.

    Args:
        numbers: Numbers of the rows in their file, for messages. Default: the split has all rows of the file.

    Returns:
        The rows, and the numbers of those that are left; of a stream, ().
    """
    columns, place = column_names(split), f"{args.dataset_name}, split {split.split or args.dataset_train_split}"
    if kind == "tokens":
        if columns != [TOKENS]:
            remedy = "has text, and others of dataset_name have tokens; give data sets of one kind"
            raise UserError(Problem("dataset_name", place, remedy))
        return split, ()

    is_stream = not isinstance(split, Dataset)
    if numbers is None:
        numbers = () if is_stream else range(len(split))
    read, made, used = converter(split, columns, args, kind)
    _log_unread(split, columns, used, args, kind)
    if kind == "text" and not is_stream:
        (text,) = used
        # If each row is text, there is nothing to convert, and so nothing to copy.
        if split.features[text] == Value("string") and not split.data.column(text).null_count:
            return split.select_columns(text).rename_columns({text: "text"}), numbers
    if is_stream and args.drop_bad_rows and kind != "text":
        remedy = "rows of a stream cannot be dropped; turn dataset_streaming off, or correct them"
        raise UserError(Problem("drop_bad_rows", True, remedy))
    # If none of the first documents is text, it is the wrong column.
    may_be_empty = is_stream and kind == "text" and drops_rows(args)
    may_be_empty = may_be_empty and any(isinstance(row[used[0]], str) for row in split.take(50))

    def convert(row: Row, index: int) -> dict[str, Any]:
        try:
            converted = read(row)
            if tokens is not None:
                refuse_special_tokens(converted, tokens)
        except ShapeError as error:
            if not is_stream:
                return {**dict.fromkeys(made), FAULT: str(error)}
            if not may_be_empty:
                remedy = f"{error}; {CORRECT}; {DROP}"
                raise UserError(Problem("dataset_name", f"{place}, row {index}", remedy)) from None
            _log_once(logging.WARNING, f"{place}: some documents are not text, and are read as empty ones.")
            return {"text": ""}
        if is_stream:
            return converted
        if "chosen" in made and not is_informative(converted):
            return {**dict.fromkeys(made), FAULT: UNINFORMATIVE}
        if calls:
            # `Json` would round the numbers of a dict to ten digits, but not the numbers in a text.
            texts = {name: [*map(json.dumps, converted[name])] for name in ANSWERED if name in converted}
            return {**converted, **texts, FAULT: None}
        has_calls = any(len(message) > 2 for name in ANSWERED for message in converted.get(name) or ())
        return {**dict.fromkeys(converted), FAULT: HAS_CALLS} if has_calls else {**converted, FAULT: None}

    # Without features a stream would not know its columns, and a numeric answer would stay a number.
    features = {name: CALLING if name in ANSWERED and (calls or is_stream) else FEATURES[name] for name in made}
    # Rewards read the other columns, unless TRL passes arguments of their names, or reads images in them.
    others = [name for name in columns if kind == "prompt" and name not in (*made, *PASSED_BY_TRL, "image", "images")]
    if others:
        features = {name: split.features[name] for name in others} | features if split.features else {}
    own: dict[str, Any] = {}
    if not is_stream:
        features[FAULT] = Value("string")
        # datasets would take longer to disassemble the function, and not notice changes in those that it calls.
        code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        own["new_fingerprint"] = Hasher.hash((split._fingerprint, vars(args), kind, tokens, calls, code))
    removed = [name for name in columns if name not in (*made, *others)]
    standard = split.map(convert, with_indices=True, remove_columns=removed, features=Features(features) or None, **own)
    if is_stream or not len(split):
        return standard, numbers
    if HAS_CALLS in standard.unique(FAULT):
        return convert_rows(split, args, kind, tokens, numbers, calls=True)
    return _drop_rows(standard, place, args, numbers)


def _drop_rows(rows: Dataset, place: str, args: DataArguments, numbers: Sequence[int]) -> tuple[Dataset, Sequence[int]]:
    """Drop the rows that could not be converted, or refuse them with the number of the first one.

    `numbers` are the numbers of the rows in their file. Return the rows that are left, and their numbers.
    """
    column = rows.data.column(FAULT).to_pylist()
    rows = rows.remove_columns(FAULT)
    left = [index for index, fault in enumerate(column) if fault is None]
    equal = column.count(UNINFORMATIVE)
    faults = {
        int(numbers[index]): fault for index, fault in enumerate(column) if fault is not None and fault != UNINFORMATIVE
    }
    if faults:
        first = min(faults)
        if not may_drop(args, len(faults), len(rows)):
            if len(faults) == len(rows) > 1:
                remedy = f"{faults[first]}; all {len(rows)} rows are like this: {CONVERT}"
                raise UserError(Problem("dataset_name", f"{place}, row {first}", remedy))
            others = ", ".join(map(str, [*faults][1:5])) + (", ..." if len(faults) > 5 else "")
            more = f" and {len(faults) - 1} more of {len(rows)} ({others})" if len(faults) > 1 else ""
            remedy = f"{faults[first]}; {CORRECT}{more}; {DROP}"
            raise UserError(Problem("dataset_name", f"{place}, row {first}", remedy))
        what = f"rows are dropped; row {first}, for instance: {faults[first]}"
        report_lost(len(faults), len(rows), what, f"correct {place}")
    # Generated data sets contain pairs that do not say which answer is better.
    if equal:
        if not left:
            raise UserError(Problem("dataset_name", place, "every pair has an empty answer, or two equal ones"))
        what = "pairs are dropped, because an answer is empty or both are the same"
        report_lost(equal, len(rows) - len(faults), what, f"correct {place}")
    if len(left) == len(rows):
        return rows, numbers
    return rows.select(left), [numbers[index] for index in left]


def _log_unread(split: Split, columns: list[str], used: list[str], args: DataArguments, kind: Kind) -> None:
    """Log the columns that are not read and, of the first rows, the keys of messages that are not read."""
    unread = [column for column in columns if column not in used]
    read = [column for column in columns if column in used and kind not in ("text", "prompt")]
    for row in split.select_columns(read).take(100) if read else ():
        for name in read:
            if isinstance(row[name], list) and normalise(name) != "tools":
                keys = unread_keys(row[name], is_answer=kind in ("preference", "unpaired"))
                unread += [f"{name}.{key}" for key in keys]
    if unused := ", ".join(map(repr, dict.fromkeys(unread))):
        use = "are passed to rewards, and not part of the prompts" if kind == "prompt" else "are not used"
        _log_once(logging.INFO, f"{'data':<11} {args.dataset_name}: the columns {unused} {use}")


def _require(columns: list[str], remedy: str = "", **expected: str) -> list[str]:
    """Return the columns that arguments name, and report the missing ones."""
    found = {field: find_column(columns, name) for field, name in expected.items()}
    # The user can choose another column only through an argument; otherwise, a column must be renamed.
    advice = {field: "choose from" if hasattr(DataArguments, field) else "rename one of" for field in expected}
    # Names with spaces around them are quoted, because the spaces would not be seen; so are those with line breaks.
    names = [name if name == " ".join(name.split()) and len(name) <= 60 else repr(name) for name in columns[:20]]
    choices = ", ".join(name if len(name) <= 60 else f"{name:.57}..." for name in names)
    choices += f" and {len(columns) - 20} more" if len(columns) > 20 else ""
    remedies = {field: f"there is no such column; {remedy}{advice[field]}: {choices}" for field in expected}
    refuse(*(Problem(field, expected[field], remedies[field]) for field, column in found.items() if not column))
    return list(found.values())


def converter(split: Split, columns: list[str], args: DataArguments, kind: Kind) -> Converter:
    """Return the `Converter` for the rows of a split. Raise a `UserError` if a column that it needs does not exist."""
    # What is read and what is made, with optional columns in brackets:
    #
    #   text           text_column                                                  text
    #   conversation   messages_column [tools], or a prompt [context], completion   messages [tools]
    #   prompt         prompt_column [context] [answer_column]                      prompt [answer], and all others
    #   preference     [prompt_column] [context] chosen_column rejected_column      prompt chosen rejected [margin]
    #                  [margin]
    #   unpaired       the same, or a prompt [context], its completion and label    the same, or prompt completion label
    if kind == "conversation":
        return _conversation_converter(args, columns)
    if kind == "prompt":
        return _prompt_converter(args, columns, split)
    if kind == "unpaired" and not find_column(columns, args.chosen_column):
        prompt = _find_prompt(args, columns)
        completion = find_column(columns, *([args.completion_column] if args.completion_column else ANSWERS))
        names = {"prompt_column": prompt or args.prompt_column, "completion_column": completion or "completion"}
        prompt, completion, label = _require(columns, "or, for pairs, chosen and rejected; ", **names, label="label")
        read, used = _prompt_reader(args, columns, prompt, completion)

        def from_unpaired(row: Row) -> dict[str, Any]:
            if row[label] not in (True, False):
                raise ShapeError(f"{label} is {row[label]!r:.60}, not true or false")
            answer = read_answer(row[completion], completion)
            return {"prompt": read(row), "completion": answer, "label": bool(row[label])}

        return from_unpaired, ["prompt", "completion", "label"], [*used, completion, label]

    if kind == "text":
        (text,) = _require(columns, text_column=args.text_column)

        def from_text(row: Row) -> dict[str, Any]:
            if not isinstance(row[text], str):
                raise ShapeError(f"the text is {row[text]!r:.60}")
            return {"text": row[text]}

        return from_text, ["text"], [text]

    chosen, rejected = _require(columns, chosen_column=args.chosen_column, rejected_column=args.rejected_column)
    prompt = _find_prompt(args, columns, split)
    # Answers that are conversations contain their prompt; texts do not.
    if not prompt and isinstance(next(iter(split))[chosen], str):
        remedy = "there is no such column, and chosen and rejected contain only answers; "
        remedy += "move what precedes the answers to a column of prompts"
        raise UserError(Problem("prompt_column", args.prompt_column, remedy))
    read, used = _prompt_reader(args, columns, prompt or args.prompt_column)

    margin = find_column(columns, "margin")

    def from_pair(row: Row) -> dict[str, Any]:
        pair = {**row, "chosen": row[chosen], "rejected": row[rejected]} | ({"margin": row[margin]} if margin else {})
        return read_pair(pair, read(row) if has_prompt(pair, prompt) else None, args.system_prompt)

    made = ["prompt", "chosen", "rejected", *(["margin"] if margin else [])]
    return from_pair, made, [*used, chosen, rejected, *([margin] if margin else [])]


def _find_prompt(args: DataArguments, columns: list[str], pairs: Split | None = None) -> str:
    """Return the column of the prompts: the named one, by default one with a usual name, or ""."""
    if args.prompt_column != "prompt":
        return find_column(columns, args.prompt_column)
    chosen = find_column(columns, args.chosen_column)
    answer = next(iter(pairs))[chosen] if pairs is not None and chosen else None
    # Whole conversations contain their prompt.
    return find_column(columns, *PROMPTS, *(() if answer is None or is_whole(answer) else CONVERSATIONS))


def _prompt_reader(
    args: DataArguments, columns: list[str], prompt: str, completion: str = ""
) -> tuple[Callable[[Row], Messages], list[str]]:
    """Return the function that reads a prompt with its context, and the columns that it reads."""
    contexts = [name for name in columns if normalise(name) in CONTEXTS and name not in (prompt, completion)]
    used = [prompt, *contexts]
    if contexts:
        _log_once(logging.INFO, f"{'data':<11} {args.dataset_name}: prompts are made of the columns {', '.join(used)}")

    def read(row: Row) -> Messages:
        text = row[prompt]
        # A prompt that consists of messages is complete.
        for name in contexts if isinstance(text, str) and text.strip() else ():
            context = as_answer(row[name])
            if not isinstance(context, str | None):
                raise ShapeError(f"{name}, which belongs to the prompt, is {context!r:.60}, not text")
            text += f"\n\n{context}" if context and context.strip() else ""
        return read_prompt(text, prompt, args.system_prompt)

    return read, used


def _conversation_converter(args: DataArguments, columns: list[str]) -> Converter:
    """Return what reads conversations, or joins a prompt and its completion (by default, columns in `PAIRS`)."""
    is_default = args.messages_column == "messages"
    messages_column = find_column(columns, args.messages_column, *(CONVERSATIONS if is_default else ()))
    tools = find_column(columns, "tools")
    made, extra = (["messages", "tools"], [tools]) if tools else (["messages"], [])

    def list_tools(row: Row) -> dict[str, Any]:
        if not tools:
            return {}
        schemas = read_functions(without_none(row[tools]), tools, schemas=True)
        # Some templates distinguish an empty list from none.
        return {"tools": json.dumps(schemas, ensure_ascii=False) if schemas else None}

    def from_messages(row: Row) -> dict[str, Any]:
        messages = read_messages(row[messages_column], messages_column, args.system_prompt, calls=True)
        if messages[-1]["role"] != "assistant":
            raise ShapeError(f"{messages_column} ends with the role {messages[-1]['role']}, not assistant")
        if next(message["role"] for message in messages if message["role"] != "system") == "assistant":
            raise ShapeError(f"{messages_column} begins with the assistant: there is no prompt")
        return {"messages": messages, **list_tools(row)}

    if messages_column and args.completion_column is None:
        return from_messages, made, [messages_column, *extra]
    if args.completion_column is not None:
        pairs = [(_find_prompt(args, columns), find_column(columns, args.completion_column))]
        missing, remedy = {"prompt_column": args.prompt_column, "completion_column": args.completion_column}, ""
    else:
        pairs = [(find_column(columns, one), find_column(columns, other)) for one, other in PAIRS if is_default]
        missing, remedy = {"messages_column": args.messages_column}, NAME_OR_CONVERT
    prompt, completion = next(filter(all, pairs), None) or _require(columns, remedy, **missing)
    read, used = _prompt_reader(args, columns, prompt, completion)

    def from_pair(row: Row) -> dict[str, Any]:
        return {"messages": [*read(row), *read_answer(row[completion], completion)], **list_tools(row)}

    return from_pair, made, [*used, completion, *extra]


def _prompt_converter(args: DataArguments, columns: list[str], split: Split) -> Converter:
    prompt = _find_prompt(args, columns, split)
    # Pairs of conversations also work: their prompt is what both begin with.
    chosen, rejected = (find_column(columns, name) for name in (args.chosen_column, args.rejected_column))
    has_pairs = chosen and rejected and args.prompt_column == "prompt"
    if not prompt and not has_pairs:
        _require(columns, prompt_column=args.prompt_column)
    answer = find_column(columns, args.answer_column, *(("answer", "a") if args.answer_column == "answer" else ()))
    if not answer and (args.answer_pattern is not None or args.answer_column != "answer"):
        _require(columns, answer_column=args.answer_column)
    try:
        pattern = re.compile(args.answer_pattern) if args.answer_pattern is not None else None
    except re.error as error:
        remedy = f"is not a regular expression ({error})"
        raise UserError(Problem("answer_pattern", args.answer_pattern, remedy)) from None
    read, used = _prompt_reader(args, columns, prompt or args.prompt_column, answer)

    def convert(row: Row) -> dict[str, Any]:
        pair = {**row, "chosen": row[chosen], "rejected": row[rejected]} if has_pairs else {}
        is_pair = has_pairs and not has_prompt(pair, prompt)
        messages = read_pair(pair, None, args.system_prompt)["prompt"] if is_pair else read(row)
        if not answer:
            return {"prompt": messages}
        value = as_answer(row[answer])
        if value is None or isinstance(value, list | dict):
            raise ShapeError(f"{answer} is {row[answer]!r:.60}, not one answer as text or as a number")
        final = str(value)
        # By default, the final answer is what follows GSM8K's mark.
        if match := (pattern or re.compile(r"####\s*(.+)")).search(final):
            final = match[1] if match.re.groups else match[0]
            if final is None:
                raise ShapeError(f"the group of answer_pattern finds nothing in {row[answer]!r:.60}")
        elif pattern is not None:
            raise ShapeError(f"answer_pattern does not occur in {final!r:.60}")
        return {"prompt": messages, "answer": final.strip()}

    return convert, ["prompt", *(["answer"] if answer else [])], [*used, answer]
