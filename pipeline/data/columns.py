"""Which columns of a data set are what: decided once for a data set, and used for all of its splits."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal, NoReturn, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from pipeline.data.arguments import ANSWERS, CONTEXTS, CONVERSATIONS, PROMPTS, DataArguments
from pipeline.data.messages import (
    Messages,
    Row,
    ShapeError,
    as_answer,
    has_prompt,
    is_whole,
    read_answer,
    read_functions,
    read_messages,
    read_pair,
    read_prompt,
    without_none,
)
from pipeline.errors import Problem, UserError

logger = logging.getLogger(__name__)
TOKENS = "input_ids"
"""Column of blocks, and of documents that are tokens already: `bos + text + eos`."""
Kind = Literal["text", "tokens", "conversation", "preference", "unpaired", "prompt"]
Split: TypeAlias = Dataset | IterableDataset
Splits: TypeAlias = DatasetDict | IterableDatasetDict
RowReader: TypeAlias = Callable[[Row], dict[str, Any]]

PAIRS = (("question", "answer"), ("prompt", "completion"), *product(PROMPTS, ANSWERS))
"""Columns of a prompt and its answer, the most usual first; case and surrounding spaces of the names do not matter."""
TEXT_COLUMNS = frozenset({"text", "chosen", "rejected", *PROMPTS, *ANSWERS, *CONTEXTS})
"""Columns of a table that are always read as text."""

PASSED_BY_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that TRL passes to every reward function in addition to the columns of the data."""
NAME_OR_CONVERT = "name prompt_column and completion_column, convert the rows (docs/data.md, “Rows”), or "
GSM8K_ANSWER = re.compile(r"####\s*(.+)")
"""The final answer in a solution of GSM8K."""

log_once = cache(logger.log)
"""Log a line once, with its level, although several splits and stages of a process may repeat it."""


def column_names(split: Split) -> list[str]:
    """Return the columns of a split; a stream may not know them before its first row."""
    return list(split.column_names or next(iter(split)))


def normalise(name: str) -> str:
    """Return the name of a column without differences in case, line breaks and spaces around it."""
    return " ".join(name.split()).casefold()


def find_column(columns: Iterable[str], *names: str) -> str:
    """Return the first of some names that is a column, as the data set spells it; "" if there is none."""
    # A column's spelling comes last, so that it wins: `answer` is this column, although `Answer` may exist as well.
    columns_by_name = {normalise(column): column for column in columns} | {column: column for column in columns}
    for name in names:
        if name in columns_by_name:
            return columns_by_name[name]
        if normalise(name) in columns_by_name:
            return columns_by_name[normalise(name)]
    return ""


def place_of(split: Split, args: DataArguments) -> str:
    """Return how messages name a split, such as "data.jsonl, split train"."""
    return f"{args.dataset_name}, split {split.split or args.dataset_train_split}"


@dataclass(frozen=True)
class ColumnPlan:
    """Which columns of a data set are what, and how a row is read: the decision of `plan_columns`.

    With the columns `Question`, `answer` and `level`, and the kind "conversation":

        ColumnPlan(columns=["Question", "answer", "level"], used=["Question", "answer"], outputs=["messages"], …)

    Attributes:
        kind: Content of the rows, as for `load_splits`.
        columns: All columns of the training split.
        used: The columns that `read` needs. Pairs of conversations contain their prompt. Without a column of prompts,
            `used` has the value of `prompt_column` nevertheless, which names no column.
        outputs: The columns that `read` makes, with TRL's names.
        read: Converts a row. Raises a `ShapeError` if the row does not have the expected shape.
    """

    kind: Kind
    columns: list[str]
    used: list[str]
    outputs: list[str]
    read: RowReader

    def passed_on(self, columns: list[str]) -> list[str]:
        """Return the `columns` of a split that conversion leaves as they are.

        Only prompts have such columns: all that they are not made of, which rewards may read.
        """
        if self.kind != "prompt":
            return []
        # TRL passes arguments of these names to rewards, or reads images in them.
        left_out = (*self.outputs, *PASSED_BY_TRL, "image", "images")
        return [name for name in columns if name not in left_out]

    def apply_to(self, split: Split, args: DataArguments) -> tuple[ColumnPlan, Split]:
        """Return this plan, adapted to another split of the same data set, and the rows of that split.

        Columns that the split spells differently are renamed. If the split has no margins, the adapted plan does not
        make them. Raise a `UserError` if any other column that is read is missing.
        """
        columns = column_names(split)
        spellings = {name: find_column(columns, name) for name in self.used if name in self.columns}
        missing = [name for name, spelling in spellings.items() if not spelling]
        required = [name for name in missing if normalise(name) != "margin"]
        if required:
            train = args.dataset_train_split
            remedy = f"has no column {', '.join(required)}, unlike {train}; add it, or remove this split"
            raise UserError(Problem("dataset_test_split", args.dataset_test_split, remedy))
        plan = self
        if missing:
            plan = replace(self, outputs=[name for name in self.outputs if name != "margin"])
        renamed = {spelling: name for name, spelling in spellings.items() if spelling not in ("", name)}
        if renamed:
            split = split.rename_columns(renamed)
        return plan, split


def plan_columns(rows: Split, args: DataArguments, kind: Kind, columns: list[str] | None = None) -> ColumnPlan:
    """Decide which columns of a data set are what: by their names, the arguments and, for pairs, the first row.

    Args:
        rows: The rows of its training split, or of the split that is measured.
        args: The arguments, which name only this data set.
        columns: Names of the columns. Default: those of `rows`.

    Raises:
        UserError: If a column that is needed does not exist.
    """
    # What is read and what is made of it, with optional columns in brackets:
    #
    #   tokens         input_ids                                                    input_ids
    #   text           text_column                                                  text
    #   conversation   messages_column [tools], or a prompt [context], completion   messages [tools]
    #   prompt         prompt_column [context] [answer_column]                      prompt [answer], and all others
    #   preference     [prompt_column] [context] chosen_column rejected_column      prompt chosen rejected [margin]
    #                  [margin]
    #   unpaired       the same, or a prompt [context], its completion and label    the same, or prompt completion label
    if columns is None:
        columns = column_names(rows)
    if kind == "tokens":
        return _plan_tokens(columns, place_of(rows, args))
    if kind == "text":
        return _plan_texts(args, columns)
    if kind == "conversation":
        return _plan_conversations(args, columns)
    chosen = find_column(columns, args.chosen_column)
    if kind == "unpaired" and not chosen:
        return _plan_single_answers(args, columns)
    # Column names do not say whether answers are texts, or conversations that contain their prompt. The first row does.
    first_answer = None
    if chosen:
        first_row = next(iter(rows), None)
        if first_row is not None:
            first_answer = first_row[chosen]
    if kind == "prompt":
        return _plan_prompts(args, columns, first_answer)
    return _plan_pairs(args, columns, kind, first_answer)


def _plan_tokens(columns: list[str], place: str) -> ColumnPlan:
    if columns != [TOKENS]:
        remedy = "has text, and others of dataset_name have tokens; give data sets of one kind"
        raise UserError(Problem("dataset_name", place, remedy))
    return ColumnPlan("tokens", columns, [TOKENS], [TOKENS], dict)


def _plan_texts(args: DataArguments, columns: list[str]) -> ColumnPlan:
    (text,) = _require(columns, text_column=args.text_column)

    def read(row: Row) -> dict[str, Any]:
        if not isinstance(row[text], str):
            raise ShapeError(f"the text is {row[text]!r:.60}")
        return {"text": row[text]}

    return ColumnPlan("text", columns, [text], ["text"], read)


def _plan_conversations(args: DataArguments, columns: list[str]) -> ColumnPlan:
    """Plan to read conversations, or to join a prompt and its completion: by default, columns in `PAIRS`."""
    has_default_name = args.messages_column == "messages"
    names = [args.messages_column]
    if has_default_name:
        names += CONVERSATIONS
    messages_column = find_column(columns, *names)
    tools = find_column(columns, "tools")
    tool_columns = []
    outputs = ["messages"]
    if tools:
        tool_columns.append(tools)
        outputs.append("tools")

    def read_tools(row: Row) -> dict[str, Any]:
        if not tools:
            return {}
        schemas = read_functions(without_none(row[tools]), tools, schemas=True)
        if not schemas:
            # Some templates distinguish an empty list from none.
            return {"tools": None}
        return {"tools": json.dumps(schemas, ensure_ascii=False)}

    if messages_column and args.completion_column is None:

        def from_messages(row: Row) -> dict[str, Any]:
            messages = read_messages(row[messages_column], messages_column, args.system_prompt, calls=True)
            if messages[-1]["role"] != "assistant":
                raise ShapeError(f"{messages_column} ends with the role {messages[-1]['role']}, not assistant")
            roles = [message["role"] for message in messages if message["role"] != "system"]
            if roles[0] == "assistant":
                raise ShapeError(f"{messages_column} begins with the assistant: there is no prompt")
            return {"messages": messages, **read_tools(row)}

        return ColumnPlan("conversation", columns, [messages_column, *tool_columns], outputs, from_messages)

    if args.completion_column is not None:
        prompt = _find_prompt(args, columns)
        completion = find_column(columns, args.completion_column)
        if not prompt or not completion:
            _refuse_missing(columns, prompt_column=args.prompt_column, completion_column=args.completion_column)
    else:
        pair = None
        if has_default_name:
            pair = _find_usual_pair(columns)
        if pair is None:
            _refuse_missing(columns, NAME_OR_CONVERT, messages_column=args.messages_column)
        prompt, completion = pair
    prompt_of, prompt_columns = _prompt_reader(args, columns, prompt, completion)

    def from_pair(row: Row) -> dict[str, Any]:
        messages = [*prompt_of(row), *read_answer(row[completion], completion)]
        return {"messages": messages, **read_tools(row)}

    return ColumnPlan("conversation", columns, [*prompt_columns, completion, *tool_columns], outputs, from_pair)


def _find_usual_pair(columns: list[str]) -> tuple[str, str] | None:
    """Return the first of the usual `PAIRS` of a prompt and a completion that the columns contain, or None."""
    for names in PAIRS:
        prompt, completion = (find_column(columns, name) for name in names)
        if prompt and completion:
            return prompt, completion
    return None


def _plan_single_answers(args: DataArguments, columns: list[str]) -> ColumnPlan:
    """Plan to read a prompt, one answer to it, and a label that says whether the answer is wanted."""
    completion_names = [args.completion_column] if args.completion_column else ANSWERS
    names = {
        "prompt_column": _find_prompt(args, columns) or args.prompt_column,
        "completion_column": find_column(columns, *completion_names) or "completion",
        "label": "label",
    }
    prompt, completion, label = _require(columns, "or, for pairs, chosen and rejected; ", **names)
    prompt_of, prompt_columns = _prompt_reader(args, columns, prompt, completion)

    def read(row: Row) -> dict[str, Any]:
        if row[label] not in (True, False):
            raise ShapeError(f"{label} is {row[label]!r:.60}, not true or false")
        answer = read_answer(row[completion], completion)
        return {"prompt": prompt_of(row), "completion": answer, "label": bool(row[label])}

    outputs = ["prompt", "completion", "label"]
    return ColumnPlan("unpaired", columns, [*prompt_columns, completion, label], outputs, read)


def _plan_pairs(args: DataArguments, columns: list[str], kind: Kind, first_answer: object) -> ColumnPlan:
    """Plan to read two answers and their prompt, from a column of its own or from the answers.

    `first_answer` is the value of `chosen_column` in the first row, None if there is no row.
    """
    chosen, rejected = _require(columns, chosen_column=args.chosen_column, rejected_column=args.rejected_column)
    prompt = _find_prompt(args, columns, first_answer)
    # Answers that are conversations contain their prompt; texts do not.
    if not prompt and isinstance(first_answer, str):
        remedy = "there is no such column, and chosen and rejected contain only answers; "
        remedy += "move what precedes the answers to a column of prompts"
        raise UserError(Problem("prompt_column", args.prompt_column, remedy))
    prompt_of, used = _prompt_reader(args, columns, prompt or args.prompt_column)
    margin = find_column(columns, "margin")

    def read(row: Row) -> dict[str, Any]:
        pair = {"chosen": row[chosen], "rejected": row[rejected]}
        if margin and margin in row:
            pair["margin"] = row[margin]
        messages = None
        if prompt and has_prompt(pair, row[prompt]):
            messages = prompt_of(row)
        return read_pair(pair, messages, args.system_prompt)

    used += [chosen, rejected]
    outputs = ["prompt", "chosen", "rejected"]
    if margin:
        used.append(margin)
        outputs.append("margin")
    return ColumnPlan(kind, columns, used, outputs, read)


def _plan_prompts(args: DataArguments, columns: list[str], first_answer: object) -> ColumnPlan:
    """Plan to read prompts and, if the data have them, final answers.

    `first_answer` is the value of `chosen_column` in the first row, None if there is no such column or no row.
    """
    prompt = _find_prompt(args, columns, first_answer)
    # Pairs of conversations also work: their prompt is what both begin with.
    chosen = find_column(columns, args.chosen_column)
    rejected = find_column(columns, args.rejected_column)
    has_pairs = bool(chosen and rejected and args.prompt_column == "prompt")
    if not prompt and not has_pairs:
        _require(columns, prompt_column=args.prompt_column)
    answer_names = [args.answer_column]
    if args.answer_column == "answer":
        # Data sets with the columns `q` and `a`.
        answer_names.append("a")
    answer = find_column(columns, *answer_names)
    if not answer and (args.answer_pattern is not None or args.answer_column != "answer"):
        _require(columns, answer_column=args.answer_column)
    pattern = _compile_answer_pattern(args.answer_pattern)
    prompt_of, used = _prompt_reader(args, columns, prompt or args.prompt_column, answer)
    if not prompt:
        used += [chosen, rejected]

    def read_any_prompt(row: Row) -> Messages:
        # Another split of the data set may have prompts without answers.
        if has_pairs and chosen in row and rejected in row:
            pair = {**row, "chosen": row[chosen], "rejected": row[rejected]}
            if not has_prompt(pair, pair.get(prompt)):
                return read_pair(pair, None, args.system_prompt)["prompt"]
        return prompt_of(row)

    def read(row: Row) -> dict[str, Any]:
        converted: dict[str, Any] = {"prompt": read_any_prompt(row)}
        if answer:
            converted["answer"] = _read_final_answer(row[answer], answer, pattern)
        return converted

    outputs = ["prompt"]
    if answer:
        used.append(answer)
        outputs.append("answer")
    return ColumnPlan("prompt", columns, used, outputs, read)


def _compile_answer_pattern(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        remedy = f"is not a regular expression ({error})"
        raise UserError(Problem("answer_pattern", pattern, remedy)) from None


def _read_final_answer(value: object, column: str, pattern: re.Pattern[str] | None) -> str:
    """Return the final answer in a value: what the `pattern` matches or, by default, what follows GSM8K's mark."""
    answer = as_answer(value)
    if answer is None or isinstance(answer, list | dict):
        raise ShapeError(f"{column} is {value!r:.60}, not one answer as text or as a number")
    text = str(answer)
    match = (pattern or GSM8K_ANSWER).search(text)
    if match is None:
        if pattern is not None:
            raise ShapeError(f"answer_pattern does not occur in {text!r:.60}")
        return text.strip()
    final = match[1] if match.re.groups else match[0]
    if final is None:
        raise ShapeError(f"the group of answer_pattern finds nothing in {value!r:.60}")
    return final.strip()


def _find_prompt(args: DataArguments, columns: list[str], first_answer: object = None) -> str:
    """Return the column of the prompts: the named one, by default one with a usual name, or ""."""
    if args.prompt_column != "prompt":
        return find_column(columns, args.prompt_column)
    # The prompt of answers that do not contain it may be a column of conversations.
    if first_answer is None or is_whole(first_answer):
        return find_column(columns, *PROMPTS)
    return find_column(columns, *PROMPTS, *CONVERSATIONS)


def _prompt_reader(
    args: DataArguments, columns: list[str], prompt: str, completion: str = ""
) -> tuple[Callable[[Row], Messages], list[str]]:
    """Return the function that reads a prompt with its context, and the columns that it reads."""
    contexts = [name for name in columns if normalise(name) in CONTEXTS and name not in (prompt, completion)]
    used = [prompt, *contexts]
    if contexts:
        log_once(logging.INFO, f"{'data':<11} {args.dataset_name}: prompts are made of the columns {', '.join(used)}")

    def read(row: Row) -> Messages:
        text = row[prompt]
        # A prompt that consists of messages is complete.
        if isinstance(text, str) and text.strip():
            for name in contexts:
                context = as_answer(row[name])
                if not isinstance(context, str | None):
                    raise ShapeError(f"{name}, which belongs to the prompt, is {context!r:.60}, not text")
                if context and context.strip():
                    text += f"\n\n{context}"
        return read_prompt(text, prompt, args.system_prompt)

    return read, used


def _require(columns: list[str], remedy: str = "", **names: str) -> list[str]:
    """Return the columns with some names, as the data set spells them.

    Example:
        _require(["Chosen", "rejected"], chosen_column="chosen") -> ["Chosen"]

    Args:
        columns: All columns of the data set.
        remedy: What the user can do besides choosing or renaming a column, such as "convert the rows, or ".
        **names: The name of each column, by the field of `DataArguments` that sets it, if any.

    Raises:
        UserError: If any of them does not exist. It lists them all.
    """
    spellings = [find_column(columns, name) for name in names.values()]
    if not all(spellings):
        _refuse_missing(columns, remedy, **names)
    return spellings


def _refuse_missing(columns: list[str], remedy: str = "", **names: str) -> NoReturn:
    """Raise a `UserError` that lists which of these columns do not exist; arguments as for `_require`."""
    # Names with spaces around them are quoted, because the spaces would not be seen; so are those with line breaks.
    choices = []
    for column in columns[:20]:
        is_plain = column == " ".join(column.split()) and len(column) <= 60
        choice = column if is_plain else repr(column)
        choices.append(choice if len(choice) <= 60 else f"{choice:.57}...")
    listed = ", ".join(choices)
    if len(columns) > 20:
        listed += f" and {len(columns) - 20} more"
    problems = []
    for field, name in names.items():
        if not find_column(columns, name):
            # The user can choose another column only through an argument; otherwise, a column must be renamed.
            advice = "choose from" if hasattr(DataArguments, field) else "rename one of"
            problems.append(Problem(field, name, f"there is no such column; {remedy}{advice}: {listed}"))
    raise UserError(*problems)
