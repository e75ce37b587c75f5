"""The path from random weights to reasoning as one picture, for readers who have never heard of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.metric_info import is_share, metric_info
from pipeline.evaluation.results import StageResult
from pipeline.report.labels import stage_info, stage_kind, twins
from pipeline.report.load import Run
from pipeline.report.summary import training_cost
from pipeline.report.text import magnitude, number
from pipeline.stages import STAGES

LONGEST_SAMPLE = 160
"""Characters of a sample."""


PHRASES = {
    "bits_per_byte": "{now} bits for each byte of unseen text, the fewer the better",
    "instruction_accuracy": "{now} of unseen questions answered rightly",
    "reward_accuracy": "agrees with {now} of unseen choices",
    "win_rate": "preferred to {against} in {now} of comparisons",
    "pass@1": "{now} of unseen problems solved",
}
"""Figures in words; others are called by their label."""


def path_steps(run: Run, links: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the boxes of the picture, for path.html.jinja.

    Args:
        run: The run whose figures and samples they show.
        links: Kind of a stage -> where its box leads.
    """
    boxes: list[dict[str, Any]] = []
    before: StageResult | None = None
    for kind, info in STAGES.items():
        if (box := info.box) is None:
            continue
        stage = next((stage for one in (kind, *box.others) for stage in _stages(run, one)), None)
        prompt, sample = _sample(run, stage)
        boxes.append(
            {
                "drawing": box.drawing,
                "number": len(boxes),
                "title": STAGES[stage_kind(stage.name)].name if stage else info.name,
                "stage": stage.name if stage else "",
                "about": box.about,
                "goes_in": _amount(stage) + box.goes_in,
                "trains": box.trains,
                "parts": [_part(run, name, what) for name, what in box.parts],
                "figure": _figure(run, stage, before) if stage else "",
                "prompt": prompt,
                "sample": sample,
                "link": links.get(kind, ""),
            }
        )
        before = stage or before
    return boxes


def _stages(run: Run, kind: str) -> list[StageResult]:
    """Return the stages of a kind, the last one first, without those that only serve for comparison."""
    names = [name for name in reversed(run.stages) if stage_kind(name) == kind and name not in twins(run.stages)]
    return [run.stages[name] for name in names]


def _part(run: Run, name: str, what: str) -> dict[str, str]:
    stages = _stages(run, name)
    title = STAGES[name].name if name in STAGES else name
    return {"title": title, "what": what, "figure": _figure(run, stages[0], None) if stages else ""}


def _amount(stage: StageResult | None) -> str:
    """Return how much the stage was trained on, to put before what it is."""
    tokens = training_cost(stage)[0] if stage else 0
    return f"{magnitude(tokens)} tokens of " if tokens else ""


def _figure(run: Run, stage: StageResult, before: StageResult | None) -> str:
    """Return the key figure of a stage in words, with that of the stage before it."""
    aims = stage_info(stage.name).aims or ("bits_per_byte",)
    aim = next((name for name in aims if name in stage.metrics), None)
    if aim is None:
        return ""

    def show(value: float) -> str:
        return f"{100 * value:.0f}%" if is_share(aim) else number(value, 2)

    words = PHRASES.get(aim, f"{metric_info(aim).label}: {{now}}")
    was = before.metrics.get(aim) if before and aim != "win_rate" else None
    shown = words.format(now=show(stage.metrics[aim].value), against=run.against)
    return f"{shown} (before: {show(was.value)})" if was else shown


def _sample(run: Run, stage: StageResult | None) -> tuple[str, str]:
    """Return a prompt and what the stage answers: the first problem for reasoning, otherwise the first prompt."""
    if stage is None:
        return "", ""
    if stage_info(stage.name).held_out == "problems" and stage.traces:
        return _cut(str(stage.traces[0]["problem"])), _cut(str(stage.traces[0]["answer"]))
    if stage.answers:
        return _cut(str(stage.answers[0]["prompt"])), _cut(str(stage.answers[0]["answer"]))
    return "", ""


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE].rstrip()} …"
