"""Templates that state a fact or ask for it.

`{x}` is the thing, `{X}` the thing at the start of a sentence, `{v}` the value and `{c}` the value's core.
"""

from pipeline.data.pocket.things import SplitName, Thing, capitalize, core

STATEMENTS: dict[str, tuple[str, ...]] = {
    "kind": (
        "{X} is {v}.",
        "{X} counts as {v}.",
        "People call {x} {v}.",
        "If something is {x}, then it is {v}.",
        "The kind of {x} is {c}.",
        "Whoever looks up {x} reads that it is {v}.",
        "There are many kinds, and {x} falls under {c}.",
        "In a list of kinds, {x} stands under {c}.",
        "Asked for the kind of {x}, people say {c}.",
        "The word for the kind of {x}: {c}.",
    ),
    "place": (
        "{X} is found {v}.",
        "You can find {x} {v}.",
        "The place of {x} is {v}.",
        "{X} belongs {v}.",
        "Look {v} and you may find {x}.",
        "Most people see {x} {v}.",
        "{V} there is often {x}.",
        "The place to find {x} is {v}.",
        "Whoever wants to find {x} should look {v}.",
        "Asked where to find {x}, people say {v}.",
    ),
    "part": (
        "{X} has {v}.",
        "One part of {x} is {v}.",
        "You know {x} by {v}.",
        "A picture of {x} shows {v}.",
        "{X} always comes with {v}.",
        "Nobody can draw {x} without {v}.",
        "What {x} has is {v}.",
        "The best known part of {x} is {v}.",
        "Look closely at {x} to see {v}.",
        "Asked which part {x} has, people say {v}.",
    ),
    "action": (
        "{X} {v}.",
        "Everyone knows that {x} {v}.",
        "What {x} can do is this: it {v}.",
        "Watch {x} and you will see that it {v}.",
        "The thing about {x} is that it {v}.",
        "This is what {x} does: it {v}.",
        "On most days {x} {v}.",
        "What {x} does is simple: it {v}.",
        "Much can be done, and {x} {v}.",
        "Asked what {x} does, people say that it {v}.",
    ),
    "need": (
        "{X} needs {v}.",
        "{X} depends on {v}.",
        "What {x} needs is {v}.",
        "To do well, {x} must have {v}.",
        "{X} cannot do without {v}.",
        "Give {v} to {x} and all is well.",
        "It takes {v} to keep {x} going.",
        "Without {v} there is trouble for {x}.",
        "Of all things, {x} has most need of {v}.",
        "Asked what {x} needs, people say {v}.",
    ),
    "size": (
        "{X} is {v} in size.",
        "The size of {x} is {v}.",
        "People think of {x} as {v}.",
        "If you measure {x}, it is {v}.",
        "Next to other things {x} looks {v}.",
        "As for how big {x} is, it is {v}.",
        "In size {x} is {v}.",
        "{X} comes in one size, which is {v}.",
        "The word for how big {x} is: {v}.",
        "Asked how big {x} is, people say {v}.",
    ),
}
"""Statements of each attribute. `held_out_phrasings` says which of them a thing's training documents do not use."""

QUESTIONS: dict[str, dict[SplitName, tuple[str, ...]]] = {
    "definition": {
        "train": (
            "What is {x}?",
            "Explain what {x} is.",
            "Tell me what {x} is.",
            "In short, what is {x}?",
            "I want to know what {x} is.",
            "Do you know what {x} is?",
        ),
        "validation": ("Can you tell me what {x} is?",),
        "test": ("Can you explain what {x} is?", "I would like to know what {x} is."),
    },
    "kind": {
        "train": (
            "What kind of thing is {x}?",
            "Which kind of thing is {x}?",
            "Tell me what kind of thing {x} is.",
            "Name the kind of {x}.",
            "What is the kind of {x}?",
            "I want to know the kind of {x}.",
            "Do you know what kind of thing {x} is?",
        ),
        "validation": ("Can you tell me what kind of thing {x} is?",),
        "test": ("Can you name the kind of {x}?", "I would like to know which kind of thing {x} is."),
    },
    "place": {
        "train": (
            "Where is {x} found?",
            "Where can I find {x}?",
            "Where do people find {x}?",
            "Tell me where to find {x}.",
            "Name the place of {x}.",
            "What is the place of {x}?",
            "I want to know where {x} is found.",
            "Do you know where to find {x}?",
        ),
        "validation": ("Can you tell me where {x} is found?",),
        "test": ("Can you name the place of {x}?", "I would like to know where to find {x}."),
    },
    "part": {
        "train": (
            "What does {x} have?",
            "Which part does {x} have?",
            "Tell me what {x} has.",
            "Name one part of {x}.",
            "What is one part of {x}?",
            "I want to know a part of {x}.",
            "Do you know which part {x} has?",
        ),
        "validation": ("Can you tell me which part {x} has?",),
        "test": ("Can you name one part of {x}?", "I would like to know which part {x} has."),
    },
    "action": {
        "train": (
            "What does {x} do?",
            "What can {x} do?",
            "Tell me what {x} does.",
            "Say what {x} does.",
            "What is it that {x} does?",
            "I want to know what {x} does.",
            "Do you know what {x} does?",
        ),
        "validation": ("Can you tell me what {x} does?",),
        "test": ("Can you say what {x} does?", "I would like to know what {x} does."),
    },
    "need": {
        "train": (
            "What does {x} need?",
            "What must {x} have?",
            "Tell me what {x} needs.",
            "Name one need of {x}.",
            "What is it that {x} needs?",
            "I want to know what {x} needs.",
            "Do you know what {x} needs?",
        ),
        "validation": ("Can you tell me what {x} needs?",),
        "test": ("Can you say what {x} needs?", "I would like to know what {x} needs."),
    },
    "size": {
        "train": (
            "How big is {x}?",
            "What size is {x}?",
            "Tell me how big {x} is.",
            "Name the size of {x}.",
            "What is the size of {x}?",
            "I want to know how big {x} is.",
            "Do you know how big {x} is?",
        ),
        "validation": ("Can you tell me how big {x} is?",),
        "test": ("Can you name the size of {x}?", "I would like to know how big {x} is."),
    },
}

ABOUT: dict[SplitName, tuple[str, ...]] = {
    "train": (
        "Tell me about {x}.",
        "Tell me something about {x}.",
        "What do you know about {x}?",
        "I want to know more about {x}.",
    ),
    "validation": ("Can you tell me more about {x}?",),
    "test": ("Can you tell me something about {x}?", "I would like to know more about {x}."),
}

FOLLOW_UPS = {
    "place": "Where is it found?",
    "part": "What does it have?",
    "action": "What does it do?",
    "need": "What does it need?",
    "size": "How big is it?",
}


def fill(template: str, thing: Thing, attribute: str | None = None) -> str:
    """Fill a template with a thing and the value of one of its attributes."""
    value = thing.facts[attribute] if attribute else ""
    return template.format(x=thing.noun, X=thing.at_start, v=value, V=capitalize(value), c=core(value))


def held_out_phrasings(thing_index: int, attribute_index: int) -> dict[SplitName, int]:
    """Return the statement of an attribute that each held-out split keeps for this thing: one of the last four.

    Only those can be held out: none of them is contained in another statement.
    """
    first = 6 + (thing_index + attribute_index) % 4
    return {"validation": 6 + (first - 5) % 4, "test": first}


def answer(thing: Thing, attribute: str) -> str:
    """Answer a question about one attribute plainly; "definition" gives the kind and the action."""
    if attribute == "definition":
        return f"{fill(STATEMENTS['kind'][0], thing, 'kind')} It {thing.facts['action']}."
    return fill(STATEMENTS[attribute][0], thing, attribute)
