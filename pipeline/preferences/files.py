"""The files of a preference data set in Hub layout: README.md and one Parquet file per split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCardData

from pipeline.data.columns import PREFERENCES
from pipeline.files import write_folder

SPLITS = ("train", "validation", "test")
FILES = ("README.md", *(f"{split}.parquet" for split in SPLITS))

TITLE = "# Preferences between two answers"
CARD = f"""
{TITLE}

Answers sampled from {{origin}}, compared in pairs by {{judge}}.

`first` says which of the two answers was shown first. Ties are dropped. `taste_chosen` and `taste_rejected` are the
annotators' taste without the noise. Only the test split has them: they are for evaluation, and no model may train on
them.

"""


ANNOTATORS = "simulated annotators"


@dataclass
class Counts:
    """Counts of the prompts, answers and pairs of one split.

    Attributes:
        prompts: Prompts sampled from.
        answers: Answers sampled.
        dropped: Answers that were empty or repeated another one to the same prompt.
        compared: Pairs of the remaining answers that were shown to an annotator.
        ties: Pairs that the annotator found equally good.
        pairs: Pairs that got a label.
        agreement: Share (0 to 1) of the labels that agree with the noise-free taste, among pairs on which the taste is
            not indifferent: the accuracy of a perfect reward model. None if there are no such pairs.
    """

    prompts: int = 0
    answers: int = 0
    dropped: int = 0
    compared: int = 0
    ties: int = 0
    pairs: int = 0
    agreement: float | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {text}" for name, text in self.texts().items())

    def texts(self) -> dict[str, str]:
        """Return every count as text, by name."""
        return {k: f"{value:.3f}" if isinstance(value, float) else str(value) for k, value in asdict(self).items()}


def write(
    output_dir: Path,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    counts: Mapping[str, Counts],
    origin: str,
    judge: str = ANNOTATORS,
) -> None:
    """Write a data set, either whole or not at all.

    Args:
        output_dir: Folder of the data set; replaced if it exists.
        splits: Rows of each split, with the columns of `PREFERENCES`; a split without rows is left out.
        counts: What became of the answers of each split.
        origin: The model that answered and the data set of the prompts, as a phrase.
        judge: Who labelled the pairs, as a phrase.
    """
    with write_folder(output_dir) as folder:
        for name, rows in splits.items():
            if not rows:  # `load_dataset` refuses a split without rows
                continue
            Dataset.from_list(list(rows), features=PREFERENCES).to_parquet(folder / f"{name}.parquet")
        (folder / "README.md").write_text(card(counts, origin, judge), encoding="utf-8", newline="\n")


def card(counts: Mapping[str, Counts], origin: str, judge: str = ANNOTATORS) -> str:
    """Write the data set card: its YAML header lists the splits for `load_dataset`, its table the counts of each."""
    data_files = [{"split": name, "path": f"{name}.parquet"} for name in counts if counts[name].pairs]
    header = DatasetCardData(configs=[{"config_name": "default", "data_files": data_files}], tags=["preference"])
    columns = Counts().texts()
    table = [["split", *columns], ["---", *["---:"] * len(columns)]]
    table += [[name, *count.texts().values()] for name, count in counts.items()]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in table)
    return f"---\n{header}\n---\n{CARD.format(origin=origin, judge=judge)}{lines}"
