"""`python -m pipeline evaluate RUN --stage 2_sft`: measure one stage on held-out data.

Writes RUN/evaluations/STAGE.json (metrics, answers to fixed prompts, traces) and STAGE.jsonl (a line for each example).
The data are those named in the run's `evaluate.yaml`, or another file, and the held-out rows of the stages' own data.
Options name other data; with `--name`, the result does not replace the run's own, but gets a folder of that name:

    python -m pipeline evaluate RUN --stage 4_grpo --name gsm8k --problems gsm8k-test.jsonl --prompt_column question
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem, UserError, as_typed, refuse
from pipeline.evaluation import evaluate_yaml
from pipeline.evaluation.evaluate_yaml import DEFAULTS
from pipeline.files import check_links, read_json, read_run
from pipeline.stages import HELD_OUT

if TYPE_CHECKING:
    from pipeline.evaluation.results import StageResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate` to `parser`: the keys of `evaluate.yaml` and the columns of one data set."""
    parser.add_argument("run", metavar="RUN", help="run directory, for instance runs/pocket")
    parser.add_argument("--stage", required=True, help="directory of the model inside RUN, for instance 2_sft")
    parser.add_argument("--config", metavar="FILE", help="evaluate.yaml to use instead of the run's own")
    parser.add_argument("--name", help="write to RUN/evaluations/NAME, apart from the run's own figures")
    for item in fields(evaluate_yaml.EvaluationArguments):
        # A list of prompts is easier to write in a file.
        if item.name == "fixed_prompts":
            continue
        options: dict[str, Any] = {"type": int if "int" in str(item.type) else str}
        if item.name in HELD_OUT:
            options = {"metavar": "DATASET"}
        elif item.name == "vllm":
            options = {"action": "store_true", "default": None}
        elif item.name == "lm_eval_tasks":
            options = {"nargs": "+", "metavar": "TASK"}
        parser.add_argument(f"--{item.name}", help=item.metadata["help"], **options)
    for item in fields(evaluate_yaml.Source):
        if item.name.endswith("_column") or item.name in ("answer_pattern", "grade", "system_prompt", "dataset_config"):
            parser.add_argument(f"--{item.name}", help=item.metadata["help"])
    parser.add_argument("--split", help="split of the data set (default: test; for a plain file, all rows)")
    add_trust(parser)
    parser.add_argument("--allow_unconfined_code", action="store_true", help="grade code even where it is not confined")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option `--trust`, for commands that read names of functions from the files of a run."""
    meaning = "function, class or task file that the folder names and that you let it load; repeatable"
    parser.add_argument("--trust", action="append", default=[], metavar="NAME", help=meaning)


def main(args: argparse.Namespace) -> int:
    """Evaluate the stage, write both files and print the metrics. Return the exit code."""
    if not Path(args.run).is_dir():
        raise UserError(Problem("RUN", args.run, f"no such directory; make it with `{as_typed('run', 'RECIPE')}`"))
    from pipeline.config.named_code import only_trusted
    from pipeline.config.yaml_file import read_yaml
    from pipeline.evaluation.results import format_table
    from pipeline.launch import quiet_libraries
    from pipeline.rewards.sandbox import run as sandbox

    quiet_libraries()
    sandbox.allow_unconfined = args.allow_unconfined_code
    if args.lm_eval_tasks and not (args.name or args.config or any(getattr(args, key) for key in HELD_OUT)):
        # Tasks named on the command line do not replace the run's own figures.
        args.name = "lm_eval"
    content: dict[str, Any] = {}
    if args.config:
        content = read_yaml(args.config)
    # What the command names was chosen by its user; what the run's files name, by whoever made the run.
    options = {"judge": args.judge, "lm_eval_tasks": args.lm_eval_tasks, "problems": {"grade": args.grade}}
    trusted = [*args.trust, *evaluate_yaml.named_code(content), *evaluate_yaml.named_code(options)]
    try:
        with only_trusted(trusted):
            result = evaluate(args, content)
    except UserError as error:
        raise UserError(*(_name_option(problem, args) for problem in error.problems)) from error.__cause__
    path = result.write(Path(args.run) / "evaluations" / (args.name or ""))
    print(format_table(result))
    print(f"{path} ({result.seconds:.1f} s)")
    return 0


def _name_option(problem: Problem, args: argparse.Namespace) -> Problem:
    """Return a problem that names the option instead of the key of `evaluate.yaml`, if an option gave the value."""
    key, colon, field = problem.field.partition(": ")
    if colon and key in HELD_OUT and getattr(args, key):
        option = {"dataset_name": key, "dataset_test_split": "split"}.get(field, field)
        return replace(problem, field=f"--{option}")
    if not colon and key in DEFAULTS and getattr(args, key, None) is not None:
        return replace(problem, field=f"--{key}")
    return problem


def evaluate(args: argparse.Namespace, content: Mapping[str, Any]) -> StageResult:
    """Measure the stage as the command's options say.

    Options override `content`, the file of `--config`, which replaces the run's own `evaluate.yaml`; anything that
    neither of them names follows from the stages.

    Raises:
        UserError: With keys of `evaluate.yaml`, for what cannot be used.
    """
    # These imports take seconds.
    from pipeline.evaluation.checks import check
    from pipeline.evaluation.held_out import read_held_out
    from pipeline.evaluation.stage import check_stages, evaluate_stage

    run = Path(args.run)
    recorded, facts = evaluate_yaml.read_record(run, args.stage)
    data = _data_of_options(args)
    if not args.config:
        content = recorded
    # An evaluation with a name measures only the data or tasks that the command names.
    drops_own_data = bool(args.name and (data or args.lm_eval_tasks) and not args.config)
    if drops_own_data:
        content = {key: value for key, value in content.items() if key not in HELD_OUT}
    content = {**content, **data}
    for name in DEFAULTS:
        value = getattr(args, name, None)
        if value is not None:
            content[name] = value
    only_named = drops_own_data or bool(args.name and content.keys() & HELD_OUT.keys())
    content = evaluate_yaml.complete(content, facts, only_named)

    # The record of a run that was moved has its old paths. They are also what the result says about its settings.
    moved, facts = evaluate_yaml.relocated(content, facts, run)
    problems = check(moved, facts)
    problems += _check_options(args)
    problems += _check_output(run, args.name, content)
    if not args.name:
        problems += _check_figures_of_run(run, args.stage, content)
    refuse(*problems)

    settings = evaluate_yaml.find_settings(run, moved, facts)
    stages = {"--stage": args.stage, "--against": args.against}
    check_stages(settings, {option: stage for option, stage in stages.items() if stage is not None})
    # Baselines are only measured with the stage that others are compared with.
    held_out = read_held_out(settings, list(data), baselines=args.stage == settings.requested.against)
    result = evaluate_stage(settings, args.stage, held_out, run / "evaluations" / (args.name or ""))
    result.settings = content
    return result


def _columns_of_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `Source` that options set."""
    columns = {}
    for name in evaluate_yaml.SOURCE_FIELDS:
        if getattr(args, name, None) is not None:
            columns[name] = getattr(args, name)
    if args.split:
        columns["dataset_test_split"] = args.split
    return columns


def _data_of_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the data that options name, by key of `evaluate.yaml`.

    `--problems FILE --prompt_column question --split test` is one data set with its columns.
    """
    columns = _columns_of_options(args)
    return {key: {"dataset_name": getattr(args, key), **columns} for key in HELD_OUT if getattr(args, key)}


def _check_options(args: argparse.Namespace) -> list[Problem]:
    """Return what is wrong with the options that are not keys of `evaluate.yaml`."""
    problems = []
    columns = _columns_of_options(args)
    if columns and not _data_of_options(args):
        name, value = next(iter(columns.items()))
        problems.append(Problem(f"--{name}", value, "name its data set as well"))
    if args.name and (Path(args.name).name != args.name or args.name.startswith(".")):
        problems.append(Problem("--name", args.name, "must be the name of a folder, without a slash or a leading dot"))
    return problems


def _check_output(run: Path, name: str | None, content: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each folder of the run that this evaluation writes to, and that is a link out of the run.

    The files in them are replaced, even if they are links. Arguments are the option `--name` and the settings.
    """
    folders = [run / "evaluations" / (name or "")]
    if content["judge"] == evaluate_yaml.VOTES:
        # This judge writes the pairs that it has no votes on.
        folders.append(run / evaluate_yaml.VOTES)
    return check_links(*folders, home=run, field="RUN", inner=False)


def _check_figures_of_run(run: Path, stage: str, content: Mapping[str, Any]) -> list[Problem]:
    """Return a problem if the result would replace the runner's own metrics although the data or settings differ."""
    step = read_run(run).get("steps", {}).get(f"evaluate_{stage}", {})
    saved = read_json(run / "evaluations" / f"{stage}.json").get("settings")
    if not step.get("finished_at") or not isinstance(saved, dict):
        return []
    # JSON has lists instead of tuples, for instance, so both sides must have been JSON.
    present = json.loads(json.dumps(content, default=str))
    # A key that did not exist yet had its default.
    saved = {**DEFAULTS, **saved}
    changed = [name for name in {**saved, **present} if saved.get(name) != present.get(name)]
    if not changed:
        return []
    remedy = f"the run's own figures were measured with a different {' and '.join(changed)}"
    return [Problem("--name", "nothing", f"{remedy}; choose a name for these")]
