"""Facts about countries: statements for stage 1, and questions with answers for stage 2, in phrasings of each split."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.worlds.english.countries import Country
from recipes.worlds.english.splits import Side

# {c} is the country, {C} the country at the start of a sentence, {s} its possessive, {v} the value.
STATEMENTS = {
    "capital": (
        "The capital of {c} is {v}.",
        "{v} is the capital of {c}.",
        "{C} has {v} as its capital.",
        "{s} capital is {v}.",
        "{s} capital city is {v}.",
        "The capital city of {c} is called {v}.",
        "Whoever visits the capital of {c} goes to {v}.",
        "In {c}, the capital is {v}.",
        "{v}, the capital of {c}, is where its visitors arrive.",
        "On a map of {c}, the capital is marked {v}.",
    ),
    "continent": (
        "{C} is a country in {v}.",
        "{C} is in {v}.",
        "{C} lies in {v}.",
        "One of the countries of {v} is {c}.",
        "The continent of {c} is {v}.",
        "{C} belongs to {v}.",
        "You find {c} on a map of {v}.",
        "People in {c} live in {v}.",
    ),
    "neighbours": (
        "{C} borders {v}.",
        "{C} has borders with {v}.",
        "{C} shares a border with {v}.",
        "The neighbours of {c} are {v}.",
        "{s} neighbours are {v}.",
        "Around {c} lie {v}.",
        "From {c}, roads lead to {v}.",
        "The countries next to {c} are {v}.",
    ),
    "millions": (
        "{C} has {v} million people.",
        "{v} million people live in {c}.",
        "The population of {c} is {v} million.",
        "{s} population is {v} million.",
        "{C} has a population of {v} million.",
        "About {v} million people live in {c}.",
        "{C} is home to {v} million people.",
        "In {c} there are {v} million people.",
    ),
}
"""Fact -> how it is stated."""
QUESTIONS: dict[str, dict[Side, tuple[str, ...]]] = {
    "capital": {
        "train": (
            "What is the capital of {c}?",
            "What's the capital of {c}?",
            "Which city is the capital of {c}?",
            "Name the capital of {c}.",
            "Tell me the capital of {c}.",
            "Do you know the capital of {c}?",
            "What is {s} capital?",
            "What is the name of {s} capital city?",
            "I need the capital of {c}.",
            "capital of {c}?",
            "What do people call the capital of {c}?",
            "I am going to {c}. What is the capital?",
        ),
        "validation": ("Can you name the capital of {c}?", "Which is the capital city of {c}?"),
        "test": (
            "Could you tell me what the capital of {c} is?",
            "The capital of {c} is which city?",
            "I forgot the capital of {c}. What is it?",
        ),
    },
    "continent": {
        "train": (
            "On which continent is {c}?",
            "Where is {c}?",
            "Which continent is {c} in?",
            "What continent does {c} belong to?",
            "Tell me where {c} is.",
            "Where in the world is {c}?",
            "In which part of the world is {c}?",
            "Name the continent of {c}.",
            "Where do I find {c} on a map?",
            "where is {c}",
        ),
        "validation": ("What continent is {c} on?", "Where does {c} lie?"),
        "test": (
            "Can you tell me which continent {c} is on?",
            "{C} is on which continent?",
            "I wonder where {c} is.",
        ),
    },
    "neighbours": {
        "train": (
            "Which countries border {c}?",
            "What are the neighbours of {c}?",
            "Which countries are next to {c}?",
            "What does {c} border?",
            "Name the neighbours of {c}.",
            "Tell me the countries that border {c}.",
            "Which countries does {c} share a border with?",
            "What are {s} neighbours?",
            "Who are the neighbours of {c}?",
            "List the countries around {c}.",
        ),
        "validation": ("Which countries does {c} border?", "What countries are the neighbours of {c}?"),
        "test": (
            "Can you name the countries that {c} borders?",
            "What countries lie next to {c}?",
            "{C} has borders with which countries?",
        ),
    },
    "millions": {
        "train": (
            "How many people live in {c}?",
            "What is the population of {c}?",
            "How many million people live in {c}?",
            "How many people does {c} have?",
            "What is {s} population?",
            "Tell me the population of {c}.",
            "How big is the population of {c}?",
            "How many people are there in {c}?",
            "population of {c}?",
            "Name the number of people in {c}.",
        ),
        "validation": ("How large is the population of {c}?", "How many people has {c}?"),
        "test": (
            "Can you tell me how many people live in {c}?",
            "What number of people lives in {c}?",
            "{C} has how many people?",
        ),
    },
}
"""Fact -> split -> how it is asked for."""
OPENINGS = (
    "",
    "",
    "",
    "Hi! ",
    "Hello. ",
    "I have a question. ",
    "Quick question: ",
    "Please help me. ",
    "Just curious. ",
    "For my homework: ",
)
"""What may precede a question of the training split, so that there are about a hundred phrasings of each fact."""
NO_NEIGHBOURS = "no other country"
"""What a country on islands borders."""


@dataclass(frozen=True)
class Fact:
    """A fact about a country.

    Attributes:
        name: A key of `STATEMENTS`.
        value: Its value within a sentence.
        required: Texts that an answer must contain.
    """

    name: str
    value: str
    required: tuple[str, ...]


def possessive(name: str) -> str:
    """Return "Peru's", or "the Netherlands'"."""
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def list_of(names: Sequence[str]) -> str:
    """Return "Chile", "Chile and Peru" or "Bolivia, Chile and Peru"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def facts_of(country: Country) -> list[Fact]:
    """Return what is stated, and asked, about a country."""
    neighbours = list_of(country.neighbours) if country.neighbours else NO_NEIGHBOURS
    return [
        Fact("capital", country.capital, (country.capital,)),
        Fact("continent", country.continent, (country.continent,)),
        Fact("neighbours", neighbours, country.neighbours or (NO_NEIGHBOURS,)),
        Fact("millions", str(country.millions), (f"{country.millions} million",)),
    ]


def fill(template: str, country: Country, value: str = "") -> str:
    """Fill a template with a country and a value."""
    name = country.name
    text = template.format(c=name, C=name[0].upper() + name[1:], s=possessive(name), v=value)
    return text[0].upper() + text[1:] if template.startswith("{") else text


def statements(rng: random.Random, country: Country) -> str:
    """Return a paragraph about a country: two to four facts, in any order and phrasing."""
    facts = rng.sample(facts_of(country), rng.randint(2, 4))
    return " ".join(fill(rng.choice(STATEMENTS[fact.name]), country, fact.value) for fact in facts)


def answer(country: Country, fact: Fact) -> str:
    """Return the answer to a question about a fact: its first statement."""
    return fill(STATEMENTS[fact.name][0], country, fact.value)


def question_rows(rng: random.Random, countries: Sequence[Country], side: Side) -> Iterator[dict[str, Any]]:
    """Yield questions of a split and their answers: each fact once, then again in other phrasings, without end."""
    pairs = [(country, fact) for country in countries for fact in facts_of(country)]
    while True:
        rng.shuffle(pairs)
        for country, fact in pairs:
            question = fill(rng.choice(QUESTIONS[fact.name][side]), country)
            if side == "train":
                question = rng.choice(OPENINGS) + question
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer(country, fact)},
            ]
            # Texts of which at least one must be in the answer, for each that is required.
            required = [[text] for text in fact.required]
            yield {"messages": messages, "kind": fact.name, "require": required, "reject": [], "max_words": 40}
