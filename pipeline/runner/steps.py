"""One step of a run: what it runs, reads and writes; the files that its settings name; its settings with `--smoke`."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pipeline.config.fields import argument_types
from pipeline.errors import Problem, UserError, as_typed
from pipeline.files import holds_model
from pipeline.stages import SMOKE_EVALUATION, STAGES
from pipeline.stages.kinds import StageKind

REPORT = "report"


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: Stem of its YAML file, `0_random`, `evaluate_<directory of a stage>` or `report`.
        kind: Key of `STAGES`, "evaluate" or "report".
        arguments: The words after the module of its recipe, or after `fourstage` if it has none.
        output: Directory that it writes to, in the directory of the run.
        leftovers: Files and directories to remove before it starts over.
        values: Its settings, with paths as in the YAML file; changes are detected by these.
        needs: Names of the steps whose output it reads.
        files: Files and folders outside of the run that it reads.
        data: Folders of data that it reads, by the name of the step that writes them.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    output: Path
    leftovers: tuple[Path, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    data: Mapping[str, Path] = field(default_factory=dict)

    @property
    def stage(self) -> StageKind:
        """The entry for its kind in `STAGES`, or an empty one for evaluations and the report."""
        return STAGES.get(self.kind, StageKind())

    @property
    def product(self) -> Path:
        """The file or directory that exists once the step has finished."""
        if self.kind == "evaluate":
            # The file of metrics; all evaluations of a run write to the same directory.
            return self.leftovers[0]
        if self.kind == "report":
            return self.output / "index.html"
        return self.output

    @property
    def is_complete(self) -> bool:
        """Whether the product exists; a model needs its configuration and its weights."""
        if self.stage.measured:
            return holds_model(self.output)
        return self.product.exists()

    @property
    def push(self) -> tuple[str, ...]:
        """Arguments of `fourstage` that push its output to the Hub; empty if its settings do not ask for that."""
        # An untrained model shares the file of pretraining.
        if self.stage.file_of or not self.values.get("push_to_hub"):
            return ()
        words = ["push", str(self.output), "--repo_id", self.values.get("hub_model_id") or self.output.name]
        if self.values.get("hub_revision"):
            words += ["--revision", str(self.values["hub_revision"])]
        if self.values.get("hub_private_repo"):
            words.append("--private")
        return tuple(words)

    def command(self, launch: Sequence[str], launcher: Sequence[str] = ()) -> list[str]:
        """Return the words of the command as a user types it.

        Args:
            launch: Arguments of `accelerate launch` itself, used if the step trains.
            launcher: Words of a command that starts the step on all machines of a cluster (`--launcher`), if any.
        """
        if not self.stage.module:
            return shlex.split(as_typed(*self.arguments))
        if not self.stage.launched:
            start = ["python"]
        elif launcher:
            start = [*launcher, "python", "-m", "pipeline.runner.launcher", *launch]
        else:
            start = ["accelerate", "launch", *launch]
        return [*start, "-m", self.stage.module, *self.arguments]

    def executable(self, launch: Sequence[str], launcher: Sequence[str] = ()) -> list[str]:
        """Return the words of the same command for this Python interpreter, with arguments as for `command`.

        Unlike `accelerate launch`, it ends with the exit code of the step itself.
        """
        start = [sys.executable]
        if self.stage.launched:
            start = [*launcher, sys.executable, "-m", "pipeline.runner.launcher", *launch]
        return [*start, "-m", self.stage.module or "pipeline", *self.arguments]

    @property
    def argument_types(self) -> list[type]:
        """The argument dataclasses of its recipe; importing the recipe may take seconds."""
        return argument_types(resolve_name(f"{self.stage.module}:main"))


def find_step(steps: Sequence[Step], name: str, field: str) -> Step:
    """Return the step that a user calls `name`: "2_sft", "sft" or "recipes/pocket/2_sft.yaml".

    Args:
        steps: The steps to choose from.
        name: The name.
        field: The option with which it was given, for the error.

    Raises:
        UserError: If no step or more than one has this name.
    """
    stem = Path(name).name.removesuffix(".yaml")
    # The number may be omitted: `sft` for `2_sft`, and `evaluate_sft` for `evaluate_2_sft`.
    matches = [step for step in steps if stem in (step.name, re.sub(r"^(evaluate_)?\d+_", r"\1", step.name))]
    if len(matches) == 1:
        return matches[0]
    remedy = f"no such step; choose from: {', '.join(step.name for step in steps)}"
    if matches:
        remedy = f"choose one of {', '.join(step.name for step in matches)}"
    raise UserError(Problem(field, name, remedy))


def names_file(key: str, text: str) -> bool:
    """Return whether the field `key` of a step names a file or folder on this disk by the value `text`.

    A folder that contains the working directory, such as "..", does not count: the runs are in it, and change it.
    """
    may_be_path = key.endswith(("_name", "_path", "_file", "_files", "_dir")) or os.sep in text
    return may_be_path and os.path.exists(text) and not Path.cwd().is_relative_to(os.path.realpath(text))


def smoke_overrides(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that `--smoke` changes in a step, so that it takes seconds.

    Args:
        kind: The kind of step; a kind that is not in `STAGES` is an evaluation.
        values: Its settings in the recipe.
    """
    stage = STAGES.get(kind, StageKind(smoke=SMOKE_EVALUATION))
    overrides: dict[str, Any] = {}
    for name, limit in stage.smoke.items():
        value = values.get(name)
        # Keep a recipe's own size or number of rows if it is lower; 0 and -1 mean no limit. But a batch must be
        # divisible by the number of answers to a prompt, so these two are always changed together.
        is_lower = isinstance(value, int | float) and isinstance(limit, int | float) and 0 < value < limit
        if not is_lower or name.startswith(("per_device_", "num_generations")):
            overrides[name] = limit
    if stage.samples and stage.measured:
        # TRL rejects configurations with both fields.
        if "generation_batch_size" in values:
            overrides["generation_batch_size"] = stage.smoke["per_device_train_batch_size"]
        else:
            overrides["steps_per_generation"] = 1
    return overrides
