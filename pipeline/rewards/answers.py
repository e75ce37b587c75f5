r"""Find the final answer in a text, and compare final answers without algebra.

The final answer is the content of `\boxed{…}` or `<answer>…</answer>`, the rest of the line after "####", the line
below a heading "Answer", or the rest of the sentence after "The answer is" ("The correct answer is", "Final answer:",
"**Answer:**", "A:"), or what precedes "is the answer". An explanation is cut off ("20 (4 times 5)"). If there are
several, the last one counts, so that a correction counts and listing many answers gains nothing. A number must be given
as a value: "20", "20.0", "x = 20" or "14 + 6 = 20", but not "14 + 6" or "40/2".
"""

# How a completion becomes an answer, and the answer a value:
#
#     "4 × 5 = 20. So the answer is **20 apples** (4 times 5). Good luck!"
#                     ^^^^^^^^^^^^^                                         the last ANNOUNCEMENT
#                                   **20 apples** (4 times 5)               the rest of its sentence
#                                   **20 apples**                           without an explanation
#                                     20 apples                             unwrapped: `extract_answer`
#                                     20                                    `number`, apples being a unit
#
# Anything like a second answer is kept, so that "20 or 21" is neither a number nor equal to any reference, and earns
# nothing. These patterns are long because each handles a spelling that people use, or a hedge that a policy found.

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from itertools import islice

MAX_TEXT_LENGTH = 100_000
"""Characters at the end of a text that are searched."""
MAX_ANSWER_LENGTH = 1_000
"""Characters in an answer; anything longer is not an answer."""
MAX_DIGITS = 1_000

ANNOUNCEMENT = re.compile(
    r"""
    \\(?:boxed|fbox)\s* (?:\{ | (?=[-+\d]))
    | <answer>
    | ^[#*_>\ \t]{0,12} (?:the\ )? (?:(?:final|correct)\ )? answer [*_:\ \t]{0,12} $    # a heading
    | \#{4}
    | (?:^ | (?<![^\W_])(?:the|my|our|final|correct|right|exact|required)\s+
             (?:(?:final|correct|right|exact|numerical|required)\s+){0,2})
      answer (?:\s+(?:to|in|for)\s[^.?!:\n]{1,60}? | \s+(?:here|(?:I|we)\s+(?:get|found)) | \s+\([^()\n]{1,40}\))?
      (?:,?\s+(?:then|thus|therefore),?)?
      (?: \s+(?: is | equals | (?:comes|works)(?:\s+out)?\s+to | turns\s+out\s+to\s+be
               | (?:must|should|would|will)\s+(?:(?:thus|then|therefore)\s+)?(?:be|equal) )\b
        | ['’]s\b)
      (?:,?\s+(?:thus|therefore|then|simply|exactly|indeed|equal\s+to|given\s+by)\b,?)*
    | (?<![^\W_])(?:the\s+)? (?:(?:final|correct)\s+)? (?:answer|ans\.?) [*_]{0,3} \s? [:=→]
    | ^[*_]{0,2} A [*_]{0,2} : [*_]{0,2} \ (?=\S+\ *$)
    | (?:^ | (?<=[.!?:]\s)) (?:(?:so|thus|hence|then|therefore),?\s)?
      (?P<leading>[*_$`"(\[+−-]{0,4} (?:\d\S{0,40} | [A-J][)\]*_]{0,4}))
      \s+is\s+(?:the|my|our)\s+ (?:(?:final|correct|right)\s+)? answer\b (?!\s*[:=] | \s+(?:to|of)\b)
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
"""What precedes a final answer, or a sentence that ends with "is the answer"."""
# HTML comments and commented-out LaTeX lines, in which an answer would be invisible.
_HIDDEN = re.compile(r"<!--.*?(?:-->|\Z)|^[ \t]*%[^\n]*\\(?:boxed|fbox)[^\n]*", re.DOTALL | re.MULTILINE)
# Full stops that do not end a sentence: "J. R. Tolkien", "Dr. Who", "Rs. 20", "sq. ft".
_ABBREVIATION = re.compile(
    r"^(?:[A-Z]\.\s?){2,}(?=[A-Z](?:[a-z]|\b))|\b(?:Dr|Mrs?|Ms|St|Mt|Ft|Prof|Sgt|Capt|Rev)\.(?=\s[A-Z])"
    r"|\.{2,}(?=\s*\S)|\b(?:Rs|No|Vol|approx|ca)\.(?=\s?\d)|\b(?:sq|cu|approx|i\.e|e\.g)\.(?=[\s,]*[a-z])"
)
# "Or", after any punctuation.
_RETRACTION = re.compile(r"[\W_]*[Oo]r\b")
# A sentence that begins with "Or" belongs to the one before, and takes back its answer: "B. Or C.".
_SENTENCE_END = re.compile(
    rf"(?:[.!?](?=\s|$|[*_\"'”’)$<`\]])|\n)(?!{_RETRACTION.pattern})|</|\s\|(?=[ \t]*$)|,?\s(?=(?:because|since)\s)"
)
# Where an explanation may begin: after an answer of any kind (`relative`), and after a value.
_EXPLAINED = re.compile(
    r",\s(?P<relative>(?=(?:which|who|where|as|so|that)\s))"
    r"|,\s(?=[a-z])|\s(?=[(\[])|;\s|:\s|\s→\s|\s-{1,2}\s|\s?[—–]\s?|\s(?=as\s)"
)
HEDGE = re.compile(
    r"\b(?:n?or|not?|n?either|may ?be|perhaps|possibly|probably|alternatively|also|another|other|else|otherwise|too"
    r"|well|unless|if|could|might|may|can\s+be|but|wrong|incorrect|actually|wait|instead|rather|both|remainder|less|plus"
    r"|minus|between|from)\b|n['’]t\b|^\W*(?:\d[\d.,]*\s+)?(?:and|to)\s+\W*\d|±|\\pm",
    re.IGNORECASE,
)
"""Words that offer another answer, or take one back."""
_ROUNDED = re.compile(r"\(?(?:about|approximately|approx\.?|roughly|≈|\\approx)", re.IGNORECASE)
# Explanations are words, or an equation. What follows a value in "20 - x" and "2 (x + 1)" is neither.
_EXPLANATION = re.compile(
    r"[(\[]?(?:[^\W\d_]{2,}|an?|i\.e\.),?\s+\S|\([^\W\d_-]{3,}|[(\[]?\d[^()]*(?:[×*·÷=]|\s[^\W\d_]{3,}\b)"
)
# A word or two and a number, as in "20, then 21".
_ANOTHER = re.compile(r"\W*(?:[^\W\d_]+\W+){1,2}\d[\d.,/]*\W*$")
# A formula or code on lines of its own, whose content is the answer.
_BLOCK = re.compile(r"(?:\\\[(.*?)\\\]|\$\$(.*?)\$\$|```\w*\n(.*?)```)[.\s]*(?:\n|\Z)", re.DOTALL)
# An answer in mathematics delimiters, quotes, underscores, backquotes, or a LaTeX command such as \text{…}.
_WRAPPED = re.compile(
    r"^(?:\$\$?(.*?)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\]|__(.*)__|_([^_]*)_|\"(.*)\"|“(.*)”|'(.*)'|`(.*)`"
    r"|‘(.*)’|\\(?:text(?:bf|rm|it)?|math(?:bf|rm|it)|mbox|boxed|fbox)\s*\{([^{}]*)\})$",
    re.DOTALL,
)
_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\uff0d", "-"))
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
# Exponents of ten.
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_INTEGER = r"[-+]?\s?\d[\d,]*"
# Spellings of numbers in LaTeX and in plain text, and what `_NUMBER` reads instead, in this order.
_SPELLINGS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # wrappers around the number alone, and pure typography
    (r"^\$([^$]+)\$(?=\s)|^\\\(([^()]+)\\\)(?=\s)|\*\*(?=\s)", r"\1\2"),
    (r"[\s\u2600-\u27bf\U0001f300-\U0001faff\ufe0f]+$", ""),
    (r"</?(?:b|strong|i|em|u)>|\\(?:left|right|[a-z]+style|[Ll]arge|bf|rm|it|sf)(?![A-Za-z])", ""),
    (r"\\color\s*\{[a-z]+\}", ""),
    (r"\\(?:text|math)?(?:text|bf|rm|it|sf|mbox|underline)\s*\{([^{}]*)\}", r" \1"),
    # separators of thousands, spaces
    (r"\{,\}|(?<=\d),?\\[,!](?=\d{3})", ","),
    (r"\\[,;:! ]|~(?!\d)", " "),
    # fractions
    (rf"\\[dtc]?frac\s*(?:\{{({_INTEGER})\}}|(\d))\s*(?:\{{({_INTEGER})\}}|(\d))", r" \1\2/\3\4"),
    (r"\{(\d+)\}\s*/\s*\{(\d+)\}", r"\1/\2"),
    # the end of "Rs. 20/-", and the backslash that remains of a space in LaTeX
    (r"/-$|\\$", ""),
    # degrees, currencies, per cent
    (r"\^?\{?(?:\\circ|\\degree|°)\}?", " degrees "),
    (r"\\(?=[$%€£])", ""),
    (r"(?<![A-Za-z])per\s?cents?\b", "%"),
    # words before the number
    (r"^(?:\\approx|≈|~|(?:approximately|approx\.?|about|roughly|around)\s)\s*", ""),
    (r"^(?:exactly|therefore|simply|equal to|a total of)\s+", ""),
    (r"^(?:negative|minus)\s(?=\d)", "-"),
    # "1 234", "12'345"
    (r"(?<=\d)[\u00a0\u2007\u2009\u202f'’_](?=\d{3})", ","),
    (r"^(\d{1,3})((?: \d{3})+)(?![\d/]| \d)", lambda match: match[1] + match[2].replace(" ", ",")),
    # "1.234.567" and "1.234,5", as in Germany or Brazil
    (r"(?<![\d.,])(\d{1,3}(?:\.\d{3}){2,})(?![.,\d])", lambda match: match[1].replace(".", "")),
    (r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?!\d)", lambda match: match[1].replace(".", "") + "." + match[2]),
    (r"(?<![\d.,])(\d+),(\d{2})(?=\s?(?:€|EUR))", r"\1.\2"),
    # "2½", "2 and 1/2", "2⁄3"
    (r"[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0])),
    (r"(?<=\d) and (?=\d+/\d)", " "),
    ("\u2044", "/"),
    # "1.5 × 10^6", "1.5e6", "1.5 million"
    (
        r"(?<![\d.,\w])(?:([1-9](?:\.\d+)?)\s*(?:\\times|\\cdot|[×*·⋅x])\s*)?"
        r"10(?:(?:\^|\*\*)\{?(-?\d{1,2})\}?|(⁻?[⁰¹²³⁴-⁹]{1,2}))(?![\d⁻⁰¹²³⁴-⁹])",
        lambda match: _power_of_ten(match, int((match[2] or match[3]).translate(SUPERSCRIPTS))),
    ),
    (r"(?<![\d.,\w])([1-9](?:\.\d+)?)[eE]([-+]?\d{1,2})(?!\d)", lambda match: _power_of_ten(match, int(match[2]))),
    (
        r"(?<![\d.,\w])([1-9]\d{0,2}(?:\.\d+)?) (thousand|million|billion|trillion)\b",
        lambda match: _power_of_ten(match, _SCALES[match[2]]),
    ),
]
_BRACKETS = re.compile(r"\((.*)\)|\[(.*)\]|\{(.*)\}", re.DOTALL)
# Only digits and signs of arithmetic, as in "2 + 3".
_ARITHMETIC = re.compile(r"(?:[\d\s.,+\-*/×÷·()$]|\\times|\\cdot|\\div)+")
# Forms of names of quantities: x, f(3), S_{12}, \angle ABC, m + n. An equation for "2x" is not a solution.
_NAME = re.compile(
    r"\\(?:text|mathrm|angle|overline|alpha|beta|gamma|theta|lambda|mu|phi|varphi|omega|Delta)(?![A-Za-z])|\|[A-Z]{2}\|"
    r"|(?!(?:ln|log|sin|cos|tan|exp|sqrt|abs)\b)[A-Za-z]+(?:\([^()]*\))?|_\{?\w+\}?|[{}+\s]"
)
# Sign, currency, a number ("1,234.5", "3/4", "1 3/4"), currency or per cent, and up to five words as its unit.
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s?(?:USD?|EUR|CHF|GBP|INR|Rs\.?)?\s?[$€£¥₹]?\s?(?P<inner_sign>-?)(?:(?P<mixed>\d+)\s+(?=\d+/))?"
    r"(?P<whole>[1-9]\d{0,2}(?:,\d{3})+|\d*)(?P<decimals>\.\d+)?(?:\s?/\s?(?P<divisor_sign>-?)(?P<divisor>\d+))?\s?[%$€£¢]?"
    r"(?P<unit>(?:\s*[^\W\d_]+\.?(?:[/'’.-][^\W\d_]+)*(?:\^\{?-?[123]\}?|[²³])?)?"
    r"(?:\s+[^\W\d_]+\.?(?:[/'’.-][^\W\d_]+)*(?:\^\{?-?[123]\}?|[²³])?){0,4})"
)
NOT_UNITS = {
    "or", "and", "to", "not", "nor", "plus", "minus", "times", "over", "by", "if", "but", "either", "maybe", "out",
    "less", "more", "than", "half", "dozen", "hundred", "thousand", "million", "billion", "trillion", "squared",
    "cubed", "factorial", "divided", "multiplied", "halves", "thirds", "fourths", "fifths", "tenths", "hundredths",
    "pi", "bn", "mn", "is", "was", "isn't", "no", "wrong", "incorrect", "mod", "modulo", "choose",
}  # fmt: skip
"""Words after a number that change it, make it one of several, or retract it."""
# Units that must not be confused: 2 minutes are not 2 hours.
_UNIT_NAMES = {
    "s": "s sec second seconds", "min": "min mins minute minutes", "h": "h hr hrs hour hours", "day": "day days",
    "week": "week weeks", "month": "month months", "year": "year years", "mm": "mm millimeters millimetres",
    "cm": "cm centimeters centimetres", "m": "m meter meters metre metres", "km": "km kilometers kilometres",
    "in": "inch inches", "ft": "ft foot feet", "yd": "yard yards", "mi": "mile miles", "mg": "mg milligrams",
    "g": "g gram grams", "kg": "kg kilogram kilograms", "lb": "lb lbs pounds", "ml": "ml milliliters millilitres",
    "l": "l liter liters litre litres", "$": "$ dollar dollars usd", "c": "cent cents ¢", "eur": "€ euro euros eur",
    "%": "%",
}  # fmt: skip
# The same by spelling: "minutes" -> "min".
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
# Other words of up to three letters that can be units.
_BRIEF_UNITS = {
    "in", "dm", "dl", "cl", "oz", "pt", "pts", "hz", "khz", "kw", "kwh", "kj", "cal", "kb", "mb", "gb", "tb", "mph",
    "kph", "kpa", "pa", "sq", "cu", "am", "pm", "us", "st", "nd", "rd", "th", "rs", "ms", "deg", "rad", "of", "per",
}  # fmt: skip
# Units of one letter. Any other single letter is a variable or a factor.
_SHORT_UNITS = "mghlsdLCFJNWVA"


def extract_answer(text: str) -> str | None:
    r"""Return the final answer in `text` without its wrapping (`$…$`, `**…**`, quotes, the full stop), or None.

    None means that no answer is announced, that it is longer than `MAX_ANSWER_LENGTH`, or that the text ends while the
    model still thinks (`<think>` without `</think>`). Only the last `MAX_TEXT_LENGTH` characters are searched.

    >>> extract_answer("12 + 5 = 17. The answer is 17."), extract_answer("so\n#### 72")
    ('17', '72')
    """
    text = _HIDDEN.sub("", text[-MAX_TEXT_LENGTH:])
    _, end_of_thoughts, conclusion = text.rpartition("</think>")
    if not end_of_thoughts and "<think>" in text:
        return None
    announcements = list(ANNOUNCEMENT.finditer(conclusion))
    if not announcements:
        return None
    answer = _announced(conclusion, announcements)
    if answer is None or len(answer) > MAX_ANSWER_LENGTH:
        return None
    return unwrap(answer) or None


def _announced(text: str, announcements: list[re.Match[str]]) -> str | None:
    """Return what the last of `announcements` announces, or None if that is unfinished or retracted.

    Args:
        text: The text in which the announcements were found.
        announcements: At least one match of `ANNOUNCEMENT`, in order.
    """
    last = announcements[-1]
    rest = text[last.end() : last.end() + 2 * MAX_ANSWER_LENGTH]
    if last["leading"]:
        # "20 is the answer. Or 21."
        if _RETRACTION.match(rest):
            return None
        return last["leading"]
    if last.group().startswith("\\"):
        return _boxed(text, announcements)
    if last.group().startswith("<"):
        answer, closing_tag, _ = rest.partition("</")
        return answer if closing_tag else None
    if last.group() == "####":
        line = rest.strip().partition("\n")[0]
        return _without_explanation(line)

    # "The answer is: …"
    rest = re.sub(r"^(?:[\s:=…]|\.{2,})*(?:[*_]{1,3}\s)?\s*", "", rest)
    block = _BLOCK.match(rest)
    if block:
        return block[block.lastindex or 0]
    # Take the first sentence, with the full stops of abbreviations temporarily hidden.
    rest = _ABBREVIATION.sub(lambda match: match[0].replace(".", "\ue000"), rest)
    sentence = _SENTENCE_END.split(rest, maxsplit=1)[0]
    return _without_explanation(sentence.replace("\ue000", "."))


def count_answers(text: str) -> int:
    """Count the final answers in `text`; one that is announced twice ("**Answer:** The answer is") counts once."""
    text = text[-MAX_TEXT_LENGTH:]
    count = 0
    end = 0
    # Whether the previous announcement was in words; a box that follows belongs to it.
    after_words = False
    for match in ANNOUNCEMENT.finditer(text):
        is_box = match.group().startswith("\\")
        between = text[end : match.start()]
        is_repeated = (is_box and after_words) or not re.search(r"\w", between)
        if count == 0 or not is_repeated:
            count += 1
        end = match.end()
        after_words = not is_box
    return count


def unwrap(answer: str) -> str:
    """Remove white space, mathematics delimiters, emphasis, quotes and final punctuation around an answer.

    >>> unwrap("**$20$**.")
    '20'
    """
    previous = None
    while previous != answer:
        previous = answer
        answer = answer.strip().rstrip(".,;:!?").strip("* \n\t“”")
        match = _WRAPPED.match(answer)
        if match:
            answer = match[match.lastindex or 0]
    return answer


def normalise_answer(answer: str) -> str:
    """Unify case, spaces, dashes and digits in an answer, and remove a leading article, to compare it as text."""
    text = unicodedata.normalize("NFC", ascii_digits(unwrap(answer))).casefold().translate(_MINUS).replace("’", "'")
    text = re.sub(r"\\(?:text(?:bf|rm|it)?|math(?:bf|rm))\{([^{}]*)\}", r"\1", text)
    text = re.sub(r" ?([,:;()\[\]{}=<>|&+*/^-]) ?", r"\1", " ".join(text.split()))
    return re.sub(r"^(?:the|an?)\s+(?=\S)", "", text)


def number(answer: str, *, reduced: bool = False) -> Fraction | None:
    r"""Return the value of a plain number, or None: "1,234", "-0.5", "3/4", "1\frac{1}{2}", "$72", "50%", "14 apples".

    An equation has the value of its right side ("x = 5", "2 + 3 = 5"), and brackets around a number do not count.
    Decimal digits of every script count. "1.5 million", "1.5e6", "1.5 \times 10^6" and "10^3" are plain, but not other
    powers, "12e1", Roman numerals or more than 1,000 digits. With `reduced`, a fraction must be in lowest terms, unlike
    "40/2".
    """
    return _quantity(answer, reduced)[0]


def _quantity(answer: str, reduced: bool) -> tuple[Fraction | None, str | None]:
    """Return the value of a plain number and its unit.

    The value is None if the text is not a plain number. The unit is a key of `_UNIT_NAMES`, or None if there is none in
    the text, or another one. `reduced` is explained at `number`.
    """
    text = ascii_digits(unwrap(answer)).translate(_MINUS)
    if len(text) > 2 * MAX_DIGITS:
        return None, None
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    text = text.strip()
    while (match := _BRACKETS.fullmatch(text)) and "," not in text:
        text = match[match.lastindex or 0].strip()

    # Cut off a correctly rounded value: "2/3 ≈ 0.67" is two thirds.
    exact, *rounded = re.split(r"≈|\\approx(?![a-z])", text)
    if len(rounded) == 1:
        rounded_value = _plain_number(rounded[0].strip(), False)
        if is_rounded(rounded_value, _plain_number(exact.strip(), reduced)):
            text = exact
    *left_sides, right_side = re.split(r"=|≈|\\approx(?![a-z])", text)
    value = _plain_number(right_side.strip(), reduced)
    symbol = re.search(r"[$€¢%]|(?<=[\d\s])[A-Za-z]+", right_side)
    unit = None
    if symbol:
        unit = _UNITS.get(symbol[0].casefold())
    if value is None or not left_sides:
        return value, unit

    # Accept 2 + 3 = 5, 2 * 2 = 1 + 3 = 4 and x = 5, but not 4 = 5, which states two answers.
    is_definition = len(left_sides) == 1 and is_name(left_sides[0])
    if is_definition or all(_is_calculation(side, value) for side in left_sides):
        return value, unit
    return None, None


def _is_calculation(side: str, value: Fraction) -> bool:
    """Return whether the left side of an equation is a calculation ("2 + 3"), or the same number as its right side.

    The calculation is not checked. `value` is the value of the right side.
    """
    if not _ARITHMETIC.fullmatch(side):
        return False
    side_value = _plain_number(side.strip(), False)
    return side_value is None or side_value == value


def is_name(side: str) -> bool:
    """Return whether the left side of an equation names a quantity ("x", "f(3)"), so that the right side is its value.

    A phrase with a word of `HEDGE` and a side of more than 60 characters are not names.
    """
    return len(side) <= 60 and not _NAME.sub("", side) and side.strip() != "" and not HEDGE.search(side)


def is_rounded(rounded: Fraction | None, value: Fraction | None) -> bool:
    """Return whether a number differs by at most 2% from `value`, as a rounded one; False if either is None."""
    return rounded is not None and value is not None and abs(rounded - value) <= abs(value) / 50


def _plain_number(text: str, reduced: bool) -> Fraction | None:
    """Return the value of a number with signs, currency and unit, or None if the text is anything else.

    With `reduced`, the value is None for fractions that are not in lowest terms.
    """
    match = _NUMBER.fullmatch(text)
    if match is None or not (match["whole"] or match["decimals"]):
        return None
    words = match["unit"].split()
    is_attached = text[match.start("unit") - 1].isdigit() and not match["unit"][:1].isspace()
    if words and not _is_unit(words, is_attached):
        return None

    whole = match["whole"].replace(",", "")
    decimals = match["decimals"] or ""
    divisor = match["divisor"] or "1"
    mixed = match["mixed"] or ""
    if len(whole) + len(decimals) + len(divisor) + len(mixed) > MAX_DIGITS or int(divisor) == 0:
        return None
    value = Fraction(f"{whole or '0'}{decimals}") / int(divisor) + int(mixed or 0)
    if reduced and match["divisor"]:
        in_lowest_terms = int(divisor) > 1 and int(divisor) == value.denominator
        if decimals or not in_lowest_terms:
            return None
    signs = match["sign"] + match["inner_sign"] + (match["divisor_sign"] or "")
    if signs.count("-") > 1:
        return None
    return -value if "-" in signs else value


def _is_unit(words: list[str], is_attached: bool) -> bool:
    """Return whether the words that follow a number can be its unit; `is_attached` if no space precedes them."""
    if any(word.casefold() in NOT_UNITS or not word[0].isalpha() for word in words):
        return False
    letters = re.split(r"[/^²³.]", words[0])[0]
    if len(letters) == 1:
        # Of the units of one letter, only metres are raised to a power.
        has_power = re.search("[²³^]", words[0])
        return letters in ("m" if has_power else _SHORT_UNITS)
    # A few letters are mostly variables, as in 12x and 6ab^2.
    longest_variable = 3 if is_attached else 2
    return len(letters) > longest_variable or letters.casefold() in _UNITS.keys() | _BRIEF_UNITS


def same_answer(reference: str, answer: str) -> bool:
    """Return whether an answer is its reference, as normalised text or as a plain number in lowest terms.

    A unit is ignored unless both have different ones, or it is a per cent sign that the reference lacks. A fraction
    must be in lowest terms, as graders of MATH demand: otherwise, it is an unsolved division.
    """
    if normalise_answer(answer) == normalise_answer(reference):
        return True
    expected, expected_unit = _quantity(reference, reduced=False)
    value, unit = _quantity(answer, reduced=True)
    if expected is None or value != expected:
        return False
    if unit is None or unit == expected_unit:
        return True
    return expected_unit is None and unit != "%"


def _without_explanation(answer: str) -> str:
    """Cut off an explanation, as in "20 (4 times 5)" or "20, which is even", but not the offer of another answer."""
    for match in islice(_EXPLAINED.finditer(answer[:MAX_ANSWER_LENGTH]), 20):
        # In "20, which is even", the head is "20" and the tail is "which is even".
        head = answer[: match.start()]
        tail = answer[match.end() :]
        value = number(head)
        if HEDGE.search(tail) or _is_other_number(tail, value):
            return answer
        # The end of a formula or of bold text ends an answer, as a number does.
        is_complete = value is not None or re.search(r"\$$|\\\)$|\*\*$", head)
        is_relative_clause = match["relative"] is not None
        if (is_complete or is_relative_clause) and _EXPLANATION.match(tail):
            return head
    return answer


def _is_other_number(tail: str, value: Fraction | None) -> bool:
    """Return whether `tail` states a number other than `value`, which precedes it: "21" or "then 21" after 20.

    A repetition ("= 20") and a rounded value ("about 0.67" after 2/3) are not other numbers. `value` is None if what
    precedes the tail is not a number.
    """
    tail_value = number(tail.strip("()[] "))
    if "=" in tail:
        is_same = tail_value == value
    else:
        is_same = bool(_ROUNDED.match(tail)) and (value is None or is_rounded(tail_value, value))
    if is_same:
        return False
    return tail_value is not None or _ANOTHER.match(tail) is not None


def _boxed(text: str, announcements: list[re.Match[str]]) -> str | None:
    r"""Return the content of the last box, or of the box around it: "1 or \boxed{2}" for `\boxed{1 or \boxed{2}}`.

    Return None if the braces of the last box are not closed within `MAX_ANSWER_LENGTH` characters.

    Args:
        text: The text in which the announcements were found.
        announcements: Matches of `ANNOUNCEMENT`, of which the last one is a box.
    """
    last = announcements[-1]
    answer = None
    # The first box that reaches beyond the beginning of the last one is the outermost one around it, or the last one.
    for box in announcements[-4:]:
        rest = text[box.end() :][: MAX_ANSWER_LENGTH + 1]
        if box.group().endswith("{"):
            answer = _up_to_closing_brace(rest)
        elif box is last:
            # "\boxed 20" has no braces.
            answer = re.split(r"[^-+\d.,/]", rest[:MAX_ANSWER_LENGTH], maxsplit=1)[0]
        else:
            answer = None
        if answer is not None and box.end() + len(answer) > last.start():
            return answer
    return answer


def _up_to_closing_brace(text: str) -> str | None:
    """Return `text` up to the brace that closes the one which precedes `text`, or None if it is not closed."""
    depth = 1
    for index, letter in enumerate(text):
        if letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
        if depth == 0:
            return text[:index]
    return None


def _power_of_ten(match: re.Match[str], exponent: int) -> str:
    """Return "1500000" for a match of "1.5 × 10^6", whose first group is "1.5".

    Exponents between -1 and 1 are left unchanged, because nobody writes such numbers like that.
    """
    if abs(exponent) < 2:
        return match[0]
    return format(Decimal(f"{match[1] or 1}e{exponent}"), "f")


def ascii_digits(text: str) -> str:
    """Replace decimal digits of any script by ASCII ones."""
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(letter)) if letter.isdecimal() else letter for letter in text)
