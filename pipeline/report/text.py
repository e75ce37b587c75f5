"""Making whatever a model wrote safe to show: nothing invisible, nothing that reorders or breaks the page."""

from __future__ import annotations

import re
import unicodedata

from pipeline.evaluation.intervals import Estimate

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


def number(value: float | None, digits: int = 3) -> str:
    """`value` with a true minus sign, and none before 0; an en dash if there is no value."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """`value` with its sign, "+0.012" or "−0.012"; 0 has none."""
    shown = number(value, digits)
    return f"+{shown}" if value > 0 and shown.strip("0.") else shown


def duration(seconds: float | None) -> str:
    """Seconds for people: "9.4 s", "1 min 38 s", "2 h 5 min"."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def magnitude(value: float | None) -> str:
    """A large count in three digits with an SI prefix: "1.93 M", "45.2 T"."""
    if value is None:
        return "–"
    for prefix in ("", " k", " M", " G", " T", " P", " E"):
        if abs(value) < 999.5 or prefix == " E":
            break
        value /= 1000
    return f"{value:.3g}{prefix}" if abs(value) < 999.5 else f"{value:.0f}{prefix}"


def interval(measurement: Estimate, digits: int, sign: bool = False) -> str:
    """The measurement's interval, "0.94 to 0.98", signed if `sign`; empty if there is none."""
    if measurement.low is None or measurement.high is None:
        return ""
    shown = signed if sign else number
    return f"{shown(measurement.low, digits)} to {shown(measurement.high, digits)}"
