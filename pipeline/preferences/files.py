"""The files of a preference data set in Hub layout: README.md and one Parquet file a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, Features, Value

from pipeline.data.splits import MESSAGES
from pipeline.files import write_folder

SPLITS = ("train", "validation", "test")
FILES = ("README.md", *(f"{split}.parquet" for split in SPLITS))
FEATURES = Features(
    {
        **dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES),
        **dict.fromkeys(("annotator", "first", "kind"), Value("string")),
        **dict.fromkeys(("taste_chosen", "taste_rejected"), Value("float64")),
    }
)

TITLE = "# Preferences between two answers"
CARD = f"""
{TITLE}

Answers sampled from {{origin}}, compared in pairs by simulated annotators.

`first` says which of the two was shown first. Ties are dropped. `taste_chosen` and `taste_rejected` are the
annotators' taste without the noise, and given in the test split only: they are for evaluation, and no model
may train on them.

"""


@dataclass
class Counts:
    """What became of the answers to the prompts of one split.

    Args:
        prompts: Prompts asked.
        answers: Answers sampled.
        dropped: Those that were empty, or the same as another to the same prompt.
        compared: Pairs of the others that were shown to an annotator.
        ties: Those the annotator found equally good.
        pairs: Those that got a label.
        agreement: Share (0 to 1) of the labels that agree with the noise-free taste, among pairs on which
            that is decided; what a perfect reward model would reach. None if there is no such pair.
    """

    prompts: int = 0
    answers: int = 0
    dropped: int = 0
    compared: int = 0
    ties: int = 0
    pairs: int = 0
    agreement: float | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in _shown(self).items())


def write(
    output_dir: Path,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    counts: Mapping[str, Counts],
    origin: str,
) -> None:
    """Write a data set, all at once: whoever finds `output_dir` finds it complete.

    Args:
        output_dir: Folder of the data set; replaced if it exists.
        splits: Rows of each split, with the columns of `FEATURES`.
        counts: What became of the answers of each split.
        origin: Which model the answers are from, and whose prompts, as a phrase.
    """
    with write_folder(output_dir) as folder:
        for name, rows in splits.items():
            Dataset.from_list(list(rows), features=FEATURES).to_parquet(folder / f"{name}.parquet")
        (folder / "README.md").write_text(_card(splits, counts, origin), encoding="utf-8")


def _card(splits: Mapping[str, Any], counts: Mapping[str, Counts], origin: str) -> str:
    files = [{"split": name, "path": f"{name}.parquet"} for name in splits]
    header = {"configs": [{"config_name": "default", "data_files": files}], "tags": ["preference"]}
    columns = list(asdict(Counts()))
    table = [["split", *columns], ["---", *["---:"] * len(columns)]]
    table += [[name, *_shown(counts[name]).values()] for name in splits]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in table)
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n{CARD.format(origin=origin)}{lines}"


def _shown(counts: Counts) -> dict[str, str]:
    values = asdict(counts)
    return {name: f"{value:.3f}" if isinstance(value, float) else str(value) for name, value in values.items()}
