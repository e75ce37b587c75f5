"""The path from random weights to reasoning as one picture, for readers who are new to the stages."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import StageResult
from pipeline.report.load import Run, main_aim, stage_info, stage_kind
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
    """Return a one-sentence summary: from what to what, in what time, on which hardware, with which metrics."""
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
    """Return the boxes of the picture, for path.html.jinja. `links` has the target of each kind's box."""
    # The metric and the sample come from the last stage of each kind, or the first of several variants.
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
            # If it is not known what the stage started from, it is compared with the one of the box before.
            content["figure"] = _figure(run, stage, run.parent_stage(stage) or earlier)
            content["sample"] = _sample(run, stage)
            earlier = stage
        boxes.append({**vars(box), **content})
    return boxes


def _figure(run: Run, stage: StageResult, start: StageResult | None) -> dict[str, Any] | None:
    """Return the main metric of a stage with its name in words, the value of `start`, and those of the baselines.

    None if the metric was not measured.
    """
    aim = main_aim(stage) if stage_info(stage).aims else "bits_per_byte"
    if aim not in stage.metrics:
        return None
    info = metric_info(aim)

    def show(result: StageResult) -> str:
        value = result.metrics[aim].value
        return f"{number(100 * value, 0)}%" if info.share else number(value, 2)

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
    """Return the first held-out problem of each kind, and the answers of two stages to it.

    These are the stage `last`, or the last one with answers, and the stage that it started from.
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
    """Return the answers of a stage to a problem, with how many held-out problems its greedy answers solve."""
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
    """Return an answer of a stage: to the first problem, next to the previous stage's, or else to the first prompt."""
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
    """Return a text without what would stretch the box: blank lines, and what follows the first 160 characters."""
    line = re.sub(r"\s*\n\s*\n\s*", " ⏎\n", str(text).strip())
    return line if len(line) <= 160 else f"{line[:160].rstrip()} …"
