"""The step of a run at which people vote: it waits until they have, and makes their votes a data set."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pipeline.data.arguments import VOTES_FILE
from pipeline.data.votes import update_data_set
from pipeline.errors import EXIT_WAITING, RunStopped
from pipeline.preferences.collect import PreferenceArguments, label_samples
from pipeline.preferences.votes import VoteLog

logger = logging.getLogger("pipeline.preferences.people")


@dataclass
class VoteArguments(PreferenceArguments):
    """The model, the prompts and the sampling of the pairs that people see, and how many votes are wanted."""

    min_votes: int = field(default=300, metadata={"help": "Votes for one of two answers before the run goes on."})
    simulated_votes: bool = field(
        default=False,
        metadata={"help": "Let the simulated annotators vote if nobody has, to try the run without people."},
    )


def wait_for_votes(args: VoteArguments) -> int:
    """Write the data set of the votes. Returns the number of those that prefer one answer.

    Raises:
        RunStopped: If there are fewer than are wanted.
        UserError: If the votes are damaged.
    """
    folder = Path(args.output_dir)
    if args.simulated_votes and not (folder / VOTES_FILE).exists():
        _simulate(args, folder)
    found = update_data_set(folder) if (folder / VOTES_FILE).is_file() else 0
    if found < args.min_votes:
        raise RunStopped(
            f"{found} of {args.min_votes} votes are there that prefer one of two answers. Collect them on the page "
            f"that `python -m pipeline app {folder.parent}` opens, in the section Prefer.",
            EXIT_WAITING,
        )
    logger.info("%d votes prefer one of two answers", found)
    return found


def _simulate(args: VoteArguments, folder: Path) -> None:
    """Write votes of the simulated annotators, as the page would."""
    splits, _ = label_samples(args)
    sampling = {"temperature": args.temperature, "min_p": args.min_p, "max_new_tokens": args.max_new_tokens}
    log = VoteLog(folder)
    for number, row in enumerate(row for rows in splits.values() for row in rows):
        log.add(
            {
                "id": f"simulated-{number}",
                "pair": f"simulated-{number}",
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "annotator": f"simulated ({row['annotator']})",
                "prompt": row["prompt"],
                "a": row["chosen"][0]["content"],
                "b": row["rejected"][0]["content"],
                **dict.fromkeys(("model_a", "model_b"), Path(args.model_name_or_path).name),
                "sampling": sampling,
                "shown_first": "a" if row["first"] == "chosen" else "b",
                "choice": "a",
                "undoes": None,
                "seconds": None,
                "comment": "",
            }
        )
    log.close()
