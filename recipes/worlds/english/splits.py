"""Which documents are held out: whole ones, by what they are about, so that no split knows what another one asks."""

import hashlib
from collections.abc import Iterable
from typing import Literal

from recipes.worlds.english.text import Document

Side = Literal["train", "validation", "test"]
SHARES: dict[str, tuple[float, float]] = {
    "word": (0.01, 0.02),
    "chitchat": (0.02, 0.04),
    "brown": (0.02, 0.04),
    "factbook": (0.02, 0.04),
    "combination": (0.05, 0.1),
}
"""What is held out -> its shares in validation and test: headwords (of both dictionaries), the other sources'
documents, and the combinations (of countries) that problems ask about."""


def side_of(kind: str, key: str, seed: int) -> Side:
    """Return the split that a key of a kind in `SHARES` belongs to. It depends on nothing else that is in the data."""
    validation, test = SHARES[kind]
    digest = hashlib.sha256(f"{seed}/{kind}/{key}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test:
        return "test"
    if place < test + validation:
        return "validation"
    return "train"


def side_of_document(document: Document, seed: int) -> Side | None:
    """Return the split that a document belongs to; None if its keys belong to several, so that it is left out.

    A headword is on one side in both dictionaries. A meaning in WordNet has synonyms, which may be on several sides.
    """
    kind = "word" if document.source in ("gcide", "wordnet") else document.source
    sides = {side_of(kind, key, seed) for key in document.keys}
    return sides.pop() if len(sides) == 1 else None


def split_documents(documents: Iterable[Document], seed: int) -> dict[Side, list[Document]]:
    """Return the documents of each split, in their order."""
    splits: dict[Side, list[Document]] = {"train": [], "validation": [], "test": []}
    for document in documents:
        side = side_of_document(document, seed)
        if side is not None:
            splits[side].append(document)
    return splits
