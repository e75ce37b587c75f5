"""What to ask the models of a run: a few sentences about its data, and prompts that training held out.

RUN/data/README.md         "## What may I ask?", written with the data, or `GENERAL`
RUN/data/**/test.parquet   {"kind": "counting", "prompt": [...], "answer": "10"}, as evaluations read it
"""

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pipeline.app.models import Loaded
from pipeline.config.named_code import check_trust
from pipeline.errors import UserError
from pipeline.evaluation.evaluate_yaml import Settings, find_settings, read_record, relocated
from pipeline.evaluation.held_out import EXAMPLES
from pipeline.evaluation.parts import Reader
from pipeline.files import as_list
from pipeline.models.generation import Messages
from pipeline.report.text import visible
from pipeline.stages import HELD_OUT
from pipeline.tools.dialogue import Dialogue
from pipeline.tools.loading import load_environment, load_toolbox, load_tools

HEADING = "## What may I ask?"
"""Heading in README.md of a data set. The text below it says what a model trained on these data knows."""
GENERAL = (
    "Questions that resemble the data of this run. A model that was trained from random weights knows nothing else: "
    "asked about other things, it makes something up."
)
"""Text for data whose card lacks this heading."""
LONGEST_PROMPT = 4000
"""Maximum number of characters of a held-out prompt that the page offers."""
LONGEST_ADVICE = 2000
"""Maximum number of characters of a card that the page and the chat show."""


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt that no stage was trained on."""

    # The key of `evaluate.yaml` whose data it is from, such as "problems".
    key: str
    # What kind of prompt of these data it is, such as "counting".
    kind: str
    # The conversation, without the answer.
    messages: list[dict[str, str]]
    # The last message, as the page shows it.
    text: str
    # The correct result of a problem, as the page shows it, or "".
    result: str
    # The row of the data, with the columns by which rewards are computed.
    row: Mapping[str, Any]


def evaluation_settings(run: Path) -> Settings:
    """Return how a run is evaluated, with the paths of its data updated in case the run was moved.

    Data outside of the run and of the working directory are left out, and named on stderr: a run that somebody else
    made could name any file of this machine, whose rows the page would show to its visitors.
    """
    settings = find_settings(run, *relocated(*read_record(run, ""), run))
    requested = settings.requested
    trained_on = dict(settings.facts.trained_on)
    # Data by key, and the field that messages name.
    sources = [(key, f"trained_on: {key}", source) for key, source in trained_on.items()]
    for key in HELD_OUT:
        measured = requested.source(key)
        if measured:
            sources.append((key, key, measured))
    for key, field, source in sources:
        try:
            for name in as_list(source["dataset_name"]):
                _check_place(str(name), run, field)
        except UserError as error:
            print(*error.problems, sep="\n", file=sys.stderr)
            # Leave out the training data of this key, and its held-out data, which may be rows of them.
            trained_on.pop(key, None)
            if key in HELD_OUT:
                requested = requested.without(key)
    return replace(settings, requested=requested, facts=replace(settings.facts, trained_on=trained_on))


def _check_place(name: str, run: Path, field: str) -> None:
    """Raise a `UserError` if data lie neither in the run nor below the working directory, and are not trusted."""
    path = Path(name)
    # Anything that does not exist is an id on the Hub, or is missing.
    if not path.exists():
        return
    allowed = [os.path.realpath(folder) for folder in (run, Path.cwd())]
    # A file of a folder may be a link.
    for file in [path, *path.rglob("*")]:
        if not any(Path(os.path.realpath(file)).is_relative_to(folder) for folder in allowed):
            check_trust(name, field)


def loadable_tools(run: Path) -> dict[str, Any]:
    """Return the tools that a run's models may call, by the key of the data whose prompts they are meant for.

    Tools that cannot be loaded are left out, and named on stderr: above all a user's own code, which the run's files
    name and the person who started this command did not (`only_trusted`).
    """
    tools: dict[str, Any] = {}
    for key, names in evaluation_settings(run).facts.called.items():
        try:
            load_tools(names.get("tools"))
            load_environment(names.get("environment"))
        except UserError as error:
            print(*error.problems, "The model answers without these tools.", sep="\n", file=sys.stderr)
        else:
            tools[key] = names
    return tools


def question_advice(run: Path) -> str:
    """Return what the cards of the run's data say may be asked, on one line, or `GENERAL` if none says it.

    A card may be a stranger's: its control characters are shown, and a long text is cut.
    """
    folders = [run / "data"]
    for source in evaluation_settings(run).facts.trained_on.values():
        folders += [Path(str(name)) for name in as_list(source["dataset_name"])]
    for folder in dict.fromkeys(folders):
        # A data set from the Hub, or a file, has no card here.
        with suppress(OSError, UnicodeDecodeError):
            card = (folder / "README.md").read_text(encoding="utf-8")
            _, heading, text = card.partition(f"{HEADING}\n")
            if heading:
                section, _, _ = text.partition("\n#")
                return visible(" ".join(section.split()), LONGEST_ADVICE)
    return GENERAL


def pocket_things(run: Path) -> list[str]:
    """Return the things that a run of pocket knows, such as "a fox"; [] for other data, or another release's."""
    match = re.match(r"About (\d+) things, such as a fox,", question_advice(run))
    if match is None:
        return []
    nouns = [thing.noun for thing in resolve_name("recipes.worlds.pocket.things:things")()]
    # Data of another release may have other things.
    if len(nouns) != int(match[1]):
        return []
    return nouns


def held_out_prompts(run: Path) -> list[HeldOutPrompt]:
    """Return held-out prompts of a single turn in the order of the data, the most informative data first.

    Data that cannot be read are left out, because a run can be shown without them.
    """
    reader = Reader(evaluation_settings(run), ())
    prompts = []
    for key in ("problems", "instructions", "prompts"):
        without = "reasoning" if key == "instructions" else None
        with suppress(UserError):
            for row in reader.read(key, reader.find(key), EXAMPLES[key], without):
                prompt = _read_prompt(key, row)
                if prompt is not None:
                    prompts.append(prompt)
    return prompts


def _read_prompt(key: str, row: Mapping[str, Any]) -> HeldOutPrompt | None:
    """Return the prompt of a row, or None if it has several turns, or more than `LONGEST_PROMPT` characters."""
    messages = row["messages"][:-1] if key == "instructions" else row.get("prompt", [])
    roles = [turn["role"] for turn in messages if turn["role"] != "system"]
    if roles != ["user"] or len(messages[-1]["content"]) > LONGEST_PROMPT:
        return None
    kind = row["kind"] or key.removesuffix("s")
    text = visible(messages[-1]["content"], LONGEST_PROMPT)
    # Prompts that are not problems can be answered in many ways.
    result = ""
    if key == "problems":
        result = visible(str(row.get("answer") or ""))
    return HeldOutPrompt(key, kind, messages, text, result, row)


def asks_single_questions(run: Path) -> bool:
    """Return whether all held-out conversations of a run have one question, so that its models know no others.

    False if the run has no such data or they cannot be read.
    """
    reader = Reader(evaluation_settings(run), ())
    try:
        rows = list(reader.read("instructions", reader.find("instructions"), EXAMPLES["instructions"]))
    except UserError:
        return False
    most_questions = 0
    for row in rows:
        questions = sum(turn["role"] == "user" for turn in row["messages"])
        most_questions = max(most_questions, questions)
    return most_questions == 1


def open_prompt(
    loaded: Loaded, messages: Messages, called: Mapping[str, Any], prompt: HeldOutPrompt | None = None
) -> Dialogue:
    """Return a conversation as a dialogue with tools.

    Args:
        loaded: The model that answers.
        messages: The conversation, which ends with a question.
        called: The tools that models may call, from `loadable_tools`.
        prompt: The held-out prompt that the question is, if it is one. An environment reads its row.
    """
    if prompt is not None and prompt.key in called:
        toolbox = load_toolbox(called[prompt.key], loaded.tokenizer)
        return loaded.open({**prompt.row, "prompt": messages}, toolbox)
    toolbox = load_toolbox(next(iter(called.values()), None), loaded.tokenizer)
    # Any other question has no row for an environment to read, so it only gets functions.
    if toolbox is not None:
        toolbox = replace(toolbox, environment=None)
    return loaded.open({"prompt": messages}, toolbox)
