"""Two dictionaries: entries of gcide, and the definitions and examples of WordNet."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.worlds.english.packages import read_json, read_members
from recipes.worlds.english.text import Document, is_ascii_prose, plain

PARTS_OF_GCIDE = {
    "n.": "noun",
    "a.": "adjective",
    "adj.": "adjective",
    "adv.": "adverb",
    "v. t.": "verb",
    "v. i.": "verb",
    "v. t. & i.": "verb",
    "v. i. & t.": "verb",
    "v.": "verb",
    "n. pl.": "plural noun",
    "prep.": "preposition",
    "conj.": "conjunction",
    "pron.": "pronoun",
    "interj.": "interjection",
}
"""Parts of speech of gcide -> how they are called here. Entries of others, mostly inflected forms, are left out."""
PARTS_OF_WORDNET = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
"""File names of WordNet (data.noun, …) -> part of speech."""
DAMAGE = re.compile(r"[\[\]{}<>=`*+#^~|\\@\n]|\b1913\b|\d-?$|\bSee \w|^same as |\(b\)")
"""What only cross-references and damaged texts of gcide contain, in which the extraction has mixed up parts."""
LONGEST = 600
"""Characters of the longest definition; the few longer ones are essays."""


@dataclass(frozen=True)
class Definition:
    """A meaning of some words.

    Attributes:
        words: The words that have this meaning: one in gcide, synonyms in WordNet.
        part: Part of speech.
        text: The meaning, without a full stop.
        uses: How often each of the words has this meaning in the texts that WordNet counted; 0 in gcide.
    """

    words: tuple[str, ...]
    part: str
    text: str
    uses: tuple[int, ...] = (0,)


def read_gcide(file: Path) -> Iterator[Document]:
    """Yield the entries of gcide, each with its definitions and their examples, without those that are damaged.

    trot (verb): To proceed by a certain gait peculiar to quadrupeds; to ride or drive at a trot.
    trot (noun): The pace of a horse or other quadruped, more rapid than a walk. "He that rises late must trot all day."
    """
    for _, entries in read_json(file, "*/words_*.json"):
        for entry in entries.values():
            word = plain(entry["entry"]).lower()
            if not re.fullmatch(r"[a-z][a-z' -]*", word):
                continue
            lines = []
            definitions = []
            for group in entry["pos"]:
                part = PARTS_OF_GCIDE.get(group["part_of_speech"])
                texts = []
                for meaning in group["definitions"]:
                    text = plain(meaning["text"])
                    is_whole = text.endswith((".", "!", "?")) and not DAMAGE.search(meaning["text"].strip())
                    if part is None or not is_whole or not is_ascii_prose(text) or len(text) > LONGEST:
                        continue
                    texts.append(text)
                    definitions.append(Definition((word,), part, text.rstrip(".")))
                    texts += [f'"{example}"' for example in map(plain, meaning["examples"]) if is_ascii_prose(example)]
                if texts:
                    lines.append(f"{word} ({part}): {' '.join(texts)}")
            if lines:
                yield Document("gcide", (word,), "\n".join(lines), definitions)


def read_wordnet(file: Path) -> Iterator[Document]:
    """Yield the meanings of WordNet, each with the words that have it and its examples.

    breathe, take a breath, respire (verb): draw air into, and expel out of, the lungs. "The patient is respiring"
    """
    counts = _count_uses(file)
    for name, text in read_members(file, "*/data.*"):
        part = PARTS_OF_WORDNET[name.rpartition(".")[2]]
        for line in text.splitlines():
            # 00001740 29 v 04 breathe 0 take_a_breath 0 … | draw air into, and expel out of, the lungs; "I can …"
            # The licence at the top of each file is indented.
            if line.startswith(" "):
                continue
            columns, _, gloss = line.partition(" | ")
            fields = columns.split()
            number = int(fields[3], 16)
            words = []
            for word in fields[4 : 4 + 2 * number : 2]:
                words.append(re.sub(r"\(\w+\)$", "", plain(word.replace("_", " "))))
            meaning, *examples = re.split(r'; (?=")', plain(gloss))
            if not is_ascii_prose(meaning) or not all(map(is_ascii_prose, words)) or len(meaning) > LONGEST:
                continue
            examples = [example for example in examples if is_ascii_prose(example)]
            sentences = " ".join([f"{meaning}.", *examples])
            keys = tuple(dict.fromkeys(word.lower() for word in words))
            # Names, which have capitals, are not asked about.
            common_words = tuple(key for key in keys if key in words)
            uses = tuple(counts.get((word.replace(" ", "_"), part, fields[0]), 0) for word in common_words)
            definition = Definition(common_words, part, meaning, uses)
            yield Document("wordnet", keys, f"{', '.join(words)} ({part}): {sentences}", [definition])


def _count_uses(file: Path) -> dict[tuple[str, str, str], int]:
    """Return how often words have their meanings: (word, part of speech, number of the meaning) -> count."""
    parts = {"1": "noun", "2": "verb", "3": "adjective", "4": "adverb", "5": "adjective"}
    counts = {}
    for _, text in read_members(file, "*/index.sense"):
        for line in text.splitlines():
            # garden%1:15:00:: 03422589 1 12
            sense, number, _, count = line.split()
            word, _, rest = sense.partition("%")
            counts[word, parts[rest[0]], number] = int(count)
    return counts
