"""One step of a run: what it runs, reads and writes."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

from pipeline.config.yaml_file import unknown_field
from pipeline.errors import Problem, UserError
from pipeline.files import is_missing_path
from pipeline.stages import STAGES, StageKind

REPORT = "report"
INPUTS = ("model_name_or_path", "dataset_name")
"""Fields without which a step has nothing to start from."""


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: Stem of its YAML file, `0_random`, `evaluate_<directory of a stage>` or `report`.
        kind: Key of `STAGES`, "evaluate" or "report".
        arguments: Arguments of the module.
        output: Directory that it writes.
        module: Module to run with `python -m`.
        launched: Whether it runs under `accelerate launch`.
        leftovers: Files and directories to delete before it runs from the beginning.
        values: Its settings, with paths as in the YAML file; the fingerprint is taken of these.
        needs: Names of the steps whose output it reads.
        files: Files and folders outside of the run that it reads.
        data: Folders of data that it reads, by the name of the step that writes them.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    output: Path
    module: str = "pipeline"
    launched: bool = False
    leftovers: tuple[Path, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    data: Mapping[str, Path] = field(default_factory=dict)

    @property
    def stage(self) -> StageKind:
        """What is known about its kind; of an evaluation and of the report, nothing in particular."""
        return STAGES.get(self.kind, StageKind())

    @property
    def product(self) -> Path:
        """The file or directory that exists once the step has finished."""
        if self.kind == "evaluate":
            return self.leftovers[0]
        return self.output / "index.html" if self.kind == "report" else self.output

    @property
    def is_complete(self) -> bool:
        """Whether the product exists; a model needs its configuration and its weights."""
        if not self.stage.measured:
            return self.product.exists()
        configured = any((self.output / name).exists() for name in ("config.json", "adapter_config.json"))
        return configured and any(self.output.glob("*.safetensors"))

    @property
    def push(self) -> tuple[str, ...]:
        """Arguments of `python -m pipeline` that push what it wrote; empty if its settings do not ask for that."""
        if self.stage.file_of or not self.values.get("push_to_hub"):
            return ()
        name, revision = self.values.get("hub_model_id"), self.values.get("hub_revision")
        options = ["--revision", str(revision)] if revision else []
        options += ["--private"] if self.values.get("hub_private_repo") else []
        return ("push", str(self.output), "--repo_id", str(name or self.output.name), *options)

    def command(self, launch: Sequence[str], launcher: Sequence[str] = ()) -> list[str]:
        """Return the command that a user would type.

        Args:
            launch: Arguments of `accelerate launch` itself.
            launcher: Command that starts it on several machines.
        """
        entry = ["python", "-m", "pipeline.runner.launcher"] if launcher else ["accelerate", "launch"]
        start = [*launcher, *entry, *launch] if self.launched else ["python"]
        return [*start, "-m", self.module, *self.arguments]

    def executable(self, launch: Sequence[str], launcher: Sequence[str] = ()) -> list[str]:
        """Return the same command for this Python interpreter; it ends with the exit code of the step itself."""
        start = [sys.executable]
        if self.launched:
            start = [*launcher, sys.executable, "-m", "pipeline.runner.launcher", *launch]
        return [*start, "-m", self.module, *self.arguments]


def tidy_paths(value: Any, home: Path) -> Any:
    """Return a value of a YAML file with paths in `home` as steps are compared: `runs/r/2_sft/` is `runs/r/2_sft`."""
    if isinstance(value, Mapping):
        return {key: tidy_paths(item, home) for key, item in value.items()}
    if isinstance(value, list):
        return [tidy_paths(item, home) for item in value]
    return str(Path(value)) if isinstance(value, str) and Path(value).is_relative_to(home) else value


def find_step(steps: Iterable[Step], name: str, field: str) -> Step:
    """Return the step that a user calls `name`: `2_sft`, `sft` or the name of the file.

    Raises:
        UserError: If no step or several steps have this name; it names `field` and lists them.
    """
    steps = list(steps)
    wanted = Path(name).name.removesuffix(".yaml")
    for same in (lambda step: step.name == wanted, lambda step: _short(step.name) == wanted):
        found = [step for step in steps if same(step)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(Problem(field, name, f"choose one of {', '.join(step.name for step in found)}"))
    raise UserError(Problem(field, name, f"no such step; choose from: {', '.join(step.name for step in steps)}"))


def _short(name: str) -> str:
    """Shorten a name: `2_sft` -> `sft`, `evaluate_2_sft` -> `evaluate_sft`."""
    return re.sub(r"^(evaluate_)?\d+_", r"\1", name)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def override_steps(steps: Sequence[Step], words: Sequence[str]) -> list[Step]:
    """Return the steps with the options of a command line, each option in all steps that know it.

    Raises:
        UserError: If no step knows an option, or a value is of the wrong type.
    """
    from pipeline.config.command_line import Parser, read_command_line
    from pipeline.config.parser import field_types

    changed, problems, known, unknown = [], [], set(), []
    for step in steps:
        types = recipe_types(step)
        hints = field_types(*types)
        values, found = read_command_line(Parser(types), list(words), hints) if words else ({}, [])
        changed.append(dataclasses.replace(step, values={**step.values, **values}))
        problems += [problem for problem in found if problem.field in hints]
        unknown.append({problem.field: problem for problem in found if problem.field not in hints})
        known |= set(hints)
    for name, problem in unknown[0].items():
        if all(name in others for others in unknown):
            problems.append(unknown_field(name, problem.value, known) if name.isidentifier() else problem)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return changed


def recipe_types(step: Step) -> list[type]:
    """Return the argument dataclasses of the step's recipe."""
    from pipeline.config.parser import argument_types

    return argument_types(resolve_name(f"{step.stage.module}:main"))


class Settings(SimpleNamespace):
    """The settings of a step as attributes, with the defaults of its recipe; those that it does not have are None."""

    def __getattr__(self, name: str) -> Any:
        return None

    def build(self, kind: type) -> Any:
        """Return the dataclass `kind` with these settings."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in values.items() if value is not None})


def settings_of(step: Step) -> Settings:
    """Return the settings of a step."""
    items = [item for kind in recipe_types(step) for item in dataclasses.fields(kind)]
    defaults = {item.name: item.default for item in items if item.default is not dataclasses.MISSING}
    return Settings(**{**defaults, **step.values})


def check_steps(steps: Iterable[Step], rewards: bool = True) -> list[Problem]:
    """Check the settings that a step would refuse as soon as it starts, which may be hours from now.

    Args:
        steps: The steps that are due. Those without a YAML file of their own are skipped.
        rewards: Whether reward functions are loaded, which may need packages.

    Returns:
        Values that are wrong by themselves or together, and inputs that do not exist, under the step's name.
    """
    from transformers import TrainingArguments  # these imports take seconds

    from pipeline.config.parser import check_values
    from pipeline.evaluation.settings import check
    from pipeline.launch import quiet_libraries
    from pipeline.rewards.loading import load_rewards
    from pipeline.training.checks import preflight

    quiet_libraries()
    problems = []
    steps = list(steps)
    for evaluation in [step for step in steps if step.kind == "evaluate"][:1]:  # all have the same settings
        problems += check(evaluation.values, "evaluate.yaml: ")
        if isinstance(tasks := evaluation.values.get("lm_eval_tasks"), list):
            from pipeline.evaluation.harness import check_tasks  # lm-eval takes seconds to list its tasks

            problems += check_tasks(list(map(str, tasks)), "evaluate.yaml: lm_eval_tasks")
    for step in steps:
        # A step that shares the file of another one is checked with that one.
        if not step.stage.module or step.stage.file_of:
            continue
        types = recipe_types(step)
        built, found = check_values(step.values, types) if types else ([], [])
        for item in built:
            found += preflight(item) if isinstance(item, TrainingArguments) else []
            inputs = {name: getattr(item, name) for name in INPUTS if hasattr(item, name)}
            listed = [(name, one) for name, value in inputs.items() for one in _listed(value)]
            for name, value in listed:
                if not value:
                    found.append(Problem(name, "nothing", "give a Hub id, a file or a folder"))
                elif is_missing_path(value) and not Path(value).is_relative_to(Path(step.values["output_dir"]).parent):
                    found.append(Problem(name, value, "there is no such file or folder; correct the path"))
        if step.stage.check:
            found += resolve_name(step.stage.check)(step.values)
        names = step.values.get("reward_funcs")
        if rewards and names and isinstance(names, list) and all(isinstance(name, str) for name in names):
            try:
                load_rewards(names)
            except UserError as error:
                found += error.problems
        problems += [dataclasses.replace(problem, field=f"{step.name}: {problem.field}") for problem in found]
    return problems
