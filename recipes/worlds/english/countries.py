"""The CIA World Factbook: what it says about each country, and the facts that are asked about."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.worlds.english.packages import read_json
from recipes.worlds.english.text import Document, plain

CONTINENTS = {
    "africa": "Africa",
    "central-america-n-caribbean": "North America",
    "central-asia": "Asia",
    "east-n-southeast-asia": "Asia",
    "europe": "Europe",
    "middle-east": "Asia",
    "north-america": "North America",
    "south-america": "South America",
    "south-asia": "Asia",
    "australia-oceania": "Oceania",
}
"""Folders of the factbook -> continent."""
SPELLINGS = {
    "Burma": "Myanmar",
    "Congo (Brazzaville)": "the Republic of the Congo",
    "Republic of the Congo": "the Republic of the Congo",
    "DRC": "the Democratic Republic of the Congo",
    "Democratic Republic of the Congo": "the Democratic Republic of the Congo",
    "Central African Republic": "the Central African Republic",
    "Dominican Republic": "the Dominican Republic",
    "The Dominican": "the Dominican Republic",
    "United States": "the United States",
    "US": "the United States",
    "United Kingdom": "the United Kingdom",
    "UK": "the United Kingdom",
    "United Arab Emirates": "the United Arab Emirates",
    "UAE": "the United Arab Emirates",
    "Netherlands": "the Netherlands",
    "Philippines": "the Philippines",
    "The Gambia": "the Gambia",
    "Turkey (Turkiye)": "Turkey",
    "Czech Republic": "Czechia",
    "Macedonia": "North Macedonia",
}
"""Names of the factbook -> names in a sentence. It calls some countries differently where it lists neighbours."""
CAPITALS = {"Myanmar": "Naypyidaw", "Sri Lanka": "Colombo", "South Africa": "Pretoria", "Haiti": "Port-au-Prince"}
"""Capitals that the factbook names in a sentence of its own, or next to others."""
NO_NAMES = ("", "none")
"""What the factbook has in place of a name, for countries without a short one, oceans, and the world."""
MILLION = 1_000_000


@dataclass(frozen=True)
class Country:
    """A country with at least a million people.

    Attributes:
        name: Its name within a sentence: "Peru", "the Netherlands".
        capital: Its capital.
        continent: Its continent.
        millions: Millions of people, rounded.
        neighbours: Names of the countries with a million people that it borders, in alphabetical order.
    """

    name: str
    capital: str
    continent: str
    millions: int
    neighbours: tuple[str, ...]


def read_factbook(file: Path) -> Iterator[Document]:
    """Yield what the factbook says about each country, territory or ocean. The details are a `Country`, or None.

    Peru
    Background: Ancient Peru was the seat of several prominent Andean civilizations, most notably …
    Location: Western South America, bordering the South Pacific Ocean, between Chile and Ecuador
    """
    for path, content in read_json(file, "*/data/*/*.json"):
        _, _, folder, code = path.rsplit("/", 3)
        long_name = plain(_text(content, "Government", "Country name", "conventional long form"))
        name = plain(_text(content, "Government", "Country name", "conventional short form"))
        if name in NO_NAMES:
            name = long_name
        lines = [f"{title}: {text}" for title, text in _lines(content)]
        if name not in NO_NAMES:
            lines.insert(0, name)
        key = code.removesuffix(".json") if name in NO_NAMES else _in_sentence(name)
        country = _read_country(name, CONTINENTS.get(folder), content)
        yield Document("factbook", (key,), "\n".join(lines), country)


def link_neighbours(countries: Iterable[Country]) -> list[Country]:
    """Return countries that have capitals, with only each other as neighbours."""
    countries = list(countries)
    names = {country.name for country in countries}
    linked = []
    for country in countries:
        neighbours = sorted(name for name in country.neighbours if name in names)
        linked.append(replace(country, neighbours=tuple(neighbours)))
    return linked


def _text(content: Mapping[str, Any], *keys: str) -> str:
    """Return the text at a path of the factbook, "" if there is none."""
    value: Any = content
    for key in keys:
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    if isinstance(value, Mapping):
        value = value.get("text", "")
    return str(value)


def _lines(content: Mapping[str, Any], title: str = "") -> Iterator[tuple[str, str]]:
    """Yield the titles and the texts of an article, nested titles after the one around them."""
    for name, value in content.items():
        heading = f"{title}, {name}" if title else name
        if isinstance(value, Mapping) and "text" not in value:
            # The names of the sections, such as "People and Society", are no part of the titles.
            yield from _lines(value, heading if title or "note" in value else "")
            continue
        text = plain(_text({"": value}, ""))
        if text and text != "NA":
            yield heading, text


def _in_sentence(name: str) -> str:
    """Return a country's name within a sentence."""
    return SPELLINGS.get(name, name)


def _read_country(name: str, continent: str | None, content: Mapping[str, Any]) -> Country | None:
    """Return the facts about a country, or None if it has fewer than a million people, no capital or no continent."""
    population = re.match(r"[\d,]+", _text(content, "People and Society", "Population", "total"))
    people = int(population.group().replace(",", "")) if population else 0
    capital_text = plain(_text(content, "Government", "Capital", "name"))
    # "Tripoli (Tarabulus)", "Santiago; note - Valparaiso is …", "Gitega (political capital), Bujumbura (…)"
    capital = re.split(r" \(|;| in Romanian|, (?!D\.C\.)", capital_text)[0]
    name = _in_sentence(name)
    # The factbook has articles about the European Union and the world, too.
    if people < MILLION or not capital or continent is None or name in NO_NAMES:
        return None
    borders = plain(_text(content, "Geography", "Land boundaries", "border countries"))
    neighbours = set()
    for part in borders.split(";"):
        # "Lithuania (Kaliningrad Oblast) 261 km"
        match = re.match(r"\s*([^\d(]+?)(?: \([^)]*\))? [\d,.]+ km", part)
        if match:
            neighbours.add(_in_sentence(match.group(1)))
    millions = (people + MILLION // 2) // MILLION
    return Country(name, CAPITALS.get(name, capital), continent, millions, tuple(sorted(neighbours)))
