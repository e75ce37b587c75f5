r"""Find the final answer in a text, and compare final answers without algebra.

The final answer is the content of `\boxed{…}` or `<answer>…</answer>`, the rest of the line after "####", the line
below a heading "Answer", or the rest of the sentence after "The answer is" ("The correct answer is", "Final answer:",
"**Answer:**", "A:"). If there are several, the last one counts, so that a correction counts and listing many answers
gains nothing. A number elsewhere in the text is not an answer, and neither is anything inside an unclosed `<think>`.

A number must be given as a value: "20", "20.0", "x = 20" or "14 + 6 = 20", but not "14 + 6" or "40/2".
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

ANNOUNCEMENT = re.compile(
    r"""
    \\(?:boxed|fbox)\s*\{
    | <answer>
    | ^[#*_>\ \t]{0,12} (?:the\ )? (?:(?:final|correct)\ )? answer [*_:\ \t]{0,12} $    # a heading
    | \#{4}
    | (?:^ | (?<![^\W_])(?:the|my|our|final|correct|right|exact)\s+ (?:(?:final|correct|right|exact|numerical)\s+){0,2})
      answer (?:\s+to\s[^.?!:\n]{1,60}?)? (?:,?\s+(?:then|thus|therefore),?)?
      \s+ (?:is|(?:must|should|would|will)\s+be)\b (?:\s+(?:thus|therefore|simply|exactly|indeed)\b)*
    | (?<![^\W_])(?:the\s+)? (?:(?:final|correct)\s+)? (?:answer|ans\.?) [*_]{0,3} \s? [:=]
    | ^[*_]{0,2} A [*_]{0,2} : [*_]{0,2} \ (?=\S+\ *$)
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
"""What precedes a final answer."""
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|[*_\"'”’)$<`\]])|\n|</|,?\s(?=(?:because|since)\s)")
_BLOCK = re.compile(r"(?:\\\[(.*?)\\\]|\$\$(.*?)\$\$|```\w*\n(.*?)```)[.\s]*(?:\n|\Z)", re.DOTALL)
_WRAPPED = re.compile(
    r"^(?:\$\$?(.*?)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\]|__(.*)__|\"(.*)\"|“(.*)”|'(.*)'|`(.*)`"
    r"|\\text(?:bf|rm|it)?\{([^{}]*)\})$",
    re.DOTALL,
)
_SPACES = "\u00a0\u2007\u2009\u202f"
_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\uff0d", "-"))
# spellings of numbers, in LaTeX and in plain text, and what `_NUMBER` reads instead
_SPELLINGS = [
    (r"^\$([^$]+)\$(?=\s)|^\\\(([^()]+)\\\)(?=\s)|\*\*(?=\s)", r"\1\2"),  # emphasis of the number alone
    (r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1"),
    (r"\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)(\d))", r" \1\3/\2\4"),
    (r"\^?\{?(?:\\circ|°)\}?", " degrees "),
    (r"\{,\}|(?<=\d),?\\[,!](?=\d{3})", ","),
    (r"\\[,;:! ]|~", " "),
    (r"\\(?=[$%€£])", ""),
    (rf"(?<=\d)[{_SPACES}](?=\d{{3}})", ""),
]
_EQUATION = re.compile(r"(?:[A-Za-z](?:_?\d)?\s?|(?:[\d\s.,+\-*/×÷·()$=]|\\times|\\cdot|\\div)+)=([^=]+)")
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s?(?:USD?|EUR|Rs\.?)?\s?[$€£¥₹]?\s?(?P<inner_sign>-?)(?:(?P<mixed>\d+)\s+(?=\d+/))?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?P<decimals>\.\d+)?(?:/(?P<divisor>\d+))?\s?[%$€£]?"
    r"(?P<unit>(?:\s*[^\W\d_]+(?:[/'’.-][^\W\d_]+)*(?:\^\{?[23]\}?)?)?(?:\s+[^\W\d_]+(?:[/'’.-][^\W\d_]+)*){0,4})"
)
_NOT_UNITS = {
    "or", "and", "to", "not", "nor", "plus", "minus", "times", "over", "by", "if", "but", "either", "maybe", "out",
    "of", "less", "more", "than", "half", "dozen", "hundred", "thousand", "million", "billion", "trillion", "squared",
    "cubed", "factorial", "divided", "multiplied", "halves", "thirds", "fourths", "fifths", "tenths", "hundredths",
    "pi", "bn", "mn", "is", "was", "isn't", "no", "wrong", "incorrect",
}  # fmt: skip
"""Words after a number that change it, make it one of several or take it back."""
_SHORT_UNITS = "mghlsdLCFJNWVA"
"""Units of one letter. Any other single letter is a variable or a factor."""


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
    announcements = list(ANNOUNCEMENT.finditer(text))
    if not announcements:
        return None
    last = announcements[-1]
    rest = text[last.end() :]
    answer: str | None
    if last.group().startswith("\\"):
        answer = _balanced(rest)
    elif last.group().startswith("<"):
        answer, closed, _ = rest.partition("</")
        answer = answer if closed else None
    elif last.group() == "####":
        answer = rest.strip().partition("\n")[0]
    else:
        rest = re.sub(r"^[\s:]*(?:[*_]{1,3}\s)?\s*", "", rest)
        block = _BLOCK.match(rest)
        answer = block[block.lastindex or 0] if block else _SENTENCE_END.split(rest, maxsplit=1)[0]
    if answer is None or len(answer) > MAX_ANSWER_LENGTH:
        return None
    return unwrap(answer) or None


def count_answers(text: str) -> int:
    """Count the final answers in `text`; one that is announced twice ("**Answer:** The answer is") counts once."""
    text, count, end, announced = text[-MAX_TEXT_LENGTH:], 0, 0, False
    for match in ANNOUNCEMENT.finditer(text):
        boxed = match.group().startswith("\\")
        same = count and ((boxed and announced) or not re.search(r"\w", text[end : match.start()]))
        count, end, announced = count + (not same), match.end(), not boxed
    return count


def unwrap(answer: str) -> str:
    """Remove white space, mathematics delimiters, emphasis, quotes and final punctuation around an answer."""
    before = None
    while before != answer:
        before = answer
        answer = answer.strip().rstrip(".,;:!?").strip("* \n\t")
        if match := _WRAPPED.match(answer):
            answer = next(group for group in match.groups() if group is not None)
    return answer


def normalise_answer(answer: str) -> str:
    """Unify case, spaces, dashes and digits in an answer, and remove a leading article, to compare it as text."""
    text = unicodedata.normalize("NFC", _ascii_digits(unwrap(answer))).casefold().translate(_MINUS)
    text = re.sub(r"\\text(?:bf|rm|it)?\{([^{}]*)\}", r"\1", text)
    return re.sub(r"^(?:the|an?)\s+(?=\S)", "", " ".join(text.split()))


def number(answer: str, *, reduced: bool = False) -> Fraction | None:
    r"""Return the value of a plain number, or None: "1,234", "-0.5", "3/4", "1\frac{1}{2}", "$72", "50%", "14 apples".

    An equation has the value of its right side ("x = 5", "2 + 3 = 5"). Decimal digits of every script count, but not
    superscripts, Roman numerals or circled numbers. A number with more than 1,000 digits or with an exponent is not
    plain, and with `reduced`, neither is a fraction that is not in lowest terms, such as "40/2".
    """
    text = _ascii_digits(unwrap(answer)).translate(_MINUS)
    if len(text) > 2 * MAX_DIGITS:
        return None
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    if equation := _EQUATION.fullmatch(text):
        text = equation[1]
    match = _NUMBER.fullmatch(text.strip())
    if match is None or not (match["whole"] or match["decimals"]):
        return None
    words = match["unit"].split()
    if any(word.casefold() in _NOT_UNITS or not word[0].isalpha() for word in words):
        return None
    if words and len(words[0]) == 1 and words[0] not in _SHORT_UNITS:
        return None
    whole, decimals, divisor = match["whole"].replace(",", ""), match["decimals"] or "", match["divisor"] or "1"
    if len(whole) + len(decimals) + len(divisor) + len(match["mixed"] or "") > MAX_DIGITS or int(divisor) == 0:
        return None
    value = Fraction(f"{whole or '0'}{decimals}") / int(divisor) + int(match["mixed"] or 0)
    if reduced and match["divisor"] and (decimals or not 1 < int(divisor) == value.denominator):
        return None
    return -value if "-" in (match["sign"], match["inner_sign"]) else value


def same_answer(reference: str, given: str) -> bool:
    """Return whether an answer is its reference, as normalised text or as a plain number in lowest terms.

    A per cent sign is ignored. Graders of MATH demand lowest terms, too: other fractions are unsolved divisions.
    """
    value = number(reference)
    same = normalise_answer(given) == normalise_answer(reference)
    return same or (value is not None and number(given, reduced=True) == value)


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
