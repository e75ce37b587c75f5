"""The held-out rows that stages are measured on, and the rows that baselines need."""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from pipeline.data.arguments import DIVISION, DataArguments
from pipeline.data.messages import is_informative
from pipeline.data.sources import open_source
from pipeline.data.splits import load_splits
from pipeline.errors import Problem, UserError
from pipeline.evaluation.evaluate_yaml import SOURCE_FIELDS, Settings, Source
from pipeline.evaluation.parts import Example, Part, Reader, Rows
from pipeline.files import as_list, read_run
from pipeline.rewards.graders import COMPARED, Grader, grade_rows, load_grader
from pipeline.rewards.sandbox.run import validate_sandbox
from pipeline.stages import HELD_OUT, STAGES, kind_in_name

logger = logging.getLogger(__name__)

EXAMPLES = {"text": 400, "instructions": 400, "problems": 300, "longer": 150, "prompts": 200, "pairs": 1000}
"""Number of examples used without a `limit`, for intervals a few hundredths wide within seconds on a CPU."""
MAX_TRAINING_ROWS = 10_000
"""Training rows that are searched for held-out rows and the most frequent answers, in a few seconds."""
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
"""Stages answer these greedily if the run generates its data; otherwise held-out prompts or, without any, the first."""


@dataclass(frozen=True)
class HeldOut:
    """The rows that a stage is measured on.

    Attributes:
        text, instructions, problems, prompts, pairs: Held-out examples of these keys of `evaluate.yaml`; empty if there
            are no such data.
        longer: Problems that are longer than any in the training split.
        majority: Most frequent answer of each kind of problem in the training split, for the baseline `majority`.
        validation: Other prompts, whose answers are not code, for the baseline `constant`.
        trials: Other problems, on which the baseline `elicited` chooses how to ask.
        shots: Beginnings of conversations with solved problems, for the baseline `elicited`.
        grader: Grades answers to `problems`.
        graded: Whether `problems` are graded at all. Otherwise they have nothing but the reward of an environment.
        can_vote: Whether answers to `problems` have a final answer, so that samples can vote for one.
        fixed_prompts: Conversations that every stage answers.
        remarks: Doubts about the data, for the report.
        suspects: Name of training rows -> the rows, and the keys of held-out data that they might contain copies of.
    """

    text: list[Example] = field(default_factory=list)
    instructions: list[Example] = field(default_factory=list)
    problems: list[Example] = field(default_factory=list)
    longer: list[Example] = field(default_factory=list)
    majority: dict[str, str] = field(default_factory=dict)
    prompts: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    trials: list[Example] = field(default_factory=list)
    shots: list[list[dict[str, str]]] = field(default_factory=list)
    pairs: list[Example] = field(default_factory=list)
    grader: Grader = grade_rows
    graded: bool = True
    can_vote: bool = True
    fixed_prompts: Sequence[Sequence[dict[str, str]]] = ()
    remarks: Sequence[str] = ()
    suspects: Mapping[str, tuple[Part, list[str]]] = field(default_factory=dict)


def read_held_out(settings: Settings, keys_of_options: Collection[str], baselines: bool) -> HeldOut:
    """Read the held-out rows of the data in the settings and, for `baselines`, the rows that only these need.

    tests/evaluation/test_held_out.py guards that no stage of the run trains on any of these rows.

    Args:
        settings: How the run is measured.
        keys_of_options: Keys whose data an option of the command names.
        baselines: Whether baselines are measured.

    Raises:
        UserError: If a data set cannot be read, or if the data that options name have no rows.
    """
    reader = Reader(settings, keys_of_options)
    most = {name: settings.requested.limit or number for name, number in EXAMPLES.items()}
    parts: dict[str, Part] = {}
    rows: dict[str, list[Example]] = {key: [] for key in HELD_OUT}
    for key in HELD_OUT:
        part = reader.find(key)
        if part is not None:
            parts[key] = part
            # Problems have metrics of their own, which compare final answers instead of looking for words.
            excluded_kind = "reasoning" if key == "instructions" else None
            rows[key] = reader.read(key, part, most[key], excluded_kind)
    _warn_of_missing_system_prompts(reader, rows)
    problems = rows["problems"]
    grade = None
    if "problems" in parts:
        grade = parts["problems"].source.grade
    for_baselines: dict[str, Any] = {}
    if baselines:
        for_baselines = _read_for_baselines(reader, parts, problems, settings, most["prompts"])
    held_out = HeldOut(
        text=[row for row in rows["text"] if row["text"].strip()],
        instructions=drop_ungradable(rows["instructions"]),
        problems=problems,
        longer=reader.read("problems", reader.find("problems", "test_longer"), most["longer"]),
        prompts=drop_ungradable(rows["prompts"]),
        pairs=[row for row in rows["pairs"] if is_informative(row)],
        grader=load_grader(grade),
        graded=grade not in COMPARED or all("answer" in row for row in problems),
        can_vote=grade in COMPARED,
        fixed_prompts=_choose_fixed_prompts(settings, rows),
        remarks=list(_remarks_on_division(settings.run)),
        suspects=_find_suspects(reader, parts),
        **for_baselines,
    )
    if keys_of_options and not any(getattr(held_out, key) for key in HELD_OUT):
        problems_of_keys: list[Problem] = []
        for key in keys_of_options:
            source = settings.requested.source(key) or {}
            problem = Problem(f"{key}: dataset_name", source.get("dataset_name"), "has no rows to measure on")
            problems_of_keys.append(problem)
        raise UserError(*problems_of_keys)
    return held_out


def _warn_of_missing_system_prompts(reader: Reader, rows: Mapping[str, Rows]) -> None:
    """Warn if a stage was trained with a system prompt, and rows that the user names lack one."""
    prompts = [source.system_prompt for source in reader.trained_on.values() if source.system_prompt]
    if not prompts:
        return
    for key in sorted(reader.named_by_user - {"text"}):
        column = "messages" if key == "instructions" else "prompt"
        if any(row[column][0]["role"] != "system" for row in rows[key]):
            logger.warning("%s: has no system prompt, and a stage was trained with %r (system_prompt)", key, prompts[0])


def _choose_fixed_prompts(settings: Settings, rows: Mapping[str, Rows]) -> list[Sequence[dict[str, str]]]:
    """Return the conversations that every stage answers.

    They are the `fixed_prompts` of the settings, or else, in a run that generates its data, `FIXED_PROMPTS`, or else
    held-out prompts.
    """
    texts: Sequence[str] = settings.requested.fixed_prompts or ()
    if not texts and (settings.run / "data").is_dir():
        texts = FIXED_PROMPTS
    if texts:
        return [[{"role": "user", "content": text}] for text in texts]
    prompts: list[Sequence[dict[str, str]]] = [row["messages"][:-1] for row in rows["instructions"][:5]]
    for key in ("problems", "prompts"):
        prompts += [row["prompt"] for row in rows[key][:4]]
    if not prompts:
        prompts = [[{"role": "user", "content": FIXED_PROMPTS[0]}]]
    return prompts[: len(FIXED_PROMPTS)]


def _find_suspects(reader: Reader, parts: Mapping[str, Part]) -> dict[str, tuple[Part, list[str]]]:
    """Return the training rows that might contain copies of held-out rows, as `HeldOut.suspects`.

    Pairs, for instance, may be made from test problems. Only among the data that the run generates itself, there are no
    copies. A stream is only searched for its own held-out rows.
    """
    suspects: dict[str, tuple[Part, list[str]]] = {}
    for trained_key, sources in reader.trained_on.items():
        for name in sources.dataset_names:
            source = replace(sources, dataset_name=name)
            keys = list(parts)
            if reader.is_made(source):
                keys = [key for key in parts if not reader.is_made(parts[key].source)]
            if not keys:
                continue
            # An evaluation does not need the training data, which may be on another machine.
            with suppress(UserError):
                part = reader.find(trained_key, trained_on=True, source=source)
                if part is None:
                    continue
                if not isinstance(part.data, Dataset):
                    keys = [key for key in keys if key == trained_key]
                if keys:
                    title = trained_key if trained_key not in suspects else f"{trained_key} ({name})"
                    suspects[title] = part, keys
    return suspects


def _remarks_on_division(run: Path) -> Iterator[str]:
    """Yield a remark for each data set whose rows an earlier release divided differently when it trained a stage.

    Such a stage was trained on rows that are held out by the present release.
    """
    for step, entry in read_run(run).get("steps", {}).items():
        kind = STAGES.get(kind_in_name(step))
        values = entry.get("values", {})
        share = values.get("validation_share", DataArguments.validation_share)
        if entry.get("division") == DIVISION or kind is None or not values.get("dataset_name") or not share:
            continue
        fields_of_source = {name: values[name] for name in SOURCE_FIELDS if values.get(name) is not None}
        for name in as_list(fields_of_source["dataset_name"]):
            # Data that the run makes have splits.
            if Path(name).resolve().is_relative_to(run.resolve()):
                continue
            source = Source(**{**fields_of_source, "dataset_name": name, "validation_share": 0.0})
            # The data may be on another machine.
            with suppress(UserError):
                if _has_moved_division(source, kind.data):
                    remark = f"{step}: an earlier release trained it, which held out other rows of {name}, so that it "
                    remark += "knows rows that are measured; train it again to measure it on rows that it has not seen"
                    yield remark


def _has_moved_division(source: Source, content: str) -> bool:
    """Return whether earlier releases held out other rows of a data set than the present one.

    Rows are held out by their number. Earlier releases numbered the rows after some of them had been dropped: by
    `keep_rows` or, in pairs from files of the user, for any reason. The present release numbers the rows of the file.
    So there is a difference if any row is dropped.

    Args:
        source: One data set, with a `validation_share` of 0, so that no row is held out.
        content: Content of its rows, as in `StageKind.data`.
    """
    name = source.dataset_names[0]
    are_pairs_of_user = content in ("preference", "unpaired") and Path(name).exists()
    if not source.keep_rows and not are_pairs_of_user:
        return False
    splits = open_source(name, source.dataset_config, source.dataset_streaming, source.document)
    rows = splits.get(source.dataset_train_split)
    if len(splits) > 1 or rows is None:
        return False
    # The number of rows of a stream is not known.
    if source.keep_rows or not isinstance(rows, Dataset):
        return True
    remaining, _ = load_splits(source, "preference" if content == "preference" else "unpaired", evaluation=False)
    return len(remaining) != len(rows)


def _read_for_baselines(
    reader: Reader, parts: Mapping[str, Part], problems: Rows, settings: Settings, most: int
) -> dict[str, Any]:
    """Return the fields of `HeldOut` that only baselines need.

    Args:
        reader: Reads the rows.
        parts: The held-out rows, by key.
        problems: The held-out problems that are measured.
        settings: How the run is measured.
        most: Maximum number of prompts for `validation`.
    """
    # The user's own problems have no training split here whose answers would be informative.
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    if "problems" not in reader.named_by_user:
        for row in reader.read("problems", reader.find("problems", trained_on=True), MAX_TRAINING_ROWS):
            if row.get("answer"):
                counts[row["kind"]][row["answer"]] += 1
    shots = _draw_shots(reader, problems, settings.requested.shots)

    def rows_to_choose_on(key: str, most: int) -> list[Example]:
        """Return rows, other than those that are measured, on which the best variant of a baseline is chosen."""
        part = reader.find(key, "validation")
        # Without a validation split, or if that is measured, they are training rows.
        if key in parts and (part is None or part.place == parts[key].place):
            part = reader.find(key, trained_on=True)
        return reader.read(key, part, most)

    trials: list[Example] = []
    if len(as_list(settings.requested.elicit or [])) + len(shots) > 1:
        trials = rows_to_choose_on("problems", 64)
    return {
        "majority": {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()},
        "shots": shots,
        "validation": [row for row in rows_to_choose_on("prompts", most) if not row.get("test")],
        "trials": trials,
    }


def _draw_shots(reader: Reader, problems: Rows, number: int) -> list[list[dict[str, str]]]:
    """Draw two beginnings of conversations, each with `number` solved problems; [] if there are not enough problems."""
    if number <= 0:
        return []
    # Solved problems are among the conversations that a stage trains on.
    kinds = {"reasoning", *(row["kind"] for row in problems)}
    rows = reader.read("instructions", reader.find("instructions", trained_on=True), MAX_TRAINING_ROWS)
    solved = [row["messages"][-2:] for row in rows if row["kind"] in kinds]
    if len(solved) < number:
        return []
    rng = random.Random(0)
    shots = []
    for _ in range(2):
        drawn = rng.sample(solved, number)
        shots.append([message for messages in drawn for message in messages])
    return shots


def drop_ungradable(rows: Rows) -> list[Example]:
    """Return the rows, without those whose answers are code if code cannot be run here, which is logged."""
    if any(row.get("test") for row in rows):
        fault = validate_sandbox()
        if fault:
            logger.warning("answers that are code are omitted: %s", fault)
            return [row for row in rows if not row.get("test")]
    return list(rows)
