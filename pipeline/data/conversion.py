"""Rows are converted to TRL's columns, as the `ColumnPlan` of their data set says; the others are dropped or rejected.

Only this module decides what happens to rows without the expected shape. The user's own rows raise a `UserError`,
unless `drop_bad_rows` is set. Rows from the Hub, which its users cannot correct, are dropped, up to a share of
`MOST_LEFT_OUT`. Pairs that do not say which answer is better are always dropped: generated data sets contain some.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher

from pipeline.data.arguments import DataArguments
from pipeline.data.columns import ColumnPlan, Kind, Split, log_once, normalise, place_of
from pipeline.data.messages import Row, ShapeError, is_informative, refuse_special_tokens, unread_keys
from pipeline.data.writing import ANSWERED, CALLING, MESSAGES
from pipeline.errors import Problem, UserError
from pipeline.progress import report_lost

FEATURES = {
    **dict.fromkeys(("text", "answer", "tools"), Value("string")),
    **dict.fromkeys(("messages", "prompt", "chosen", "rejected", "completion"), MESSAGES),
    "margin": Value("float64"),
    "label": Value("bool"),
}
"""Types of the columns that are made."""
MOST_LEFT_OUT = 0.1
"""Share of a Hub data set's rows that may lack the expected shape. If more do, it is the wrong column."""
CONVERT = "convert them (docs/data.md, “Rows”), or name other columns"
CORRECT = "correct or remove that row"
DROP = "rows count from 0, and drop_bad_rows drops such rows"
FAULT = "_fault"
"""Temporary column that says why a row cannot be converted, or None."""
HAS_CALLS = "calls a tool"
"""Value of `FAULT` for a row whose messages do not fit `MESSAGES`; all rows must be converted to `CALLING`."""
UNINFORMATIVE = "says nothing"
"""Value of `FAULT` for a pair that does not say which answer is better."""


def drops_rows(args: DataArguments) -> bool:
    """Return whether rows without the expected shape are dropped: on demand, or because they come from the Hub."""
    return args.drop_bad_rows or not Path(args.dataset_names[0]).expanduser().exists()


def may_drop(args: DataArguments, lost: int, rows: int) -> bool:
    """Return whether `lost` of a data set's `rows` may be dropped."""
    # At least one row must be left.
    if lost >= rows or not drops_rows(args):
        return False
    # In a small data set, a single faulty row may exceed the share.
    return args.drop_bad_rows or lost < 2 + MOST_LEFT_OUT * rows


def convert_stored(
    rows: Dataset, plan: ColumnPlan, args: DataArguments, special_tokens: re.Pattern[str] | None, numbers: Sequence[int]
) -> tuple[Dataset, Sequence[int]]:
    """Convert every row to TRL's columns, and drop or reject those that cannot be converted.

    The result is cached by `datasets`: see `_fingerprint`. tests/data/test_splits.py guards which rows are dropped,
    tests/data/test_calls.py what becomes of tool calls.

    Args:
        args: The arguments, which name only this data set.
        special_tokens: What no message may contain as text; None to accept any text.
        numbers: Numbers of the rows in their file, by which messages name them.

    Returns:
        The rows that are left, and their numbers.

    Raises:
        UserError: If a row lacks the expected shape and may not be dropped, or if no row is left.
    """
    _log_unread(rows, rows.column_names, plan, args)
    if plan.kind == "text":
        (column,) = plan.used
        # If each row is text, there is nothing to convert, and so nothing to copy.
        if rows.features[column] == Value("string") and not rows.data.column(column).null_count:
            return rows.select_columns(column).rename_columns({column: "text"}), numbers
    converted = _map_stored(rows, plan, args, special_tokens, calls=False)
    if not len(rows):
        return converted, numbers
    # Whether any row calls a tool is only known now. Most data sets call none, and are converted once.
    if HAS_CALLS in converted.unique(FAULT):
        converted = _map_stored(rows, plan, args, special_tokens, calls=True)
    return _drop_faulty(converted, place_of(rows, args), args, numbers)


def _map_stored(
    rows: Dataset, plan: ColumnPlan, args: DataArguments, special_tokens: re.Pattern[str] | None, calls: bool
) -> Dataset:
    """Convert rows, and add the column `FAULT`. With `calls`, messages have the type `CALLING`."""
    empty_row = dict.fromkeys(plan.outputs)

    def convert(row: Row) -> dict[str, Any]:
        try:
            converted = _read(row, plan, special_tokens)
        except ShapeError as error:
            return {**empty_row, FAULT: str(error)}
        if "chosen" in plan.outputs and not is_informative(converted):
            return {**empty_row, FAULT: UNINFORMATIVE}
        if calls:
            # `Json` would round the numbers of a dict to ten digits, but not the numbers in a text.
            for name in ANSWERED:
                if name in converted:
                    converted[name] = [json.dumps(message) for message in converted[name]]
        elif calls_tools(converted):
            return {**empty_row, FAULT: HAS_CALLS}
        return {**converted, FAULT: None}

    features = _features(rows.features, rows.column_names, plan, calls)
    features[FAULT] = Value("string")
    return rows.map(
        convert,
        remove_columns=_removed(rows.column_names, plan),
        features=Features(features),
        new_fingerprint=_fingerprint(rows, plan, args, special_tokens, calls),
    )


def _fingerprint(
    rows: Dataset, plan: ColumnPlan, args: DataArguments, special_tokens: re.Pattern[str] | None, calls: bool
) -> str:
    """Return the name of the converted rows in the cache: it depends on the rows, all arguments, and this code."""
    # datasets would take longer to disassemble the function, and not notice changes in those that it calls.
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    columns = (plan.columns, plan.used, plan.outputs)
    return Hasher.hash((rows._fingerprint, vars(args), plan.kind, columns, special_tokens, calls, code))


def convert_stream(
    stream: IterableDataset, plan: ColumnPlan, args: DataArguments, special_tokens: re.Pattern[str] | None
) -> IterableDataset:
    """Convert the rows of a stream to TRL's columns when they are read; arguments as for `convert_stored`.

    A row without the expected shape raises a `UserError` then. No row is dropped, because that would renumber later
    rows, and so change which rows are held out. Documents from the Hub that are not text become empty instead, and
    pairs that do not say which answer is better stay until `drop_uninformative`.
    """
    if plan.kind == "tokens":
        return stream
    # A stream may not know its columns before its first row, and there may be no row that is held out.
    columns = stream.column_names or list(next(iter(stream), plan.columns))
    _log_unread(stream, columns, plan, args)
    if args.drop_bad_rows and plan.kind != "text":
        remedy = "rows of a stream cannot be dropped; turn dataset_streaming off, or correct them"
        raise UserError(Problem("drop_bad_rows", True, remedy))
    place = place_of(stream, args)
    # Whether a document that is not text is read as an empty one.
    may_be_empty = False
    if plan.kind == "text" and drops_rows(args):
        # If none of the first documents is text, it is the wrong column.
        (column,) = plan.used
        may_be_empty = any(isinstance(row[column], str) for row in stream.take(50))

    def convert(row: Row, index: int) -> dict[str, Any]:
        try:
            return _read(row, plan, special_tokens)
        except ShapeError as error:
            if not may_be_empty:
                remedy = f"{error}; {CORRECT}; {DROP}"
                raise UserError(Problem("dataset_name", f"{place}, row {index}", remedy)) from None
            log_once(logging.WARNING, f"{place}: some documents are not text, and are read as empty ones.")
            return {"text": ""}

    # Without features a stream would not know its columns, and a numeric answer would stay a number.
    features = _features(stream.features, columns, plan, calls=True)
    removed = _removed(columns, plan)
    return stream.map(convert, with_indices=True, remove_columns=removed, features=Features(features) or None)


def drop_uninformative(stream: IterableDataset, plan: ColumnPlan) -> IterableDataset:
    """Drop the pairs of a converted stream that do not say which answer is better."""
    return stream.filter(is_informative) if "chosen" in plan.outputs else stream


def _read(row: Row, plan: ColumnPlan, special_tokens: re.Pattern[str] | None) -> dict[str, Any]:
    """Convert a row. Raise a `ShapeError` if that is not possible, or a message spells a special token."""
    converted = plan.read(row)
    if special_tokens is not None:
        refuse_special_tokens(converted, special_tokens)
    return converted


def calls_tools(converted: Mapping[str, Any]) -> bool:
    """Return whether a converted row calls tools: a message has more keys than its role and content."""
    columns = [converted.get(name) or () for name in ANSWERED]
    return any(len(message) > 2 for messages in columns for message in messages)


def _features(types: Features | None, columns: list[str], plan: ColumnPlan, calls: bool) -> dict[str, Any]:
    """Return the types of the columns of a converted split.

    Args:
        types: The types of the `columns` before they are converted; None or {} if a stream does not know them.
        columns: All columns before they are converted.
        calls: Whether any row calls tools.

    Returns:
        The types by column; {} if the type of a column that stays as it is (`ColumnPlan.passed_on`) is unknown.
    """
    features: dict[str, Any] = {}
    for name in plan.passed_on(columns):
        if not types:
            return {}
        features[name] = types[name]
    for name in plan.outputs:
        features[name] = CALLING if calls and name in ANSWERED else FEATURES[name]
    return features


def _removed(columns: list[str], plan: ColumnPlan) -> list[str]:
    """Return the columns that conversion removes."""
    staying = (*plan.outputs, *plan.passed_on(columns))
    return [name for name in columns if name not in staying]


def _drop_faulty(
    rows: Dataset, place: str, args: DataArguments, numbers: Sequence[int]
) -> tuple[Dataset, Sequence[int]]:
    """Drop the rows that could not be converted, or reject the data with the number of the first such row.

    `numbers` are the numbers of the rows in their file. Return the rows that are left, and their numbers.
    """
    column = rows.data.column(FAULT).to_pylist()
    rows = rows.remove_columns(FAULT)
    remaining: list[int] = []
    faults: dict[int, str] = {}
    uninformative = 0
    for index, fault in enumerate(column):
        if fault is None:
            remaining.append(index)
        elif fault == UNINFORMATIVE:
            uninformative += 1
        else:
            faults[int(numbers[index])] = fault
    if faults:
        first = min(faults)
        if not may_drop(args, len(faults), len(rows)):
            raise UserError(Problem("dataset_name", f"{place}, row {first}", _describe_faults(faults, len(rows))))
        what = f"rows are dropped; row {first}, for instance: {faults[first]}"
        report_lost(len(faults), len(rows), what, f"correct {place}")
    if uninformative:
        if not remaining:
            raise UserError(Problem("dataset_name", place, "every pair has an empty answer, or two equal ones"))
        what = "pairs are dropped, because an answer is empty or both are the same"
        report_lost(uninformative, len(rows) - len(faults), what, f"correct {place}")
    if len(remaining) == len(rows):
        return rows, numbers
    return rows.select(remaining), [numbers[index] for index in remaining]


def _describe_faults(faults: Mapping[int, str], row_count: int) -> str:
    """Return what is wrong with the first faulty row, and the numbers of the next ones.

    `faults` are by the number of the row, in ascending order; `row_count` also counts the rows without a fault.
    """
    first = faults[min(faults)]
    if row_count > 1 and len(faults) == row_count:
        return f"{first}; all {row_count} rows are like this: {CONVERT}"
    more = ""
    if len(faults) > 1:
        listed = ", ".join(map(str, [*faults][1:5]))
        if len(faults) > 5:
            listed += ", ..."
        more = f" and {len(faults) - 1} more of {row_count} ({listed})"
    return f"{first}; {CORRECT}{more}; {DROP}"


def _unread_keys(row: Row, kind: Kind) -> list[str]:
    """Return the keys of a row's messages that are not read, such as "messages.weight"."""
    names = []
    for column, value in row.items():
        if isinstance(value, list):
            keys = unread_keys(value, is_answer=kind in ("preference", "unpaired"))
            names += [f"{column}.{key}" for key in keys]
    return names


def _log_unread(split: Split, columns: list[str], plan: ColumnPlan, args: DataArguments) -> None:
    """Log the columns that are not read, and the keys that the messages of the first rows have and nobody reads."""
    unread = [column for column in columns if column not in plan.used]
    if plan.kind not in ("text", "prompt"):
        may_have_messages = [column for column in columns if column in plan.used and normalise(column) != "tools"]
        if may_have_messages:
            for row in split.select_columns(may_have_messages).take(100):
                unread += _unread_keys(row, plan.kind)
    if unread:
        listed = ", ".join(map(repr, dict.fromkeys(unread)))
        use = "are passed to rewards, and not part of the prompts" if plan.kind == "prompt" else "are not used"
        log_once(logging.INFO, f"{'data':<11} {args.dataset_name}: the columns {listed} {use}")
