"""Conversations and pairs of answers in the rows of a data set, read from the various shapes that data sets use."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from typing import Any

Messages = list[dict[str, Any]]
Row = Mapping[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}
"""Names of roles in ShareGPT's conversations."""
MESSAGE_KEYS: tuple[str, ...] = ("role", "content", "from", "value", "tool_calls", "function_call")
"""Keys of messages that are read everywhere."""
RENDERED: tuple[str, ...] = ("name", "reasoning_content", "thinking")
"""Keys of messages in an answer that some chat templates write, in addition to role, content and calls."""


class ShapeError(ValueError):
    """A row does not have the expected shape; the message says how."""


def read_messages(value: object, column: str, system_prompt: str | None = None, calls: bool = False) -> Messages:
    """Read a conversation: a list of messages, or the text of a single message of the user.

    Args:
        value: The content of a row.
        column: Name of the column, for messages.
        system_prompt: System message for a conversation that does not have one.
        calls: Whether messages of the assistant may call tools, and be empty apart from that. Such messages get the key
            `tool_calls`, in OpenAI's form with arguments as a dict.

    Raises:
        ShapeError: If it is neither, or not a conversation that a model can learn from.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ShapeError(f"{column} is empty")
        value = [{"role": "user", "content": _as_text(value, column)}]
    value = _from_sharegpt(value)
    if not isinstance(value, list) or not value:
        raise ShapeError(f"{column} is {value!r:.60}, not a list of messages")
    messages: Messages = []
    for item in value:
        message = _read_message(item, column, calls)
        if messages and message["role"] == messages[-1]["role"] == "assistant":
            raise ShapeError(f"{column} has two messages of the assistant in a row")
        messages.append(message)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _read_message(message: object, column: str, calls: bool) -> dict[str, Any]:
    """Return the role, the content and the tool calls of a message, or raise a `ShapeError`; see `read_messages`."""
    tool_calls: list[dict[str, Any]] = []
    if isinstance(message, Mapping):
        raw_calls = message.get("tool_calls") or message.get("function_call")
        if raw_calls:
            if not calls:
                raise ShapeError(f"{column} calls a tool, which is not supported here; write the call into the content")
            tool_calls = read_functions(without_none(raw_calls), column)
            message = {**message, "content": message.get("content") or ""}
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise ShapeError(f"{column} contains {message!r:.60}, not {{role, content}}")
    role = message["role"]
    content = message["content"]
    if role not in ("system", "user", "assistant", "tool"):
        raise ShapeError(f"{column} has the role {role!r:.60}, not system, user or assistant")
    if not isinstance(content, str):
        raise ShapeError(f"{column} has the content {content!r:.60}, not text")
    if tool_calls:
        if role != "assistant":
            raise ShapeError(f"{column} calls a tool in a message of the {role}, not of the assistant")
        return {"role": role, "content": content, "tool_calls": tool_calls}
    if not content.strip() and role in ("user", "assistant"):
        raise ShapeError(f"{column} has an empty message of the {role}")
    return {"role": role, "content": content}


def _as_text(value: str, column: str) -> str:
    """Return text, but reject a list of messages that a table stores as text."""
    if re.match(r"\s*\[\s*\{\s*['\"](role|content|from)['\"]\s*:", value):
        raise ShapeError(f"{column} has messages as text, {value!r:.60}; save them as JSONL or Parquet")
    return value


def _from_sharegpt(value: object) -> object:
    """Return the messages of ShareGPT, `{from, value}`, as `{role, content}`, and anything else as it is.

    A single message becomes a list. In ShareGPT, a tool call is a message of its own; it is added to the assistant's
    message before it.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return value
    messages: list[Any] = []
    for message in value:
        match message:
            case {"role": "function"}:
                message = {**message, "role": "tool"}
            case {"from": "function_call", "value": call}:
                # Without a message of the assistant before the call, a new one contains it.
                answer: Mapping[str, Any] = {"role": "assistant", "content": ""}
                if messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
                    answer = messages.pop()
                message = {**answer, "tool_calls": [*(answer.get("tool_calls") or ()), call]}
            case {"from": str(role), "value": content} if message.get("role") is None:
                message = {"role": ROLES.get(role, role), "content": content}
        messages.append(message)
    return messages


def read_functions(value: object, column: str, schemas: bool = False) -> list[dict[str, Any]]:
    """Return calls of tools or, with `schemas`, the schemas of tools, in OpenAI's form.

    Example:
        '{"name": "add", "arguments": "{\\"x\\": 1}"}' -> [{"type": "function", "function": {"name": "add", "arguments":
        {"x": 1}}}]

    Args:
        value: A call or a schema, with or without OpenAI's `{"function": ...}` around it, or a list of them. Each, the
            list, and the arguments of a call may be JSON as text. None and "" are no calls.
        column: Name of the column, for messages.
        schemas: Whether these are schemas, which are not changed.

    Raises:
        ShapeError: If it is anything else.
    """
    match _parse(value):
        case None | "":
            return []
        case list(items):
            functions = []
            for item in items:
                functions += read_functions(item, column, schemas)
            return functions
        case {"function": {"name": str(name)} as function} | ({"name": str(name)} as function) if name.strip():
            if schemas:
                return [{"type": "function", "function": function}]
            arguments = _parse(function.get("arguments"))
            if isinstance(arguments, Mapping):
                if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in leaves(arguments)):
                    raise ShapeError(f"{column} has a number that JSON cannot hold in the call {arguments!r:.60}")
                return [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    if schemas:
        raise ShapeError(f"{column} has the tool {value!r:.60}, not a function with a name")
    raise ShapeError(f"{column} has the call {value!r:.60}, not a name with an object of arguments")


def _parse(value: object) -> Any:
    """Parse a text that is JSON, and return anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def without_none(value: object) -> Any:
    """Remove the keys whose value is None: a table gives every call the arguments of all other calls, as None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def leaves(value: object) -> Iterator[object]:
    """Yield the keys and values of mappings and the items of lists, at any depth."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def read_prompt(value: object, column: str, system_prompt: str | None = None) -> Messages:
    """Read messages that the assistant is to answer; arguments and errors as for `read_messages`."""
    messages = read_messages(value, column, system_prompt)
    if messages[-1]["role"] == "assistant":
        raise ShapeError(f"{column} ends with the role assistant, so there is nothing to answer")
    return messages


def refuse_special_tokens(row: Row, tokens: re.Pattern[str]) -> None:
    """Raise a `ShapeError` if a message of a row in TRL's columns contains the text of one of the special tokens.

    Chat templates write a conversation as one text, in which the tokenizer would take such a text for the template's
    own special tokens. So a user, or an answer of a model, could end a turn or begin another.
    """
    for column in ("messages", "prompt", "chosen", "rejected", "completion"):
        for message in row.get(column) or ():
            _refuse_tokens_in([message["content"], message.get("tool_calls")], column, tokens)
    _refuse_tokens_in(row.get("tools"), "tools", tokens)


def _refuse_tokens_in(value: object, column: str, tokens: re.Pattern[str]) -> None:
    for text in leaves(value):
        if isinstance(text, str) and (match := tokens.search(text)):
            raise ShapeError(f"{column} contains {match.group()}, which the tokenizer reads as a special token")


def as_answer(value: object) -> object:
    """Return a number as text, None for NaN, and any other value as it is.

    72.0 becomes "72", because a column of integers with missing values is read as floats. Raise a `ShapeError` for a
    date, and for a float that may have lost digits.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return None
        # A number of this size may have lost digits when it was read: 2^70 and 2^70 + 1 in JSON become the same float.
        if abs(value) >= 2.0**53:
            raise ShapeError(f"the number {value} is not exact; write it as text")
        if value.is_integer():
            value = int(value)
    if isinstance(value, date):
        raise ShapeError(f"{value} was read as a date, like its whole column; save the rows as CSV or Parquet")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(value)


def as_messages(answer: str | Messages) -> Messages:
    """Return an answer, a text or a dialogue with tools, as messages."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def read_answer(value: object, column: str) -> Messages:
    """Return the messages of an answer, which is a text, a message, or a dialogue with tools."""
    if as_answer(value) is None:
        value = ""
    answer = _read_answer(value, column)
    # A message with more keys than role and content calls tools.
    if not answer[0]["content"].strip() and len(answer[0]) == 2:
        raise ShapeError(f"{column} is empty")
    return answer


def has_prompt(pair: Row, prompt: object) -> bool:
    """Return whether `prompt`, the value in the column of prompts, is the prompt of a pair; None stands for none.

    If the answers are whole conversations, a text in that column is only the last message of their prompt.
    """
    if prompt is None:
        return False
    are_whole = all(is_whole(pair[side]) for side in ("chosen", "rejected"))
    return not (are_whole and isinstance(prompt, str))


def is_whole(answer: object) -> bool:
    """Return whether an answer is a whole conversation, with its prompt, and not a dialogue with tools."""
    turns = _from_sharegpt(answer)
    return isinstance(turns, list) and bool(split_answer(turns)[0])


def split_answer(turns: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split a conversation into its prompt, [] if it has none, and the answer: what the assistant and tools say last.

    The last message of a conversation that ends with the user or the system counts as the answer, and is rejected
    later.
    """
    begin = len(turns)
    while begin and isinstance(turns[begin - 1], Mapping) and turns[begin - 1].get("role") in ("assistant", "tool"):
        begin -= 1
    if turns and begin == len(turns):
        begin -= 1
    return turns[:begin], turns[begin:]


def unread_keys(turns: list[Any], is_answer: bool) -> list[str]:
    """Return the keys of messages that nobody reads, each as often as it occurs.

    The keys in `RENDERED` are read only in an answer that is a dialogue with tools.

    Args:
        turns: The messages.
        is_answer: Whether the messages end with one of the answers of a pair.
    """
    prompt = turns
    answer: list[Any] = []
    if is_answer:
        prompt, answer = split_answer(turns)
    answer_keys = MESSAGE_KEYS
    if len(answer) > 1 or any(isinstance(message, Mapping) and message.get("tool_calls") for message in answer):
        answer_keys = MESSAGE_KEYS + RENDERED
    return [*_other_keys(prompt, MESSAGE_KEYS), *_other_keys(answer, answer_keys)]


def _other_keys(messages: list[Any], keys: Sequence[str]) -> list[str]:
    """Return the keys of messages that have a value and are not among `keys`."""
    other_keys = []
    for message in messages:
        if isinstance(message, Mapping):
            other_keys += [key for key in message if message[key] is not None and key not in keys]
    return other_keys


def read_pair(row: Row, prompt: Messages | None, system_prompt: str | None = None) -> dict[str, Any]:
    """Read two answers to a prompt.

    Args:
        row: `chosen` and `rejected`, each the text of an answer, its message, a dialogue with tools, or a whole
            conversation. Optionally `margin`, by how much the chosen answer is better.
        prompt: The messages before the answers. If it is None, the answers are conversations that begin with it.
        system_prompt: As for `read_messages`.

    Returns:
        `prompt`, `chosen` and `rejected`, lists of messages, and `margin` if the row has it.

    Raises:
        ShapeError: If the row has a different shape.
    """
    # The shapes that data sets have, with M for a message and Q, A, B for texts:
    #
    #   prompt     chosen      rejected
    #   Q or [M]   A           B           texts
    #   Q or [M]   [M]         [M]         one message each
    #   - or Q     [M, M, M]   [M, M, M]   conversations, which begin alike, with the user or the system
    #   Q or [M]   [M, M, M]   [M, M, M]   conversations that repeat the prompt, or dialogues with tools
    sides = {side: _from_sharegpt(row[side]) for side in ("chosen", "rejected")}
    if prompt is None:
        prompts = []
        for side, turns in sides.items():
            if not isinstance(turns, list) or len(turns) < 2:
                raise ShapeError("there is no prompt")
            if isinstance(turns[-1], Mapping) and turns[-1].get("role", "assistant") != "assistant":
                raise ShapeError(f"{side} ends with the role {turns[-1]['role']!r:.60}, not assistant")
            opening, sides[side] = split_answer(turns)
            if not opening:
                raise ShapeError("there is no prompt")
            prompts.append(read_prompt(opening, side, system_prompt))
        prompt = prompts[0]
        if prompts[1] != prompt:
            raise ShapeError("chosen and rejected do not answer the same prompt")
    pair: dict[str, Any] = {"prompt": prompt}
    for side, answer in sides.items():
        pair[side] = _read_answer(answer, side, prompt, system_prompt)
    if "margin" in row:
        if not isinstance(row["margin"], int | float) or not math.isfinite(row["margin"]):
            raise ShapeError(f"margin is {row['margin']!r:.60}, not a number")
        pair["margin"] = float(row["margin"])
    return pair


def is_informative(pair: Row) -> bool:
    """Return whether a pair says which answer is better: neither is empty, and they are not the same."""
    answers = []
    for side in ("chosen", "rejected"):
        answer = [{**message, "content": message["content"].strip()} for message in pair[side]]
        has_calls = len(answer[0]) > 2
        if not answer[0]["content"] and not has_calls:
            return False
        answers.append(answer)
    return answers[0] != answers[1]


def labelled_pair(
    prompt: Messages, chosen: Any, rejected: Any, annotator: str, chosen_first: bool, kind: str = "", tastes: Any = ()
) -> dict[str, Any]:
    """Return two answers, texts or messages, of which `annotator` prefers the chosen one, as a row of a data set.

    Args:
        chosen_first: Whether the annotator saw the chosen answer first.
        kind: Kind of the prompt.
        tastes: The annotator's noise-free scores of the chosen and the rejected answer. Default: unknown.
    """
    taste_chosen = None
    taste_rejected = None
    if tastes:
        taste_chosen, taste_rejected = tastes
    return {
        "prompt": prompt,
        "chosen": as_messages(chosen),
        "rejected": as_messages(rejected),
        "annotator": annotator,
        "first": "chosen" if chosen_first else "rejected",
        "kind": kind,
        "taste_chosen": taste_chosen,
        "taste_rejected": taste_rejected,
    }


def _read_answer(
    value: object, column: str, prompt: Messages | None = None, system_prompt: str | None = None
) -> Messages:
    """Read an answer like `read_answer`, but allow an empty one, or a conversation that begins with this prompt."""
    value = as_answer(value)
    if isinstance(value, str):
        return as_messages(_as_text(value, column))
    if isinstance(value, list) and value:
        # A conversation may repeat the prompt.
        opening, answer = split_answer(value)
        if opening and read_messages(opening, column, system_prompt) == prompt:
            value = answer
    if isinstance(value, list) and _is_dialogue(value):
        return _read_dialogue(value, column)
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping):
        raise ShapeError(f"{column} is {value!r:.60}, not one answer to the prompt")
    role = value[0].get("role")
    content = value[0].get("content")
    if role != "assistant":
        raise ShapeError(f"{column} has the role {role!r:.60}, not assistant")
    if not isinstance(content, str):
        raise ShapeError(f"{column} is {content!r:.60}, not text")
    return as_messages(content)


def _is_dialogue(turns: list[Any]) -> bool:
    """Return whether an answer is a dialogue with tools: it begins with the assistant, and nobody asks again."""
    if not turns or not isinstance(turns[0], Mapping) or turns[0].get("role") != "assistant":
        return False
    if any(isinstance(turn, Mapping) and turn.get("role") in ("system", "user") for turn in turns):
        return False
    return len(turns) > 1 or bool(turns[0].get("tool_calls"))


def _read_dialogue(turns: list[Any], column: str) -> Messages:
    """Read an answer that is a dialogue with tools; its messages keep the keys in `RENDERED`."""
    messages = read_messages(turns, column, calls=True)
    if messages[-1]["role"] != "assistant":
        raise ShapeError(f"{column} is {turns!r:.60}, not one answer to the prompt")
    for message, turn in zip(messages, turns, strict=True):
        message |= {key: turn[key] for key in RENDERED if turn.get(key)}
    return messages
