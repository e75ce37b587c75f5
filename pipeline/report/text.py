"""Making whatever a model wrote safe to show: nothing invisible, nothing that reorders or breaks the page."""

from __future__ import annotations

import re
import unicodedata

SHOWN_CHARACTERS = 700
"""An answer longer than this is cut when it is shown; the outcomes on disk keep all of it."""

_LINK = re.compile(r"(https?|ftp|www)([:.])", re.IGNORECASE)
"""What GitHub makes a link of without being asked."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


def visible(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """`text` with every character that cannot be seen made visible, cut at `limit` characters.

    Control characters become their pictures (U+2400), bidirectional controls, other invisible format
    characters, lone surrogates and unassigned code points their number; line breaks and tabs stay. Combining
    marks piled on one character are cut after the third. HTML is not escaped here: the templates escape
    everything.

    Args:
        text: any string.
        limit: most characters to keep.
    """
    text = text.replace("\r\n", "\n")
    shown = []
    marks = 0
    for character in text[:limit]:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= 3:
            shown.append(_glyph(character))
    if len(text) > limit:
        shown.append(f" … (+{len(text) - limit} characters)")
    return "".join(shown)


def _glyph(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    # control, format (bidi, zero width, tags), surrogate, private, unassigned, line and paragraph separators
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{code:04X}⟩"
    return character


def markdown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """`text` as one line of Markdown that shows it literally, in a table cell too."""
    line = visible(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _LINK.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\1", line))
    return line.replace("\n", "<br>").replace("\t", " ").strip()
