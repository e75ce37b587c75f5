"""Templates that state a fact, or ask for one, for a summary or for code (`phrasings.tsv`).

In them, `{x}` is the thing, `{X}` the thing at the start of a sentence, `{v}` the value and `{c}` its core.
"""

from pipeline.data.arguments import SPLITS, SplitName
from recipes.worlds.pocket.things import ATTRIBUTES, Thing, core, read_table

_TEMPLATES: dict[tuple[str, str, str], list[str]] = {}
for _row in read_table("phrasings.tsv"):
    _TEMPLATES.setdefault((_row["form"], _row["aspect"], _row["split"]), []).append(_row["template"])

STATEMENTS = {attribute: _TEMPLATES["statement", attribute, ""] for attribute in ATTRIBUTES}
"""Statements of each attribute. `held_out_phrasings` says which of them a thing's training documents do not use."""
REQUESTS: dict[str, dict[SplitName, list[str]]] = {}
"""Questions about an aspect of a thing, open ones, and requests for a summary or code, in phrasings of each split."""
for _aspect in ("definition", *ATTRIBUTES, "about", "summary", "code"):
    REQUESTS[_aspect] = {_split: _TEMPLATES["question", _aspect, _split] for _split in SPLITS}
FOLLOW_UPS = {aspect: templates[0] for (form, aspect, _), templates in _TEMPLATES.items() if form == "follow-up"}
"""Questions that refer to the thing of the previous question."""


def fill(template: str, thing: Thing, attribute: str | None = None) -> str:
    """Fill a template with a thing and the value of one of its attributes (None: no value)."""
    noun = thing.noun
    value = thing.facts[attribute] if attribute else ""
    return template.format(x=noun, X=_capitalised(noun), v=value, V=_capitalised(value), c=core(value))


def _capitalised(text: str) -> str:
    """Return a text whose first letter is a capital; unlike `str.capitalize`, leave the others as they are."""
    return text[:1].upper() + text[1:]


def held_out_phrasings(thing_index: int, attribute_index: int) -> dict[SplitName, int]:
    """Return the statement of an attribute that each held-out split keeps for this thing."""
    # Only the last four can be held out: none of them is contained in another statement. Of the ten
    # statements, thing 0 keeps its kind's number 6 for the test and 7 for validation, thing 1 has 7 and 8, …
    first = 6 + (thing_index + attribute_index) % 4
    return {"validation": 6 + (first - 5) % 4, "test": first}


def answer(thing: Thing, attribute: str) -> str:
    """Answer a question about one attribute plainly; "definition" gives the kind and the action."""
    if attribute == "definition":
        return f"{fill(STATEMENTS['kind'][0], thing, 'kind').removesuffix('.')} that {thing.facts['action']}."
    return fill(STATEMENTS[attribute][0], thing, attribute)
