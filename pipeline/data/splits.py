"""The splits of a data set that a stage trains on, and is evaluated on during training."""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, load_dataset_builder

from pipeline.data.arguments import DataArguments
from pipeline.data.columns import ColumnPlan, Kind, Split, Splits, column_names, place_of, plan_columns
from pipeline.data.conversion import (
    CONVERT,
    CORRECT,
    DROP,
    calls_tools,
    convert_stored,
    convert_stream,
    drop_uninformative,
)
from pipeline.data.documents import BLANK, NO_TEXT
from pipeline.data.messages import ShapeError
from pipeline.data.shards import is_shards
from pipeline.data.sources import UNREADABLE, locate_error, open_source
from pipeline.data.votes import VOTES_FILE
from pipeline.data.writing import ANSWERED, CALLING
from pipeline.errors import Problem, UserError, collect, refuse
from pipeline.progress import report_progress, report_read

logger = logging.getLogger(__name__)

T = TypeVar("T", int, np.ndarray)

FIRST_ROWS = 100
"""Rows that are checked before a run begins."""
FIRST_DOCUMENTS = 1000
"""Documents of a stream of which at least one must have text."""
SMALL_BYTES = 16 * 2**20
"""Size of a data set up to which its whole files are read to check the first rows. Larger ones are streamed."""
SHUFFLE_BUFFER = 1000
"""Rows among which a stream is shuffled."""
HELD_OUT_OF_STREAM = 1000
"""Default of `max_eval_samples` if rows of a stream are held out: each evaluation would read it to its end."""


def load_splits(
    args: DataArguments, kind: Kind, evaluation: bool, special_tokens: re.Pattern[str] | None = None, seed: int = 0
) -> tuple[Split, Split | None]:
    """Load the training split of a data set and its evaluation split, or None if `evaluation` is off.

    If the data set has a single split (a plain file, for instance), every `1 / validation_share`-th row is held out,
    whether or not the evaluation split is wanted: the finished model is measured on these rows as well. What is held
    out is guarded by tests/evaluation/test_held_out.py, the order of rows by tests/data/test_splits.py.

    Args:
        args: Names of the data sets, their splits and columns.
        kind: Content of the rows, and the columns that are returned:
            `"text"`: `text`, a document.
            `"tokens"`: `input_ids`, the tokens of a document, from `pipeline.data.shards`.
            `"conversation"`: `messages`, which end with the assistant's, also made of a question and an answer column;
                and `tools` if the data have it.
            `"preference"`: `prompt`, `chosen` and `rejected`, lists of messages, and `margin` if the data have it.
            `"unpaired"`: the same, or `prompt`, `completion` and `label` for single answers.
            `"prompt"`: `prompt`, a list of messages, `answer` if the data have it, and all other columns, for rewards.
        evaluation: Whether the evaluation split is wanted.
        special_tokens: What no message may contain as text (`pipeline.models.tokenizer.special_tokens`). Default: any
            text is accepted.
        seed: Seed of the order of a stream. Documents stay in their order: `pipeline.data.streams` shuffles them.

    Returns:
        The training split, and the evaluation split or None. Both are streams if `args.dataset_streaming`.

    Raises:
        UserError: If the data set, a split or a column does not exist, a split is empty, or a row is malformed.
    """
    # Only this function handles several data sets: below, `args` name a single one.
    trains: list[Split] = []
    tests: list[Split] = []
    for name in args.dataset_names:
        try:
            train, test = _load_one(replace(args, dataset_name=name), kind, evaluation, special_tokens)
        except UnicodeDecodeError as error:
            # `datasets` only decodes the texts in JSON when it reads the rows.
            raise UserError(*locate_error(Path(name), error)) from None
        trains.append(train)
        if test is not None:
            tests.append(test)
    _check_optional_columns(args.dataset_names, trains, kind)
    # `_load_one` has limited each data set; this limits all of them together.
    train = _join(trains, args.max_train_samples)
    if isinstance(train, IterableDataset) and kind not in ("text", "tokens"):
        # Trainers only shuffle data with a length. The order of a stream depends on the seed and the epoch.
        train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    if not evaluation:
        return train, None
    return train, _join(tests, args.max_eval_samples)


def _load_one(
    args: DataArguments, kind: Kind, evaluation: bool, special_tokens: re.Pattern[str] | None
) -> tuple[Split, Split | None]:
    """Load the only data set that `args` names: its training split, and its evaluation split or None."""
    # What happens to the rows, from left to right; `keep` leaves those that `keep_rows` asks for:
    #
    #                        stored                            stream, whose rows pass when they are read
    #
    #    only split          keep   convert  divide  limit     convert  divide  limit
    #                                                          with keep_rows: divide  keep  convert  limit
    #    training split      keep   convert  limit             keep     limit   convert
    #    evaluation split    keep   limit    convert           keep     limit   convert
    #
    # Converting checks the rows. All stored rows to train on are checked, also those that a trial run leaves out. Rows
    # are divided by their numbers in the file. Stored rows are passed on with their numbers; a stream only knows them
    # before any row is dropped, and converts first where it can, because messages name rows by their numbers.
    source = open_source(args.dataset_names[0], args.dataset_config, args.dataset_streaming, args.document)
    args = _choose_test_split(source, args, evaluation)
    _check_split_names(source, args, evaluation)
    split = source[args.dataset_train_split]
    rows, numbers = keep_rows(split, args)
    _check_kept(rows, args)
    _check_filled(rows, args)
    plan = plan_columns(rows, args, kind)
    # A single row is trained on if there is no evaluation.
    is_single_row = isinstance(rows, Dataset) and len(rows) == 1
    divides = is_divided(source, args) and (evaluation or not is_single_row)
    held_out = None
    if divides:
        trained_on, held_out = _load_only_split(split, rows, numbers, plan, args, evaluation, special_tokens)
    else:
        trained_on = _load_train_split(rows, numbers, plan, args, special_tokens)
        if evaluation:
            held_out = _load_test_split(source[args.dataset_test_split], plan, args, special_tokens)
    if kind == "text":
        _check_has_text(trained_on, args)
    _report_read(rows, numbers, plan, args, divides)
    return trained_on, held_out


def _choose_test_split(source: Splits, args: DataArguments, evaluation: bool) -> DataArguments:
    """Return arguments that evaluate on the split `test` if the data set has no split `validation`, the default."""
    if not evaluation or args.dataset_test_split != "validation":
        return args
    if "validation" in source or "test" not in source:
        return args
    logger.info(
        "The data set has no split validation: training is evaluated on its split test, as the finished model is. "
        "With load_best_model_at_end, these rows also choose the model, and its figures flatter it; add a split "
        "validation."
    )
    report_progress(evaluated_on="test")
    return replace(args, dataset_test_split="test")


def _check_split_names(source: Splits, args: DataArguments, evaluation: bool) -> None:
    """Raise a `UserError` if a split does not exist, or training would be evaluated on what it learns."""
    train = args.dataset_train_split
    test = args.dataset_test_split
    remedy = f"there is no such split; choose from: {', '.join(source)}"
    problems = []
    if train not in source:
        problems.append(Problem("dataset_train_split", train, remedy))
    # If a single split has another name than the training split, report only that: it will be divided.
    if evaluation and test not in source and not is_divided(source, args) and (train in source or len(source) > 1):
        problems.append(Problem("dataset_test_split", test, remedy))
    if evaluation and train == test:
        problems.append(Problem("dataset_test_split", test, "is the training split; choose another"))
    refuse(*problems)


def _load_only_split(
    split: Split,
    rows: Split,
    numbers: Sequence[int],
    plan: ColumnPlan,
    args: DataArguments,
    evaluation: bool,
    special_tokens: re.Pattern[str] | None,
) -> tuple[Split, Split | None]:
    """Divide the only split of a data set into rows to train on and rows to evaluate on, None without `evaluation`.

    Args:
        split: All rows. A stream is divided by its numbers before the argument `keep_rows` drops any of them.
        rows: The rows that `keep_rows` has left.
        numbers: Their numbers in `split`; of a stream, ().
        special_tokens: What no message may contain as text; None to accept any text.
    """
    share = args.validation_share
    rule = f"every {round(1 / share)}th row is held out for it"
    logger.info("The data set has no split %s: %s.", args.dataset_test_split, rule)
    trained_on: Split
    held_out: Split
    if isinstance(rows, Dataset):
        converted, numbers = convert_stored(rows, plan, args, special_tokens, numbers)
        if len(converted) < 2:
            remedy = f"has {len(converted)} rows, too few to hold any out; give more rows, or --eval_strategy no"
            raise UserError(Problem("dataset_name", args.dataset_name, remedy))
        are_held_out = is_held_out(np.array(numbers), share)
        trained_on = converted.select(np.flatnonzero(~are_held_out))
        held_out = converted.select(np.flatnonzero(are_held_out))
    else:
        parts: Sequence[Split]
        # The drawing in `_load_one` shows the two orders, and says why.
        if args.keep_rows:
            remaining_parts = [keep_rows(part, args)[0] for part in _divide_stream(split, share)]
            parts = [convert_stream(part, plan, args, special_tokens) for part in remaining_parts]
        else:
            parts = _divide_stream(convert_stream(split, plan, args, special_tokens), share)
        trained_on, held_out = [drop_uninformative(part, plan) for part in parts]
    if not evaluation:
        return _limit(trained_on, args.max_train_samples, args), None
    if next(iter(held_out), None) is None:
        # Holds out every 21st row instead of every 20th.
        other_share = 1 / (round(1 / share) + 1)
        remedy = f"holds out none of the rows that are left; give another share, such as {other_share:.3g}"
        raise UserError(Problem("validation_share", share, f"{remedy}, or --eval_strategy no"))
    trained_on = _limit(trained_on, args.max_train_samples, args)
    held_out_limit = args.max_eval_samples
    if held_out_limit is None and isinstance(held_out, IterableDataset):
        logger.info("max_eval_samples %d (default for a stream)", HELD_OUT_OF_STREAM)
        held_out_limit = HELD_OUT_OF_STREAM
    return trained_on, _limit(held_out, held_out_limit, args)


def is_divided(splits: Collection[str], args: DataArguments) -> bool:
    """Return whether the only split of a data set is divided into rows to train on and rows that are held out.

    Training and evaluation (`pipeline.evaluation.held_out`) both ask this function; `is_held_out` says which rows.
    """
    return list(splits) == [args.dataset_train_split] and args.validation_share > 0


def is_held_out(numbers: T, share: float) -> T:
    """Return which rows of a single split are held out: every `1 / share`-th one, 0, 20, 40, … for a share of 0.05.

    This is the only rule, guarded by tests/evaluation/test_held_out.py. The numbers, an integer or an array, count the
    rows of the data set as it lies on the disk, before any row is dropped. So all stages hold out the same rows of a
    data set with the same share, and none trains on what another one holds out.

    Of a stream, only the first file is divided (`first_file`), because processes that read other files do not know the
    numbers of their rows.
    """
    return numbers % round(1 / share) == 0


def first_file(stream: IterableDataset) -> IterableDataset:
    """Return the rows of a stream's first file, the only one of which rows are held out."""
    return stream.shard(stream.num_shards, 0)


def _divide_stream(stream: IterableDataset, share: float) -> tuple[IterableDataset, IterableDataset]:
    """Return the rows of a stream to train on, and those of its first file that are held out."""
    first = first_file(stream)
    other_files = [stream.shard(stream.num_shards, file) for file in range(1, stream.num_shards)]
    trained_on = first.filter(lambda _, number: not is_held_out(number, share), with_indices=True)
    held_out = first.filter(lambda _, number: is_held_out(number, share), with_indices=True)
    if other_files:
        trained_on = concatenate_datasets([trained_on, *other_files])
    return trained_on, held_out


def _load_train_split(
    rows: Split, numbers: Sequence[int], plan: ColumnPlan, args: DataArguments, special_tokens: re.Pattern[str] | None
) -> Split:
    """Convert the training split of a data set that has other splits, and limit it.

    `numbers` are the numbers of `rows` in the split before `keep_rows` dropped some; () for a stream.
    """
    if isinstance(rows, Dataset):
        converted, _ = convert_stored(rows, plan, args, special_tokens, numbers)
        return _limit(converted, args.max_train_samples, args)
    limited = _limit(rows, args.max_train_samples, args)
    return drop_uninformative(convert_stream(limited, plan, args, special_tokens), plan)


def _load_test_split(
    split: Split, plan: ColumnPlan, args: DataArguments, special_tokens: re.Pattern[str] | None
) -> Split:
    """Convert the evaluation split by the `plan` of the training split, whose columns it must have."""
    rows, numbers = keep_rows(split, args)
    rows = _limit(rows, args.max_eval_samples, args)
    plan, rows = plan.apply_to(rows, args)
    if isinstance(rows, Dataset):
        return convert_stored(rows, plan, args, special_tokens, numbers)[0]
    return drop_uninformative(convert_stream(rows, plan, args, special_tokens), plan)


def _report_read(rows: Split, numbers: Sequence[int], plan: ColumnPlan, args: DataArguments, divides: bool) -> None:
    """Report which rows and columns of a training split are read; `numbers` are those of its rows in their file."""
    row_count = None
    held_out_count = None
    if isinstance(rows, Dataset):
        row_count = len(rows)
        if divides:
            held_out_count = int(is_held_out(np.array(numbers), args.validation_share).sum())
    place = args.dataset_names[0]
    if args.dataset_config:
        place += f" ({args.dataset_config})"
    if args.dataset_train_split != "train":
        place += f", split {args.dataset_train_split}"
    unread = [name for name in plan.columns if name not in plan.used]
    report_read(place, row_count, held_out_count, used=plan.used, made=plan.outputs, others=unread)


def keep_rows(split: Split, args: DataArguments) -> tuple[Split, Sequence[int]]:
    """Return the rows that `args.keep_rows` asks for, and their numbers in the split, which are () for a stream.

    Raise a `UserError` if one of its conditions is not COLUMN=VALUE.
    """
    if not isinstance(split, Dataset):
        if args.keep_rows:
            split = split.filter(row_filter(args, column_names(split)))
        return split, ()
    if not args.keep_rows:
        return split, range(len(split))
    is_kept = row_filter(args, column_names(split))
    # Only the columns of the conditions are read, because others may be long.
    columns = dict.fromkeys(condition.partition("=")[0] for condition in args.keep_rows)
    numbers = [number for number, row in enumerate(split.select_columns(list(columns))) if is_kept(row)]
    return split.select(numbers), numbers


def row_filter(args: DataArguments, columns: Sequence[str]) -> Callable[[Mapping[str, Any]], bool]:
    """Return a function that says whether `args.keep_rows` asks for a row: all rows, if it is not set.

    Conditions on the same column are alternatives, and those on several columns must all hold. Raise a `UserError` if
    one is not COLUMN=VALUE.
    """
    values_of: dict[str, set[str]] = {}
    for condition in args.keep_rows or ():
        column, sign, value = condition.partition("=")
        if not sign or column not in columns:
            remedy = f"must be COLUMN=VALUE, with one of the columns {', '.join(columns)}"
            raise UserError(Problem("keep_rows", condition, remedy))
        values_of.setdefault(column, set()).add(value.casefold())
    return lambda row: all(str(row[name]).casefold() in values for name, values in values_of.items())


def _check_kept(rows: Split, args: DataArguments) -> None:
    """Raise a `UserError` if `keep_rows` leaves no row of the training split."""
    if args.keep_rows and next(iter(rows), None) is None:
        remedy = f"no row of {args.dataset_name}, split {args.dataset_train_split}, has these values; "
        raise UserError(Problem("keep_rows", ", ".join(args.keep_rows), remedy + "correct one of them"))


def _limit(split: Split, limit: int | None, args: DataArguments) -> Split:
    """Return the first `limit` rows of a split, all for None. Raise a `UserError` if it has no rows."""
    if limit is not None:
        split = split.take(limit)
    _check_filled(split, args)
    return split


def _check_filled(split: Split, args: DataArguments) -> None:
    """Raise a `UserError` if a split has no rows."""
    if next(iter(split), None) is None:
        raise UserError(Problem("dataset_name", place_of(split, args), "is empty; choose one that has rows"))


def _check_has_text(documents: Split, args: DataArguments) -> None:
    """Raise a `UserError` if documents have nothing but white space: all stored ones, or the first of a stream."""
    if isinstance(documents, IterableDataset):
        documents = documents.take(FIRST_DOCUMENTS)
    # Mostly, the first document has text.
    if all(BLANK.fullmatch(row["text"]) for row in documents):
        raise UserError(Problem("dataset_name", place_of(documents, args), NO_TEXT))


def _check_optional_columns(names: Sequence[str], trains: Sequence[Split], kind: Kind) -> None:
    """Check that all data sets of a stage have the optional column of its kind, or none of them.

    Raise a `UserError` if only some of them have margins; warn if only some of them have answers.
    """
    column = {"preference": "margin", "prompt": "answer"}.get(kind)
    if column is None:
        return
    lacking = [name for name, train in zip(names, trains, strict=True) if column not in column_names(train)]
    if not lacking or len(lacking) == len(names):
        return
    listed = ", ".join(lacking)
    if column == "margin":
        remedy = "has no column margin, unlike other data sets of this stage; add it here, or remove it there"
        raise UserError(Problem("dataset_name", listed, remedy))
    logger.warning("%s: has no answers for rewards, unlike other data sets of this stage", listed)


def _join(parts: list[Split], limit: int | None) -> Split:
    """Concatenate the rows of several data sets, and return the first `limit` rows, all for None."""
    types = [part.features or {} for part in parts]
    # If the messages of any data set call tools, the messages of all data sets get the type `CALLING`.
    calling: dict[str, Any] = {}
    for features in types:
        calling |= {name: CALLING for name in ANSWERED if features.get(name) == CALLING}
    if calling and any(features != types[0] for features in types):
        parts = [part.cast(Features({**part.features, **calling})) for part in parts]
    joined = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return joined if limit is None else joined.take(limit)


def has_calls(conversations: Dataset | Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any of these conversations from `load_splits` calls tools; of a stream, pass the first rows."""
    if isinstance(conversations, Dataset):
        return any(conversations.features.get(name) == CALLING for name in ANSWERED)
    return any(calls_tools(row) for row in conversations)


def count_rows(args: DataArguments, kind: Kind, planned: Mapping[str, Any], needed: bool) -> tuple[int, float]:
    """Return the number of training rows and their approximate mean length in tokens, each 0 if it is unknown.

    Nothing is downloaded, except for the card of a data set on the Hub.

    Args:
        args: The data sets.
        kind: Content of the rows, as for `load_splits`.
        planned: The number of rows of each data set that an earlier step will write.
        needed: Whether to raise a `UserError` if the number of rows is unknown.
    """
    names = args.dataset_names
    try:
        if all(Path(name).exists() for name in names) and not args.dataset_streaming:
            rows = load_splits(args, kind, evaluation=False)[0]
            return len(rows), _mean_tokens(rows.take(200))
        if args.max_train_samples or not needed:
            return args.max_train_samples or 0, 0
        if all(name in planned for name in names):
            return sum(planned[name] for name in names), 0
        infos = [load_dataset_builder(name, args.dataset_config).info for name in names]
        return sum(info.splits[args.dataset_train_split].num_examples for info in infos), 0
    except Exception as error:
        # An unreadable data set, an unreachable Hub and a card without numbers all raise different errors.
        if not needed:
            return 0, 0
        remedy = "its rows can be counted neither here nor on the Hub; give --max_train_samples"
        raise UserError(Problem("dataset_name", args.dataset_name, remedy)) from error


def _mean_tokens(rows: Dataset) -> float:
    """Return the approximate number of tokens of a row, with about 4 characters per token."""
    # The columns of one sequence: a text, a conversation, a prompt, or the prompt and the preferred answer of a pair.
    columns = [column for column in ("text", "messages", "prompt", "chosen") if column in rows.column_names]
    characters = 0
    for column in columns:
        characters += sum(len(str(text)) for text in rows[column])
    return characters / len(rows) / 4


def check_first_rows(args: DataArguments, kind: Kind, splits: Sequence[str] = ()) -> None:
    """Check the columns and the first rows of the user's files, as `load_splits` will; download nothing.

    Shards, votes and files that do not exist are left to the step that reads them. Raise a `UserError` for columns that
    do not exist, and for malformed rows.

    Args:
        splits: Names of splits, of which the first that exists is checked. Default: the training split.
    """
    problems: list[Problem] = []
    for name in args.dataset_names:
        path = Path(name).expanduser()
        if not path.exists() or is_shards(path) or (path / VOTES_FILE).exists():
            continue
        files = [path] if path.is_file() else path.rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())
        with collect(problems):
            try:
                _check_rows_of(replace(args, dataset_name=name), kind, size > SMALL_BYTES, splits)
            except UNREADABLE:
                # A stream reports errors in its files without their place; the step itself finds it.
                logger.debug("%s: its first rows cannot be read", name, exc_info=True)
    refuse(*problems)


def _check_rows_of(args: DataArguments, kind: Kind, streaming: bool, splits: Sequence[str]) -> None:
    """Check the first rows of the only data set that `args` names."""
    source = open_source(args.dataset_names[0], args.dataset_config, streaming, args.document)
    names = [name for name in splits or [args.dataset_train_split] if name in source]
    if not names:
        return
    rows, numbers = keep_rows(source[names[0]], args)
    if next(iter(rows), None) is None:
        return
    plan = plan_columns(rows, args, kind)
    if args.drop_bad_rows:
        return
    limit = FIRST_ROWS
    if isinstance(rows, Dataset):
        limit = min(FIRST_ROWS, len(rows))
    row_count = 0
    faults: dict[int, str] = {}
    for index, row in enumerate(rows.take(limit)):
        row_count += 1
        try:
            plan.read(row)
        except ShapeError as error:
            # The rows of a stream have no numbers.
            number = int(numbers[index]) if numbers else index
            faults[number] = str(error)
    if not faults:
        return
    first = min(faults)
    if row_count > 1 and len(faults) == row_count:
        remedy = f"{faults[first]}; the first {row_count} rows are all like this: {CONVERT}"
    else:
        more = ""
        if len(faults) > 1:
            more = f" and {len(faults) - 1} more of the first {row_count}"
        remedy = f"{faults[first]}; {CORRECT}{more}; {DROP}"
    raise UserError(Problem("dataset_name", f"{args.dataset_name}, split {names[0]}, row {first}", remedy))
