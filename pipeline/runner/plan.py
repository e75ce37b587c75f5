"""Read a recipe folder: the steps of its YAML files, and those that follow from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.recipe_folder import find_shipped
from pipeline.config.yaml_file import read_yaml
from pipeline.data.votes import VOTES_FILE
from pipeline.errors import Problem, UserError
from pipeline.evaluation.settings import BASE, VOTES, complete, derive
from pipeline.evaluation.settings import FILE as EVALUATE
from pipeline.files import check_directory, check_path, read_json, split_revision
from pipeline.runner.smoke import smoke_overrides
from pipeline.runner.steps import REPORT, Step, tidy_paths
from pipeline.runner.trash import TRASH
from pipeline.stages import HELD_OUT, OPPONENT, STAGES

RANDOM = STAGES["random"].directory
RESERVED = ("report", "evaluations", "logs", VOTES, RANDOM, BASE, "run.json", "run.lock", TRASH)
"""Names in the directory of a run that no step may write to unless its kind has this name for its directory."""


@dataclass(frozen=True)
class Plan:
    """The steps of a run and where it writes.

    Attributes:
        steps: The steps, each after all that it needs.
        run_dir: Directory of the run.
        seed: Seed of the steps, None if no configuration names one.
    """

    steps: tuple[Step, ...]
    run_dir: Path
    seed: int | None


def read_plan(folder: Path, output_dir: Path | None = None, seed: int | None = None, smoke: bool = False) -> Plan:
    """Read the steps of a recipe folder.

    Args:
        folder: Folder with files named `<number>_<kind>.yaml` or `<number>_<kind>_<anything>.yaml`, or the name of one
            that is installed with the package, such as pocket.
        output_dir: Directory of the run. Default: the one in which the files' `output_dir` lie; for a smoke run,
            that name with `-smoke` appended.
        seed: Seed of every step. Default: each step's own.
        smoke: Whether every stage takes two steps on a miniature.

    Returns:
        The plan: the steps of the files, an untrained model before the first pretraining, the evaluation of every model
        after it (of the one that others are compared with: after a judge that a step trains) and of one that the first
        stage starts from, and the report.

    Raises:
        UserError: With all files that are not steps, paths that no step writes and directories that cannot be used.
    """
    folder = find_shipped(folder)
    configurations = _read_folder(folder)
    home = _common_home(folder, configurations)
    run_dir = output_dir or (home.with_name(home.name + "-smoke") if smoke else home)
    _check_run_dir(run_dir, folder)
    steps: list[Step] = []
    for stem, (path, written) in configurations.items():
        values = tidy_paths(written, home)
        kind = _kind_of(stem)
        from_scratch = STAGES[kind].from_scratch and not values.get("model_name_or_path")
        if from_scratch and not any(step.kind == "random" for step in steps):
            steps.append(_step(RANDOM, "random", path, {**values, "output_dir": str(home / RANDOM)}, seed, smoke))
        steps.append(_step(stem, kind, path, values, seed, smoke))
    steps = [_move(step, home, run_dir) for step in _connect(steps, home)]
    settings = _evaluation_settings(folder, steps, home)
    planned: list[Step] = []
    for item in _in_order(steps, settings):
        step = item if isinstance(item, Step) else _evaluation(item, planned, run_dir, settings, seed, smoke)
        planned.append(step)
    editable = {step.name: step.output for step in steps if step.stage.editable}
    planned = [replace(s, data={need: editable[need] for need in s.needs if need in editable}) for s in planned]
    names = tuple(step.name for step in planned)
    planned.append(Step(REPORT, "report", ("report", str(run_dir)), output=run_dir / "report", needs=names))
    outputs = [*(step.output for step in planned), run_dir / "logs"]
    if problems := [problem for output in outputs if (problem := check_path(output))]:
        raise UserError(*problems)
    seeds = (values["seed"] for _, values in configurations.values() if isinstance(values.get("seed"), int))
    return Plan(tuple(planned), run_dir, next(seeds, None) if seed is None else seed)


def check_writable(plan: Plan) -> list[Problem]:
    """Report directories of a run that may not be written to."""
    if problem := check_directory(plan.run_dir):
        return [problem]
    places = dict.fromkeys([*(step.output for step in plan.steps), plan.run_dir / "logs"])
    return [problem for place in places if (problem := check_directory(place))]


def _in_order(steps: Sequence[Step], settings: Mapping[str, Any]) -> list[Step | str]:
    """Return the steps and, after them, the stages that are measured: the model that the first one starts from, too."""
    order: list[Step | str] = []
    for step in steps:
        starts = bool(settings["base"]) and step.values.get("model_name_or_path") == settings["base"]
        order += [BASE, step] if starts and BASE not in order else [step]
        order += [step.output.name] if step.stage.measured else []
    against, judge = settings["against"], Path(str(settings["judge"]))
    trains = (place for place, step in enumerate(order) if isinstance(step, Step) and step.output.name == judge.name)
    if judge.parent == Path(settings["home"]) and against in order[: (last := next(trains, 0))]:
        order.insert(last, order.pop(order.index(against)))  # a baseline needs the judge
    return order


def _kind_of(stem: str) -> str:
    return stem.split("_")[1]


def _read_folder(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the path and the content of each step's file, by its stem, in the order in which the steps run."""
    remedy = "give a folder with files such as 2_sft.yaml"
    try:
        files = sorted(path for path in folder.iterdir() if re.fullmatch(r"\d+_.+\.ya?ml", path.name))
    except FileNotFoundError:
        raise UserError(Problem("recipe", folder, f"does not exist; {remedy}")) from None
    except OSError as error:
        raise UserError(Problem("recipe", folder, f"cannot be read ({error.strerror}); {remedy}")) from error
    if not files:
        raise UserError(Problem("recipe", folder, f"does not contain a step; {remedy}"))
    problems = []
    order = [name for name, stage in STAGES.items() if stage.module]
    read: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in files:
        kind = _kind_of(path.stem)
        if kind not in order:
            problems.append(Problem("recipe", path, f"unknown kind of step; choose from: {', '.join(order)}"))
            continue
        try:
            content = read_yaml(str(path))
        except UserError as error:
            problems += [replace(problem, field="recipe") for problem in error.problems]
            continue
        output_dir, own_name = content.get("output_dir"), STAGES[kind].directory
        if not isinstance(output_dir, str):
            problems.append(Problem("output_dir", path, "must name the directory that this step writes"))
        elif output_dir.startswith("~"):
            problems.append(Problem("output_dir", output_dir, f"write it without ~ in {path}"))
        elif (name := Path(output_dir).name).casefold() in RESERVED and own_name != name:
            problems.append(Problem("output_dir", output_dir, f"the runner writes there itself; rename it in {path}"))
        elif own_name not in ("", name):
            problems.append(Problem("output_dir", output_dir, f"must end in {own_name}; rename it in {path}"))
        elif path.stem in read:
            problems.append(Problem("recipe", path, f"is the same step as {read[path.stem][0].name}; keep one of them"))
        read.setdefault(path.stem, (path, {str(key): value for key, value in content.items()}))
    if problems:
        raise UserError(*problems)
    stems = sorted(read, key=lambda stem: (int(stem.split("_")[0]), order.index(_kind_of(stem)), stem))
    return {stem: read[stem] for stem in stems}


def _common_home(folder: Path, configurations: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> Path:
    """Return the directory in which all steps write; each must have a directory of its own there."""
    outputs = {stem: Path(values["output_dir"]) for stem, (_, values) in configurations.items()}
    for stem, output in outputs.items():
        if {output.name, output.parent.name} & {"", ".."}:
            remedy = f"must lie in a directory of the run; write runs/NAME/{stem} in {configurations[stem][0]}"
            raise UserError(Problem("output_dir", output, remedy))
        twin = next((other for other in outputs if other != stem and outputs[other] == output), None)
        if twin:
            raise UserError(Problem("output_dir", output, f"{stem} and {twin} would write there; give each its own"))
    homes = {output.parent for output in outputs.values()}
    if len(homes) > 1:
        remedy = f"the steps write to several runs ({', '.join(sorted(map(str, homes)))}); use one directory for all"
        raise UserError(Problem("output_dir", folder, remedy))
    return homes.pop()


def _check_run_dir(run_dir: Path, folder: Path) -> None:
    """Refuse a directory that contains more than a run, or that cannot be created."""
    if problem := check_path(run_dir):
        raise UserError(problem)
    if str(run_dir).startswith("~"):
        raise UserError(Problem("output_dir", run_dir, "write it without quotes, which keep ~ from its meaning"))
    if (run_dir / "config.json").exists():
        raise UserError(Problem("output_dir", run_dir, "is the directory of a model; choose another directory"))
    real = Path(os.path.realpath(run_dir))
    project = Path(__file__).parents[2]
    for inner, name in ((Path.cwd(), "the current directory"), (project, "the project itself")):
        if inner.resolve().is_relative_to(real):
            remedy = f"is or contains {name}; choose a directory of its own, such as runs/mine"
            raise UserError(Problem("output_dir", run_dir, remedy))
    if folder.resolve() == real:
        raise UserError(Problem("output_dir", run_dir, "is the recipe folder; choose another directory"))


def check_of_recipe(run_dir: Path, recipe: Path) -> Problem | None:
    """Refuse a directory that a recipe of the Hub has chosen, unless it is new or was made by this recipe before."""
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return None
    name, _ = split_revision(recipe.as_posix())
    for record in (run_dir / "run.json", *run_dir.glob("seed*/run.json")):
        if split_revision(str(read_json(record).get("recipe")))[0] == name:
            return None
    return Problem("output_dir", run_dir, f"is not a run of {name}, which may only write to its own; give --output_dir")


def _step(name: str, kind: str, path: Path, values: Mapping[str, Any], seed: int | None, smoke: bool) -> Step:
    overrides: dict[str, Any] = smoke_overrides(kind, values) if smoke else {}
    stage = STAGES[kind]
    if seed is not None and stage.seeded:
        overrides["seed"] = seed
    # The file that it shares names the directory of another step.
    own = ["--output_dir", values["output_dir"]] if stage.file_of else []
    output = Path(values["output_dir"])
    return Step(
        name=name,
        kind=kind,
        module=stage.module,
        launched=stage.launched,
        arguments=("--config", str(path), *own, *_flags(overrides)),
        output=output,
        # People's work is never moved or deleted.
        leftovers=() if stage.by_people else (output,),
        values={**values, **overrides},
    )


def _flags(overrides: Mapping[str, Any]) -> list[str]:
    flags = []
    for key, value in overrides.items():
        flags += [f"--{key}", *([str(item) for item in value] if isinstance(value, list) else [str(value)])]
    return flags


def _paths(value: Any) -> Iterable[str]:
    """Yield every string inside a value of a YAML file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _paths(item)


def _relative_to(text: str, directory: Path) -> Path | None:
    """Return the path `text` relative to `directory`, or None if it lies elsewhere."""
    path = Path(text)
    return path.relative_to(directory) if path.is_relative_to(directory) else None


def _connect(steps: Sequence[Step], home: Path) -> list[Step]:
    """Find the steps that each one needs: those whose directories its configuration names."""
    problems, connected = [], []
    for position, step in enumerate(steps):
        needs, files = [], []
        for key, value in step.values.items():
            unread = key == "output_dir" or (step.stage.file_of and key == "dataset_name")
            for text in () if unread else _paths(value):
                inner = _relative_to(text, home)
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
    """Return whether a setting names a file or folder on this disk, other than a folder around the runs."""
    named = key.endswith(("_name", "_path", "_file", "_files", "_dir")) or os.sep in text
    return named and os.path.exists(text) and not Path.cwd().is_relative_to(os.path.realpath(text))


def _move(step: Step, home: Path, run_dir: Path) -> Step:
    """Return the step with all of its paths in `run_dir` instead of `home`."""
    if run_dir == home:
        return step

    def move(text: str) -> str:
        inner = _relative_to(text, home)
        return text if inner is None else str(run_dir / inner)

    overrides: dict[str, Any] = {}
    for key, value in step.values.items():
        moved = [move(text) for text in _paths(value)]
        if moved == list(_paths(value)):
            continue
        if isinstance(value, Mapping) or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
            remedy = f"a path inside a nested value cannot follow --output_dir; write {run_dir} in the YAML file"
            raise UserError(Problem(f"{step.name}: {key}", value, remedy))
        overrides[key] = moved[0] if isinstance(value, str) else moved
    arguments = list(step.arguments)
    if step.stage.file_of:
        position = arguments.index("--output_dir")
        del arguments[position : position + 2]
    output = run_dir / step.output.relative_to(home)
    leftovers = (output,) if step.leftovers else ()
    return replace(step, arguments=(*arguments, *_flags(overrides)), output=output, leftovers=leftovers)


def _evaluation_settings(folder: Path, steps: Iterable[Step], home: Path) -> dict[str, Any]:
    """Return the settings of all evaluations: evaluate.yaml, completed with what the stages read."""
    steps, file = list(steps), folder / EVALUATE
    stages = [(step.output.name, step.kind, step.values) for step in steps]
    content = tidy_paths(read_yaml(str(file)), home) if file.exists() else {}
    settings = complete(content, derive(stages, home))
    named = {key: value.get("dataset_name") if isinstance(value, Mapping) else value for key, value in content.items()}
    problems = []
    for field, text in (("judge", settings["judge"]), *((key, named.get(key)) for key in HELD_OUT)):
        inner = _relative_to(text, home) if isinstance(text, str) else None
        made = inner is None or not inner.parts or any(step.output.name == inner.parts[0] for step in steps)
        if not made and not os.path.exists(text):
            problems.append(Problem(f"{EVALUATE}: {field}", text, "no step of this recipe writes it"))
    known = [step.output.name for step in steps if step.stage.measured] + [BASE] * bool(settings["base"])
    if (against := content.get("against")) is not None and against not in known:
        problems.append(Problem(f"{EVALUATE}: against", against, f"no such stage; choose from: {', '.join(known)}"))
    if problems:
        raise UserError(*problems)
    return settings


def _evaluation(
    stage: str, before: Sequence[Step], run_dir: Path, settings: Mapping[str, Any], seed: int | None, smoke: bool
) -> Step:
    """Return the step that measures a stage on the run's data and against the stage that others are compared with."""
    overrides: dict[str, Any] = smoke_overrides("evaluate", settings) if smoke else {}
    overrides |= {} if seed is None else {"seed": seed}
    inputs = [settings.get("judge"), *(source["dataset_name"] for source in _sources(settings))]
    inputs += [settings["base"]] if stage == BASE else []
    own = [step for step in before if step.output == run_dir / stage]
    judges, people = any(not step.stage.generates for step in own), run_dir / VOTES / VOTES_FILE
    voted = people.is_file() or any(step.stage.by_people for step in before)  # perhaps only in the course of the run
    # Only reward models are measured on people's votes, which may become more at any time.
    read = {Path(name) for name in inputs if isinstance(name, str) and (judges or Path(name).name != VOTES)}
    home = Path(settings["home"])
    written = [path for path in read if path.is_relative_to(home)]
    files = [path for path in read - set(written) if _names_file("dataset_name", str(path))]
    shared = [
        other.name
        for other in before
        if (other.stage.editable and not other.stage.by_people)
        or other.kind == OPPONENT
        or any(run_dir / path.relative_to(home) == other.output for path in written)
    ]
    results = run_dir / "evaluations" / stage
    return Step(
        name=f"evaluate_{stage}",
        kind="evaluate",
        arguments=("evaluate", str(run_dir), "--stage", stage, *_flags(overrides)),
        output=results.parent,
        leftovers=(results.with_suffix(".json"), results.with_suffix(".jsonl")),
        values={**settings, **overrides},
        needs=tuple(dict.fromkeys([*shared, *(step.name for step in own)])),
        files=tuple(sorted([*files, *([people] if judges and voted else [])])),
    )


def _sources(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the data that stages are measured on."""
    sources = [settings.get(key) for key in HELD_OUT]
    return [source for source in sources if isinstance(source, Mapping) and "dataset_name" in source]
