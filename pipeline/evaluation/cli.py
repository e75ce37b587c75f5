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
from pipeline.files import read_json, read_run
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
        about: dict[str, Any] = {"type": int if "int" in str(item.type) else str}
        if item.name in HELD_OUT:
            about = {"metavar": "DATASET"}
        elif item.name == "vllm":
            about = {"action": "store_true", "default": None}
        elif item.name == "lm_eval_tasks":
            about = {"nargs": "+", "metavar": "TASK"}
        if item.name != "fixed_prompts":
            earlier = ["--reasoning"] if item.name == "problems" else []
            parser.add_argument(f"--{item.name}", *earlier, help=item.metadata["help"], **about)
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
    from pipeline.config.yaml_file import read_yaml
    from pipeline.evaluation.results import format_table
    from pipeline.launch import quiet_libraries
    from pipeline.rewards.loading import only_trusted
    from pipeline.rewards.sandbox import run as sandbox

    quiet_libraries()
    sandbox.allow_unconfined = args.allow_unconfined_code
    if args.lm_eval_tasks and not (args.name or args.config or any(getattr(args, key) for key in HELD_OUT)):
        # Tasks named on the command line do not replace the run's own figures.
        args.name = "lm_eval"
    # What the command names was chosen by its user; what the run's files name, by whoever made the run.
    content = read_yaml(args.config) if args.config else {}
    named = {"judge": args.judge, "lm_eval_tasks": args.lm_eval_tasks, "problems": {"grade": args.grade}}
    trusted = [*args.trust, *evaluate_yaml.named_code(content), *evaluate_yaml.named_code(named)]
    try:
        with only_trusted(trusted):
            result = evaluate(args, content)
    except UserError as error:
        # A problem with the value of an option names the option, not the key of `evaluate.yaml`.
        problems = []
        for problem in error.problems:
            key, colon, name = problem.field.partition(": ")
            if colon and key in HELD_OUT and getattr(args, key):
                name = {"dataset_name": key, "dataset_test_split": "split"}.get(name, name)
                problem = replace(problem, field=f"--{name}")
            elif not colon and key in evaluate_yaml.DEFAULTS and getattr(args, key, None) is not None:
                problem = replace(problem, field=f"--{key}")
            problems.append(problem)
        raise UserError(*problems) from error.__cause__
    path = result.write(Path(args.run) / "evaluations" / (args.name or ""))
    print(format_table(result))
    print(f"{path} ({result.seconds:.1f} s)")
    return 0


def evaluate(args: argparse.Namespace, content: Mapping[str, Any]) -> StageResult:
    """Measure the stage as the command's options say.

    Options override `content`, the file of `--config`, which replaces the run's own `evaluate.yaml`; anything that
    neither of them names follows from the stages. Raise a UserError, with keys of `evaluate.yaml`, for what
    cannot be used.
    """
    from pipeline.evaluation.held_out import read_held_out
    from pipeline.evaluation.stage import check_stages, evaluate_stage

    run = Path(args.run)
    own = evaluate_yaml.recorded(run, args.stage)
    options = {name: value for name, value in vars(args).items() if value is not None}
    # `--problems FILE --prompt_column question --split test` is one data set with its columns.
    columns = {name: options[name] for name in evaluate_yaml.SOURCE_FIELDS if name in options}
    if args.split:
        columns["dataset_test_split"] = args.split
    data = {key: {"dataset_name": options[key], **columns} for key in HELD_OUT if options.get(key)}
    if not args.config:
        content = evaluate_yaml.without_derived(own)
    # An evaluation with a name only measures the data or tasks that the command names.
    alone = bool(args.name and (data or args.lm_eval_tasks) and not args.config)
    if alone:
        content = {key: value for key, value in content.items() if key not in HELD_OUT}
    content = {**content, **data} | {name: options[name] for name in evaluate_yaml.DEFAULTS if name in options}
    only_named = alone or bool(args.name and content.keys() & HELD_OUT.keys())
    settings = evaluate_yaml.complete(content, own, only_named)

    # The record of a run that was moved has the old paths of its reward models.
    moved = evaluate_yaml.move(settings, run)
    rewards = [*settings["reward_models"], *moved["reward_models"]]
    problems = evaluate_yaml.check({**settings, "reward_models": rewards, "lm_eval_tasks": moved["lm_eval_tasks"]})
    if columns and not data:
        problems.append(Problem(f"--{next(iter(columns))}", next(iter(columns.values())), "name its data set as well"))
    if args.name and (Path(args.name).name != args.name or args.name.startswith(".")):
        problems.append(Problem("--name", args.name, "must be the name of a folder, without a slash or a leading dot"))
    written = evaluate_yaml.without_derived(settings)
    step = read_run(run).get("steps", {}).get(f"evaluate_{args.stage}", {})
    saved = read_json(run / "evaluations" / f"{args.stage}.json").get("settings")
    if not args.name and step.get("finished_at") and isinstance(saved, dict):
        # The runner's measurements are not replaced by others on different data or with different settings.
        now = json.loads(json.dumps(written, default=str))
        saved = {**evaluate_yaml.DEFAULTS, **saved}
        if changed := [name for name in {**saved, **now} if saved.get(name) != now.get(name)]:
            remedy = f"the run's own figures were measured with a different {' and '.join(changed)}"
            problems.append(Problem("--name", "nothing", f"{remedy}; choose a name for these"))
    refuse(*problems)

    moved = evaluate_yaml.with_layout(moved, run)
    named = {"--stage": args.stage, "--against": args.against}
    check_stages(run, {option: stage for option, stage in named.items() if stage is not None}, moved)
    # Baselines are only measured with the stage that others are compared with.
    held_out = read_held_out(run, moved, list(data), baselines=args.stage == moved["against"])
    result = evaluate_stage(run, args.stage, held_out, moved, run / "evaluations" / (args.name or ""))
    result.settings = written
    return result
