"""Checks of an `evaluate.yaml` before anything is trained: its keys, data, judge, functions and tasks."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.errors import Problem, collect
from pipeline.evaluation.evaluate_yaml import (
    VOTES,
    EvaluationArguments,
    RunFacts,
    Source,
    Values,
    first_of,
    is_task_file,
)
from pipeline.files import as_list, is_missing_path
from pipeline.rewards.table import GRADES
from pipeline.stages import HELD_OUT

MAX_SAMPLES = 1000
"""Largest number of answers to a prompt."""


def check(content: Values, facts: RunFacts, prefix: str = "") -> list[Problem]:
    """Return everything that is wrong with an `evaluate.yaml`.

    Args:
        content: Its content, completed by `complete`.
        facts: What follows from the stages of the run.
        prefix: Text that precedes the field in each message.
    """
    # Imported here, because it imports transformers and TRL.
    from pipeline.config.parser import check_values
    from pipeline.models.vllm_sampler import validate_vllm
    from pipeline.rewards.loading import load_rewards

    _, problems = check_values(content, [EvaluationArguments])
    problems += _check_numbers(content)
    if content.get("vllm"):
        fault = validate_vllm()
        if fault:
            problems.append(Problem("vllm", True, fault))
    if isinstance(content.get("lm_eval_tasks"), list):
        problems += _check_tasks(content["lm_eval_tasks"])

    # The functions of the user that grade or judge, by the field that names them.
    functions: dict[str, str] = {}
    for key in HELD_OUT:
        source = content.get(key)
        trained_on = facts.trained_on.get(key)
        # A stage's own data are checked with the stage.
        if not isinstance(source, Mapping) or (trained_on and source == first_of(trained_on)):
            continue
        problems += [replace(problem, field=f"{key}: {problem.field}") for problem in _check_source(source, facts)]
        grade = source.get("grade")
        if isinstance(grade, str):
            functions[f"{key}: grade"] = GRADES.get(grade, grade)
    judge = content.get("judge")
    if isinstance(judge, str):
        if ":" in judge:
            functions["judge"] = judge
        else:
            problems += _check_judge(judge, facts)
    for field, function in functions.items():
        with collect(problems):
            load_rewards([function], field)
    return [replace(problem, field=f"{prefix}{problem.field}") for problem in problems]


def _check_numbers(content: Values) -> list[Problem]:
    """Return numbers of answers that are negative, or so large that an evaluation would take days."""
    problems = []
    samples = content.get("samples")
    if isinstance(samples, int) and samples > MAX_SAMPLES:
        problems.append(Problem("samples", samples, f"must be at most {MAX_SAMPLES}"))
    best_of = content.get("best_of") or []
    for number in as_list(best_of):
        if not isinstance(number, int):
            continue
        # A single negative number has already been reported. In a list, each must be a number of answers.
        if number > MAX_SAMPLES or (isinstance(best_of, list) and number < 1):
            problems.append(Problem("best_of", number, f"must be from 1 to {MAX_SAMPLES}; omit it for none"))
    return problems


def _check_tasks(tasks: Sequence[object]) -> list[Problem]:
    """Return tasks that lm-eval does not have, and task files that the user has not allowed to be loaded."""
    # Imported here, because the harness imports torch, and an installed lm-eval takes seconds to list its tasks.
    from pipeline.config.named_code import check_trust
    from pipeline.evaluation.harness import check_tasks

    problems: list[Problem] = []
    trusted: list[str] = []
    for task in map(str, tasks):
        with collect(problems):
            # A task's file may name functions, which lm-eval calls.
            if is_task_file(task):
                check_trust(task, "lm_eval_tasks")
            trusted.append(task)
    return problems + check_tasks(trusted)


def _check_source(source: Values, facts: RunFacts) -> list[Problem]:
    """Return what is wrong with a data set: its fields, or a path that does not exist; Hub ids are not looked up."""
    # Imported here, because it imports transformers and TRL.
    from pipeline.config.parser import check_values

    _, problems = check_values(source, [Source])
    name = source.get("dataset_name")
    if isinstance(name, list):
        problems.append(Problem("dataset_name", ", ".join(map(str, name)), "name one data set to measure on"))
    elif not isinstance(name, str) or _is_missing(name, facts):
        problems.append(Problem("dataset_name", name, "there is no such file or folder; give another, or a Hub id"))
    return problems


def _check_judge(judge: str, facts: RunFacts) -> list[Problem]:
    """Return what is wrong with a judge that is not a function: "votes", or the folder or Hub id of a reward model.

    The folder may be written by a later step of the run. PPO must not be trained with the same reward model: it would
    be judged by the model that it is trained to please.
    """
    if _model_folder(judge) in map(_model_folder, facts.reward_models):
        return [Problem("judge", judge, "PPO is trained to please this model; give one that it does not use")]
    if judge != VOTES and _is_missing(judge, facts):
        return [Problem("judge", judge, "no such folder; give a reward model, votes or a function")]
    return []


def _model_folder(name: str) -> Path:
    """Return the real path of a model's folder, which is the same for a model and its checkpoints."""
    path = Path(os.path.realpath(name))
    if path.name.startswith("checkpoint-"):
        return path.parent
    return path


def _is_missing(name: str, facts: RunFacts) -> bool:
    """Return whether a name is the path of something that does not exist, and that no stage of the run writes."""
    # Imported here, because it imports `datasets`.
    from pipeline.data.sources import BUILDERS, COMPRESSIONS

    path = Path(name)
    # "data.jsonl" is a file, whereas "org/data" is an id on the Hub.
    is_file = path.suffix in (*BUILDERS, *COMPRESSIONS) and not path.exists()
    return (is_file or is_missing_path(name)) and not path.is_relative_to(facts.home)
