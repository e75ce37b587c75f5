"""The path from random weights to reasoning as one picture, for readers who have never heard of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import StageResult
from pipeline.report.load import Run
from pipeline.report.stage_order import stage_info, stage_kind, twins
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


def path_boxes(run: Run, links: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the boxes of the picture, for path.html.jinja.

    Args:
        run: The run whose figures and samples they show.
        links: Kind of a stage -> where its box leads.
    """
    own = {name: stage for name, stage in run.stages.items() if name not in twins(run.stages)}
    # The last stage of each kind gives the figure and the sample.
    last = {stage_kind(name): stage for name, stage in own.items()}
    boxes: list[dict[str, Any]] = []
    before: StageResult | None = None
    for kind, info in STAGES.items():
        if (box := info.box) is None:
            continue
        stage = next((last[one] for one in (kind, *box.others) if one in last), None)
        tokens = training_cost(stage)[0] if stage else 0
        prompt, sample = _sample(stage) if stage else ("", "")
        boxes.append(
            {
                "drawing": box.drawing,
                "number": len(boxes),
                "title": STAGES[stage_kind(stage.name)].name if stage else info.name,
                "stage": stage.name if stage else "",
                "about": box.about,
                "goes_in": (f"{magnitude(tokens)} tokens of " if tokens else "") + box.goes_in,
                "trains": box.trains,
                "parts": [
                    {
                        "title": STAGES[name].name if name in STAGES else name,
                        "what": what,
                        "figure": _figure(run, last[name], None) if name in last else "",
                    }
                    for name, what in box.parts
                ],
                "figure": _figure(run, stage, before) if stage else "",
                "prompt": prompt,
                "sample": sample,
                "link": links.get(kind, ""),
            }
        )
        # The figure of the next box is compared with the last stage that the run has.
        before = stage or before
    return boxes


def _figure(run: Run, stage: StageResult, before: StageResult | None) -> str:
    """Return the key figure of a stage in words, and in brackets the one of the stage before it."""
    aims = stage_info(stage.name).aims or ("bits_per_byte",)
    aim = next((name for name in aims if name in stage.metrics), None)
    if aim is None:
        return ""
    info = metric_info(aim)
    # The win rate of the stage before is often its win rate against itself.
    values = [stage.metrics[aim].value]
    if before and aim in before.metrics and aim != "win_rate":
        values.append(before.metrics[aim].value)
    now, *was = [f"{100 * value:.0f}%" if info.share else number(value, 2) for value in values]
    shown = PHRASES.get(aim, f"{info.label}: {{now}}").format(now=now, against=run.against)
    return f"{shown} (before: {was[0]})" if was else shown


def _sample(stage: StageResult) -> tuple[str, str]:
    """Return a prompt and what the stage answers: the first problem for reasoning, otherwise the first prompt."""
    texts = ["", ""]
    if stage_info(stage.name).held_out == "problems" and stage.traces:
        texts = [str(stage.traces[0][key]).strip() for key in ("problem", "answer")]
    elif stage.answers:
        texts = [str(stage.answers[0][key]).strip() for key in ("prompt", "answer")]
    prompt, answer = (text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE].rstrip()} …" for text in texts)
    return prompt, answer
