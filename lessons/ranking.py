"""List the runs that students hand in by how much better they are than the teacher's.

    python -m lessons.ranking hand-ins/* --against runs/pocket
    python -m lessons.ranking hand-ins/* --against runs/pocket --metric 3_ppo win_rate

A run is handed in as its `run.json` and its `evaluations/`, or with `--seeds` as the folders `seed1`, `seed2` and so on
of these. It is compared with the teacher's run of the same seeds, as `fourstage compare --tests N` does for N runs. The
best one of twenty equal runs always looks good. So a run is only called better or worse if its interval, which is
widened for all N together, does not contain 0.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError, exit_on_user_error, refuse
from pipeline.evaluation.intervals import Estimate, confidence_of_each
from pipeline.evaluation.metric_info import metric_info
from pipeline.report.differences import check_rows, compare, judge_change, pair_by_seed
from pipeline.report.load import load_runs
from pipeline.report.seeds import find_seeds
from pipeline.report.text import interval, signed, visible


@dataclass(frozen=True)
class Place:
    """A run in the list.

    Attributes:
        name: Path of the folder that was handed in.
        change: Its metric minus the teacher's, None if the two cannot be compared.
        verdict: "better", "worse" or "same", or why they cannot be compared.
    """

    name: str
    change: Estimate | None
    verdict: str


def rank(hand_ins: Sequence[Path], teacher: Path, stage: str, metric: str) -> list[Place]:
    """Return the runs, the best one first, and last those that cannot be compared.

    Args:
        hand_ins: A folder for each student: a run, or the runs of several seeds.
        teacher: The run that they are compared with, or the runs of the same seeds.
        stage: Name of the stage.
        metric: Name of the metric.

    Raises:
        UserError: If the teacher's run cannot be read.
    """
    teacher_runs = load_runs(find_seeds(teacher))
    compared: list[tuple[float, Place]] = []
    rejected = []
    for folder in hand_ins:
        name = visible(str(folder))
        try:
            pairs, problems = pair_by_seed(load_runs(find_seeds(folder)), teacher_runs)
            refuse(*problems)
            refuse(*check_rows(pairs))
        except UserError as error:
            rejected.append(Place(name, None, str(error.problems[0])))
            continue
        change = compare(pairs, tests=len(hand_ins)).get(stage, {}).get(metric)
        if change is None:
            rejected.append(Place(name, None, f"has no {metric} of {stage}"))
        else:
            compared.append((change.value, Place(name, change, judge_change(metric, change))))
    compared.sort(key=lambda entry: entry[0], reverse=metric_info(metric).better != "down")
    return [place for _, place in compared] + rejected


def format_list(places: Sequence[Place], stage: str, metric: str) -> str:
    """Format the list, one run per line."""
    digits = metric_info(metric).digits
    percent = f"{100 * confidence_of_each(len(places)):.6g}%"
    lines = [f"{metric} of {stage}, minus the teacher's; {percent} intervals, which hold together with 95%"]
    for number, place in enumerate(places, start=1):
        if place.change is None:
            lines.append(f"  –  {place.name:<24} not compared: {place.verdict}")
        else:
            verdict = place.verdict.replace("same", "")
            ends = interval(place.change, digits, sign=True)
            difference = signed(place.change.value, digits)
            lines.append(f"{number:>3}  {place.name:<24} {difference:>7}  {ends:<18} {verdict}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="List runs by how much better they are than the teacher's.")
    parser.add_argument("hand_ins", nargs="+", type=Path, metavar="RUN", help="what a student handed in")
    parser.add_argument("--against", required=True, type=Path, metavar="RUN", help="the teacher's run")
    meaning = "stage and metric (default: 4_grpo pass@1)"
    parser.add_argument("--metric", nargs=2, default=("4_grpo", "pass@1"), metavar=("STAGE", "METRIC"), help=meaning)
    args = parser.parse_args(arguments)
    stage, metric = args.metric
    with exit_on_user_error():
        places = rank(args.hand_ins, args.against, stage, metric)
    print(format_list(places, stage, metric))


if __name__ == "__main__":
    main()
