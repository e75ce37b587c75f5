"""Conversations of people who chat, from chitchat-dataset."""

import re
from collections.abc import Iterator
from pathlib import Path

from recipes.worlds.english.packages import read_json
from recipes.worlds.english.text import Document, plain

FEWEST_TURNS = 4
"""Shorter conversations are greetings that nobody answered."""
PRIVATE = re.compile(r"https?:|www\.|@\w|\b\d{3}[-. ]?\d{3,4}[-. ]?\d{3,4}\b")
"""Addresses and telephone numbers. A conversation with one is left out."""
CRUDE = re.compile(r"\b(?:fuck\w*|shit\w*|bitch\w*|cunt\w*|nigg\w*|dicks?|porn\w*|sex\w*|rape\w*|fag\w*)\b", re.I)
"""Crude words. A conversation with one is left out."""


def read_chitchat(file: Path) -> Iterator[Document]:
    """Yield the conversations in which two people take turns, with their turns as details.

    A: Hello. How are you doing today?
    B: im doing good
    """
    for _, conversations in read_json(file, "*/dataset.json"):
        for name, conversation in conversations.items():
            turns = []
            for messages in conversation["messages"]:
                texts = [plain(message["text"]) for message in messages]
                turns.append(" ".join(text for text in texts if text))
            turns = [turn for turn in turns if turn]
            text = "\n".join(f"{'AB'[number % 2]}: {turn}" for number, turn in enumerate(turns))
            if len(turns) >= FEWEST_TURNS and text.isascii() and not PRIVATE.search(text) and not CRUDE.search(text):
                yield Document("chitchat", (name,), text, turns)
