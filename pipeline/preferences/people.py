"""People instead of annotators: the step that waits for their votes, and a judge that decides as they did.

People may also vote by hand, in a file that the judge writes for each evaluation. It has a line for each pair without
votes, `{"prompt": [...], "first": "It is red.", "second": "Red. Bye.", "choice": null}`, once or more. People set
`choice` to "first", "second" or "tie".
"""

import json
import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.data.arguments import option
from pipeline.data.messages import Row
from pipeline.data.votes import OUTCOMES, VOTES_FILE, VoteLog, parse_lines, read_votes, update_data_set, valid_votes
from pipeline.errors import EXIT_WAITING, RunStopped, as_typed, refuse
from pipeline.files import check_links, write_text
from pipeline.preferences.collect import AnswerArguments, label_samples
from pipeline.preferences.judges import Judge, compare
from pipeline.progress import report_progress

logger = logging.getLogger("pipeline.preferences.people")

BY_HAND = {"first": 1.0, "second": 0.0, "tie": 0.5}
"""Choice that was made by hand -> the outcome for the first answer."""


@dataclass
class VoteArguments(AnswerArguments):
    """The model, the prompts and the sampling of the pairs that people see, and how many votes are wanted."""

    min_votes: int = option(300, "Votes for one of two answers before the run continues.")
    simulated_votes: bool = option(False, "Simulate votes if there are none, to try the run without people.")


def wait_for_votes(args: VoteArguments) -> int:
    """Write the data set of the votes, and return the number of votes that prefer one answer.

    Raises:
        RunStopped: If there are fewer than `min_votes`.
        UserError: If the votes are damaged, or a link leads out of the run.
    """
    folder = Path(args.output_dir)
    refuse(*check_links(folder))
    if args.simulated_votes and not (folder / VOTES_FILE).exists():
        _simulate_votes(args, folder)
    number = 0
    if (folder / VOTES_FILE).is_file():
        number = update_data_set(folder)
    report_progress(done=number, total=args.min_votes, unit="votes")
    if number < args.min_votes:
        advice = f"Collect them on the page that `{as_typed('app', folder.parent)}` opens, in the section Prefer."
        message = f"{number} of {args.min_votes} votes. Ties and skipped pairs do not count. {advice}"
        raise RunStopped(message, EXIT_WAITING)
    logger.info("%d votes prefer one of two answers", number)
    return number


def _simulate_votes(args: VoteArguments, folder: Path) -> None:
    """Write votes of the simulated annotators, as the page would."""
    # They do not compare models: both answers come from the same one, and `a` is always better.
    splits, _ = label_samples(args)
    model = Path(args.model_name_or_path).name
    common = {
        "model_a": model,
        "model_b": model,
        "sampling": {"temperature": args.temperature, "min_p": args.min_p, "max_new_tokens": args.max_new_tokens},
        "choice": "a",
        "undoes": None,
        "seconds": None,
        "comment": "",
    }
    with closing(VoteLog(folder)) as log:
        for number, row in enumerate(chain.from_iterable(splits.values())):
            vote = {
                "id": f"simulated-{number}",
                "pair": f"simulated-{number}",
                "annotator": f"simulated ({row['annotator']})",
                "prompt": row["prompt"],
                "a": row["chosen"][0]["content"],
                "b": row["rejected"][0]["content"],
                "shown_first": "a" if row["first"] == "chosen" else "b",
            }
            log.add(vote | common | {"time": datetime.now(UTC).isoformat(timespec="milliseconds")})


def load_votes(path: Path) -> Judge:
    """Return a judge that decides as most people voted, on the page or by hand in `path`, and adds new pairs there.

    Raises:
        UserError: If the votes are damaged.
    """
    content = b""
    if path.exists():
        content = path.read_bytes()
    lines = list(parse_lines(content, _check_line, path, "judge", "a choice is first, second, tie or null"))
    # The outcomes of the votes for an answer, by the prompt, the answer and its opponent.
    decided: dict[str, list[float]] = defaultdict(list)

    def count_vote(prompt: Any, answer: str, opponent: str, outcome: float) -> None:
        decided[json.dumps([prompt, answer, opponent])].append(outcome)
        decided[json.dumps([prompt, opponent, answer])].append(1 - outcome)

    for vote in valid_votes(read_votes(path.with_name(VOTES_FILE))):
        if vote["choice"] != "skip":
            count_vote(vote["prompt"], vote["a"], vote["b"], OUTCOMES[vote["choice"]])
    for line in lines:
        if line["choice"]:
            count_vote(line["prompt"], line["first"], line["second"], BY_HAND[line["choice"]])
    listed = {_unordered(line["prompt"], line["first"], line["second"]) for line in lines}

    def match(answers: Sequence[str], opponents: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        outcomes: list[float | None] = []
        for answer, opponent, row in zip(answers, opponents, rows, strict=True):
            prompt = row["prompt"]
            if answer == opponent:
                outcomes.append(0.5)
                continue
            votes = decided.get(json.dumps([prompt, answer, opponent]))
            if votes:
                outcomes += compare([fmean(votes)], [0.5])
                continue
            outcomes.append(None)
            pair = _unordered(prompt, answer, opponent)
            if pair not in listed:
                listed.add(pair)
                # The pair itself determines the order, so that a later evaluation finds the same line.
                first, second = random.Random(pair).sample((answer, opponent), 2)
                lines.append({"prompt": prompt, "first": first, "second": second, "choice": None})
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return outcomes

    return Judge("people's votes", match, constants=0)


def _unordered(prompt: Any, first: str, second: str) -> str:
    """Return what identifies two answers to a prompt, in whichever order."""
    return json.dumps([prompt, *sorted((first, second))])


def _check_line(line: Any) -> dict[str, Any]:
    """Return a line of the file for votes by hand, or raise an error that `parse_lines` reports."""
    is_choice = line["choice"] in (None, *BY_HAND)
    if not is_choice or not isinstance(line["first"], str) or not isinstance(line["second"], str):
        raise ValueError(f"its choice is {line['choice']!r}")
    return {name: line[name] for name in ("prompt", "first", "second", "choice")}
