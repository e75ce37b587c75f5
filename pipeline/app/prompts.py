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
from pipeline.errors import UserError
from pipeline.evaluation.evaluate_yaml import CALLED, move, recorded, with_layout
from pipeline.evaluation.held_out import EXAMPLES
from pipeline.evaluation.parts import Reader
from pipeline.files import as_list
from pipeline.models.generation import Messages
from pipeline.report.text import visible
from pipeline.rewards.loading import check_trust
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


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt that no stage was trained on, from the data of a `key` of `evaluate.yaml`.

    `messages` end before the answer. `text` and, for a problem, the correct `result` are as the page shows them.
    """

    key: str
    kind: str
    messages: list[dict[str, str]]
    text: str
    result: str
    row: Mapping[str, Any]


def settings_of(run: Path) -> dict[str, Any]:
    """Return how a run is measured, with the paths of its data updated in case the run was moved.

    Data outside of the run and of the working directory are left out, and named on stderr: a run that somebody else
    made could name any file of this machine, whose rows the page would show to its visitors.
    """
    settings = with_layout(move(recorded(run, ""), run), run)
    sources = {f"trained_on: {key}": source for key, source in settings["trained_on"].items()}
    sources |= {key: settings[key] for key in HELD_OUT if isinstance(settings.get(key), Mapping)}
    for field, source in sources.items():
        try:
            for name in as_list(source["dataset_name"]):
                _check_place(str(name), run, field)
        except UserError as error:
            print(*error.problems, sep="\n", file=sys.stderr)
            key = field.removeprefix("trained_on: ")
            settings["trained_on"] = {name: kept for name, kept in settings["trained_on"].items() if name != key}
            settings[key] = None
    return settings


def _check_place(name: str, run: Path, field: str) -> None:
    """Raise a `UserError` if data lie neither in the run nor below the working directory, and are not trusted."""
    places = [os.path.realpath(place) for place in (run, Path.cwd())]
    # Anything that does not exist is an id on the Hub, or is missing. A file of a folder may be a link.
    for path in [Path(name), *Path(name).rglob("*")] if Path(name).exists() else []:
        if not any(Path(os.path.realpath(path)).is_relative_to(place) for place in places):
            check_trust(name, field)


def loadable_tools(run: Path) -> dict[str, Any]:
    """Return the tools that a run's models may call, by the key of the data whose prompts they are meant for.

    Tools that cannot be loaded are left out, and named on stderr: above all a user's own code, which the run's files
    name and the person who started this command did not (`only_trusted`).
    """
    tools: dict[str, Any] = {}
    for key, names in (settings_of(run).get(CALLED) or {}).items():
        try:
            load_tools(names.get("tools"))
            load_environment(names.get("environment"))
        except UserError as error:
            print(*error.problems, "The model answers without these tools.", sep="\n", file=sys.stderr)
        else:
            tools[key] = names
    return tools


def what_may_be_asked(run: Path) -> str:
    """Return what the cards of the run's data say to ask, on one line, or `GENERAL`."""
    sources = settings_of(run)["trained_on"].values()
    named = [Path(str(name)) for source in sources for name in as_list(source["dataset_name"])]
    for folder in dict.fromkeys([run / "data", *named]):
        # A data set from the Hub, or a file, has no card here.
        with suppress(OSError, UnicodeDecodeError):
            _, heading, rest = (folder / "README.md").read_text(encoding="utf-8").partition(f"{HEADING}\n")
            if heading:
                return " ".join(rest.partition("\n#")[0].split())
    return GENERAL


def things_to_ask(run: Path) -> list[str]:
    """Return the things that a run of pocket knows, such as "a fox"; none for other data, or another release's."""
    match = re.match(r"About (\d+) things, such as a fox,", what_may_be_asked(run))
    if match is None:
        return []
    nouns = [thing.noun for thing in resolve_name("recipes.worlds.pocket.things:things")()]
    return nouns if len(nouns) == int(match[1]) else []


def held_out_prompts(run: Path) -> list[HeldOutPrompt]:
    """Return held-out prompts of a single turn in the order of the data; none if the data cannot be read."""
    reader = Reader(run, settings_of(run), ())
    found, longest = [], 4000
    # The data that have prompts, the most informative ones first.
    for key in ("problems", "instructions", "prompts"):
        # A run can be shown without its data.
        with suppress(UserError):
            without = "reasoning" if key == "instructions" else None
            for row in reader.read(key, reader.find(key), EXAMPLES[key], without):
                messages = row["messages"][:-1] if key == "instructions" else row.get("prompt", [])
                roles = [turn["role"] for turn in messages if turn["role"] != "system"]
                if roles == ["user"] and len(messages[-1]["content"]) <= longest:
                    kind, text = row["kind"] or key.removesuffix("s"), visible(messages[-1]["content"], longest)
                    # Prompts that are not problems can be answered in many ways.
                    result = visible(str(row.get("answer") or "")) if key == "problems" else ""
                    found.append(HeldOutPrompt(key, kind, messages, text, result, row))
    return found


def asks_single_questions(run: Path) -> bool:
    """Return whether all held-out conversations of a run have one question, so that its models know no others.

    False if the run has no such data or they cannot be read.
    """
    reader = Reader(run, settings_of(run), ())
    try:
        rows = reader.read("instructions", reader.find("instructions"), EXAMPLES["instructions"])
    except UserError:
        return False
    questions = [sum(turn["role"] == "user" for turn in row["messages"]) for row in rows]
    return bool(questions) and max(questions) == 1


def open_prompt(
    loaded: Loaded, messages: Messages, called: Mapping[str, Any], found: HeldOutPrompt | None = None
) -> Dialogue:
    """Return a conversation, which may end with the held-out prompt `found`, as a dialogue with the tools `called`."""
    if found and found.key in called:
        return loaded.open({**found.row, "prompt": messages}, load_toolbox(called[found.key], loaded.tokenizer))
    toolbox = load_toolbox(next(iter(called.values()), None), loaded.tokenizer)
    # Any other question has no row for an environment to read, so it only gets functions.
    return loaded.open({"prompt": messages}, replace(toolbox, environment=None) if toolbox else None)
