"""Write the pocket data set as a Hub data set repository: a card with configs, and one Parquet file per split."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pipeline.data import writing
from pipeline.data.arguments import SPLITS, SplitName, option
from pipeline.data.overlap import NgramIndex
from pipeline.data.pocket import conversations, documents, problems
from pipeline.data.pocket.names import ITEMS, NAMES
from pipeline.data.pocket.things import things
from pipeline.errors import Problem, UserError
from pipeline.files import check_replaceable, write_folder

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
GRADING = [
    ("require", pa.list_(pa.list_(pa.string()))),
    ("reject", pa.list_(pa.string())),
    ("max_words", pa.int64()),
    ("test", pa.string()),
]
SCHEMAS: dict[str, pa.Schema] = {
    "pretrain": pa.schema([("text", pa.string()), ("kind", pa.string())]),
    "sft": pa.schema([("messages", MESSAGES), ("kind", pa.string()), *GRADING]),
    "preferences": pa.schema([("prompt", MESSAGES), ("kind", pa.string()), *GRADING]),
    "reasoning": pa.schema(
        [("prompt", MESSAGES), ("answer", pa.string()), ("kind", pa.string()), ("length", pa.int64())]
    ),
}
CONFIG_SPLITS: dict[str, tuple[str, ...]] = dict.fromkeys(SCHEMAS, SPLITS) | {"reasoning": (*SPLITS, "test_longer")}
OVERLAP_N = 8
"""Length of the n-grams, in words, that no training row may share with a held-out row."""


@dataclass
class PocketArguments:
    """Sizes of the data set to generate; each field's meaning is in its help."""

    output_dir: str = field(metadata={"help": "Folder of the data set repository; replaced if it exists."})
    world: Literal["things", "tools"] = option(
        "things", "What it is about: things and what they are, or sums for a calculator and a game of questions."
    )
    seed: int = option(0, "The same seed gives the same bytes.")
    size_mb: float = option(
        8.0, "Pretraining text in MB, before the eighth of it that overlaps with held-out text is dropped."
    )
    sft_rows: int = option(24_000, "Conversations of the sft training split.")
    preference_rows: int = option(4_000, "Prompts of the preferences training split.")
    reasoning_rows: int = option(8_000, "Problems of the reasoning training split.")
    share_with_steps: float = option(0.3, "Share of the problems in sft that are answered with worked steps.")
    carelessness: float = option(
        0.6, "Probability that worked steps, in pretrain and sft, misread what can be misread."
    )


def row_text(row: dict[str, Any]) -> str:
    """Return all text of a row that a model may see."""
    if "text" in row:
        return row["text"]
    return " ".join(message["content"] for message in row.get("messages") or row["prompt"])


def held_out(args: PocketArguments, config: str, split: str) -> list[dict[str, Any]]:
    """Generate the rows of a held-out split of `CONFIG_SPLITS`."""
    rng = random.Random(f"{args.seed}/{config}/{split}")
    own: SplitName = "validation" if split == "validation" else "test"
    if config == "pretrain":
        return documents.held_out_documents(rng, own)
    if config == "sft":
        return conversations.held_out_rows(rng, own, questions=250, others=75)
    if config == "preferences":
        return conversations.held_out_prompts(rng, own, asked=90, told=90, summaries=20)
    number, longer = (120, True) if split == "test_longer" else (300, False)
    return conversations.distinct((conversations.reasoning_prompt(rng, own, longer) for _ in count()), number)


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
    """Check the sizes, the shares and the output directory.

    Args:
        title: Title of the card of such a data set, which may be replaced.
        sizes: Fields that must be above 0.
        configs: Folders of such a data set.
    """
    problems = check_replaceable(args.output_dir, {*configs, "README.md"}, title)
    for name in sizes:
        if not getattr(args, name) > 0:
            problems.append(Problem(name, getattr(args, name), "must be more than 0"))
    for name in ("share_with_steps", "carelessness"):
        if not 0 <= getattr(args, name) <= 1:
            problems.append(Problem(name, getattr(args, name), "must be from 0 to 1"))
    return problems


def build(args: PocketArguments) -> None:
    """Generate all splits and write the repository; an interrupted build leaves `output_dir` as it was.

    Validation and test come first. A training row that shares an n-gram of `OVERLAP_N` words with one of their rows, or
    contains a shorter row whole, is dropped as it is generated, so that memory stays constant.

    Raises:
        UserError: If `output_dir` contains other files, or a size is out of range.
    """
    if problems := check_arguments(args):
        raise UserError(*problems)
    # pretrain/{train,validation,test}.parquet, sft/…, preferences/…, reasoning/… with test_longer, README.md
    index = NgramIndex(OVERLAP_N)
    with write_folder(Path(args.output_dir)) as folder:
        for config, (_, *splits) in CONFIG_SPLITS.items():
            for split in splits:
                rows = held_out(args, config, split)
                index.add(row_text(row) for row in rows)
                writing.write_rows(folder / config / f"{split}.parquet", SCHEMAS[config], rows)
        for config in SCHEMAS:
            kept = (row for row in training(args, config) if not index.overlaps(row_text(row)))
            writing.write_rows(folder / config / "train.parquet", SCHEMAS[config], kept)
        (folder / "README.md").write_text(card(args), encoding="utf-8", newline="\n")


def card(args: PocketArguments) -> str:
    """Return the data set card."""
    text = files(__package__).joinpath("card.md").read_text(encoding="utf-8")
    words = {
        "items": f"{', '.join(ITEMS[:-1])} or {ITEMS[-1]}",
        "names": len(NAMES),
        "some_names": ", ".join(NAMES[:6]),
    }
    # How many changes, groups, ages and turns the problems of the training split have, such as "1 to 4".
    lengths = {kind.generate.__name__: f"{min(kind.lengths)} to {max(kind.lengths)}" for kind in problems.KINDS}
    text = text.format(**vars(args), **words, **lengths, things=len(things()), n=OVERLAP_N)
    return writing.card(CONFIG_SPLITS, text, license="apache-2.0", language="en", pretty_name="Pocket")
