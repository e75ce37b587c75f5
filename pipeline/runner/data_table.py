"""The table that a run with `--smoke` prints at its end: which rows and columns its stages have read."""

from collections.abc import Mapping
from typing import Any

LONGEST_ROW = 160
"""Characters of a first row that are shown: most of its beginning, and its end."""


def describe_data(steps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table, [] if no step has reported what it reads.

    Steps that read the same rows in the same way are described together:

        2_sft, 4_grpo  questions.csv: 40 rows, of which 2 are held out
                       question, answer -> messages; not used: choices
                       first row: <|user|>\\nWhat is 1 + 1?<|assistant|>\\n2

    Args:
        steps: The entries of `run.json`, by the name of the step (`pipeline.runner.records.RunRecord`).
    """
    # The names of the steps with the same description.
    names: dict[tuple[str, ...], list[str]] = {}
    for name, step in steps.items():
        if step.get("read"):
            names.setdefault(tuple(_describe_step(step)), []).append(name)
    if not names:
        return []
    titles = {description: ", ".join(step_names) for description, step_names in names.items()}
    width = max(map(len, titles.values()))
    table = ["data that the stages read:"]
    for description, title in titles.items():
        first, *rest = description
        table.append(f"  {title:{width}}  {first}")
        table += [f"  {'':{width}}  {line}" for line in rest]
    return table


def _describe_step(step: Mapping[str, Any]) -> list[str]:
    """Return two lines for each data set that a step has read, and one with its first row if that was recorded."""
    lines: list[str] = []
    for source in step["read"]:
        rows = "a stream" if source["rows"] is None else f"{source['rows']:,} rows"
        if source["held_out"] is not None:
            rows += f", of which {source['held_out']:,} are held out"
        columns = f"{', '.join(source['used'])} -> {', '.join(source['made'])}"
        if source["others"]:
            # Rewards may read the other columns of prompts.
            are_prompts = set(source["made"]) <= {"prompt", "answer"}
            use = "passed to rewards" if are_prompts else "not used"
            columns += f"; {use}: {', '.join(source['others'])}"
        lines += [f"{source['source']}: {rows}", columns]
    if step.get("first_row"):
        lines.append(f"first row: {shorten(step['first_row'])}")
    return lines


def shorten(text: str) -> str:
    """Return a text on one line, without its middle if it is long."""
    line = text.replace("\n", "\\n")
    line = "".join(character if character.isprintable() else "?" for character in line)
    if len(line) <= LONGEST_ROW:
        return line
    return f"{line[: LONGEST_ROW * 3 // 4]} [...] {line[-LONGEST_ROW // 4 :]}"
