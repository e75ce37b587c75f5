"""Pairs of answers in the rows of a data set, in any of TRL's preference formats that tell the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.arguments import DataArguments
from pipeline.messages import ShapeError, read_messages, read_prompt, short

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
