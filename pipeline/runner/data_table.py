"""Which rows and columns the stages of a run have read, as `--smoke` shows it at its end."""

from collections.abc import Mapping
from typing import Any

LONGEST_ROW = 160
"""Characters of a first row that are shown: most of its beginning, and its end."""


def describe_data(steps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table; `steps` are the entries of `run.json`; training steps have `read`.

    Steps that read the same rows in the same way are described together:

        2_sft, 4_grpo  questions.csv: 40 rows, of which 2 are held out
                       question, answer -> messages; not used: choices
                       first row: <|user|>\\nWhat is 1 + 1?<|assistant|>\\n2
    """
    names: dict[str, list[str]] = {}
    described: dict[str, list[str]] = {}
    for name, step in steps.items():
        if step.get("read"):
            lines = _describe_step(step)
            text = "\n".join(lines)
            names.setdefault(text, []).append(name)
            described[text] = lines
    if not described:
        return []
    titles = {text: ", ".join(names[text]) for text in described}
    width = max(map(len, titles.values()))
    table = ["data that the stages read:"]
    for text, lines in described.items():
        first, *rest = lines
        table.append(f"  {titles[text]:{width}}  {first}")
        table += [f"  {'':{width}}  {line}" for line in rest]
    return table


def _describe_step(step: Mapping[str, Any]) -> list[str]:
    """Return what a step has read of each data set, and its first row."""
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
