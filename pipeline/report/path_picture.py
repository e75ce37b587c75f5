"""The path from random weights to reasoning as one picture, for readers who are new to the stages."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import StageResult
from pipeline.report.load import Run, stage_info, stage_kind
from pipeline.report.summary import by_length, seconds, training_cost
from pipeline.report.text import counted, duration, magnitude, number
from pipeline.stages import STAGES


def title(run: Run) -> str:
    """Return the report's name for the run: the recipe with the seed or, if unknown, the directory."""
    recipe = run.record.get("recipe")
    seed = run.record.get("seed")
    name = Path(recipe).name if isinstance(recipe, str) else run.name
    if seed is not None:
        name += f", seed {seed}"
    if run.is_smoke:
        name += ", smoke run"
    return name


def headline(run: Run) -> str:
    """Return a summary in one sentence: first and last stage, time, hardware, and the main metric of each box.

    For example, "From pretraining to reasoning in 42 min on 4 cores: 61% of problems solved (23% before)."
    """
    names = [stage_info(stage).name.lower() for stage in run.stages.values() if stage.metrics or stage.history]
    if len(names) > 1:
        sentence = f"From {names[0]} to {names[-1]}"
    elif names and names[0]:
        sentence = names[0].capitalize()
    else:
        sentence = "Nothing yet"
    total = sum(seconds(run).values())
    if total:
        sentence += f" in {duration(total)}"
    if run.hardware.get("gpu"):
        sentence += f" on {run.hardware['gpu']}"
    elif run.hardware.get("cores"):
        sentence += f" on {counted(run.hardware['cores'], 'core')}"
    results = []
    # The first box is the starting point.
    for box in path_boxes(run, {})[1:]:
        figure = box["figure"]
        if figure and figure["was"]:
            results.append(f"{figure['now']} {figure['what']} ({figure['was']} before)")
        elif figure:
            results.append(f"{figure['now']} {figure['what']}")
    if results:
        sentence += f": {', '.join(results)}"
    return f"{sentence}."


def path_boxes(run: Run, links: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the boxes of the picture from left to right, for path.html.jinja.

    There is a box for each kind of stage that has one in `STAGES`, whether the run has such a stage or not: its texts
    are filled in if it does. If the run has no stage of that kind, a kind whose `box_of` names it takes the box.

    Args:
        run: The run.
        links: Kind -> address of the part of the report that its box links to; a box without one has no link.
    """
    # A box shows the last stage of its kind or, of several variants of a stage, the first.
    stages = [stage for name, stage in run.stages.items() if name not in run.other_architectures]
    last = {stage_kind(stage): stage for stage in stages if run.first_variant(stage) is None}
    boxes: list[dict[str, Any]] = []
    earlier: StageResult | None = None
    for kind, info in STAGES.items():
        box = info.box
        if box is None:
            continue
        kinds = [kind, *(name for name, other in STAGES.items() if other.box_of == kind)]
        stage = next((last[name] for name in kinds if name in last), None)
        parts = []
        for name, what in box.parts:
            if name in STAGES:
                figure = _figure(run, last[name], None) if name in last else None
                parts.append({"title": STAGES[name].name, "what": what, "figure": figure})
            else:
                parts.append({"title": name, "what": what, "figure": None})
        content = {
            "number": len(boxes),
            "title": info.name,
            "stage": "",
            "goes_in": box.goes_in,
            "parts": parts,
            "figure": None,
            "sample": None,
            "link": links.get(kind, ""),
        }
        if stage is not None:
            content["title"] = STAGES[stage_kind(stage)].name
            content["stage"] = stage.name
            tokens, _ = training_cost(stage)
            if tokens:
                content["goes_in"] = f"{magnitude(tokens)} tokens of {box.goes_in}"
            # If it is unknown what the stage started from, it is compared with the stage of the box to its left.
            content["figure"] = _figure(run, stage, run.parent_stage(stage) or earlier)
            content["sample"] = _sample(run, stage)
            earlier = stage
        boxes.append({**vars(box), **content})
    return boxes


def _figure(run: Run, stage: StageResult, start: StageResult | None) -> dict[str, Any] | None:
    """Return the main metric of a stage for its box, None if it was not measured.

    Returns:
        `now` and `was`, its values in the stage and in `start` ("" if unknown); `what`, its name in words; `lower`,
        whether a lower value is better; and `baselines`, the values reached without training.
    """
    aim = run.main_aim(stage) if stage_info(stage).aims else "bits_per_byte"
    if aim not in stage.metrics:
        return None
    info = metric_info(aim)

    def show(result: StageResult) -> str:
        value = result.metrics[aim].value
        return f"{number(100 * value, 0)}%" if info.share else number(value, 2)

    # The phrase of a metric may contain "{lengths}", the range of lengths of the problems.
    lengths = [int(length) for length in by_length(stage)]
    range_of_lengths = ""
    if len(lengths) > 1:
        range_of_lengths = f" of {min(lengths)} to {max(lengths)} steps"
    phrase = info.phrase or info.label.lower()
    was = ""
    # The previous stage's win rate is often its win rate against itself.
    if start is not None and aim in start.metrics and aim != "win_rate":
        was = show(start)
    return {
        "now": show(stage),
        "was": was,
        "what": phrase.format(against=run.against, lengths=range_of_lengths),
        "lower": info.better == "down",
        "baselines": [
            f"{show(baseline)} ({run.baseline_title(baseline)})"
            for baseline in run.baselines_to_beat
            if aim in baseline.metrics
        ],
    }


def showcase(run: Run, last: str = "") -> list[dict[str, Any]]:
    """Return the first held-out problem of each kind, with the answers of two stages to it.

    The second one is the stage named `last` or, by default, the last stage with answers to problems. The first one is
    the stage that it started from or, if that has no such answers, the one before it that does.
    """
    stages = [stage for stage in run.stages.values() if stage.traces]
    if last:
        names = [stage.name for stage in stages]
        stages = stages[: names.index(last) + 1]
    if not stages:
        return []
    compared = stages[-2:]
    parent = run.parent_stage(stages[-1])
    if parent is not None and parent.traces:
        compared = [parent, stages[-1]]
    problems = []
    for first in stages[-1].traces:
        sides = [side for stage in compared for side in _sides(stage, first)]
        problem = {"kind": str(first["kind"]), "problem": str(first["problem"]), "sides": sides}
        problem["reference"] = str(first.get("reference") or "")
        problems.append(problem)
    return problems


def _sides(stage: StageResult, first: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the answers of a stage to a problem, with how many problems its greedy answers solve.

    Args:
        stage: The stage.
        first: The problem, as an entry of `StageResult.traces`.

    Returns:
        For each answer its `text`, whether it is `correct`, and "47 of 60" for the problems `of_kind` and `of_all`.
    """
    estimate = stage.metrics.get("pass@1")
    of_kind = estimate
    # If there is only one kind, it is not broken down.
    if estimate is not None and estimate.by_kind:
        of_kind = estimate.by_kind.get(str(first["kind"]))
    sides = []
    for trace in stage.traces:
        if trace["problem"] == first["problem"]:
            side = {"stage": stage.name, "text": str(trace["answer"]), "correct": trace.get("correct")}
            sides.append({**side, "of_kind": _solved(of_kind), "of_all": _solved(estimate)})
    return sides


def _solved(estimate: Estimate | None) -> str:
    """Return "47 of 60", "" if the number is not known."""
    if estimate is None or not estimate.n:
        return ""
    return f"{estimate.value * estimate.n:.0f} of {estimate.n}"


def _sample(run: Run, stage: StageResult) -> dict[str, Any] | None:
    """Return a sample of a stage's answers for its box, None if it has none.

    For a stage that is measured on problems, this is the first problem with the answers of the stage and the one before
    it. Otherwise, it is the first prompt with the stage's answer.
    """
    if stage_info(stage).held_out == "problems" and stage.traces:
        sample = showcase(run, stage.name)[0]
    elif stage.answers:
        side = {"stage": "", "text": stage.answers[0]["answer"], "correct": None}
        sample = {"problem": stage.answers[0]["prompt"], "reference": "", "sides": [side]}
    else:
        return None
    sides = [{**side, "text": _cut(side["text"])} for side in sample["sides"]]
    return {**sample, "problem": _cut(sample["problem"]), "sides": sides}


def _cut(text: object) -> str:
    """Shorten a text so that it fits into a box: without blank lines, and at most 160 characters."""
    lines = re.sub(r"\s*\n\s*\n\s*", " ⏎\n", str(text).strip())
    return lines if len(lines) <= 160 else f"{lines[:160].rstrip()} …"
