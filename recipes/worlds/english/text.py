"""Documents of the sources: the form in which each reader returns them, and how text is made plain."""

import html
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

# Typographic characters -> what a keyboard has, so that a small vocabulary is not spent on them.
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " "})


@dataclass(frozen=True)
class Document:
    """A document of a source.

    Attributes:
        source: Name of the source, a key of `packages.PACKAGES`.
        keys: What it is split by, such as the headwords of an entry or the name of a country: a document goes to a
            held-out split only if all its keys do, and to no split if only some do.
        text: Its text, in lines.
        details: What else its reader knows: the definitions of an entry, the turns of a conversation, a `Country`.
    """

    source: str
    keys: tuple[str, ...]
    text: str
    details: Any = field(default=None, compare=False)


def plain(text: str) -> str:
    """Return a text without markup of HTML, accents and typographic characters, and with single spaces."""
    text = html.unescape(re.sub(r"<[^<>]*>", " ", text)).translate(PLAIN)
    decomposed = unicodedata.normalize("NFKD", text)
    text = "".join(character for character in decomposed if not unicodedata.combining(character))
    return re.sub(r"\s+", " ", text).strip()


def is_ascii_prose(text: str) -> bool:
    """Return whether a text has no characters but those of English prose: letters, digits and common punctuation."""
    return re.fullmatch(r"[A-Za-z0-9 .,;:!?'\"()$%&/-]*", text) is not None
