"""Reading a recipe folder: the steps of its YAML files, and those that follow from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import Problem, UserError
from pipeline.runner.smoke import smoke_overrides
from pipeline.runner.steps import KINDS, REPORT, Step


@dataclass(frozen=True)
class Plan:
    """The steps of a run in order, and where it writes.

    Args:
        steps: each after all that it needs.
        run_dir: directory of the run.
        seed: that the steps run with, None if no configuration names one.
    """

    steps: tuple[Step, ...]
    run_dir: Path
    seed: int | None


def read_plan(folder: Path, output_dir: Path | None = None, seed: int | None = None, smoke: bool = False) -> Plan:
    """Read the steps of the recipe folder `folder`.

    Args:
        folder: holds files named `<number>_<kind>.yaml` or `<number>_<kind>_<anything>.yaml`.
        output_dir: directory of the run; by default that of the YAML files' `output_dir`, and for a smoke run
            that name with `-smoke` appended.
        seed: given to every step; by default each has its own.
        smoke: every stage takes two steps on a miniature.

    Returns:
        The plan: the steps of the files, an untrained model before the first pretraining, the evaluation of
        every model after it, and the report.

    Raises:
        UserError: naming every file that is no step of a recipe, and every path that no step writes.
    """
    configurations = _read_folder(folder)
    home = _common_home(folder, configurations)
    run_dir = output_dir or (home.with_name(home.name + "-smoke") if smoke else home)
    steps: list[Step] = []
    for stem, (path, values) in configurations.items():
        kind = _kind_of(stem)
        from_scratch = kind == "pretrain" and not values.get("model_name_or_path")
        if from_scratch and not any(step.kind == "random" for step in steps):
            untrained = {**values, "output_dir": str(home / "0_random")}
            steps.append(_step("0_random", "random", path, untrained, seed, smoke))
        steps.append(_step(stem, kind, path, values, seed, smoke))
    steps = _connect(steps, home)
    steps = [_move(step, home, run_dir) for step in steps]
    with_evaluations: list[Step] = []
    for step in steps:
        with_evaluations.append(step)
        if KINDS[step.kind].measured:
            with_evaluations.append(_evaluation(step, with_evaluations, run_dir, seed, smoke))
    editable = {step.name: step.output for step in steps if KINDS[step.kind].editable}
    with_evaluations = [
        replace(step, data={need: editable[need] for need in step.needs if need in editable})
        for step in with_evaluations
    ]
    seeds = [values["seed"] for _, values in configurations.values() if isinstance(values.get("seed"), int)]
    return Plan(
        steps=(*with_evaluations, _report(with_evaluations, run_dir)),
        run_dir=run_dir,
        seed=seed if seed is not None else next(iter(seeds), None),
    )


def _kind_of(stem: str) -> str:
    return stem.split("_")[1]


def _read_folder(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Stem -> (file, its content), in the order in which the steps run."""
    from pipeline.config.yaml_file import read_yaml

    if not folder.is_dir():
        raise UserError(Problem("recipe", folder, "no such folder; give one with files such as 2_sft.yaml"))
    files = [path for path in folder.iterdir() if re.fullmatch(r"\d+_.+\.ya?ml", path.name)]
    if not files:
        raise UserError(Problem("recipe", folder, f"holds no step; name files <number>_<{'|'.join(KINDS)}>.yaml"))
    problems = []
    read: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(files):
        if _kind_of(path.stem) not in KINDS:
            problems.append(Problem("recipe", path, f"no such kind of step; there are {', '.join(KINDS)}"))
            continue
        try:
            content = read_yaml(str(path))
        except UserError as error:
            problems += [replace(problem, field="recipe") for problem in error.problems]
            continue
        if not isinstance(content.get("output_dir"), str):
            problems.append(Problem("output_dir", path, "must say in which directory of the run this step writes"))
            continue
        if content["output_dir"].startswith("~"):
            problems.append(Problem("output_dir", content["output_dir"], f"write it without ~ in {path}"))
            continue
        if path.stem in read:
            problems.append(Problem("recipe", path, f"is the same step as {read[path.stem][0].name}; keep one"))
            continue
        read[path.stem] = (path, {str(key): value for key, value in content.items()})
    if problems:
        raise UserError(*problems)
    order = list(KINDS)
    return dict(sorted(read.items(), key=lambda item: (_number(item[0]), order.index(_kind_of(item[0])), item[0])))


def _number(stem: str) -> int:
    return int(stem.split("_")[0])


def _common_home(folder: Path, configurations: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> Path:
    """The directory in which all steps write; each must have a directory of its own there."""
    outputs = {stem: Path(values["output_dir"]) for stem, (_, values) in configurations.items()}
    homes = {output.parent for output in outputs.values()}
    if len(homes) > 1:
        told = ", ".join(sorted(map(str, homes)))
        raise UserError(Problem("output_dir", folder, f"the steps write to several runs ({told}); let them share one"))
    for stem, output in outputs.items():
        twin = next((other for other in outputs if other != stem and outputs[other] == output), None)
        if twin:
            raise UserError(Problem("output_dir", output, f"{stem} and {twin} would write there; give each its own"))
    home = homes.pop()
    if home.name in ("", ".."):
        remedy = "must lie in a directory of the run, such as runs/mine/2_sft"
        raise UserError(Problem("output_dir", next(iter(outputs.values())), remedy))
    return home


def _step(name: str, kind: str, path: Path, values: Mapping[str, Any], seed: int | None, smoke: bool) -> Step:
    overrides: dict[str, Any] = smoke_overrides(kind, values) if smoke else {}
    if seed is not None and KINDS[kind].seeded:
        overrides["seed"] = seed
    arguments = ["--config", str(path)]
    if kind == "random":
        arguments += ["--output_dir", str(values["output_dir"])]
    output = Path(values["output_dir"])
    return Step(
        name=name,
        kind=kind,
        module=KINDS[kind].module,
        launched=KINDS[kind].launched,
        arguments=(*arguments, *_flags(overrides)),
        output=output,
        leftovers=(output,),
        values={**values, **overrides},
    )


def _flags(overrides: Mapping[str, Any]) -> list[str]:
    flags = []
    for key, value in overrides.items():
        flags += [f"--{key}", *([str(item) for item in value] if isinstance(value, list) else [str(value)])]
    return flags


def _paths(value: Any) -> Iterable[str]:
    """Every string inside a value of a YAML file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)


def _inside(text: str, directory: Path) -> Path | None:
    """Where in `directory` the path `text` points to, relative to it; None if it does not."""
    try:
        return Path(text).relative_to(directory)
    except ValueError:
        return None


def _connect(steps: Sequence[Step], home: Path) -> list[Step]:
    """Find out which steps each needs: those whose directories its configuration names."""
    problems, connected = [], []
    for position, step in enumerate(steps):
        needs, files = [], []
        for key, value in step.values.items():
            for text in () if key == "output_dir" else _paths(value):
                inner = _inside(text, home)
                if inner is None and _names_file(key, text):
                    files.append(Path(text))
                if inner is None or not inner.parts:
                    continue
                directory = home / inner.parts[0]
                if directory == step.output:
                    continue
                writer = next((other for other in steps[:position] if other.output == directory), None)
                if writer is not None:
                    needs.append(writer.name)
                elif os.path.exists(text):
                    files.append(Path(text))
                else:
                    problems.append(Problem(f"{step.name}: {key}", text, "no earlier step of this recipe writes it"))
        connected.append(replace(step, needs=tuple(dict.fromkeys(needs)), files=tuple(files)))
    if problems:
        raise UserError(*problems)
    return connected


def _names_file(key: str, text: str) -> bool:
    """Whether a setting names something on this disk, rather than on the Hub."""
    return (key.endswith(("_name", "_path", "_file", "_files", "_dir")) or os.sep in text) and os.path.exists(text)


def _move(step: Step, home: Path, run_dir: Path) -> Step:
    """The step with all of its paths in `run_dir` instead of `home`."""
    if run_dir == home:
        return step
    overrides: dict[str, Any] = {}
    for key, value in step.values.items():
        moved = [str(run_dir / inner) for text in _paths(value) if (inner := _inside(text, home)) is not None]
        if not moved:
            continue
        if isinstance(value, str):
            overrides[key] = moved[0]
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            overrides[key] = [
                item if (inner := _inside(item, home)) is None else str(run_dir / inner) for item in value
            ]
        else:
            remedy = f"a path inside a nested value cannot follow --output_dir; write {run_dir} in the YAML file"
            raise UserError(Problem(f"{step.name}: {key}", moved[0], remedy))
    arguments = list(step.arguments)
    if step.kind == "random":
        position = arguments.index("--output_dir")
        del arguments[position : position + 2]
    output = run_dir / step.output.relative_to(home)
    return replace(step, arguments=(*arguments, *_flags(overrides)), output=output, leftovers=(output,))


def _evaluation(step: Step, before: Sequence[Step], run_dir: Path, seed: int | None, smoke: bool) -> Step:
    """The step that measures `step`: on the data of the run, and against its instruction-tuned model."""
    overrides: dict[str, Any] = smoke_overrides("evaluate", {}) if smoke else {}
    if seed is not None:
        overrides["seed"] = seed
    shared = [other.name for other in before if other.kind in ("data", "preferences", "sft")]
    results = run_dir / "evaluations" / step.output.name
    return Step(
        name=f"evaluate_{step.output.name}",
        kind="evaluate",
        module="pipeline",
        launched=False,
        arguments=("evaluate", str(run_dir), "--stage", step.output.name, *_flags(overrides)),
        output=results.parent,
        leftovers=(results.with_suffix(".json"), results.with_suffix(".jsonl")),
        values=overrides,
        needs=tuple(dict.fromkeys([*shared, step.name])),
    )


def _report(before: Sequence[Step], run_dir: Path) -> Step:
    return Step(
        name=REPORT,
        kind="report",
        module="pipeline",
        launched=False,
        arguments=("report", str(run_dir)),
        output=run_dir / "report",
        leftovers=(),
        values={},
        needs=tuple(step.name for step in before),
    )
