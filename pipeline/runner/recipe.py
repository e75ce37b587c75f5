"""Read a recipe folder: the steps in its YAML files, and the steps derived from them.

A recipe's paths are in one directory, its `home`; with `--output_dir` or `--smoke`, it writes to another one, the
`run_dir`. A step's settings keep the paths from its file, so that runs of a recipe in different directories have the
same settings. Its command's arguments and `output` have the paths of the run.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config.recipe_folder import find_shipped
from pipeline.config.yaml_file import read_yaml
from pipeline.data.votes import VOTES_FILE
from pipeline.errors import Problem, UserError, refuse
from pipeline.evaluation.evaluate_yaml import BASE, VOTES, complete, derive, named_code
from pipeline.evaluation.evaluate_yaml import FILE as EVALUATE
from pipeline.files import as_list, check_directory, read_json, relocate, split_revision
from pipeline.runner.records import TRASH
from pipeline.runner.steps import REPORT, Step, smoke_overrides
from pipeline.stages import HELD_OUT, OPPONENT, STAGES
from pipeline.stages.kinds import StageKind

RANDOM = STAGES["random"].directory
RESERVED = ("report", "evaluations", "logs", VOTES, RANDOM, BASE, "run.json", "run.lock", TRASH)
"""Reserved names in a run's directory, which a step may only write to if its kind's directory has this name."""

Files = dict[str, tuple[str, Path, dict[str, Any]]]
"""Kind, path and content of each step's file, by its stem."""


@dataclass(frozen=True)
class Plan:
    """The steps of a run, each after those that it needs, and its directory. `seed` is None if no file sets it."""

    steps: tuple[Step, ...]
    run_dir: Path
    seed: int | None


def read_plan(folder: Path, output_dir: Path | None = None, seed: int | None = None, smoke: bool = False) -> Plan:
    """Read the steps of a recipe folder, and add an untrained model before pretraining, evaluations and the report.

    Args:
        folder: Folder with files named `<number>_<kind>[_<anything>].yaml`, or one that is installed, such as pocket.
        output_dir: Directory of the run. Default: the parent of the files' `output_dir`, with `-smoke` if `smoke`.
        seed: Seed of every step. Default: each step's own.
        smoke: Whether every stage takes two steps in miniature.

    Raises:
        UserError: With all files that are not steps, paths that no step writes and directories that cannot be used.
    """
    folder = find_shipped(folder)
    files, home = _read_folder(folder)
    run_dir = output_dir or (home.with_name(home.name + "-smoke") if smoke else home)
    _check_run_dir(run_dir, folder)

    def overrides(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
        seeded = seed is not None and STAGES.get(kind, StageKind()).seeded
        return (smoke_overrides(kind, values) if smoke else {}) | ({"seed": seed} if seeded else {})

    steps: list[Step] = []
    for stem, (kind, path, written) in files.items():
        # `runs/pocket/2_sft/` and `runs/pocket/2_sft` are the same.
        values = relocate(written, home, home)
        from_scratch = STAGES[kind].from_scratch and not values.get("model_name_or_path")
        # A second pretraining, of another architecture, has no untrained model of its own.
        if from_scratch and RANDOM not in [step.name for step in steps]:
            untrained = {**values, "output_dir": str(home / RANDOM)}
            steps.append(_step(RANDOM, "random", path, untrained, overrides("random", untrained), home, run_dir))
        steps.append(_step(stem, kind, path, values, overrides(kind, values), home, run_dir))
    steps = _connect(steps, home, run_dir)

    # The steps and, after each one, its evaluation.
    settings = _evaluation_settings(folder, steps, home)
    order: list[Step | str] = []
    for step in steps:
        # A model from the Hub is measured once, before the first stage that starts from it.
        if settings["base"] and step.values.get("model_name_or_path") == settings["base"] and BASE not in order:
            order.append(BASE)
        order += [step, step.output.name] if step.stage.measured else [step]
    # The opponent is measured when the judge is trained, because its baselines need the judge.
    against, judge = settings["against"], Path(str(settings["judge"]))
    if judge.parent == Path(settings["home"]) and judge.name in order and against in order:
        trained = order.index(judge.name) - 1
        if order.index(against) < trained:
            order.remove(against)
            order.insert(trained, against)
    changed = overrides("evaluate", settings)
    # Tools and graders of evaluations may run unconfined code if a stage's may.
    allowed = ("--allow_unconfined_code",) if any(step.values.get("allow_unconfined_code") for step in steps) else ()
    planned: list[Step] = []
    for item in order:
        if isinstance(item, str):
            item = _evaluation(item, planned, run_dir, settings, changed)
            item = replace(item, arguments=(*item.arguments, *allowed))
        planned.append(item)
    # People may correct data by hand. Then the steps that read the data are due, but not the step that made them.
    editable = {step.name: step.output for step in steps if step.stage.editable}
    planned = [replace(one, data={need: editable[need] for need in one.needs if need in editable}) for one in planned]
    names = tuple(step.name for step in planned)
    planned.append(Step(REPORT, "report", ("report", str(run_dir)), output=run_dir / "report", needs=names))
    # The run's record has one seed: the first one in a file.
    seeds = (values["seed"] for *_, values in files.values() if isinstance(values.get("seed"), int))
    return Plan(tuple(planned), run_dir, next(seeds, None) if seed is None else seed)


def _read_folder(folder: Path) -> tuple[Files, Path]:
    """Return the steps' files in the order of the steps, and the directory that all steps write to."""
    remedy = "give a folder with files such as 2_sft.yaml"
    try:
        paths = sorted(path for path in folder.iterdir() if re.fullmatch(r"\d+_.+\.ya?ml", path.name))
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(Problem("recipe", folder, f"{reason}; {remedy}")) from error
    if not paths:
        raise UserError(Problem("recipe", folder, f"does not contain a step; {remedy}"))
    problems: list[Problem] = []
    order = [name for name, stage in STAGES.items() if stage.module]
    read: Files = {}
    for path in paths:
        kind = path.stem.split("_")[1]
        if kind not in order:
            problems.append(Problem("recipe", path, f"unknown kind of step; choose from: {', '.join(order)}"))
            continue
        try:
            content = read_yaml(str(path))
        except UserError as error:
            problems += [replace(problem, field="recipe") for problem in error.problems]
            continue
        # The directories of the runner and of a few kinds have fixed names, so that other steps find them.
        output_dir, own_name = content.get("output_dir"), STAGES[kind].directory
        if not isinstance(output_dir, str):
            problems.append(Problem("output_dir", path, "must name the directory that this step writes"))
        elif (name := Path(output_dir).name).casefold() in RESERVED and own_name != name:
            problems.append(Problem("output_dir", output_dir, f"the runner writes there itself; rename it in {path}"))
        elif own_name not in ("", name):
            problems.append(Problem("output_dir", output_dir, f"must end in {own_name}; rename it in {path}"))
        elif path.stem in read:
            problems.append(Problem("recipe", path, f"is the same step as {read[path.stem][1].name}; keep one of them"))
        read.setdefault(path.stem, (kind, path, {str(key): value for key, value in content.items()}))
    refuse(*problems)
    # Steps of the same number run in the order of `STAGES`, 3_reward before 3_ppo, unless `_connect` changes that.
    files = dict(sorted(read.items(), key=lambda one: (int(one[0].split("_")[0]), order.index(one[1][0]), one[0])))

    writers: dict[Path, str] = {}
    for stem, (_, path, values) in files.items():
        output = Path(values["output_dir"])
        if {output.name, output.parent.name} & {"", ".."}:
            remedy = f"must lie in a directory of the run; write runs/NAME/{stem} in {path}"
            raise UserError(Problem("output_dir", output, remedy))
        if (twin := writers.setdefault(output, stem)) != stem:
            raise UserError(Problem("output_dir", output, f"{twin} and {stem} would write there; give each its own"))
    # A recipe cannot write to two runs, because a run has one lock, one record and one report.
    homes = {output.parent for output in writers}
    if len(homes) > 1:
        remedy = f"the steps write to several runs ({', '.join(sorted(map(str, homes)))}); use one directory for all"
        raise UserError(Problem("output_dir", folder, remedy))
    return files, homes.pop()


def _check_run_dir(run_dir: Path, folder: Path) -> None:
    """Refuse a directory that contains anything but a run, or that cannot be created."""
    refuse(check_directory(run_dir, writable=False))
    # Links are followed, because what matters is which files are next to the run's.
    real = Path(os.path.realpath(run_dir))
    contains = any(inside.is_relative_to(real) for inside in (Path.cwd(), Path(__file__).parents[2].resolve()))
    refusals = {
        "write the whole path, without ~": str(run_dir).startswith("~"),
        "is the directory of a model; choose another directory": (run_dir / "config.json").exists(),
        "is or contains the current directory or this project; choose one of its own, such as runs/mine": contains,
        "is the recipe folder; choose another directory": folder.resolve() == real,
    }
    if found := [remedy for remedy, holds in refusals.items() if holds]:
        raise UserError(Problem("output_dir", run_dir, found[0]))


def check_of_recipe(run_dir: Path, recipe: Path) -> Problem | None:
    """Refuse a directory chosen by a recipe from the Hub, unless it is new or was made by the same recipe."""
    name, _ = split_revision(recipe.as_posix())
    records = (run_dir / "run.json", *run_dir.glob("seed*/run.json"))
    is_new = not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir()))
    if is_new or any(split_revision(str(read_json(record).get("recipe")))[0] == name for record in records):
        return None
    return Problem("output_dir", run_dir, f"is not a run of {name}, which may only write to its own; give --output_dir")


def _step(
    name: str, kind: str, path: Path, values: Mapping[str, Any], overrides: dict[str, Any], home: Path, run_dir: Path
) -> Step:
    """Return the step of the file `path`, which writes to `run_dir`; `values` contains paths in `home`."""
    values = {**values, **overrides}
    stage, output = STAGES[kind], run_dir / Path(values["output_dir"]).name
    # Command line options override the file. For another directory, all paths of the run become options.
    moved = {key: new for key, value in values.items() if (new := relocate(value, home, run_dir)) != value}
    for key, value in moved.items():
        # The command line cannot express a mapping, so the step would read another run's files.
        if not all(isinstance(item, str) for item in as_list(value)):
            remedy = f"a path inside a nested value cannot follow --output_dir; write {run_dir} in the YAML file"
            raise UserError(Problem(f"{name}: {key}", values[key], remedy))
    # The shared file names the directory of another step.
    own = {"output_dir": values["output_dir"]} if stage.file_of else {}
    arguments = ("--config", str(path), *_flags({**own, **overrides, **moved}))
    # Never move or delete people's work.
    return Step(name, kind, arguments, output, () if stage.by_people else (output,), values)


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    return [word for key, value in options.items() for word in (f"--{key}", *map(str, as_list(value)))]


def _connect(steps: Sequence[Step], home: Path, run_dir: Path) -> list[Step]:
    """Find the steps that each step needs, by the directories in its settings, and the files that it reads."""
    # Each step comes before steps of the same number that read its output: 3_preferences before 3_sft_preferred.
    ordered: list[Step] = []
    for step in steps:
        written, number = str(home / step.output.name), step.name.partition("_")[0]
        same = ((i, other) for i, other in enumerate(ordered) if other.name.partition("_")[0] == number)
        readers = (place for place, other in same if written in map(str, other.values.values()))
        ordered.insert(next(readers, len(ordered)), step)
    problems, connected = [], []
    writers: dict[Path, str] = {}
    for step in ordered:
        needs, files = [], []
        # An untrained model does not read the data of the pretraining whose file it shares.
        unread = ("output_dir", "dataset_name") if step.stage.file_of else ("output_dir",)
        named = ((key, text) for key, value in step.values.items() if key not in unread for text in as_list(value))
        for key, text in ((key, text) for key, text in named if isinstance(text, str)):
            path = Path(text)
            if code := _code_file(text):
                files.append(code)
                continue
            if not path.is_relative_to(home):
                files += [path] if _names_file(key, text) else []
                continue
            # A file inside a step's directory, such as `runs/pocket/data/README.md`, belongs to the step as well.
            directory = run_dir.joinpath(*path.relative_to(home).parts[:1])
            if directory in (run_dir, step.output):
                continue
            if directory in writers:
                needs.append(writers[directory])
            elif os.path.exists(text):
                files.append(path)
            else:
                problems.append(Problem(f"{step.name}: {key}", text, "no earlier step of this recipe writes it"))
        connected.append(replace(step, needs=tuple(dict.fromkeys(needs)), files=tuple(files)))
        writers[step.output] = step.name
    refuse(*problems)
    return connected


def _code_file(text: str) -> Path | None:
    """Return the file of a user's `package.module:function`, or None for any other text; nothing is imported.

    A step that calls the function runs again when its file changes. Our own code and other libraries are not watched.
    """
    match = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*):\w+", text)
    if match is None:
        return None
    first, *rest = match[1].split(".")
    if first in (*sys.stdlib_module_names, "__main__", "pipeline", "recipes"):
        return None
    # Looking for `package.module` would import the package.
    spec = find_spec(first)
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    candidates = [folder.joinpath(*rest).with_suffix(".py") for folder in folders if rest]
    candidates += [folder.joinpath(*rest, "__init__.py") for folder in folders]
    if not folders and not rest and spec.origin:
        candidates = [Path(spec.origin)]
    file = next(filter(Path.is_file, candidates), None)
    if file is None or "site-packages" in file.parts:
        return None
    file, here = file.absolute(), Path.cwd()
    # As a user writes it, so that a project can be moved with its runs.
    return file.relative_to(here) if file.is_relative_to(here) else file


def _names_file(key: str, text: str) -> bool:
    """Return whether a setting names a file or folder on this disk, except for a parent of the runs."""
    named = key.endswith(("_name", "_path", "_file", "_files", "_dir")) or os.sep in text
    return named and os.path.exists(text) and not Path.cwd().is_relative_to(os.path.realpath(text))


def _evaluation_settings(folder: Path, steps: Sequence[Step], home: Path) -> dict[str, Any]:
    """Return the settings of all evaluations: evaluate.yaml, completed from the stages' settings."""
    file = folder / EVALUATE
    content = relocate(read_yaml(str(file)), home, home) if file.exists() else {}
    settings = complete(content, derive([(step.output.name, step.kind, step.values) for step in steps], home))
    problems = []
    written = [home / step.output.name for step in steps]
    for key in ("judge", *HELD_OUT):
        named = content.get(key)
        text = named.get("dataset_name") if isinstance(named, Mapping) else named
        if not isinstance(text, str) or not Path(text).is_relative_to(home) or Path(text) == home:
            continue
        if not any(Path(text).is_relative_to(output) for output in written) and not os.path.exists(text):
            problems.append(Problem(f"{EVALUATE}: {key}", text, "no step of this recipe writes it"))
    known = [step.output.name for step in steps if step.stage.measured] + ([BASE] if settings["base"] else [])
    if (against := content.get("against")) is not None and against not in known:
        problems.append(Problem(f"{EVALUATE}: against", against, f"no such stage; choose from: {', '.join(known)}"))
    refuse(*problems)
    return settings


def _evaluation(
    stage: str, before: Sequence[Step], run_dir: Path, settings: Mapping[str, Any], overrides: dict[str, Any]
) -> Step:
    """Return the step that evaluates a stage on the run's data, against the stage that others are compared with."""
    own = [step for step in before if step.output == run_dir / stage]
    scores = any(not step.stage.generates for step in own)

    # It reads the judge, held-out data and, to evaluate the model that the first stage starts from, that model.
    sources = [settings[key] for key in HELD_OUT if isinstance(settings.get(key), Mapping)]
    base = settings["base"] if stage == BASE else None
    named = [settings.get("judge"), base, *(source.get("dataset_name") for source in sources)]
    paths = {Path(name) for name in named if isinstance(name, str)}
    # Only reward models are measured on people's votes, which may be added at any time.
    paths = {path for path in paths if scores or path.name != VOTES}
    home = Path(settings["home"])
    written = {run_dir / path.relative_to(home) for path in paths if path.is_relative_to(home)}
    files = {p for p in paths if not p.is_relative_to(home) and _names_file("dataset_name", str(p))}
    files |= {file for name in named_code(settings) if (file := _code_file(name))}
    votes = run_dir / VOTES / VOTES_FILE
    # The page makes an empty file as soon as it is opened.
    has_votes = votes.is_file() and votes.stat().st_size > 0
    if scores and (has_votes or any(step.stage.by_people for step in before)):
        files.add(votes)

    # Everything that it reads from the run comes first: all data, the opponent, and the model that it measures.
    written |= {step.output for step in before if step.stage.editable and not step.stage.by_people}
    needs = [step.name for step in before if step.output in written or step.kind == OPPONENT]
    needs += [step.name for step in own]
    # The recipe's own functions, which the command would not load just because the run's files name them.
    trust = [word for name in named_code(settings) for word in ("--trust", name)]
    arguments = ("evaluate", str(run_dir), "--stage", stage, *_flags(overrides), *trust)
    output, values = run_dir / "evaluations", {**settings, **overrides}
    results = (output / f"{stage}.json", output / f"{stage}.jsonl")
    needed, read = tuple(dict.fromkeys(needs)), tuple(sorted(files))
    return Step(f"evaluate_{stage}", "evaluate", arguments, output, results, values, needed, read)
