"""People's votes, `votes.jsonl`, and the preference data set that is made of them beside it.

A line of the file is a vote of a person on two answers to a prompt, `a` by `model_a` and `b` by `model_b`:

    {"id": "…", "pair": "…", "time": "…", "annotator": "ann", "prompt": [...], "a": "It is red.", "b": "Red.",
     "model_a": "2_sft", "model_b": "3_ppo", "sampling": {...}, "shown_first": "b", "choice": "a",
     "undoes": null, "seconds": 3.2, "comment": ""}

`choice` is "a", "b", "tie", "bad" (both are), "skip", or null if the line only takes a vote back. `undoes` is the id of
that vote; with a choice, the line corrects it. Lines are appended and never changed. The data set has the form of that
of `pipeline.preferences.files`, one row for each vote that prefers one answer; the others are counted in README.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.arguments import VOTES_FILE
from pipeline.errors import Problem, UserError
from pipeline.files import check_regular, lock, write_text

CHOICES = ("a", "b", "tie", "bad", "skip")
OTHER = {"a": "b", "b": "a"}
OUTCOMES = {"a": 1.0, "b": 0.0, "tie": 0.5, "bad": 0.5}
"""The outcome of a vote for answer `a`; a skipped pair has none."""
SPLITS = ("train", "validation", "test")

Vote = dict[str, Any]

TEXT = ("id", "pair", "annotator", "a", "b", "model_a", "model_b")
"""Fields of a vote that are text."""

CARD = """
# People's preferences between two answers

Answers of {models}, compared in pairs by {annotators}, who did not know whose answers they are. `first` says which of
the two was shown first. Ties, pairs of which both answers are bad and skipped pairs are counted, and left out. All
votes on a prompt are in one split.

{table}
Made from `votes.jsonl` with the SHA-256 digest {digest}.
"""


def read_votes(path: Path) -> list[Vote]:
    """Return the lines of a file of votes, each vote once. There are none in a file that does not exist.

    A last line that was not written whole is left out: this vote was never confirmed.

    Raises:
        UserError: If another line is not a vote, or the file cannot be read.
    """
    try:
        content = b""
        if path.exists():
            check_regular(path)
            content = path.read_bytes()
    except OSError as error:
        raise UserError(Problem("dataset_name", path, f"cannot be read ({error.strerror or error})")) from None
    votes: dict[str, Vote] = {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            vote = _checked(json.loads(line))
            votes.setdefault(vote["id"], vote)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            if number < len(lines):
                remedy = f"is not a vote ({error}); correct or remove it"
                raise UserError(Problem("dataset_name", f"{path}, line {number}", remedy)) from None
    return list(votes.values())


def _checked(vote: Any) -> Vote:
    wrong = [name for name in TEXT if not isinstance(vote[name], str)]
    turns = vote["prompt"]
    if not turns or not all(isinstance(turn[key], str) for turn in turns for key in ("role", "content")):
        wrong.append("prompt")
    undoes = vote.get("undoes")
    if vote["choice"] not in CHOICES and not (vote["choice"] is None and isinstance(undoes, str)):
        wrong.append("choice")
    if not isinstance(undoes, str | None):
        wrong.append("undoes")
    if wrong:
        raise ValueError(f"{wrong[0]} is {json.dumps(vote[wrong[0]])[:80]}")
    return dict(vote)


def standing(votes: Sequence[Vote]) -> list[Vote]:
    """Return the votes that count: those that their annotator has neither taken back nor corrected."""
    undone = {(vote["annotator"], vote["undoes"]) for vote in votes if vote.get("undoes")}
    return [vote for vote in votes if vote["choice"] is not None and (vote["annotator"], vote["id"]) not in undone]


def split_of(prompt: Sequence[dict[str, str]]) -> str:
    """Return the split of all votes on a prompt: of ten prompts, one is for the test and one for validation."""
    text = json.dumps([[turn["role"], turn["content"]] for turn in prompt])
    tenth = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(tenth, "train")


def as_pairs(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Return the votes that prefer one answer, as rows of a preference data set."""
    return [
        {
            "prompt": [{key: turn[key] for key in ("role", "content")} for turn in vote["prompt"]],
            "chosen": [{"role": "assistant", "content": vote[vote["choice"]]}],
            "rejected": [{"role": "assistant", "content": vote[OTHER[vote["choice"]]]}],
            "annotator": vote["annotator"],
            "first": "chosen" if vote.get("shown_first") == vote["choice"] else "rejected",
            "kind": "",
            **dict.fromkeys(("taste_chosen", "taste_rejected")),
        }
        for vote in votes
        if vote["choice"] in OTHER and vote["a"].strip() != vote["b"].strip()
    ]


def update_data_set(folder: Path) -> int:
    """Write the data set of the votes in `folder`, unless it is up to date.

    Returns:
        The number of its rows.

    Raises:
        UserError: If a line of the file is not a vote, or the folder cannot be written to.
    """
    card = folder / "README.md"
    rows, text = _data_set(folder)
    total = sum(map(len, rows.values()))
    if card.exists() and card.read_text(encoding="utf-8", errors="replace") == text:
        return total
    from datasets import Dataset  # a second, which the report does not need

    from pipeline.data.columns import PREFERENCES

    with lock(folder / ".data.lock"):  # several processes may read the same data
        rows, text = _data_set(folder)
        for name in SPLITS:
            path = folder / f"{name}.parquet"
            if rows[name]:
                tmp_file = folder / f".{name}.tmp"
                Dataset.from_list(rows[name], features=PREFERENCES).to_parquet(tmp_file)
                os.replace(tmp_file, path)
            else:  # `load_dataset` refuses a split without rows
                path.unlink(missing_ok=True)
        write_text(card, text)
    return sum(map(len, rows.values()))


def _data_set(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Return the rows of each split, and the card."""
    digest = hashlib.sha256((folder / VOTES_FILE).read_bytes()).hexdigest()
    by_split: dict[str, list[Vote]] = {name: [] for name in SPLITS}
    for vote in standing(read_votes(folder / VOTES_FILE)):
        by_split[split_of(vote["prompt"])].append(vote)
    rows = {name: as_pairs(part) for name, part in by_split.items()}
    return rows, _card(by_split, rows, digest)


def _card(votes: dict[str, list[Vote]], rows: dict[str, list[dict[str, Any]]], digest: str) -> str:
    from huggingface_hub import DatasetCardData

    data_files = [{"split": name, "path": f"{name}.parquet"} for name in SPLITS if rows[name]]
    configs = [{"config_name": "default", "data_files": data_files}] if data_files else None
    header = DatasetCardData(configs=configs, tags=["preference", "human-feedback"])
    table = "| split | prompts | votes | pairs | ties | both bad | skipped |\n| --- |" + " ---: |" * 6 + "\n"
    for name, part in votes.items():
        counts = Counter(vote["choice"] for vote in part)
        prompts = len({json.dumps(vote["prompt"]) for vote in part})
        numbers = [prompts, len(part), len(rows[name]), counts["tie"], counts["bad"], counts["skip"]]
        table += f"| {name} | {' | '.join(map(str, numbers))} |\n"
    every = [vote for part in votes.values() for vote in part]
    models = sorted({vote[side] for vote in every for side in ("model_a", "model_b")})
    people = len({vote["annotator"] for vote in every})
    named = ", ".join(f"`{Path(name).name}`" for name in models) or "no model yet"
    annotators = "one person" if people == 1 else f"{people} people"
    return f"---\n{header}\n---\n{CARD.format(models=named, annotators=annotators, table=table, digest=digest)}"
