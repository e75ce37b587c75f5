"""Write the pocket data set as a Hub data set repository: a card with configs, and one Parquet file per split."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count, cycle
from typing import Any, Literal

import pyarrow as pa

from pipeline.data.arguments import SPLITS, SplitName, option
from pipeline.data.overlap import NgramIndex
from pipeline.data.writing import card as write_card
from pipeline.data.writing import write_data_set
from pipeline.errors import Problem, refuse
from pipeline.files import check_replaceable
from recipes.worlds.pocket import conversations, documents, problems
from recipes.worlds.pocket.conversations import distinct
from recipes.worlds.pocket.names import ITEMS, NAMES
from recipes.worlds.pocket.things import things, things_of

STRING = pa.string()
MESSAGES = pa.list_(pa.struct([("role", STRING), ("content", STRING)]))
DOCUMENT = pa.schema({"text": STRING, "kind": STRING})
REASONING = pa.schema({"prompt": MESSAGES, "answer": STRING, "kind": STRING, "length": pa.int64()})
GRADING = {"require": pa.list_(pa.list_(STRING)), "reject": pa.list_(STRING), "max_words": pa.int64(), "test": STRING}
SCHEMAS: dict[str, pa.Schema] = {
    "pretrain": DOCUMENT,
    "sft": pa.schema({"messages": MESSAGES, "kind": STRING, **GRADING}),
    "preferences": pa.schema({"prompt": MESSAGES, "kind": STRING, **GRADING}),
    "reasoning": REASONING,
}
CONFIG_SPLITS: dict[str, tuple[str, ...]] = dict.fromkeys(SCHEMAS, SPLITS) | {"reasoning": (*SPLITS, "test_longer")}
OVERLAP_N = 8
"""Length of the n-grams, in words, that no training row may share with a held-out row."""


@dataclass
class PocketArguments:
    """Sizes of the data set to generate; each field's meaning is in its help."""

    output_dir: str = field(metadata={"help": "Folder of the data set repository; replaced if it exists."})
    world: Literal["things", "tools", "english"] = option(
        "things", "Things and what they are, a calculator's sums and a game, or real English from packages."
    )
    seed: int = option(0, "The same seed gives the same bytes.")
    size_mb: float = option(8.0, "Pretraining text in MB, an eighth of which is dropped: it overlaps held-out text.")
    sft_rows: int = option(24_000, "Conversations of the sft training split.")
    preference_rows: int = option(4_000, "Prompts of the preferences training split.")
    reasoning_rows: int = option(8_000, "Problems of the reasoning training split.")
    share_with_steps: float = option(0.3, "Share of the problems in sft that are answered with worked steps.")
    carelessness: float = option(0.6, "Probability that a worked solution, in pretrain and sft, misreads its problem.")


def row_text(row: dict[str, Any]) -> str:
    """Return all text in a row that a model may see."""
    if row.get("text"):
        return row["text"]
    messages = row.get("messages") or row["prompt"]
    return " ".join(message["content"] for message in messages)


def held_out(args: PocketArguments, config: str, split: str) -> list[dict[str, Any]]:
    """Generate the rows of a held-out split of `CONFIG_SPLITS`. Guarded by `tests/recipes/worlds/pocket`."""
    rng = random.Random(f"{args.seed}/{config}/{split}")
    # `test_longer` has the phrasings and the numbers of `test`.
    source: SplitName = "validation" if split == "validation" else "test"
    if config == "pretrain":
        # Facts about every thing, in the phrasings that are held out for that thing.
        order = list(things())
        rng.shuffle(order)
        return [{"text": documents.facts(rng, source, thing), "kind": "facts"} for thing in order]
    if config == "sft":
        subjects = things_of(source)
        pairs = [(thing, aspect) for thing in subjects for aspect in conversations.ASPECTS]
        rng.shuffle(pairs)
        return [
            *distinct((conversations.question(rng, source, *pair) for pair in cycle(pairs)), 250),
            *distinct((conversations.summary(rng, source, thing) for thing in cycle(subjects)), 75),
            *distinct((conversations.code(rng, source) for _ in count()), 75),
        ]
    if config == "preferences":
        # Prompts for comparing answers: fixed numbers of questions, orders and summaries.
        numbers = {"question": 90, "order": 90, "summary": 20}
        parts: dict[str, list[dict[str, Any]]] = {part: [] for part in numbers}
        for _ in range(20 * sum(numbers.values())):
            row = conversations.preference_prompt(rng, source)
            if row["kind"] == "summary":
                parts["summary"].append(row)
            elif row["prompt"][0]["content"].endswith("?"):
                parts["question"].append(row)
            else:
                parts["order"].append(row)
        rows = []
        for part, number in numbers.items():
            rows += distinct(parts[part], number)
        rng.shuffle(rows)
        return rows
    longer = split == "test_longer"
    number = 120 if longer else 300
    return distinct((conversations.reasoning_prompt(rng, source, longer) for _ in count()), number)


def training(args: PocketArguments, config: str) -> Iterator[dict[str, Any]]:
    """Generate the rows of a training split, including rows that overlap with held-out rows."""
    rng = random.Random(f"{args.seed}/{config}/train")
    if config == "pretrain":
        remaining = args.size_mb * 1e6
        while remaining > 0:
            row = documents.document(rng, args.carelessness)
            remaining -= len(row["text"].encode())
            yield row
    elif config == "sft":
        for _ in range(args.sft_rows):
            yield conversations.training_row(rng, args.share_with_steps, args.carelessness)
    elif config == "preferences":
        for _ in range(args.preference_rows):
            yield conversations.preference_prompt(rng, "train")
    else:
        for _ in range(args.reasoning_rows):
            yield conversations.reasoning_prompt(rng, "train")


def check_arguments(
    args: PocketArguments,
    title: str = "# Pocket",
    sizes: Iterable[str] = ("size_mb", "sft_rows", "preference_rows", "reasoning_rows"),
    configs: Iterable[str] = (*SCHEMAS,),
) -> list[Problem]:
    """Check the shares, the `sizes` and the output directory, which may have a data set with this title and configs."""
    problems = []
    problem = check_replaceable(args.output_dir, {*configs, "README.md"}, title)
    if problem:
        problems.append(problem)
    for name in sizes:
        size = getattr(args, name)
        if not size > 0:
            problems.append(Problem(name, size, "must be more than 0"))
    for name in ("share_with_steps", "carelessness"):
        share = getattr(args, name)
        if not 0 <= share <= 1:
            problems.append(Problem(name, share, "must be from 0 to 1"))
    return problems


def build(args: PocketArguments) -> None:
    """Generate all splits and write the repository; an interrupted build leaves `output_dir` as it was.

    Validation and test come first. A training row that shares an n-gram of `OVERLAP_N` words with one of their rows, or
    contains a shorter row whole, is dropped as it is generated, so that memory stays constant. A `UserError` says that
    `output_dir` contains other files, or a size is out of range.
    """
    refuse(*check_arguments(args))
    index = NgramIndex(OVERLAP_N)
    parts: list[tuple[str, str, Iterable[dict[str, Any]]]] = []
    for config, (_, *held_out_splits) in CONFIG_SPLITS.items():
        for split in held_out_splits:
            rows = held_out(args, config, split)
            index.add(map(row_text, rows))
            parts.append((config, split, rows))
    for config in SCHEMAS:
        parts.append((config, "train", (row for row in training(args, config) if not index.overlaps(row_text(row)))))
    write_data_set(args.output_dir, SCHEMAS, parts, card(args))


def card(args: PocketArguments) -> str:
    """Return the data set card."""
    # How many changes, groups, ages and turns the problems of the training split have, such as "1 to 4".
    lengths = {kind.generate.__name__: f"{min(kind.lengths)} to {max(kind.lengths)}" for kind in problems.KINDS}
    counts = {"names": len(NAMES), "things": len(things()), "n": OVERLAP_N}
    *items, last_item = ITEMS
    words = {"items": f"{', '.join(items)} or {last_item}", "some_names": ", ".join(NAMES[:6])}
    text = files(__package__).joinpath("card.md").read_text(encoding="utf-8")
    text = text.format(**vars(args), **lengths, **counts, **words)
    return write_card(CONFIG_SPLITS, text, license="apache-2.0", language="en", pretty_name="Pocket")
