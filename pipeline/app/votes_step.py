"""The step of a run that waits for people's votes. The command reads its settings before it imports PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.files import holds_model, read_run


def votes_step(run: Path) -> dict[str, Any]:
    """Return the settings of the run's step for votes, {} if it has none."""
    settings = [step.get("values", {}) for step in read_run(run).get("steps", {}).values()]
    return next((dict(values) for values in settings if "min_votes" in values), {})


def models_to_vote_on(run: Path) -> list[str]:
    """Return the model that the run's step for votes names, if it is not a stage of the run."""
    name = str(votes_step(run).get("model_name_or_path") or "")
    return [name] if name and not holds_model(run / Path(name).name) else []
