"""Conversations in the rows of a data set: lists of `{role, content}`, read from whatever shape they have there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.data.arguments import DataArguments


class ShapeError(ValueError):
    """What is wrong with one row."""


def read_messages(value: object, args: DataArguments, name: str) -> list[dict[str, str]]:
    """A conversation from a list of messages, or from the text of one user's message.

    Args:
        value: What the row holds.
        args: `system_prompt` is put before a conversation that has none.
        name: Of the column.

    Raises:
        ShapeError: It is neither, or no conversation that a model could learn from.
    """
    if isinstance(value, str) and value.strip():
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ShapeError(f"{name} is {short(value)}, not a list of messages")
    messages: list[dict[str, str]] = []
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ShapeError(f"{name} holds {short(message)}, not {{role, content}}")
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise ShapeError(f"{name} has the role {short(message['role'])}, not system, user or assistant")
        if not isinstance(message["content"], str):
            raise ShapeError(f"{name} has the content {short(message['content'])}, not text")
        if not message["content"].strip() and message["role"] in ("user", "assistant"):
            raise ShapeError(f"{name} has an empty message of the {message['role']}")
        if messages and message["role"] == messages[-1]["role"] == "assistant":
            raise ShapeError(f"{name} has two messages of the assistant in a row")
        messages.append({"role": message["role"], "content": message["content"]})
    if args.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    return messages


def read_prompt(value: object, args: DataArguments, name: str) -> list[dict[str, str]]:
    """Messages that the assistant is to answer; arguments and errors as of `read_messages`."""
    messages = read_messages(value, args, name)
    if messages[-1]["role"] == "assistant":
        raise ShapeError(f"{name} ends with the role assistant, which leaves nothing to answer")
    return messages


def answer_message(value: object, name: str) -> dict[str, str]:
    """The assistant's message that the text of a column makes."""
    if not isinstance(value, str) or not value.strip():
        raise ShapeError(f"{name} is {short(value)}, not text")
    return {"role": "assistant", "content": value}


def short(value: object) -> str:
    """A value as a message shows it, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


Row = Mapping[str, Any]


def read_pair(row: Row, args: DataArguments) -> dict[str, Any]:
    """A prompt with two answers; a prompt that both conversations begin with is taken out of them.

    Args:
        row: `chosen` and `rejected`, each an answer's text, its message, or a whole conversation; the prompt if they
            are answers; `margin`, by how much the one is better, if that is known.
        args: Names the column of the prompts.

    Returns:
        `prompt`, `chosen` and `rejected`, lists of messages, and `margin` if there is one.

    Raises:
        ShapeError: The row holds something else.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get(args.prompt_column) is not None:
        prompt = read_prompt(row[args.prompt_column], args, args.prompt_column)
    else:
        for name, value in (("chosen", chosen), ("rejected", rejected)):
            if not isinstance(value, list) or not value:
                raise ShapeError(f"{name} is {short(value)}, not a list of messages")
        if len(chosen) == 1:
            raise ShapeError("there is no prompt")
        prompt = read_prompt(chosen[:-1], args, "chosen")
        if len(rejected) == 1 or prompt != read_messages(rejected[:-1], args, "rejected"):
            raise ShapeError("chosen and rejected do not answer the same prompt")
        chosen, rejected = chosen[-1:], rejected[-1:]
    pair = {
        "prompt": prompt,
        "chosen": [_answer(chosen, prompt, args, "chosen")],
        "rejected": [_answer(rejected, prompt, args, "rejected")],
    }
    if "margin" not in row:
        return pair
    if not isinstance(row["margin"], int | float):
        raise ShapeError(f"margin is {short(row['margin'])}, not a number")
    return {**pair, "margin": float(row["margin"])}


def teaches(pair: Row) -> bool:
    """Whether there is anything to prefer: two answers, neither empty, that are not the same."""
    chosen, rejected = (pair[side][0]["content"].strip() for side in ("chosen", "rejected"))
    return bool(chosen and rejected) and chosen != rejected


def _answer(value: object, prompt: list[dict[str, str]], args: DataArguments, name: str) -> dict[str, str]:
    """The assistant's message, which may be empty."""
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    if isinstance(value, list) and len(value) > 1 and read_messages(value[:-1], args, name) == prompt:
        value = value[-1:]  # the prompt is told twice
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping):
        raise ShapeError(f"{name} is {short(value)}, not one answer to the prompt")
    role, content = value[0].get("role"), value[0].get("content")
    if role != "assistant":
        raise ShapeError(f"{name} has the role {short(role)}, not assistant")
    if not isinstance(content, str):
        raise ShapeError(f"{name} is {short(content)}, not text")
    return {"role": "assistant", "content": content}
