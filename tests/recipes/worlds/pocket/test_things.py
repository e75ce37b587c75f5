"""The world: enough things and phrasings, and no answer that counts as wrong is right."""

import re
import string
from collections import Counter

import pytest

from pipeline.data.arguments import SPLITS
from recipes.worlds.pocket.phrasings import REQUESTS, STATEMENTS, answer, fill, held_out_phrasings
from recipes.worlds.pocket.problems import KINDS
from recipes.worlds.pocket.things import ATTRIBUTES, Thing, core, things, things_of, wrong_values


def as_words(text: str) -> str:
    """Return a text in lower case without punctuation, which contains ` w ` if it contains the word `w`."""
    return f" {' '.join(re.sub(r'[^a-z0-9 ]', ' ', text.lower()).split())} "


def truths(thing: Thing) -> list[str]:
    """Return everything that documents and answers say of a thing, in every phrasing."""
    stated = [fill(template, thing, name) for name in ATTRIBUTES for template in STATEMENTS[name]]
    return [*stated, *(answer(thing, aspect) for aspect in ("definition", *ATTRIBUTES))]


def test_the_world_is_large_enough() -> None:
    assert len(things()) >= 120
    assert all(len(thing.facts) >= 5 and all(thing.facts.values()) for thing in things())
    nouns = Counter(thing.noun for thing in things())
    assert {"an LLM", "a token"} <= set(nouns)
    assert max(nouns.values()) == 1
    assert all(len(set(templates)) >= 8 for templates in STATEMENTS.values())
    assert set(STATEMENTS) == set(ATTRIBUTES)
    assert {kind.generate.__name__ for kind in KINDS} == {"arithmetic", "ordering", "counting", "logic"}


def test_articles_fit_the_nouns() -> None:
    for thing in things():
        article, _, noun = thing.noun.partition(" ")
        if article in ("a", "an"):
            # "an LLM" is spoken "an el-el-em".
            assert (article == "an") == (noun[0] in "aeioL"), thing.noun


def test_any_two_things_differ_in_some_fact() -> None:
    assert len({tuple(thing.facts.values()) for thing in things()}) == len(things())


def test_every_thing_belongs_to_one_split() -> None:
    split = [thing.noun for name in SPLITS for thing in things_of(name)]
    assert sorted(split) == sorted(thing.noun for thing in things())
    assert all(len(things_of(name)) >= 20 for name in SPLITS)


def test_no_phrasing_of_a_question_is_in_two_splits() -> None:
    for phrasings in REQUESTS.values():
        bare = [as_words(template.replace("{x}", "x")) for name in SPLITS for template in phrasings[name]]
        assert len(set(bare)) == len(bare)


@pytest.mark.parametrize("templates", STATEMENTS.values(), ids=STATEMENTS)
def test_placeholders_are_known(templates: tuple[str, ...]) -> None:
    for template in templates:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name}
        assert names & {"x", "X"} and names & {"v", "V", "c"} and names <= {"x", "X", "v", "V", "c"}


def test_documents_leave_phrasings_to_the_held_out_splits() -> None:
    for index in range(len(things())):
        for position in range(len(ATTRIBUTES)):
            held_out = held_out_phrasings(index, position)
            assert set(held_out) == {"validation", "test"}
            assert len(set(held_out.values())) == 2


def test_wrong_values_reject_nothing_that_is_true_of_the_thing() -> None:
    for thing in things():
        told = as_words(" . ".join(truths(thing)))
        for attribute in ATTRIBUTES:
            wrong = [value for value in wrong_values(thing, attribute) if as_words(value) in told]
            assert not wrong, (thing.noun, attribute, wrong)


def test_wrong_values_reject_what_is_true_of_others_only() -> None:
    for thing in things():
        for attribute in ATTRIBUTES:
            wrong = wrong_values(thing, attribute)
            assert core(thing.facts[attribute]) not in wrong
            assert len(wrong) >= 3, "an answer can be wrong"
    fox = things()[0]
    assert {"bird", "fish"} <= set(wrong_values(fox, "kind"))
