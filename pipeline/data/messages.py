"""Conversations and pairs of answers in the rows of a data set, read from the various shapes that data sets use."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import date
from typing import Any

Messages = list[dict[str, Any]]
Row = Mapping[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}
"""Names of roles in ShareGPT's conversations."""
MESSAGE_KEYS = ("role", "content", "from", "value", "tool_calls", "function_call")
"""Keys of messages that are read everywhere."""
RENDERED = ("name", "reasoning_content", "thinking")
"""Keys of messages in an answer that some chat templates write, besides role, content and calls."""


class ShapeError(ValueError):
    """A row does not have the expected shape; the message says how."""


def read_messages(value: object, column: str, system_prompt: str | None = None, calls: bool = False) -> Messages:
    """Read a conversation: a list of messages, or the text of a single message of the user, or raise a `ShapeError`.

    A conversation without a system message gets `system_prompt`. With `calls`, messages of the assistant may call tools
    and be empty apart from that. They get the key `tool_calls`, in OpenAI's form with arguments as a dict.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ShapeError(f"{column} is empty")
        value = [{"role": "user", "content": _as_text(value, column)}]
    value = _with_roles(value)
    if not isinstance(value, list) or not value:
        raise ShapeError(f"{column} is {value!r:.60}, not a list of messages")
    messages: Messages = []
    for message in value:
        called = {}
        if isinstance(message, Mapping) and (found := message.get("tool_calls") or message.get("function_call")):
            if not calls:
                raise ShapeError(f"{column} calls a tool, which is not supported here; write the call into the content")
            called = {"tool_calls": read} if (read := read_functions(without_none(found), column)) else {}
            message = {**message, "content": message.get("content") or ""}
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ShapeError(f"{column} contains {message!r:.60}, not {{role, content}}")
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise ShapeError(f"{column} has the role {message['role']!r:.60}, not system, user or assistant")
        if not isinstance(message["content"], str):
            raise ShapeError(f"{column} has the content {message['content']!r:.60}, not text")
        if called and message["role"] != "assistant":
            raise ShapeError(f"{column} calls a tool in a message of the {message['role']}, not of the assistant")
        if not called and not message["content"].strip() and message["role"] in ("user", "assistant"):
            raise ShapeError(f"{column} has an empty message of the {message['role']}")
        if messages and message["role"] == messages[-1]["role"] == "assistant":
            raise ShapeError(f"{column} has two messages of the assistant in a row")
        messages.append({"role": message["role"], "content": message["content"], **called})
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _as_text(value: str, column: str) -> str:
    """Return text, but refuse a list of messages that a table stores as text."""
    if re.match(r"\s*\[\s*\{\s*['\"](role|content|from)['\"]\s*:", value):
        raise ShapeError(f"{column} has messages as text, {value!r:.60}; save them as JSONL or Parquet")
    return value


def _with_roles(value: object) -> object:
    """Return the messages of ShareGPT, `{from, value}`, as `{role, content}`; a single message as a list.

    Tool calls, which are separate messages there, are added to the assistant's message before them.
    """
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list):
        return value
    messages: list[Any] = []
    for one in value:
        match one:
            case {"role": "function"}:
                one = {**one, "role": "tool"}
            case {"from": "function_call", "value": call}:
                before = {"role": "assistant", "content": ""}
                if messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
                    before = messages.pop()
                one = {**before, "tool_calls": [*(before.get("tool_calls") or ()), call]}
            case {"from": str(role), "value": content} if one.get("role") is None:
                one = {"role": ROLES.get(role, role), "content": content}
        messages.append(one)
    return messages


def read_functions(value: object, column: str, schemas: bool = False) -> list[dict[str, Any]]:
    """Return calls, or `schemas`, of tools in OpenAI's form. Each, its arguments, or a list may be JSON as text."""
    match _parse(value):
        case None | "":
            return []
        case list(several):
            return [function for one in several for function in read_functions(one, column, schemas)]
        case {"function": {"name": str(name)} as function} | ({"name": str(name)} as function) if name.strip():
            if schemas:
                return [{"type": "function", "function": function}]
            if isinstance(arguments := _parse(function.get("arguments")), Mapping):
                if any(isinstance(one, float) and not math.isfinite(one) for one in leaves(arguments)):
                    raise ShapeError(f"{column} has a number that JSON cannot hold in the call {arguments!r:.60}")
                return [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    kind, expected = ("tool", "a function with a name") if schemas else ("call", "a name with an object of arguments")
    raise ShapeError(f"{column} has the {kind} {value!r:.60}, not {expected}")


def _parse(value: object) -> Any:
    """Parse a text that is JSON, and return anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def without_none(value: object) -> Any:
    """Remove the keys that are None: in a table, every call has the arguments of all others."""
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def leaves(value: object) -> Iterator[object]:
    """Yield the keys and values of mappings and the items of lists, at any depth."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def read_prompt(value: object, column: str, system_prompt: str | None = None) -> Messages:
    """Read messages that the assistant is to answer; arguments and errors as for `read_messages`."""
    messages = read_messages(value, column, system_prompt)
    if messages[-1]["role"] == "assistant":
        raise ShapeError(f"{column} ends with the role assistant, so there is nothing to answer")
    return messages


def refuse_special_tokens(row: Row, tokens: re.Pattern[str]) -> None:
    """Raise a `ShapeError` if a message of a row in TRL's columns contains the text of one of the special tokens."""
    # Chat templates write one text, in which the tokenizer would take such a text for the template's special tokens.
    for column in ("messages", "prompt", "chosen", "rejected", "completion", "tools"):
        for message in [{"content": row.get(column)}] if column == "tools" else row.get(column) or ():
            for text in leaves([message["content"], message.get("tool_calls")]):
                if isinstance(text, str) and (found := tokens.search(text)):
                    raise ShapeError(f"{column} contains {found.group()}, which the tokenizer reads as a special token")


def as_answer(value: object) -> object:
    """Return a number as text, None for NaN. 72.0 becomes "72", because missing answers turn integers into floats."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        # A number of this size may have lost digits when it was read: JSON's 2^70 and 2^70 + 1 become the same one.
        if abs(value) >= 2.0**53:
            raise ShapeError(f"the number {value} is not exact; write it as text")
        value = int(value) if value.is_integer() else value
    if isinstance(value, date):
        raise ShapeError(f"{value} was read as a date, like its whole column; save the rows as CSV or Parquet")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def as_messages(answer: str | Messages) -> Messages:
    """Return an answer, a text or a dialogue with tools, as messages."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def read_answer(value: object, column: str) -> Messages:
    """Return the messages of an answer, which is a text, a message, or a dialogue with tools."""
    answer = as_messages("") if as_answer(value) is None else _read_answer(value, column)
    if not answer[0]["content"].strip() and len(answer[0]) == 2:
        raise ShapeError(f"{column} is empty")
    return answer


def has_prompt(pair: Row, column: str) -> bool:
    """Return whether a pair has a separate column for its prompt."""
    # If the answers are whole conversations, a text in that column is only the last message of their prompt.
    whole = all(is_whole(pair[side]) for side in ("chosen", "rejected"))
    return pair.get(column) is not None and not (whole and isinstance(pair[column], str))


def is_whole(answer: object) -> bool:
    """Return whether an answer is a whole conversation, with its prompt, and not a dialogue with tools."""
    turns = _with_roles(answer)
    return isinstance(turns, list) and bool(split_answer(turns)[0])


def split_answer(turns: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split a conversation into its prompt, [] if it has none, and the answer: what the assistant and tools say last.

    What does not end with the assistant has no answer: its last message counts as one, and is refused later.
    """
    begin = len(turns)
    while begin and isinstance(turns[begin - 1], Mapping) and turns[begin - 1].get("role") in ("assistant", "tool"):
        begin -= 1
    begin = min(begin, len(turns) - 1)
    return turns[: max(begin, 0)], turns[max(begin, 0) :]


def unread_keys(turns: list[Any], is_answer: bool) -> list[str]:
    """Return the keys of messages that are not read; chat templates may render some of an answer that is a dialogue."""
    prompt, answer = split_answer(turns) if is_answer else (turns, [])
    is_dialogue = len(answer) > 1 or any(isinstance(one, Mapping) and one.get("tool_calls") for one in answer)
    unread = []
    for messages, read in ((prompt, MESSAGE_KEYS), (answer, MESSAGE_KEYS + RENDERED if is_dialogue else MESSAGE_KEYS)):
        for message in messages:
            if isinstance(message, Mapping):
                unread += [key for key in message if message[key] is not None and key not in read]
    return unread


def read_pair(row: Row, prompt: Messages | None, system_prompt: str | None = None) -> dict[str, Any]:
    """Read two answers to a prompt, which is extracted from them if it is None, or raise a `ShapeError`.

    Return `prompt`, `chosen` and `rejected`, lists of messages, and `margin`, by how much chosen is better, if known.
    """
    # The shapes that data sets have, with M for a message and Q, A, B for texts:
    #
    #   prompt     chosen      rejected
    #   Q or [M]   A           B           texts
    #   Q or [M]   [M]         [M]         one message each
    #   - or Q     [M, M, M]   [M, M, M]   conversations, which begin alike, with the user or the system
    #   Q or [M]   [M, M, M]   [M, M, M]   conversations that repeat the prompt, or dialogues with tools
    sides = {side: _with_roles(row[side]) for side in ("chosen", "rejected")}
    if prompt is None:
        prompts = []
        for side, turns in sides.items():
            if not isinstance(turns, list) or len(turns) < 2:
                raise ShapeError("there is no prompt")
            if isinstance(turns[-1], Mapping) and turns[-1].get("role", "assistant") != "assistant":
                raise ShapeError(f"{side} ends with the role {turns[-1]['role']!r:.60}, not assistant")
            before, sides[side] = split_answer(turns)
            if not before:
                raise ShapeError("there is no prompt")
            prompts.append(read_prompt(before, side, system_prompt))
        prompt = prompts[0]
        if prompts[1] != prompt:
            raise ShapeError("chosen and rejected do not answer the same prompt")
    answers = {side: _read_answer(answer, side, prompt, system_prompt) for side, answer in sides.items()}
    pair: dict[str, Any] = {"prompt": prompt, **answers}
    if "margin" in row:
        if not isinstance(row["margin"], int | float) or not math.isfinite(row["margin"]):
            raise ShapeError(f"margin is {row['margin']!r:.60}, not a number")
        pair["margin"] = float(row["margin"])
    return pair


def is_informative(pair: Row) -> bool:
    """Return whether a pair says which answer is better: neither is empty, and they are not the same."""
    answers = [[{**one, "content": one["content"].strip()} for one in pair[side]] for side in ("chosen", "rejected")]
    return answers[0] != answers[1] and all(answer[0]["content"] or len(answer[0]) > 2 for answer in answers)


def labelled_pair(
    prompt: Messages, chosen: Any, rejected: Any, annotator: str, chosen_first: bool, kind: str = "", tastes: Any = ()
) -> dict[str, Any]:
    """Return two answers, texts or messages, of which `annotator` prefers the chosen one, as a row of a data set.

    `kind` is the kind of the prompt; `tastes` are the noise-free tastes of both answers, if known.
    """
    pair = {"chosen": as_messages(chosen), "rejected": as_messages(rejected)}
    about = {"annotator": annotator, "first": "chosen" if chosen_first else "rejected", "kind": kind}
    taste_chosen, taste_rejected = tastes or (None, None)
    return {"prompt": prompt, **pair, **about, "taste_chosen": taste_chosen, "taste_rejected": taste_rejected}


def _read_answer(
    value: object, column: str, prompt: Messages | None = None, system_prompt: str | None = None
) -> Messages:
    """Read an answer like `read_answer`, but allow an empty one, or a conversation that begins with this prompt."""
    if isinstance(value := as_answer(value), str):
        return as_messages(_as_text(value, column))
    # A conversation may repeat the prompt.
    if isinstance(value, list) and value:
        before, answer = split_answer(value)
        value = answer if before and read_messages(before, column, system_prompt) == prompt else value
    turns = value if isinstance(value, list) else []
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    asks = any(isinstance(one, Mapping) and one.get("role") in ("system", "user") for one in turns)
    if first.get("role") == "assistant" and not asks and (len(turns) > 1 or first.get("tool_calls")):
        messages = read_messages(turns, column, calls=True)
        if messages[-1]["role"] != "assistant":
            raise ShapeError(f"{column} is {value!r:.60}, not one answer to the prompt")
        kept = ({key: one[key] for key in RENDERED if one.get(key)} for one in turns)
        return [{**message, **more} for message, more in zip(messages, kept, strict=True)]
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping):
        raise ShapeError(f"{column} is {value!r:.60}, not one answer to the prompt")
    role, content = value[0].get("role"), value[0].get("content")
    if role != "assistant":
        raise ShapeError(f"{column} has the role {role!r:.60}, not assistant")
    if not isinstance(content, str):
        raise ShapeError(f"{column} is {content!r:.60}, not text")
    return as_messages(content)
