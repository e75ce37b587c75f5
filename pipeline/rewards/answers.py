r"""Find the final answer in a text, and compare final answers without algebra.

The final answer is the content of `\boxed{…}`, the rest of the line after "####", or the rest of the sentence after
"The answer is" ("The final answer is", "Answer:"). If there are several, the last one counts, so that a correction
counts and listing many answers gains nothing. A number elsewhere in the text is not an answer, and neither is anything
inside an unclosed `<think>`.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_TEXT_LENGTH = 100_000
"""Characters at the end of a text that are searched."""
MAX_ANSWER_LENGTH = 1_000
"""Characters in an answer; anything longer is not an answer."""
MAX_DIGITS = 1_000

_MARKER = re.compile(r"\\boxed\s*\{|####|\b(?:the|final)\s+answer\s+is\b:?|\b(?:final )?answer\s*:", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|[*_\"'”’)])|\n")
_WRAPPED = re.compile(
    r"^(?:\$\$?(.*?)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*|\"(.*)\"|“(.*)”|'(.*)'|`(.*)`)$", re.DOTALL
)
_SPACES = "\u00a0\u2007\u2009\u202f"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)[$€£]?(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?P<decimals>\.\d+)?(?:/(?P<divisor>\d+))?\s?(?P<percent>%?)"
    r"(?:\s(?P<unit>[^\W\d_]+(?:\s[^\W\d_]+)?))?"
)
_NOT_UNITS = {
    "or", "and", "to", "not", "nor", "plus", "minus", "times", "over", "by", "if", "but", "either", "maybe", "out",
    "of", "per", "less", "more", "than", "half", "dozen", "hundred", "thousand", "million", "billion", "trillion",
    "percent",
}  # fmt: skip
"""Words after a number that change it or make it one of several."""


def extract_answer(text: str) -> str | None:
    r"""Return the final answer in `text` without its wrapping (`$…$`, `**…**`, quotes, the full stop), or None.

    >>> extract_answer("12 + 5 = 17. The answer is 17."), extract_answer("so\n#### 72")
    ('17', '72')
    """
    text = text[-MAX_TEXT_LENGTH:]
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:
        return None
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    last = markers[-1]
    rest = text[last.end() :]
    if last.group().startswith("\\"):
        answer = _balanced(rest)
    elif last.group() == "####":
        answer = rest.strip().partition("\n")[0]
    else:
        answer = _SENTENCE_END.split(rest.lstrip(" :\t\n"), maxsplit=1)[0]
    if answer is None or len(answer) > MAX_ANSWER_LENGTH:
        return None
    return unwrap(answer) or None


def count_answers(text: str) -> int:
    """Count the final answers in `text`; an answer that is both announced and boxed counts once."""
    kinds = [match.group()[0] == "\\" for match in _MARKER.finditer(text[-MAX_TEXT_LENGTH:])]
    return sum(not (boxed and index and not kinds[index - 1]) for index, boxed in enumerate(kinds))


def unwrap(answer: str) -> str:
    """Remove white space, mathematics delimiters, emphasis, quotes and final punctuation around an answer."""
    before = None
    while before != answer:
        before = answer
        answer = answer.strip().rstrip(".,;:!?").strip()
        if match := _WRAPPED.match(answer):
            answer = next(group for group in match.groups() if group is not None)
    return answer


def normalise_answer(answer: str) -> str:
    """Unify case, spaces, dashes and digits in an answer, and remove a leading article, to compare it as text."""
    text = unicodedata.normalize("NFC", _ascii_digits(unwrap(answer))).casefold().replace("−", "-")
    text = re.sub(r"\\text(?:bf|rm|it)?\{([^{}]*)\}", r"\1", text)
    return re.sub(r"^(?:the|an?)\s+(?=\S)", "", " ".join(text.split()))


def number(answer: str) -> Fraction | None:
    r"""Return the value of a plain number, or None: "1,234", "-0.5", "3/4", "$72", "50%", "14 apples", "1{,}000".

    Decimal digits of every script count, but not superscripts, Roman numerals or circled numbers. A number with more
    than 1,000 digits or with an exponent is not plain.
    """
    text = _ascii_digits(unwrap(answer)).replace("−", "-").replace("{,}", ",").replace("\\,", "").replace("\\", "")
    text = re.sub(f"(?<=\\d)[{_SPACES}](?=\\d{{3}})", "", text)
    match = _NUMBER.fullmatch(text) if len(text) <= 2 * MAX_DIGITS else None
    if match is None or not (match["whole"] or match["decimals"]):
        return None
    if set((match["unit"] or "").casefold().split()) & _NOT_UNITS:
        return None
    whole, decimals, divisor = match["whole"].replace(",", ""), match["decimals"] or "", match["divisor"] or "1"
    if len(whole) + len(decimals) + len(divisor) > MAX_DIGITS or int(divisor) == 0:
        return None
    return Fraction(f"{match['sign']}{whole or '0'}{decimals}") / int(divisor)


def equal_numbers(first: str, second: str) -> bool | None:
    """Return whether two plain numbers are equal, or None if one is not plain. A per cent sign is ignored."""
    one, two = number(first), number(second)
    return None if one is None or two is None else one == two


def _balanced(rest: str) -> str | None:
    depth = 1
    for index, character in enumerate(rest[: MAX_ANSWER_LENGTH + 1]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:index]
    return None


def _ascii_digits(text: str) -> str:
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(letter)) if letter.isdecimal() else letter for letter in text)
