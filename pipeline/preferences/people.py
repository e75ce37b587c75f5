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
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.data.arguments import option
from pipeline.data.messages import Row
from pipeline.data.votes import OUTCOMES, VOTES_FILE, VoteLog, parse_lines, read_votes, update_data_set, valid_votes
from pipeline.errors import EXIT_WAITING, RunStopped, as_typed
from pipeline.files import write_text
from pipeline.preferences.collect import AnswerArguments, label_samples
from pipeline.preferences.judges import Judge, compare
from pipeline.progress import report_progress

logger = logging.getLogger("pipeline.preferences.people")

# The outcome for the first answer, by the choice that was made by hand.
BY_HAND = {"first": 1.0, "second": 0.0, "tie": 0.5}


@dataclass
class VoteArguments(AnswerArguments):
    """The model, the prompts and the sampling of the pairs that people see, and how many votes are wanted."""

    min_votes: int = option(300, "Votes for one of two answers before the run continues.")
    simulated_votes: bool = option(False, "Simulate votes if there are none, to try the run without people.")


def wait_for_votes(args: VoteArguments) -> int:
    """Write the data set of the votes, and return the number that prefer one answer; stop if they are too few."""
    folder = Path(args.output_dir)
    if args.simulated_votes and not (folder / VOTES_FILE).exists():
        # Simulated votes do not compare models: both answers come from the same one, and `a` is always better.
        splits, _ = label_samples(args)
        model = Path(args.model_name_or_path).name
        sampling = {"temperature": args.temperature, "min_p": args.min_p, "max_new_tokens": args.max_new_tokens}
        common: dict[str, Any] = {"model_a": model, "model_b": model, "sampling": sampling, "choice": "a"}
        common |= {"undoes": None, "seconds": None, "comment": ""}
        with closing(VoteLog(folder)) as log:
            for number, row in enumerate(row for rows in splits.values() for row in rows):
                vote = dict.fromkeys(("id", "pair"), f"simulated-{number}")
                vote |= {"annotator": f"simulated ({row['annotator']})", "prompt": row["prompt"]}
                vote |= {"a": row["chosen"][0]["content"], "b": row["rejected"][0]["content"]}
                vote |= {"shown_first": "a" if row["first"] == "chosen" else "b"}
                log.add(vote | common | {"time": datetime.now(UTC).isoformat(timespec="milliseconds")})
    found = update_data_set(folder) if (folder / VOTES_FILE).is_file() else 0
    report_progress(done=found, total=args.min_votes, unit="votes")
    if found < args.min_votes:
        advice = f"Collect them on the page that `{as_typed('app', folder.parent)}` opens, in the section Prefer."
        message = f"{found} of {args.min_votes} votes. Ties and skipped pairs do not count. {advice}"
        raise RunStopped(message, EXIT_WAITING)
    logger.info("%d votes prefer one of two answers", found)
    return found


def load_votes(path: Path) -> Judge:
    """Return a judge that decides as most people voted, on the page or by hand in `path`, and adds new pairs there."""
    content = path.read_bytes() if path.exists() else b""
    lines = list(parse_lines(content, _check_line, path, "judge", "a choice is first, second, tie or null"))
    votes = [vote for vote in valid_votes(read_votes(path.with_name(VOTES_FILE))) if vote["choice"] != "skip"]
    cast = [(vote["prompt"], vote["a"], vote["b"], OUTCOMES[vote["choice"]]) for vote in votes]
    cast += [(one["prompt"], one["first"], one["second"], BY_HAND[one["choice"]]) for one in lines if one["choice"]]
    decided: dict[str, list[float]] = defaultdict(list)
    for prompt, answer, opponent, outcome in cast:
        decided[json.dumps([prompt, answer, opponent])].append(outcome)
        decided[json.dumps([prompt, opponent, answer])].append(1 - outcome)
    listed = {json.dumps([line["prompt"], *sorted((line["first"], line["second"]))]) for line in lines}

    def match(answers: Sequence[str], opponents: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        outcomes: list[float | None] = []
        for answer, opponent, row in zip(answers, opponents, rows, strict=True):
            found = [0.5] if answer == opponent else decided.get(json.dumps([row["prompt"], answer, opponent]))
            outcomes += compare([fmean(found)], [0.5]) if found else [None]
            pair = json.dumps([row["prompt"], *sorted((answer, opponent))])
            if not found and pair not in listed:
                listed.add(pair)
                # The pair itself determines the order, so that a later evaluation finds the same line.
                first, second = random.Random(pair).sample((answer, opponent), 2)
                lines.append({"prompt": row["prompt"], "first": first, "second": second, "choice": None})
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return outcomes

    return Judge("people's votes", match, constants=0)


def _check_line(line: Any) -> dict[str, Any]:
    """Return a line of the file for votes by hand, or raise an error that `parse_lines` reports."""
    if line["choice"] not in (None, *BY_HAND) or not all(isinstance(line[side], str) for side in ("first", "second")):
        raise ValueError(f"its choice is {line['choice']!r}")
    return {name: line[name] for name in ("prompt", "first", "second", "choice")}
