"""The kinds of steps that a recipe folder can have, and one step: what it runs, writes and needs."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pipeline.errors import Problem, UserError

REPORT = "report"


@dataclass(frozen=True)
class Kind:
    """What the files `<number>_<kind>.yaml` run.

    Args:
        module: run with `python -m`.
        launched: through `accelerate launch`, on as many processes as asked for.
        measured: it leaves a model, which is evaluated.
        seeded: it draws random numbers, and takes a seed.
        editable: what it writes are data, which people may correct by hand.
    """

    module: str
    launched: bool = False
    measured: bool = False
    seeded: bool = True
    editable: bool = False


# In the order in which kinds of the same number run.
KINDS = {
    "data": Kind("recipes.data", editable=True),
    "tokenizer": Kind("recipes.tokenizer", seeded=False),
    "random": Kind("recipes.untrained", measured=True),
    "pretrain": Kind("recipes.pretrain", launched=True, measured=True),
    "sft": Kind("recipes.sft", launched=True, measured=True),
    "preferences": Kind("recipes.preferences", launched=True, editable=True),
    "reward": Kind("recipes.reward", launched=True, measured=True),
    "ppo": Kind("recipes.ppo", launched=True, measured=True),
    "grpo": Kind("recipes.grpo", launched=True, measured=True),
}


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Args:
        name: stem of its YAML file, `0_random`, `evaluate_<directory of a stage>` or `report`.
        kind: key of `KINDS`, "evaluate" or "report".
        module: run with `python -m`.
        launched: through `accelerate launch`.
        arguments: what follows the module.
        output: directory that it writes.
        leftovers: what is deleted before it runs anew.
        values: what it was configured with, paths as in the YAML file; the fingerprint is taken of these.
        needs: names of the steps whose output it reads.
        files: files and folders outside of the run that it reads.
        data: by the name of the step that writes them, folders of data that it reads.
    """

    name: str
    kind: str
    module: str
    launched: bool
    arguments: tuple[str, ...]
    output: Path
    leftovers: tuple[Path, ...]
    values: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    data: Mapping[str, Path] = field(default_factory=dict)

    @property
    def product(self) -> Path:
        """What is there once it has finished."""
        if self.kind == "evaluate":
            return self.leftovers[0]
        return self.output / "index.html" if self.kind == "report" else self.output

    def command(self, launch: Sequence[str]) -> list[str]:
        """The command that a user would type; `launch` are the arguments of `accelerate launch` itself."""
        start = ["accelerate", "launch", *launch] if self.launched else ["python"]
        return [*start, "-m", self.module, *self.arguments]

    def executable(self, launch: Sequence[str]) -> list[str]:
        """The same command on this Python interpreter, ending with the exit code of the step itself."""
        launcher = ["-m", "pipeline.runner.launcher", *launch] if self.launched else []
        return [sys.executable, *launcher, "-m", self.module, *self.arguments]


def find_step(steps: Iterable[Step], name: str, field: str) -> Step:
    """The step that a user calls `name`: `2_sft`, `sft` or the file's name.

    Raises:
        UserError: about `field`, if there is none or more than one; lists those there are.
    """
    steps = list(steps)
    wanted = Path(name).name.removesuffix(".yaml")
    for same in (lambda step: step.name == wanted, lambda step: _short(step.name) == wanted):
        found = [step for step in steps if same(step)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(Problem(field, name, f"choose one of {', '.join(step.name for step in found)}"))
    raise UserError(Problem(field, name, f"no such step; there are {', '.join(step.name for step in steps)}"))


def _short(name: str) -> str:
    """`2_sft` -> `sft`, `evaluate_2_sft` -> `evaluate_sft`."""
    return re.sub(r"^(evaluate_)?\d+_", r"\1", name)


def printable(command: Sequence[str]) -> str:
    """The command as typed in a shell."""
    return shlex.join(command)


def check_steps(steps: Iterable[Step]) -> list[Problem]:
    """Settings that a step would refuse as soon as it begins, which may be after hours.

    Args:
        steps: Those that are due. What has no YAML file of its own is passed over.

    Returns:
        Unknown fields, values of the wrong type and values out of range, under the step's name.
    """
    from pipeline.config.parser import argument_types, check_values  # imports take seconds

    problems = []
    for step in steps:
        if step.kind not in KINDS or step.kind == "random":  # which reads the file of the pretraining
            continue
        taken = argument_types(resolve_name(f"{KINDS[step.kind].module}:main"))
        found = check_values(step.values, taken) if taken else []
        problems += [dataclasses.replace(problem, field=f"{step.name}: {problem.field}") for problem in found]
    return problems
