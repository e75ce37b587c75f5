"""The rows that stages are measured on, and the prompts that all of them answer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from pipeline.data.messages import is_informative
from pipeline.data.overlap import overlap
from pipeline.errors import Problem, UserError
from pipeline.evaluation.graders import COMPARED, Grader, load_grader
from pipeline.evaluation.sources import Example, Part, Reader
from pipeline.files import read_json
from pipeline.rewards.sandbox.run import validate_sandbox
from pipeline.stages import HELD_OUT

logger = logging.getLogger(__name__)

MAX_EXAMPLES = {"text": 400, "instructions": 400, "problems": 300, "longer": 150, "prompts": 200, "pairs": 1000}
"""Largest number of examples used: intervals a few hundredths wide, in seconds of CPU time."""

MAX_TRAINING_ROWS = 10_000
"""Rows that stages train on in which held-out rows and the most frequent answers are looked for, in a few seconds."""

OVERLAP_WORDS = 13
"""Words in a row that a held-out row has in common with one that is trained on only if it is a copy (as for GPT-3)."""

FIXED_PROMPTS: tuple[str, ...] = (
    "What is an LLM?",
    "Can you explain what a fox is?",
    "I would like to know where to find a piano.",
    "Can you say what a hedgehog does?",
    "I would like to know how big a lion is.",
    "Can you tell me something about a tokenizer?",
    "Can you summarise this in one sentence? It was warm. One day Julia painted a hedgehog in the park. "
    "Carl had never painted a hedgehog. You know a hedgehog by sharp spines. Carl found Julia in the park.",
    "I would like a function add_7 that adds 7 to a number.",
    "Sam has 14 coins. Sam finds 5 coins. Sam sells 3 coins. Sam gets 4 coins. How many are left?",
    "Greta has children of ages 3, 2, 9, 1, 6. Which age comes third?",
)
"""Stages answer these greedily in a run that generates its data; otherwise the first of them, and held-out prompts."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples; without data of a kind, its list is empty.

    Attributes:
        texts: `text` and `kind`, for bits per byte.
        instructions: `messages`, `kind` and perhaps how they are graded.
        problems: `prompt`, `answer` and `kind`, for pass@k.
        longer: Problems that are longer than those of the training split.
        majority: Most frequent answer of each kind of problem in the training split.
        prompts: `prompt`, `kind` and perhaps how they are graded, for the win rate.
        validation: Other prompts, whose answers are not code, for the baseline `constant`.
        pairs: `prompt`, `chosen` and `rejected`, for reward models.
        graders: Graders of `instructions` and `problems`; without one, each instruction says how it is graded.
        can_vote: Whether samples can vote on the answer to a problem.
        fixed_prompts: Conversations that every stage answers.
        suspects: Data that might overlap with what stages train on -> the rows that these train on.
    """

    texts: list[Example] = field(default_factory=list)
    instructions: list[Example] = field(default_factory=list)
    problems: list[Example] = field(default_factory=list)
    longer: list[Example] = field(default_factory=list)
    majority: dict[str, str] = field(default_factory=dict)
    prompts: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    pairs: list[Example] = field(default_factory=list)
    graders: Mapping[str, Grader] = field(default_factory=dict)
    can_vote: bool = True
    fixed_prompts: Sequence[Sequence[dict[str, str]]] = ()
    suspects: Mapping[str, Part] = field(default_factory=dict)

    def of(self, key: str) -> list[Example]:
        """Return the examples of a key of `evaluate.yaml`."""
        examples: list[Example] = getattr(self, "texts" if key == "text" else key)
        return examples


def read_held_out(run: Path, settings: Mapping[str, Any], flags: Collection[str], baselines: bool) -> HeldOut:
    """Read what the settings name.

    Args:
        run: Directory of the run.
        settings: From `pipeline.evaluation.settings.complete`, with paths that exist.
        flags: Data that options name, for messages.
        baselines: Whether what only baselines need is wanted.

    Raises:
        UserError: If data that options name have no rows, or a data set cannot be read.
    """
    reader = Reader(run, settings, flags)
    limit = settings.get("limit")
    most = {name: min(n, limit or n) for name, n in MAX_EXAMPLES.items()}
    parts = {key: part for key in HELD_OUT if (part := reader.find(key)) is not None}
    # Problems have metrics of their own, which compare final answers instead of looking for words.
    rows = {
        key: reader.read(key, part, most[key], left_out="reasoning" if key == "instructions" else None)
        for key, part in parts.items()
    }
    _warn_of_system_prompts(reader, rows)
    graders: dict[str, Grader] = {
        key: load_grader(grade, f"{key}: grade")
        for key in ("instructions", "problems")
        if key in parts and ((grade := parts[key].source.grade) is not None or key == "problems")
    }
    longer = reader.find("problems", "test_longer")
    found = HeldOut(
        texts=[row for row in rows.get("text", ()) if row["text"].strip()],
        instructions=drop_ungradable(rows.get("instructions", ())),
        problems=rows.get("problems", []),
        longer=reader.read("problems", longer, most["longer"]) if longer else [],
        majority=_most_frequent_answers(reader) if baselines else {},
        prompts=drop_ungradable(rows.get("prompts", ())),
        validation=reader.read_validation(most["prompts"]) if baselines else [],
        pairs=[row for row in rows.get("pairs", ()) if is_informative(row)],
        graders=graders,
        can_vote="problems" in parts and parts["problems"].source.grade in COMPARED,
        fixed_prompts=_fixed_prompts(run, settings, rows),
        suspects=reader.suspects(parts),
    )
    if flags and not any(map(found.of, HELD_OUT)):
        raise UserError(
            *(Problem(f"--{key}", settings[key]["dataset_name"], "has no rows to measure on") for key in flags)
        )
    return found


def _warn_of_system_prompts(reader: Reader, rows: Mapping[str, Sequence[Example]]) -> None:
    """Warn of named data without a system prompt, if a stage was trained with one."""
    trained = next((source.system_prompt for source in reader.own.values() if source.system_prompt), None)
    for key in sorted(reader.named & rows.keys() - {"text"}) if trained else ():
        column = "messages" if key == "instructions" else "prompt"
        if any(row[column][0]["role"] != "system" for row in rows[key]):
            logger.warning("%s: has no system prompt, and a stage was trained with %r (system_prompt)", key, trained)


def find_overlaps(held_out: HeldOut, folder: Path) -> dict[str, dict[str, Any]]:
    """Look for held-out rows in those that stages train on, where both come from one split or the user names the data.

    Args:
        held_out: The rows.
        folder: Where the evaluations of other stages are written, whose findings are used again.

    Returns:
        For each kind of data: the number of `rows`, of those `found`, the number `trained_on` that were looked at, the
        `n` words in a row that must agree, and a `key` that identifies all of these.
    """
    known = [entry for path in sorted(folder.glob("*.json")) for entry in read_json(path).get("overlap", {}).values()]
    overlaps: dict[str, dict[str, Any]] = {}
    for key, part in held_out.suspects.items():
        tests = [_text_of(key, row) for row in held_out.of(key)]
        size = len(part.data) if isinstance(part.data, Dataset) else None
        path = Path(str(part.source.dataset_name))
        state = path.stat().st_mtime_ns if path.exists() else None
        content = json.dumps([part.place, part.period, size, state, OVERLAP_WORDS, tests], default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        found = next((entry for entry in known if isinstance(entry, dict) and entry.get("key") == digest), None)
        if found is None:
            rows = (row for _, row in part.sample(MAX_TRAINING_ROWS))
            shared = overlap(rows, tests, OVERLAP_WORDS)
            counts = {"rows": shared.test_rows, "found": len(shared.matches), "trained_on": shared.train_rows}
            found = {**counts, "n": OVERLAP_WORDS, "key": digest}
        overlaps[key] = found
    return overlaps


def _text_of(key: str, row: Example) -> dict[str, Any]:
    """Return what is looked for: a text, or messages without those of the system, which many rows share."""
    if key == "text":
        return {"text": row["text"]}
    messages = row["messages" if key == "instructions" else "prompt"]
    return {"messages": [message for message in messages if message["role"] != "system"]}


def drop_ungradable(rows: Sequence[Example]) -> list[Example]:
    """Leave out rows whose answers are code, with one line in the log, where code cannot be graded."""
    if any(row.get("test") for row in rows) and (fault := validate_sandbox()):
        logger.warning("answers that are code are left out: %s", fault)
        return [row for row in rows if not row.get("test")]
    return list(rows)


def _most_frequent_answers(reader: Reader) -> dict[str, str]:
    """Return the most frequent answer to each kind of problem that a stage trains on."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    part = reader.find("problems", trained_on=True) if "problems" not in reader.named else None
    for row in reader.read("problems", part, MAX_TRAINING_ROWS) if part else ():
        if row.get("answer"):
            counts[row["kind"]][row["answer"]] += 1
    return {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}


def _fixed_prompts(
    run: Path, settings: Mapping[str, Any], rows: Mapping[str, Sequence[Example]]
) -> list[list[dict[str, str]]]:
    """Return the prompts that the settings name, or those of the data that the run generates, or held-out ones."""
    own: Sequence[str] = settings.get("fixed_prompts") or (FIXED_PROMPTS if (run / "data").is_dir() else ())
    held_out = [row["messages"][:-1] for row in rows.get("instructions", ())[:5]]
    held_out += [row["prompt"] for key in ("problems", "prompts") for row in rows.get(key, ())[:4]]
    asked = [[{"role": "user", "content": text}] for text in own or FIXED_PROMPTS[:1]]
    return asked if own else [*asked, *held_out][: len(FIXED_PROMPTS)]
