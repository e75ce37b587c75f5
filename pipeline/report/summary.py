"""metrics.json: every figure of a run, for scripts."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.evaluation.intervals import finite
from pipeline.files import write_text
from pipeline.report.differences import Difference
from pipeline.report.load import Run, Stage, last_logged
from pipeline.report.targets import Verdict

EVALUATE = "evaluate_"
"""What the name of the step that measures a stage begins with."""
PACKAGES = ("fourstage", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "peft")


def summarise(run: Run, found: Sequence[Difference], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The content of metrics.json.

    Args:
        run: the run.
        found: its paired differences.
        verdicts: the promises that it is held to.

    Returns:
        `stages` (stage -> metric -> `{"value", "ci95", "n"}`, and `by_kind` where there are kinds), `seconds`
        (step -> seconds), `hardware`, `versions` and `seed`; and `run`, `commit`, `parameters`, `tokens` and
        `flops` (by stage), `differences`, `promises` and `notes`.
    """
    costs = {name: training_cost(stage) for name, stage in run.stages.items()}
    return {
        "run": run.name,
        "stages": {
            name: {metric: estimate.to_json() for metric, estimate in stage.metrics.items()}
            for name, stage in run.stages.items()
            if stage.metrics
        },
        "seconds": seconds(run),
        "hardware": _facts(run, "hardware", machine),
        "versions": _facts(run, "versions", versions),
        "seed": run.manifest.get("seed"),
        "commit": commit(run),
        "parameters": {name: stage.parameters for name, stage in run.stages.items() if stage.parameters},
        "tokens": {name: round(tokens) for name, (tokens, _) in costs.items() if tokens},
        "flops": {name: flops for name, (_, flops) in costs.items() if flops},
        "differences": [
            {
                "stage": item.stage,
                "before": item.before,
                "metric": item.metric,
                "aim": item.aim,
                "verdict": item.verdict,
                **item.change.to_json(),
            }
            for item in found
        ],
        "promises": [
            {"promise": str(verdict.promise), "measured": verdict.measured, "kept": verdict.kept}
            for verdict in verdicts
        ],
        "notes": list(run.notes),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON that every parser reads (no NaN), whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False, default=str) + "\n"
    write_text(path, text)


def seconds(run: Run) -> dict[str, float]:
    """Seconds of each step by the manifest; for a stage that it lacks, of training alone, by its log."""
    steps = run.manifest.get("steps")
    taken: dict[str, float] = {}
    for name, step in (steps if isinstance(steps, dict) else {}).items():
        value = finite(step.get("seconds")) if isinstance(step, dict) else None
        # The report cannot know how long it takes itself.
        if value is not None and name != "report":
            taken[name] = value
    for name, stage in run.stages.items():
        runtime = last_logged(stage, "train_runtime")
        if name not in taken and runtime is not None:
            taken[name] = runtime
    return taken


def evaluation_seconds(run: Run, stage: str, taken: Mapping[str, float]) -> float | None:
    """How long the stage's evaluation took: by the manifest (`taken`), or else by its own clock."""
    return taken.get(EVALUATE + stage, run.stages[stage].evaluation_seconds)


def training_cost(stage: Stage) -> tuple[float | None, float | None]:
    """Tokens that the stage trained on and its floating-point operations, None where not known.

    The operations are 6 x parameters x tokens (forward and backward; Kaplan et al. 2020), or what the trainer
    counted where it logged no tokens.
    """
    tokens = last_logged(stage, "num_tokens") or last_logged(stage, "num_input_tokens_seen")
    tokens = tokens or finite(stage.state.get("num_input_tokens_seen")) or None
    if tokens and stage.parameters:
        return tokens, 6.0 * stage.parameters * tokens
    return tokens, finite(stage.state.get("total_flos")) or None


def _facts(run: Run, key: str, measure: Any) -> dict[str, Any]:
    """What the run recorded about its machine, or else what this machine is."""
    recorded = run.manifest.get(key)
    return recorded if isinstance(recorded, dict) and recorded else measure()


def machine() -> dict[str, Any]:
    """Processor, cores this process may use and memory in GiB, of the machine that the report is made on."""
    facts: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}"}
    accelerators = _accelerators()
    if accelerators:
        facts["gpu"] = accelerators
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        facts["processor"] = platform.processor()
        return facts
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts["processor"] = models[0] if models else platform.processor()
    facts["memory_gib"] = round(pages / 2**30, 1)
    return facts


def _accelerators() -> str:
    """NVIDIA GPUs as the driver names them, such as "2 x NVIDIA H100"; asking torch would take seconds."""
    names: dict[str, int] = {}
    for file in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("Model:"):
                name = line.partition(":")[2].strip()
                names[name] = names.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in sorted(names.items()))


def versions() -> dict[str, str]:
    """Python and the packages that matter, as installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(run: Run) -> str | None:
    """The commit that the run recorded, or else that of this checkout, "-dirty" if files differ from it."""
    recorded = run.manifest.get("commit") or run.manifest.get("git_commit")
    if isinstance(recorded, str):
        return recorded
    here = Path(__file__)
    # Installed inside of somebody else's checkout, the commit would be that of another project.
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(file: Path, *arguments: str) -> str | None:
    """What git says in the file's directory, None if it fails."""
    command = ["git", "-C", str(file.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
