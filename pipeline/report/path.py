"""The path from random weights to reasoning as one picture, for readers who have never heard of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.metric_info import is_share, metric_info
from pipeline.report.labels import stage_info, stage_kind, twins
from pipeline.report.load import Run, Stage
from pipeline.report.summary import training_cost
from pipeline.report.text import magnitude, number

LONGEST_SAMPLE = 160
"""Characters of a sample."""


@dataclass(frozen=True)
class Step:
    """A box of the picture.

    Attributes:
        kinds: The stages that it stands for; the last of the run gives the figure and the sample.
        title: Its name.
        about: What happens, in one sentence.
        goes_in: What the model is given.
        trains: What changes its weights.
        parts: The steps within it, as (name, what happens); the kind of a stage in place of a name adds its figure.
    """

    kinds: tuple[str, ...]
    title: str
    about: str
    goes_in: str
    trains: str
    parts: tuple[tuple[str, str], ...] = ()


STEPS = (
    Step(
        ("random", "base"),
        "Random weights",
        "A new model: numbers drawn at random. It has read nothing, and writes gibberish.",
        "nothing",
        "nothing yet",
    ),
    Step(
        ("pretrain",),
        "Pretraining",
        "It reads much text and learns to guess the next token, which is a word or a piece of one. Now it knows "
        "language, but only continues what it is given.",
        "plain text",
        "its wrong guesses of the next token",
    ),
    Step(
        ("sft",),
        "Instruction tuning",
        "It reads questions with good answers and learns to answer, and to stop.",
        "questions with answers",
        "the difference from the given answer",
    ),
    Step(
        ("ppo",),
        "Preference tuning",
        "It learns which of its answers people like better.",
        "prompts without answers",
        "the score of its own answers",
        (
            ("Choices", "two answers to one prompt: which is better?"),
            ("reward", "a second model learns to score answers as the choices would"),
            ("PPO", "answers with high scores become more likely, in small steps"),
        ),
    ),
    Step(
        ("grpo",),
        "Reasoning",
        "It tries problems whose answer can be checked, and learns to work them out.",
        "problems with a known result",
        "whether the result is right",
        (
            ("Prompt", "a problem"),
            ("Completions", "several attempts at it"),
            ("Check", "is the result right?"),
            ("Update", "right attempts become more likely, wrong ones less; then the next problem"),
        ),
    ),
)

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
    boxes = []
    before: Stage | None = None
    for place, step in enumerate(STEPS):
        stage = next((stage for kind in step.kinds for stage in _stages(run, kind)), None)
        prompt, sample = _sample(run, stage)
        boxes.append(
            {
                "drawing": step.kinds[0],
                "number": place,
                "title": stage_info(stage.name).title if stage and step.kinds[-1] == "base" else step.title,
                "stage": stage.name if stage else "",
                "about": step.about,
                "goes_in": _amount(stage) + step.goes_in,
                "trains": step.trains,
                "parts": [_part(run, name, what) for name, what in step.parts],
                "figure": _figure(run, stage, before) if stage else "",
                "prompt": prompt,
                "sample": sample,
                "link": links.get(step.kinds[0], ""),
            }
        )
        before = stage or before
    return boxes


def _stages(run: Run, kind: str) -> list[Stage]:
    """Return the stages of a kind, the last one first, without those that only serve for comparison."""
    names = [name for name in reversed(run.stages) if stage_kind(name) == kind and name not in twins(run.stages)]
    return [run.stages[name] for name in names]


def _part(run: Run, name: str, what: str) -> dict[str, str]:
    stages = _stages(run, name)
    title = stage_info(name).title if name == "reward" else name
    return {"title": title, "what": what, "figure": _figure(run, stages[0], None) if stages else ""}


def _amount(stage: Stage | None) -> str:
    """Return how much the stage was trained on, to put before what it is."""
    tokens = training_cost(stage)[0] if stage else 0
    return f"{magnitude(tokens)} tokens of " if tokens else ""


def _figure(run: Run, stage: Stage, before: Stage | None) -> str:
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


def _sample(run: Run, stage: Stage | None) -> tuple[str, str]:
    """Return a prompt and what the stage answers: the first problem for reasoning, otherwise the first prompt."""
    if stage is None:
        return "", ""
    if stage_kind(stage.name) == "grpo" and stage.traces:
        return _cut(str(stage.traces[0]["problem"])), _cut(str(stage.traces[0]["answer"]))
    if stage.answers:
        return _cut(str(stage.answers[0]["prompt"])), _cut(str(stage.answers[0]["answer"]))
    return "", ""


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE].rstrip()} …"
