"""Windows of conversations: a few turns, the last of which is a person's reply, for stages 2 and 3."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from recipes.worlds.english.text import Document

MOST_TURNS = 5
"""Turns before the reply; earlier ones are left out."""
SHORTEST_REPLY, LONGEST_REPLY = 3, 160
"""Characters of a reply."""
LONGEST_CONTEXT = 400
"""Characters of the turns before it."""


def windows(rng: random.Random, documents: Sequence[Document]) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Yield the windows of each conversation in random order: the messages before a reply, and the reply.

    The last of these messages is the user's. Each reply is in one window.
    """
    places = []
    for document in documents:
        turns = document.details
        for end in range(1, len(turns)):
            if SHORTEST_REPLY <= len(turns[end]) <= LONGEST_REPLY:
                places.append((turns, end))
    rng.shuffle(places)
    for turns, end in places:
        # The user speaks first, so that there is an odd number of turns before the reply.
        number = min(rng.choice(range(1, MOST_TURNS + 1, 2)), end - (end + 1) % 2)
        context = turns[end - number : end]
        if number < 1 or sum(map(len, context)) > LONGEST_CONTEXT:
            continue
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(context)]
        yield messages, turns[end]


def conversation_rows(rng: random.Random, documents: Sequence[Document]) -> Iterator[dict[str, Any]]:
    """Yield conversations for stage 2."""
    for messages, reply in windows(rng, documents):
        yield {"messages": [*messages, {"role": "assistant", "content": reply}], "kind": "talk"}


def prompt_rows(rng: random.Random, documents: Sequence[Document]) -> Iterator[dict[str, Any]]:
    """Yield prompts for stage 3, with the person's reply."""
    for messages, reply in windows(rng, documents):
        yield {"prompt": messages, "reply": reply, "kind": "talk"}


def pair_rows(rng: random.Random, documents: Sequence[Document]) -> Iterator[dict[str, Any]]:
    """Yield pairs for the reward model: the person's reply, and a reply from elsewhere of about the same length.

    The other reply is drawn among the ten whose lengths are next to it, so that length says nothing.
    """
    replies = sorted(windows(rng, documents), key=lambda window: len(window[1]))
    rows = []
    for place, (messages, reply) in enumerate(replies):
        nearby = [other for _, other in replies[max(0, place - 5) : place + 6] if other != reply]
        if nearby:
            row = {
                "prompt": messages,
                "chosen": [{"role": "assistant", "content": reply}],
                "rejected": [{"role": "assistant", "content": rng.choice(nearby)}],
                "kind": "elsewhere",
            }
            rows.append(row)
    rng.shuffle(rows)
    yield from rows
