"""What to ask the models of a run: a few sentences about its data, and prompts that training held out.

RUN/data/README.md         "## What may I ask?", written with the data, or `GENERAL`
RUN/data/**/test.parquet   {"kind": "counting", "prompt": [...], "answer": "10"}, as evaluations read it
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.app.models import Loaded
from pipeline.errors import UserError
from pipeline.evaluation.evaluate_yaml import move, recorded, with_layout
from pipeline.evaluation.held_out import EXAMPLES, Reader
from pipeline.files import as_list
from pipeline.models.generation import Messages
from pipeline.report.text import visible
from pipeline.tools.dialogue import Dialogue
from pipeline.tools.loading import load_toolbox

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
    """Return how a run is measured, with the paths of its data updated in case the run was moved."""
    return with_layout(move(recorded(run, ""), run), run)


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


def open_prompt(
    loaded: Loaded, messages: Messages, called: Mapping[str, Any], found: HeldOutPrompt | None = None
) -> Dialogue:
    """Return a conversation, which may end with the held-out prompt `found`, as a dialogue with the tools `called`."""
    if found and found.key in called:
        return loaded.open({**found.row, "prompt": messages}, load_toolbox(called[found.key], loaded.tokenizer))
    toolbox = load_toolbox(next(iter(called.values()), None), loaded.tokenizer)
    # Any other question has no row for an environment to read, so it only gets functions.
    return loaded.open({"prompt": messages}, replace(toolbox, environment=None) if toolbox else None)
