"""Questions about what words mean, answered with a definition of a dictionary."""

import random
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from recipes.worlds.english.dictionaries import Definition
from recipes.worlds.english.facts import OPENINGS
from recipes.worlds.english.splits import Side
from recipes.worlds.english.text import Document

LONGEST_ANSWER = 110
"""Characters of the longest definition that is an answer."""
ARTICLES = {
    "noun": "{a} {word} is {meaning}.",
    "plural noun": "{word} are {meaning}.",
    "verb": "To {word} is to {meaning}.",
    "adjective": "{word} means {meaning}.",
    "adverb": "{word} means {meaning}.",
}
"""Part of speech -> the answer. Other parts are not asked about."""
QUESTIONS: dict[Side, tuple[str, ...]] = {
    "train": (
        "What does {word} mean?",
        "What is the meaning of {word}?",
        "Define {word}.",
        "What does the word {word} mean?",
        "Explain the word {word}.",
        "I do not know the word {word}. What does it mean?",
        "meaning of {word}?",
        "Tell me what {word} means.",
        "Could you define {word}?",
        "Please define the word {word}.",
        "What is meant by {word}?",
        "Give me the meaning of {word}.",
        "I read the word {word}. What does it mean?",
        "How would you explain {word}?",
        "What's the definition of {word}?",
        "I need a definition of the word {word}.",
        "Do you know the word {word}?",
        "what does {word} mean",
    ),
    "validation": ("Do you know what {word} means?", "Give me a definition of {word}."),
    "test": ("Can you tell me what {word} means?", "Which meaning does {word} have?"),
}
OF_NOUNS = ("What is {a} {word}?", "what's {a} {word}", "Can you explain what {a} {word} is?")
"""More questions of the training split."""
ENDINGS = ("lessness", "fulness", "ation", "ings", "ness", "less", "able", "ally", "ing", "ies", "ers", "est", "ful")
SHORT_ENDINGS = ("ed", "er", "es", "ly", "al", "ic", "s", "y", "e")


def stem(word: str) -> str:
    """Return a word without its ending, equal for most forms of a word: "garden" for gardens, gardener, gardening."""
    for ending in (*ENDINGS, *SHORT_ENDINGS):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def question_rows(
    rng: random.Random, documents: Iterable[Document], side: Side, common: Collection[str], seen: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield each common word of some documents once, in random order, with a question and its most used meaning.

    Args:
        rng: The random numbers.
        documents: Entries of the dictionaries.
        side: Their split.
        common: Words that people use, which are asked about.
        seen: Stems of the words of the training split: a held-out word with one of them is of the kind "other form".
    """
    # Word -> its meanings, each with how often it is used.
    definitions: dict[str, list[tuple[int, Definition]]] = {}
    for document in documents:
        for definition in document.details:
            is_short = len(definition.text) <= LONGEST_ANSWER and definition.text[:1].isalpha()
            if definition.part not in ARTICLES or not is_short:
                continue
            for word, uses in zip(definition.words, definition.uses, strict=True):
                if word in common and word.isalpha():
                    definitions.setdefault(word, []).append((uses, definition))
    words = sorted(definitions)
    rng.shuffle(words)
    for word in words:
        # Of meanings that are used equally often, the shortest one.
        _, definition = max(definitions[word], key=lambda meaning: (meaning[0], -len(meaning[1].text)))
        templates: Sequence[str] = QUESTIONS[side]
        if side == "train" and definition.part == "noun":
            templates = (*templates, *OF_NOUNS)
        article = "an" if word[0] in "aeiou" else "a"
        question = rng.choice(templates).format(word=word, a=article)
        if side == "train":
            question = rng.choice(OPENINGS) + question
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _answer(word, article, definition)},
        ]
        kind = "other form" if stem(word) in seen else "definition"
        yield {"messages": messages, "kind": kind}


def _answer(word: str, article: str, definition: Definition) -> str:
    """Return an answer such as "A garden is a plot of ground where plants are cultivated."."""
    meaning = definition.text
    # The definitions of gcide are sentences. Names and abbreviations keep their capitals.
    if re.match(r"[A-Z][a-z]|A ", meaning):
        meaning = meaning[0].lower() + meaning[1:]
    if definition.part == "verb":
        meaning = meaning.removeprefix("to ")
    text = ARTICLES[definition.part].format(a=article, word=word, meaning=meaning)
    return text[0].upper() + text[1:]
