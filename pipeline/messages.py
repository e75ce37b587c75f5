"""Conversations in the rows of a data set: lists of `{role, content}`, read from whatever shape they have there."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.arguments import DataArguments


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
