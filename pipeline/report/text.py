"""Text and numbers as the report shows them: without anything that is invisible, or would reorder or break the page."""

import math
import re
import unicodedata

from pipeline.evaluation.intervals import Estimate
from pipeline.progress import time_in_words

SHOWN_CHARACTERS = 700
"""Longer texts are truncated for display; the files on disk have them in full."""
# The following patterns match what Markdown would interpret, and `markdown` therefore escapes.
_LINK = re.compile(r"((?:https?|ftp)(?=://)|www(?=\.))([:.])", re.IGNORECASE)
"""The beginning of an address, "https:" or "www.", which GitHub turns into a link."""
_INLINE = re.compile(r"[\\`|\[~$]|(?<!\s)\*|\*(?!\s)|(?<![^\W_])_+|_+(?![^\W_])")
"""What Markdown interprets anywhere in a line. Neither `_` within a word (2_sft) nor `*` between spaces is."""
_BLOCK = re.compile(r"^(?:[-+*#](?=[\s#-]|$)|>|=+$|\d{1,9}(?=[.)](?:\s|$)))")
"""What Markdown interprets at the beginning of a line: list items, headings, quotes, and lines that underline."""
_ENTITY = re.compile(r"&(?=#?\w+;)")
"""The "&" of a character reference, such as "&amp;" or "&#38;"."""
_TAG = re.compile(r"<(?=[a-z/!?])", re.IGNORECASE)
"""The "<" of an HTML tag or comment."""


def visible(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Replace every character of `text` that cannot be seen, and cut it at `limit` characters.

    Control characters become their pictures (U+2400), other invisible ones their number. Line breaks and tabs stay.
    """
    text = text.replace("\r\n", "\n")
    characters = []
    marks = 0
    for character in text[:limit]:
        code = ord(character)
        if unicodedata.combining(character):
            marks += 1
        else:
            marks = 0
        # Many combining marks would cover the lines around them.
        if marks > 3:
            continue
        if (code < 0x20 or code == 0x7F) and character not in "\n\t":
            character = chr(0x2400 + min(code, 0x21))
        # "C" are control characters, formats (bidirectional, of zero width, tags), surrogates, private and unassigned
        # code points; the others separate lines and paragraphs.
        elif character not in "\n\t" and unicodedata.category(character).startswith(("C", "Zl", "Zp")):
            character = f"⟨U+{code:04X}⟩"
        characters.append(character)
    if len(text) > limit:
        characters.append(f" … (+{len(text) - limit} characters)")
    return "".join(characters)


def markdown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return `text` as one line of Markdown that shows it literally, also in a table cell.

    Only what Markdown would interpret is escaped, so that the line can be read in a terminal as well.
    """
    line = visible(text, limit).strip()
    line = _TAG.sub("&lt;", _ENTITY.sub("&amp;", line))
    line = _INLINE.sub(lambda match: "".join(f"\\{sign}" for sign in match[0]), line)
    # "https\://" is shown as "https://", but is no link.
    line = _LINK.sub(r"\1\\\2", line)
    # A backslash goes before a sign, but after the digits of "1.", where it escapes the full stop.
    line = _BLOCK.sub(lambda match: f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}", line)
    return line.replace("\n", "<br>").replace("\t", " ").strip()


def number(value: float | None, digits: int = 3) -> str:
    """Format `value` with a true minus sign, and without a sign before 0; None is an en dash."""
    if value is None:
        return "–"
    # Halves are rounded away from 0, even if floating point makes them slightly smaller.
    return f"{value + math.copysign(1e-9, value):z.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Format `value` with its sign, "+0.012" or "−0.012", and 0 without."""
    text = number(value, digits)
    is_zero = not text.strip("0.")
    if value is not None and value > 0 and not is_zero:
        return f"+{text}"
    return text


def counted(number: int, name: str) -> str:
    """Return "1 core", "2 cores"."""
    return f"1 {name}" if number == 1 else f"{number} {name}s"


def duration(seconds: float | None) -> str:
    """Format seconds for people: "9.4 s", "1 min 38 s", "2 h 5 min"."""
    if seconds is None:
        return "–"
    return time_in_words(seconds)


def magnitude(value: float | None) -> str:
    """Format a large count in three digits with an SI prefix: "1.93 M", "45.2 T"."""
    if value is None:
        return "–"
    # 999.5 would be rounded to 1000, so it gets the next prefix. The FLOPs of the largest models need "E".
    for prefix in ("", " k", " M", " G", " T", " P"):
        if abs(value) < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g} E"


def interval(estimate: Estimate, digits: int, sign: bool = False) -> str:
    """Format the interval, "0.94 to 0.98", signed if `sign`; "" if there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    show = signed if sign else number
    return f"{show(estimate.low, digits)} to {show(estimate.high, digits)}"
