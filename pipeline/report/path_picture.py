"""The path from random weights to reasoning as one picture, for readers who are new to the stages."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import StageResult
from pipeline.report.load import Run, main_aim, stage_info, stage_kind
from pipeline.report.summary import by_length, seconds, training_cost
from pipeline.report.text import counted, duration, magnitude, number
from pipeline.stages import STAGES


def title(run: Run) -> str:
    """Return the report's name for the run: the recipe with the seed or, if unknown, the directory."""
    recipe, seed = run.record.get("recipe"), run.record.get("seed")
    name = Path(recipe).name if isinstance(recipe, str) else run.name
    return name + (f", seed {seed}" if seed is not None else "") + (", smoke run" if run.is_smoke else "")


def headline(run: Run) -> str:
    """Return a one-sentence summary: from what to what, in what time, on which hardware, with which figures."""
    names = [stage_info(stage).name.lower() for stage in run.stages.values() if stage.metrics or stage.history]
    said = f"From {names[0]} to {names[-1]}" if names[1:] else "".join(names).capitalize() or "Nothing yet"
    if taken := sum(seconds(run).values()):
        said += f" in {duration(taken)}"
    if gpu := run.hardware.get("gpu"):
        said += f" on {gpu}"
    elif cores := run.hardware.get("cores"):
        said += f" on {counted(cores, 'core')}"
    # The first box is the starting point.
    figures = [box["figure"] for box in path_boxes(run, {})[1:] if box["figure"]]
    reached = [f"{it['now']} {it['what']}" + (f" ({it['was']} before)" if it["was"] else "") for it in figures]
    return f"{said}: {', '.join(reached)}." if reached else f"{said}."


def path_boxes(run: Run, links: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the boxes of the picture, for path.html.jinja. `links` has the target of each kind's box."""
    # The figure and the sample come from the last stage of each kind, or the first of several variants.
    shown_stages = [stage for name, stage in run.stages.items() if name not in run.twins]
    last = {stage_kind(stage): stage for stage in shown_stages if run.first_variant(stage) is None}
    boxes: list[dict[str, Any]] = []
    before: StageResult | None = None
    for kind, info in STAGES.items():
        if (box := info.box) is None:
            continue
        stage = next((last[one] for one in (kind, *box.others) if one in last), None)
        tokens = training_cost(stage)[0] if stage else 0
        parts = []
        for name, what in box.parts:
            figure = _figure(run, last[name], None) if name in last else None
            parts.append({"title": STAGES[name].name if name in STAGES else name, "what": what, "figure": figure})
        shown = {
            "number": len(boxes),
            "title": STAGES[stage_kind(stage)].name if stage else info.name,
            "stage": stage.name if stage else "",
            "goes_in": (f"{magnitude(tokens)} tokens of " if tokens else "") + box.goes_in,
            "parts": parts,
            "figure": _figure(run, stage, run.origin(stage) or before) if stage else None,
            "sample": _sample(run, stage) if stage else None,
            "link": links.get(kind, ""),
        }
        boxes.append({**vars(box), **shown})
        # If it is not known what the stage of the next box started from, its figure is compared with this one.
        before = stage or before
    return boxes


def _figure(run: Run, stage: StageResult, before: StageResult | None) -> dict[str, Any] | None:
    """Return the main figure of a stage with its name in words, the previous stage's, and the baselines'."""
    aim = main_aim(stage) if stage_info(stage).aims else "bits_per_byte"
    if aim not in stage.metrics:
        return None
    info, lengths = metric_info(aim), [int(length) for length in by_length(stage)]

    def show(result: StageResult) -> str:
        value = result.metrics[aim].value
        return f"{number(100 * value, 0)}%" if info.share else number(value, 2)

    measured = f" of {min(lengths)} to {max(lengths)} steps" if len(lengths) > 1 else ""
    return {
        "now": show(stage),
        # The previous stage's win rate is often its win rate against itself.
        "was": show(before) if before and aim in before.metrics and aim != "win_rate" else "",
        "what": (info.phrase or info.label.lower()).format(against=run.against, lengths=measured),
        "lower": info.better == "down",
        "baselines": [f"{show(it)} ({run.baseline_title(it)})" for it in run.bars if aim in it.metrics],
    }


def showcase(run: Run, last: str = "") -> list[dict[str, Any]]:
    """Return the first held-out problem of each kind, and the answers of the stage `last` and of its start."""
    traced = [stage for stage in run.stages.values() if stage.traces]
    names = [stage.name for stage in traced]
    stages = traced[: names.index(last) + 1 if last else None][-2:]
    origin = run.origin(stages[-1]) if stages else None
    if origin and origin.traces:
        stages = [origin, stages[-1]]
    problems = []
    for shown in stages[-1].traces if stages else ():
        sides = []
        for stage in stages:
            # How many held-out problems the greedy answers solve. If there is only one kind, it is not broken down.
            of_all = stage.metrics.get("pass@1")
            of_kind = of_all.by_kind.get(str(shown["kind"])) if of_all and of_all.by_kind else of_all
            solved, alike = (f"{it.value * it.n:.0f} of {it.n}" if it and it.n else "" for it in (of_all, of_kind))
            for trace in [trace for trace in stage.traces if trace["problem"] == shown["problem"]]:
                side = {"stage": stage.name, "text": str(trace["answer"]), "correct": trace.get("correct")}
                sides.append({**side, "of_kind": alike, "of_all": solved})
        problem = {"kind": str(shown["kind"]), "problem": str(shown["problem"]), "sides": sides}
        problems.append({**problem, "reference": str(shown.get("reference") or "")})
    return problems


def _sample(run: Run, stage: StageResult) -> dict[str, Any] | None:
    """Return an answer of a stage: to the first problem, next to the previous stage's, or else to the first prompt."""
    if stage_info(stage).held_out == "problems" and stage.traces:
        shown = showcase(run, stage.name)[0]
    elif stage.answers:
        side = {"stage": "", "text": stage.answers[0]["answer"], "correct": None}
        shown = {"problem": stage.answers[0]["prompt"], "reference": "", "sides": [side]}
    else:
        return None

    def cut(text: object) -> str:
        # Blank lines, or more than 160 characters, would stretch the box.
        line = re.sub(r"\s*\n\s*\n\s*", " ⏎\n", str(text).strip())
        return line if len(line) <= 160 else f"{line[:160].rstrip()} …"

    sides = [{**side, "text": cut(side["text"])} for side in shown["sides"]]
    return {**shown, "problem": cut(shown["problem"]), "sides": sides}
