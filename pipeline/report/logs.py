"""What the trainers of a run have logged."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.intervals import finite
from pipeline.report.load import Run, Stage


def logged(stage: Stage, key: str, x: str = "step") -> list[tuple[float, float]]:
    """Return the points (x, value) at which the stage logged both `key` and `x`, in the order of logging."""
    points = [(finite(record.get(x)), finite(record.get(key))) for record in stage.history]
    return [(at, value) for at, value in points if at is not None and value is not None]


def last_logged(stage: Stage, key: str) -> float | None:
    """Return the last finite value that the stage logged under `key`, None if there is none."""
    return next((v for record in reversed(stage.history) if (v := finite(record.get(key))) is not None), None)


def alarms(run: Run) -> list[dict[str, Any]]:
    """Return `{"stage", "step", "what", "value"}` for each alarm that the trainers logged as `alarm/<what>`."""
    return [
        {"stage": stage.name, "step": int(step), "what": key.removeprefix("alarm/"), "value": value}
        for stage in run.stages.values()
        for key in dict.fromkeys(key for record in stage.history for key in record if key.startswith("alarm/"))
        for step, value in logged(stage, key)
    ]
