"""The splits of a data set that a stage trains on, and is evaluated on during training."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, load_dataset_builder

from pipeline.data.arguments import DataArguments
from pipeline.data.columns import (
    CONVERT,
    CORRECT,
    DROP,
    Kind,
    Split,
    column_names,
    convert_rows,
    converter,
    drop_uninformative,
    find_column,
    normalise,
    standardise,
)
from pipeline.data.messages import ShapeError
from pipeline.data.shards import is_shards
from pipeline.data.sources import UNREADABLE, locate_error, open_source
from pipeline.data.votes import VOTES_FILE
from pipeline.data.writing import ANSWERED, CALLING
from pipeline.errors import Problem, UserError, collect, refuse
from pipeline.progress import report_progress, report_read

logger = logging.getLogger(__name__)

T = TypeVar("T", int, np.ndarray)

FIRST_ROWS, SMALL_BYTES = 100, 16 * 2**20
"""Rows that are checked before a run begins, and the size of a data set up to which its files are read for that."""
SHUFFLE_BUFFER, HELD_OUT_OF_STREAM = 1000, 1000
"""Rows among which a stream is shuffled, and the default of `max_eval_samples` if rows of a stream are held out:
otherwise, each evaluation would read the stream to its end."""


def load_splits(
    args: DataArguments, kind: Kind, evaluation: bool, tokens: re.Pattern[str] | None = None, seed: int = 0
) -> tuple[Split, Split | None]:
    """Load the training split of a data set and its evaluation split, or None if `evaluation` is off.

    If the data set has a single split (a plain file, for instance), every `1 / validation_share`-th row is held out,
    whether or not the evaluation split is wanted: the finished model is measured on these rows as well. A `UserError`
    says that the data set, a split or a column does not exist, a split is empty, or a row is malformed.

    Args:
        kind: Content of the rows, and the columns that are returned:
            `"text"`: `text`, a document.
            `"tokens"`: `input_ids`, the tokens of a document, from `pipeline.data.shards`.
            `"conversation"`: `messages`, which end with the assistant's; also made of a question and an answer column.
            `"preference"`: `prompt`, `chosen` and `rejected`, lists of messages, and `margin` if the data have it.
            `"prompt"`: `prompt`, a list of messages, `answer` if the data have it, and all other columns, for rewards.
        tokens: Special tokens of the tokenizer, which no message may contain as text. Default: any text is accepted.
        seed: Seed of the order of a stream. Documents stay in their order: `pipeline.data.streams` shuffles them.
    """
    # Only this function handles several data sets: everything below is about one, and names only that.
    parts = []
    for name in args.dataset_names:
        try:
            parts.append(_load_one(replace(args, dataset_name=name), kind, evaluation, tokens))
        except UnicodeDecodeError as error:
            # The texts in JSON are decoded only now.
            raise UserError(*locate_error(Path(name), error)) from None
    for column in {"preference": ["margin"], "prompt": ["answer"]}.get(kind, ()):
        has = {name: column in column_names(part) for name, (part, _) in zip(args.dataset_names, parts, strict=True)}
        lacking = ", ".join(name for name in has if not has[name])
        if lacking and any(has.values()) and column == "margin":
            remedy = "has no column margin, unlike other data sets of this stage; add it here, or remove it there"
            raise UserError(Problem("dataset_name", lacking, remedy))
        if lacking and any(has.values()):
            logger.warning("%s: has no answers for rewards, unlike other data sets of this stage", lacking)
    train = _join([train for train, _ in parts], args.max_train_samples)
    test = _join([test for _, test in parts if test is not None], args.max_eval_samples) if evaluation else None
    if isinstance(train, IterableDataset) and kind not in ("text", "tokens"):
        # Trainers only shuffle data with a length. The order of a stream depends on the seed and the epoch.
        train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return train, test


def has_calls(conversations: Dataset | Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any of these conversations from `load_splits` calls tools; of a stream, pass the first rows."""
    if isinstance(conversations, Dataset):
        return any(conversations.features.get(name) == CALLING for name in ANSWERED)
    return any(len(one) > 2 for row in conversations for name in ANSWERED for one in row.get(name) or ())


def count_rows(args: DataArguments, kind: Kind, planned: Mapping[str, Any], needed: bool) -> tuple[int, float]:
    """Return the number of training rows and their approximate mean length in tokens; 0 for an unknown one.

    Nothing is downloaded. `planned` has the numbers of rows of data sets that do not exist yet. If the number is
    `needed` but unknown, raise a `UserError`.
    """
    names = args.dataset_names
    try:
        if all(Path(name).exists() for name in names) and not args.dataset_streaming:
            rows = load_splits(args, kind, evaluation=False)[0]
            first = rows.take(200)
            # Each of these columns, and an answer to a prompt, makes one sequence, with about 4 characters per token.
            shown = [column for column in ("text", "messages", "prompt", "chosen") if column in rows.column_names]
            return len(rows), sum(len(str(text)) for column in shown for text in first[column]) / len(first) / 4
        if args.max_train_samples or not needed:
            return args.max_train_samples or 0, 0
        if all(name in planned for name in names):
            return sum(planned[name] for name in names), 0
        splits = [load_dataset_builder(name, args.dataset_config).info.splits for name in names]
        return sum(split[args.dataset_train_split].num_examples for split in splits), 0
    except Exception as error:
        # An unreadable data set, an unreachable Hub and a card without numbers all raise different errors.
        if not needed:
            return 0, 0
        remedy = "its rows can be counted neither here nor on the Hub; give --max_train_samples"
        raise UserError(Problem("dataset_name", args.dataset_name, remedy)) from error


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
    source = open_source(args.dataset_names[0], args.dataset_config, streaming, args.document)
    name = next((name for name in splits or [args.dataset_train_split] if name in source), "")
    if not name:
        return
    rows, numbers = keep_rows(source[name], args)
    if next(iter(rows), None) is None:
        return
    convert, _, _ = converter(rows, column_names(source[name]), args, kind)
    if args.drop_bad_rows:
        return
    first_rows = list(rows.take(min(FIRST_ROWS, len(rows)) if isinstance(rows, Dataset) else FIRST_ROWS))
    faults: dict[int, str] = {}
    for index, row in enumerate(first_rows):
        try:
            convert(row)
        except ShapeError as error:
            faults[int(numbers[index]) if numbers else index] = str(error)
    if not faults:
        return
    first = min(faults)
    if len(faults) == len(first_rows) > 1:
        remedy = f"{faults[first]}; the first {len(first_rows)} rows are all like this: {CONVERT}"
    else:
        others = f" and {len(faults) - 1} more of the first {len(first_rows)}" if len(faults) > 1 else ""
        remedy = f"{faults[first]}; {CORRECT}{others}; {DROP}"
    raise UserError(Problem("dataset_name", f"{args.dataset_name}, split {name}, row {first}", remedy))


def is_held_out(numbers: T, share: float) -> T:
    """Return which rows of a single split are held out: every `1 / share`-th one, 0, 20, 40, … for a share of 0.05.

    This is the only rule. The numbers, an integer or an array, are those in the data set as it lies on the disk, before
    any row is dropped or left out. So it makes no difference for what a row is read, and which others are: no stage
    trains on what another one holds out of the same data set with the same share. Of a stream, only the first file is
    divided, because processes that read other files do not know the numbers of their rows.
    """
    return numbers % round(1 / share) == 0


def row_filter(args: DataArguments, columns: Sequence[str]) -> Callable[[Mapping[str, Any]], bool]:
    """Return which rows `args.keep_rows` asks for; raise a `UserError` if it is not COLUMN=VALUE."""
    kept: dict[str, set[str]] = {}
    for condition in args.keep_rows or ():
        column, sign, value = condition.partition("=")
        if not sign or column not in columns:
            remedy = f"must be COLUMN=VALUE, with one of the columns {', '.join(columns)}"
            raise UserError(Problem("keep_rows", condition, remedy))
        kept.setdefault(column, set()).add(value.casefold())
    return lambda row: all(str(row[name]).casefold() in values for name, values in kept.items())


def keep_rows(split: Split, args: DataArguments) -> tuple[Split, Sequence[int]]:
    """Return the rows that `args.keep_rows` asks for, and their numbers in the split; of a stream, ().

    Raise a `UserError` if it is not COLUMN=VALUE.
    """
    is_stored = isinstance(split, Dataset)
    if not args.keep_rows:
        return split, range(len(split)) if is_stored else ()
    is_kept = row_filter(args, column_names(split))
    if not is_stored:
        return split.filter(is_kept), ()
    columns = split.select_columns(list(dict.fromkeys(one.partition("=")[0] for one in args.keep_rows)))
    numbers = [number for number, row in enumerate(columns) if is_kept(row)]
    return split.select(numbers), numbers


def _check_kept(split: Split, args: DataArguments) -> None:
    """Raise a `UserError` if no row of the training split is kept."""
    if args.keep_rows and next(iter(split), None) is None:
        remedy = f"no row of {args.dataset_name}, split {args.dataset_train_split}, has these values; "
        raise UserError(Problem("keep_rows", ", ".join(args.keep_rows), remedy + "correct one of them"))


def _load_one(
    args: DataArguments, kind: Kind, evaluation: bool, tokens: re.Pattern[str] | None
) -> tuple[Split, Split | None]:
    train = args.dataset_train_split
    source = open_source(args.dataset_names[0], args.dataset_config, args.dataset_streaming, args.document)
    if evaluation and args.dataset_test_split == "validation" not in source and "test" in source:
        logger.info(
            "The data set has no split validation: training is evaluated on its split test, as the finished model is. "
            "With load_best_model_at_end, these rows also choose the model, and its figures flatter it; add a split "
            "validation."
        )
        report_progress(evaluated_on="test")
        args = replace(args, dataset_test_split="test")
    test = args.dataset_test_split
    is_single = list(source) == [train] and test != train and args.validation_share > 0
    kept = {name: keep_rows(split, args) for name, split in source.items() if name in (train, test)}
    if train in kept:
        _check_kept(kept[train][0], args)
    # A single row is trained on if there is no evaluation.
    can_be_divided = evaluation or not isinstance(source.get(train), Dataset) or len(kept[train][0]) > 1
    if not (is_single and can_be_divided):
        remedy = f"there is no such split; choose from: {', '.join(source)}"
        problems = [] if train in source else [Problem("dataset_train_split", train, remedy)]
        if evaluation and test not in source and (train in source or len(source) > 1):
            problems.append(Problem("dataset_test_split", test, remedy))
        if evaluation and train == test:
            problems.append(Problem("dataset_test_split", test, "is the training split; choose another"))
        refuse(*problems)
        trained_on = kept[train][0]
        if isinstance(trained_on, Dataset) and len(trained_on):
            # All rows are checked, also those that a trial run does not train on.
            trained_on = _limit(standardise(trained_on, args, kind, tokens), args, "max_train_samples")
        else:
            trained_on = standardise(_limit(trained_on, args, "max_train_samples"), args, kind, tokens)
        _report_read(*kept[train], args, kind, is_divided=False)
        if not evaluation:
            return trained_on, None
        held_out = _limit(kept[test][0], args, "max_eval_samples")
        # The evaluation split must have the columns that are read from the training split, such as answers.
        columns, others = column_names(source[train]), column_names(held_out)
        used = [] if kind == "tokens" else converter(kept[train][0], columns, args, kind)[2]
        # Prompts may be read from the answers, and margins are optional.
        read = [name for name in used if normalise(name) != "margin" and find_column(columns, name)]
        if lacking := [name for name in read if not find_column(others, name)]:
            remedy = f"has no column {', '.join(lacking)}, unlike {train}; add it, or remove this split"
            raise UserError(Problem("dataset_test_split", test, remedy))
        return trained_on, standardise(held_out, args, kind, tokens)

    trained_on, held_out = _hold_out(source[train], args, kind, tokens)
    _report_read(*kept[train], args, kind, is_divided=True)
    if evaluation and next(iter(held_out), None) is None:
        other = 1 / (round(1 / args.validation_share) + 1)
        remedy = (
            f"holds out none of the rows that are left; give another share, such as {other:.3g}, or --eval_strategy no"
        )
        raise UserError(Problem("validation_share", args.validation_share, remedy))
    if args.max_eval_samples is None and isinstance(held_out, IterableDataset):
        logger.info("max_eval_samples %d (default for a stream)", HELD_OUT_OF_STREAM)
        args = replace(args, max_eval_samples=HELD_OUT_OF_STREAM)
    trained_on = _limit(trained_on, args, "max_train_samples")
    return trained_on, _limit(held_out, args, "max_eval_samples") if evaluation else None


def _report_read(split: Split, numbers: Sequence[int], args: DataArguments, kind: Kind, is_divided: bool) -> None:
    """Report which rows and columns of a training split are read; `numbers` are those of its rows in their file."""
    columns = column_names(split)
    made, used = (columns, columns) if kind == "tokens" else converter(split, columns, args, kind)[1:]
    others = [name for name in columns if name not in used]
    rows = held_out = None
    if isinstance(split, Dataset):
        rows = len(split)
        if is_divided:
            held_out = int(is_held_out(np.array(numbers), args.validation_share).sum())
    place = args.dataset_names[0]
    if args.dataset_config:
        place += f" ({args.dataset_config})"
    if args.dataset_train_split != "train":
        place += f", split {args.dataset_train_split}"
    report_read(place, rows, held_out, used=[*filter(None, used)], made=made, others=others)


def _hold_out(only: Split, args: DataArguments, kind: Kind, tokens: re.Pattern[str] | None) -> tuple[Split, Split]:
    """Divide converted rows into a part to train on and a part to evaluate on, as `is_held_out` says."""
    share = args.validation_share
    which = f"every {round(1 / share)}th row is held out for it"
    logger.info("The data set has no split %s: %s.", args.dataset_test_split, which)
    if isinstance(only, Dataset):
        rows, numbers = keep_rows(only, args)
        rows, numbers = convert_rows(rows, args, kind, tokens, numbers)
        if len(rows) < 2:
            remedy = f"has {len(rows)} rows, too few to hold any out; give more rows, or --eval_strategy no"
            raise UserError(Problem("dataset_name", args.dataset_name, remedy))
        held_out = is_held_out(np.array(numbers), share)
        return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))
    if args.keep_rows:
        # Rows have their numbers before any are left out.
        trained_on, others = (keep_rows(part, args)[0] for part in _hold_out_of_stream(only, share))
        if next(iter(others), None) is not None:
            others = standardise(others, args, kind, tokens)
        return standardise(trained_on, args, kind, tokens), others
    # Rows are converted first, so that errors give their numbers in the file.
    converted, _ = convert_rows(only, args, kind, tokens)
    trained_on, others = _hold_out_of_stream(converted, share)
    return drop_uninformative(trained_on, kind), drop_uninformative(others, kind)


def _hold_out_of_stream(only: IterableDataset, share: float) -> tuple[IterableDataset, IterableDataset]:
    """Divide the first file of a stream."""
    first, *others = (only.shard(only.num_shards, file) for file in range(only.num_shards))
    kept = first.filter(lambda _, number: not is_held_out(number, share), with_indices=True)
    held_out = first.filter(lambda _, number: is_held_out(number, share), with_indices=True)
    return concatenate_datasets([kept, *others]) if others else kept, held_out


def _limit(split: Split, args: DataArguments, field: str) -> Split:
    """Take the first rows, as many as the field says, and check that there are any."""
    if (samples := getattr(args, field)) is not None:
        split = split.take(samples)
    if next(iter(split), None) is None:
        place = f"{args.dataset_name}, split {split.split or args.dataset_train_split}"
        raise UserError(Problem("dataset_name", place, "is empty; choose one that has rows"))
    return split


def _join(parts: list[Split], most: int | None) -> Split:
    """Concatenate the rows of several data sets, up to `most` rows."""
    types = [part.features or {} for part in parts]
    calling = {name: CALLING for one in types for name in ANSWERED if one.get(name) == CALLING}
    if any(one != types[0] for one in types) and calling:
        parts = [part.cast(Features({**part.features, **calling})) for part in parts]
    joined = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return joined if most is None else joined.take(most)
