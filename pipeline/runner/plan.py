"""Read a recipe folder, and plan a run of it: the steps of its YAML files, and the steps that follow from them.

    recipe folder                 plan
                                  0_random             an untrained model, which only the first pretraining has
                                  evaluate_0_random
    1_pretrain.yaml               1_pretrain
    evaluate.yaml                 evaluate_1_pretrain  one evaluation after each step that writes a model
    2_sft.yaml                    2_sft                needs 1_pretrain, because its settings name that directory
                                  evaluate_2_sft
                                  report

A recipe's paths are in one directory, its `home`. With `--output_dir` or `--smoke`, it writes to another one, the
`run_dir`. A step's settings keep the paths from its file, so that runs of a recipe in different directories have the
same settings. Its command's arguments and `output` have the paths of the run.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.named_code import code_files
from pipeline.config.recipe_folder import find_shipped
from pipeline.config.yaml_file import read_yaml
from pipeline.data.votes import VOTES_FILE
from pipeline.errors import Problem, UserError, refuse
from pipeline.evaluation.evaluate_yaml import BASE, VOTES, RunFacts, complete, named_code, to_record
from pipeline.evaluation.evaluate_yaml import FILE as EVALUATE
from pipeline.files import as_list, check_directory, relocate, split_revision
from pipeline.runner.records import TRASH
from pipeline.runner.steps import REPORT, Step, names_file, smoke_overrides
from pipeline.stages import HELD_OUT, OPPONENT, STAGES
from pipeline.stages.kinds import StageKind

RANDOM = STAGES["random"].directory
RESERVED = ("report", "evaluations", "logs", VOTES, RANDOM, BASE, "run.json", "run.lock", TRASH)
"""Names in a run's directory that the runner uses itself. A step may only write there if its kind's directory has this
fixed name."""


@dataclass(frozen=True)
class Plan:
    """A planned run.

    Attributes:
        steps: Its steps, each after the steps that it needs; the last one is the report.
        run_dir: Its directory.
        seed: The seed of its steps; None if neither the command line nor any file sets it.
    """

    steps: tuple[Step, ...]
    run_dir: Path
    seed: int | None


@dataclass(frozen=True)
class StepFile:
    """The YAML file of a step.

    Attributes:
        name: Its name without the suffix, such as "3_sft_preferred".
        kind: The kind of step, "sft".
        path: The file.
        values: Its settings.
    """

    name: str
    kind: str
    path: Path
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """The files of a recipe folder, from which runs with other seeds or in other directories are planned.

    Attributes:
        folder: The folder.
        files: The steps' files, in the order of the steps.
        evaluation: The content of evaluate.yaml, {} without one.
        home: The directory in the files that all steps write to.
    """

    folder: Path
    files: tuple[StepFile, ...]
    evaluation: Mapping[str, Any]
    home: Path

    def plan(self, output_dir: Path | None = None, seed: int | None = None, smoke: bool = False) -> Plan:
        """Plan a run. Arguments and errors as for `read_plan`."""
        run_dir = self.home
        if output_dir is not None:
            run_dir = output_dir
        elif smoke:
            run_dir = self.home.with_name(self.home.name + "-smoke")
        _check_run_dir(run_dir, self.folder)
        steps = _find_inputs(_stage_steps(self, run_dir, seed, smoke), self.home, run_dir)

        # Each model is evaluated right after the step that writes it, with settings that follow from all steps.
        settings = _evaluation_settings(self, steps)
        overrides = _overrides("evaluate", settings, seed, smoke)
        # Tools and graders of evaluations may run unconfined code if a stage's may.
        unconfined = any(step.values.get("allow_unconfined_code") for step in steps)
        planned: list[Step] = []
        for entry in _order_with_evaluations(steps, settings):
            if isinstance(entry, Step):
                planned.append(entry)
                continue
            evaluation = _evaluation_step(entry, planned, run_dir, settings, overrides)
            if unconfined:
                evaluation = replace(evaluation, arguments=(*evaluation.arguments, "--allow_unconfined_code"))
            planned.append(evaluation)

        # People may correct data by hand. Then the steps that read the data are due, but not the step that made them.
        editable = {step.name: step.output for step in steps if step.stage.editable}
        for place, step in enumerate(planned):
            data = {need: editable[need] for need in step.needs if need in editable}
            planned[place] = replace(step, data=data)
        names = tuple(step.name for step in planned)
        planned.append(Step(REPORT, "report", ("report", str(run_dir)), output=run_dir / "report", needs=names))
        if seed is None:
            seed = self.seed
        return Plan(tuple(planned), run_dir, seed)

    @property
    def seed(self) -> int | None:
        """The first seed in a file, which is the one in the run's record; None if no file sets one."""
        for file in self.files:
            seed = file.values.get("seed")
            if isinstance(seed, int):
                return seed
        return None


def read_plan(folder: Path, output_dir: Path | None = None, seed: int | None = None, smoke: bool = False) -> Plan:
    """Read the steps of a recipe folder, and add an untrained model before pretraining, evaluations and the report.

    Args:
        folder: Folder with files named `<number>_<kind>[_<anything>].yaml`, or one that is installed, such as pocket.
        output_dir: Directory of the run. Default: the parent of the files' `output_dir`, with `-smoke` if `smoke`.
        seed: Seed of every step. Default: each step's own.
        smoke: Whether every stage trains for two steps in miniature.

    Raises:
        UserError: With all files that are not steps, paths that no step writes and directories that cannot be used.
    """
    return read_recipe(folder).plan(output_dir, seed, smoke)


def read_recipe(folder: Path) -> Recipe:
    """Read the files of a recipe folder, or of one that is installed.

    Raises:
        UserError: If a file cannot be read, is not a step, or names no directory that it may write to. Wrong values
            of `evaluate.yaml` are only reported when a run is planned or checked.
    """
    folder = find_shipped(folder)
    files = _read_step_files(folder)
    home = _find_home(files, folder)
    evaluation: dict[str, Any] = {}
    if (folder / EVALUATE).exists():
        evaluation = read_yaml(str(folder / EVALUATE))
    return Recipe(folder, files, evaluation, home)


def _read_step_files(folder: Path) -> tuple[StepFile, ...]:
    """Return the steps' files in the order of the steps. Raise a `UserError` with what is wrong with any of them."""
    problems: list[Problem] = []
    kinds = [name for name, stage in STAGES.items() if stage.module]
    files: dict[str, StepFile] = {}
    for path in _list_step_files(folder):
        kind = path.stem.split("_")[1]
        if kind not in kinds:
            problems.append(Problem("recipe", path, f"unknown kind of step; choose from: {', '.join(kinds)}"))
            continue
        try:
            content = read_yaml(str(path))
        except UserError as error:
            problems += [replace(problem, field="recipe") for problem in error.problems]
            continue
        problem = _check_output_dir(content.get("output_dir"), kind, path)
        if problem is not None:
            problems.append(problem)
        elif path.stem in files:
            same = files[path.stem].path.name
            problems.append(Problem("recipe", path, f"is the same step as {same}; keep one of them"))
        values = {str(key): value for key, value in content.items()}
        files.setdefault(path.stem, StepFile(path.stem, kind, path, values))
    refuse(*problems)

    def place(file: StepFile) -> tuple[int, int, str]:
        # Steps of the same number run in the order of `STAGES`, 3_reward before 3_ppo, unless `_sort_by_inputs` changes
        # that.
        return int(file.name.split("_")[0]), kinds.index(file.kind), file.name

    return tuple(sorted(files.values(), key=place))


def _list_step_files(folder: Path) -> list[Path]:
    """Return the YAML files of a recipe folder that are steps by their name, sorted; there must be at least one."""
    remedy = "give a folder with files such as 2_sft.yaml"
    try:
        paths = sorted(path for path in folder.iterdir() if re.fullmatch(r"\d+_.+\.ya?ml", path.name))
    except FileNotFoundError as error:
        raise UserError(Problem("recipe", folder, f"does not exist; {remedy}{_download_hint(folder)}")) from error
    except OSError as error:
        raise UserError(Problem("recipe", folder, f"cannot be read ({error.strerror}); {remedy}")) from error
    if not paths:
        raise UserError(Problem("recipe", folder, f"does not contain a step; {remedy}"))
    return paths


def _download_hint(folder: Path) -> str:
    """Return the command that downloads a recipe from the Hub, as the end of a message; "" if `folder` is no Hub id."""
    name = folder.as_posix()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@.+)?", name) or folder.parts[0] in ("recipes", "runs"):
        return ""
    repo, revision = split_revision(name)
    command = f"hf download {repo} --local-dir {repo}"
    if revision is not None:
        command += f" --revision {revision}"
    return f"; recipes on the Hub are not read: run `{command}`, read the files, then run {repo}"


def _check_output_dir(output_dir: object, kind: str, path: Path) -> Problem | None:
    """Check that a step file names a directory that its step may write to.

    Args:
        output_dir: The value in the file, None if it is missing.
        kind: The kind of step; some kinds have a directory with a fixed name.
        path: The file.
    """
    fixed_name = STAGES[kind].directory
    if not isinstance(output_dir, str):
        return Problem("output_dir", path, "must name the directory that this step writes")
    name = Path(output_dir).name
    if name == fixed_name:
        return None
    if name.casefold() in RESERVED:
        return Problem("output_dir", output_dir, f"the runner writes there itself; rename it in {path}")
    if fixed_name:
        return Problem("output_dir", output_dir, f"must end in {fixed_name}; rename it in {path}")
    return None


def _find_home(files: Sequence[StepFile], folder: Path) -> Path:
    """Return the directory of the run in the files: the common parent of the directories that the steps write.

    Raises:
        UserError: If the steps do not have one directory each, next to each other.
    """
    writers: dict[Path, str] = {}
    for file in files:
        output = Path(file.values["output_dir"])
        if {output.name, output.parent.name} & {"", ".."}:
            remedy = f"must lie in a directory of the run; write runs/NAME/{file.name} in {file.path}"
            raise UserError(Problem("output_dir", output, remedy))
        if output in writers:
            remedy = f"{writers[output]} and {file.name} would write there; give each its own"
            raise UserError(Problem("output_dir", output, remedy))
        writers[output] = file.name
    # A recipe cannot write to two runs, because a run has one lock, one record and one report.
    homes = {output.parent for output in writers}
    if len(homes) > 1:
        remedy = f"the steps write to several runs ({', '.join(sorted(map(str, homes)))}); use one directory for all"
        raise UserError(Problem("output_dir", folder, remedy))
    return homes.pop()


def _check_run_dir(run_dir: Path, folder: Path) -> None:
    """Reject a directory that contains anything but a run, or that cannot be created."""
    refuse(check_directory(run_dir, writable=False))
    # Links are followed, because what matters is which files are next to the run's.
    real = Path(os.path.realpath(run_dir))
    project = Path(__file__).parents[2].resolve()
    remedy = ""
    if str(run_dir).startswith("~"):
        remedy = "write the whole path, without ~"
    elif (run_dir / "config.json").exists():
        remedy = "is the directory of a model; choose another directory"
    elif Path.cwd().is_relative_to(real) or project.is_relative_to(real):
        remedy = "is or contains the current directory or this project; choose one of its own, such as runs/mine"
    elif folder.resolve() == real:
        remedy = "is the recipe folder; choose another directory"
    if remedy:
        raise UserError(Problem("output_dir", run_dir, remedy))


def _stage_steps(recipe: Recipe, run_dir: Path, seed: int | None, smoke: bool) -> list[Step]:
    """Return the steps of a recipe's files, with an untrained model before the first pretraining."""
    home = recipe.home
    files: list[StepFile] = []
    for file in recipe.files:
        # This normalises paths: `runs/pocket/2_sft/` and `runs/pocket/2_sft` are the same.
        values = relocate(file.values, home, home)
        from_scratch = STAGES[file.kind].from_scratch and not values.get("model_name_or_path")
        # A second pretraining, of another architecture, has no untrained model of its own.
        if from_scratch and RANDOM not in [earlier.name for earlier in files]:
            files.append(StepFile(RANDOM, "random", file.path, {**values, "output_dir": str(home / RANDOM)}))
        files.append(replace(file, values=values))
    steps: list[Step] = []
    for file in files:
        overrides = _overrides(file.kind, file.values, seed, smoke)
        steps.append(_step_of_file(file, overrides, home, run_dir))
    return steps


def _overrides(kind: str, values: Mapping[str, Any], seed: int | None, smoke: bool) -> dict[str, Any]:
    """Return the settings that `--smoke` and `--seed` change in a step of this kind with these values."""
    overrides: dict[str, Any] = {}
    if smoke:
        overrides = smoke_overrides(kind, values)
    if seed is not None and STAGES.get(kind, StageKind()).seeded:
        overrides["seed"] = seed
    return overrides


def _step_of_file(file: StepFile, overrides: Mapping[str, Any], home: Path, run_dir: Path) -> Step:
    """Return the step of a file; what it needs is not known yet.

    Example:
        with home runs/pocket and run_dir runs/mine, the file's `output_dir: runs/pocket/2_sft` becomes the argument
        `--output_dir runs/mine/2_sft`, and stays `runs/pocket/2_sft` in the step's `values`

    Args:
        file: The file, whose values contain paths in `home`.
        overrides: Settings that replace values of the file.
        home: Directory of the run in the file.
        run_dir: Directory of the run.

    Raises:
        UserError: If a path inside a mapping would have to be changed.
    """
    values = {**file.values, **overrides}
    stage = STAGES[file.kind]
    output = run_dir / Path(values["output_dir"]).name
    # Command line options override the file. For another directory, all paths of the run become options.
    moved: dict[str, Any] = {}
    for key, value in values.items():
        new_value = relocate(value, home, run_dir)
        if new_value == value:
            continue
        # The command line cannot express a mapping, so the step would read another run's files.
        if not all(isinstance(item, str) for item in as_list(new_value)):
            remedy = f"a path inside a nested value cannot follow --output_dir; write {run_dir} in the YAML file"
            raise UserError(Problem(f"{file.name}: {key}", value, remedy))
        moved[key] = new_value
    options = {**overrides, **moved}
    if stage.file_of:
        # The shared file names the directory of another step.
        options = {"output_dir": values["output_dir"], **options}
    arguments = ("--config", str(file.path), *_flags(options))
    leftovers: tuple[Path, ...] = (output,)
    if stage.by_people:
        # Never move or delete people's work.
        leftovers = ()
    return Step(file.name, file.kind, arguments, output, leftovers, values)


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Return settings as words of a command line: {"a": 1, "b": ["x", "y"]} -> --a 1 --b x y."""
    words: list[str] = []
    for key, value in options.items():
        words += [f"--{key}", *map(str, as_list(value))]
    return words


def _find_inputs(steps: Sequence[Step], home: Path, run_dir: Path) -> list[Step]:
    """Put the steps in order, and return them with the steps that they need and the files that they read.

    Each text in a step's settings may name one of three things:

        runs/pocket/1_pretrain        inside `home`: the step that writes this directory is needed
        my_package.rewards:length     a function of the user: its file and what that imports are read
        data/questions.jsonl          any other path: the file is read

    Raises:
        UserError: With all paths inside `home` that no earlier step writes and that do not exist either.
    """
    problems: list[Problem] = []
    completed: list[Step] = []
    writers: dict[Path, str] = {}
    for step in _sort_by_inputs(steps, home):
        needs: list[str] = []
        files: list[Path] = []
        for key, text in _texts_read_by(step):
            path = Path(text)
            code = code_files(text)
            if code:
                files += code
                continue
            if not path.is_relative_to(home):
                if names_file(key, text):
                    files.append(path)
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
        completed.append(replace(step, needs=tuple(dict.fromkeys(needs)), files=tuple(files)))
        writers[step.output] = step.name
    refuse(*problems)
    return completed


def _sort_by_inputs(steps: Sequence[Step], home: Path) -> list[Step]:
    """Put each step before the steps of the same number that read its output: 3_preferences before 3_sft_preferred."""
    ordered: list[Step] = []
    for step in steps:
        output = str(home / step.output.name)
        number = step.name.partition("_")[0]
        place = len(ordered)
        for earlier_place, earlier in enumerate(ordered):
            reads_output = output in map(str, earlier.values.values())
            if reads_output and earlier.name.partition("_")[0] == number:
                place = earlier_place
                break
        ordered.insert(place, step)
    return ordered


def _texts_read_by(step: Step) -> Iterator[tuple[str, str]]:
    """Yield the field and the value of each setting that may name what the step reads: any text, also in a list."""
    unread = ["output_dir"]
    if step.stage.file_of:
        # An untrained model does not read the data of the pretraining whose file it shares.
        unread.append("dataset_name")
    for key, value in step.values.items():
        if key in unread:
            continue
        for item in as_list(value):
            if isinstance(item, str):
                yield key, item


def _evaluation_settings(recipe: Recipe, steps: Sequence[Step]) -> dict[str, Any]:
    """Return the settings of all evaluations: evaluate.yaml, completed from the stages' settings.

    Raises:
        UserError: If `evaluate.yaml` names a path in the run that no step writes, or an opponent that is not a stage.
    """
    home = recipe.home
    content = relocate(recipe.evaluation, home, home)
    facts = RunFacts.of_stages([(step.output.name, step.kind, step.values) for step in steps], home)
    settings = to_record(complete(content, facts), facts)
    problems: list[Problem] = []
    outputs = [home / step.output.name for step in steps]
    for key in ("judge", *HELD_OUT):
        text = content.get(key)
        if isinstance(text, Mapping):
            text = text.get("dataset_name")
        if not isinstance(text, str) or not Path(text).is_relative_to(home) or Path(text) == home:
            continue
        if not any(Path(text).is_relative_to(output) for output in outputs) and not os.path.exists(text):
            problems.append(Problem(f"{EVALUATE}: {key}", text, "no step of this recipe writes it"))
    stages = [step.output.name for step in steps if step.stage.measured]
    if settings["base"]:
        stages.append(BASE)
    against = content.get("against")
    if against is not None and against not in stages:
        problems.append(Problem(f"{EVALUATE}: against", against, f"no such stage; choose from: {', '.join(stages)}"))
    refuse(*problems)
    return settings


def _order_with_evaluations(steps: Sequence[Step], settings: Mapping[str, Any]) -> list[Step | str]:
    """Return the order of steps and evaluations, in which an evaluation is the name of the directory that it measures.

    Example:
        [step 1_pretrain, "1_pretrain", step 2_sft, "2_sft"]

    Args:
        steps: The steps of the stages, in order.
        settings: The settings of all evaluations.
    """
    order: list[Step | str] = []
    for step in steps:
        # A model from the Hub is measured once, before the first stage that starts from it.
        if settings["base"] and step.values.get("model_name_or_path") == settings["base"] and BASE not in order:
            order.append(BASE)
        order.append(step)
        if step.stage.measured:
            order.append(step.output.name)
    # The opponent is measured after the judge has been trained, because its baselines need the judge.
    against = settings["against"]
    judge = Path(str(settings["judge"]))
    if judge.parent == Path(settings["home"]) and judge.name in order and against in order:
        # The step that trains the judge comes right before the judge's own evaluation.
        judge_step = order.index(judge.name) - 1
        if order.index(against) < judge_step:
            order.remove(against)
            # Since that step has moved to the place before, this is the place right after it.
            order.insert(judge_step, against)
    return order


def _evaluation_step(
    stage: str, earlier: Sequence[Step], run_dir: Path, settings: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Step:
    """Return the step that evaluates a stage on the run's data, against the stage that others are compared with.

    Args:
        stage: Name of the stage's directory, or `BASE`.
        earlier: All steps before the evaluation, among which are those that it needs.
        run_dir: Directory of the run.
        settings: The settings of all evaluations, whose paths are in the recipe's `home`.
        overrides: The settings that the command line of the run changes.
    """
    writers = [step for step in earlier if step.output == run_dir / stage]
    is_reward_model = any(not step.stage.generates for step in writers)
    home = Path(settings["home"])
    paths = _paths_read_by_evaluation(stage, settings)
    if not is_reward_model:
        # Only reward models are measured on people's votes, which may be added at any time.
        paths = {path for path in paths if path.name != VOTES}
    files = {path for path in paths if not path.is_relative_to(home) and names_file("dataset_name", str(path))}
    for name in named_code(settings):
        files.update(code_files(name))
    votes = run_dir / VOTES / VOTES_FILE
    # The page makes an empty file as soon as it is opened.
    has_votes = votes.is_file() and votes.stat().st_size > 0
    if is_reward_model and (has_votes or any(step.stage.by_people for step in earlier)):
        files.add(votes)

    # Everything that it reads from the run comes first: all data, the opponent, and the model that it measures.
    outputs = {run_dir / path.relative_to(home) for path in paths if path.is_relative_to(home)}
    outputs |= {step.output for step in earlier if step.stage.editable and not step.stage.by_people}
    needs = [step.name for step in earlier if step.output in outputs or step.kind == OPPONENT]
    needs += [step.name for step in writers]
    arguments = ["evaluate", str(run_dir), "--stage", stage, *_flags(overrides)]
    # The recipe's own functions, which the command would not load just because the run's files name them.
    for name in named_code(settings):
        arguments += ["--trust", name]
    output = run_dir / "evaluations"
    return Step(
        name=f"evaluate_{stage}",
        kind="evaluate",
        arguments=tuple(arguments),
        output=output,
        leftovers=(output / f"{stage}.json", output / f"{stage}.jsonl"),
        values={**settings, **overrides},
        needs=tuple(dict.fromkeys(needs)),
        files=tuple(sorted(files)),
    )


def _paths_read_by_evaluation(stage: str, settings: Mapping[str, Any]) -> set[Path]:
    """Return the names of the judge, of the held-out data and, for `BASE`, of the model, as paths; some are Hub ids."""
    names = [settings.get("judge")]
    if stage == BASE:
        names.append(settings["base"])
    for key in HELD_OUT:
        source = settings.get(key)
        if isinstance(source, Mapping):
            names.append(source.get("dataset_name"))
    return {Path(name) for name in names if isinstance(name, str)}
