"""Find, before the first step runs, what a later step would reject hours later.

Each step is checked with the arguments that its recipe will build, its number of processes, and the configuration of
the model that an earlier step makes. Of the user's own files, the columns and the first rows are checked. Problems with
later rows and with downloaded data only show when the step loads them, which `--smoke` does within seconds.
`pipeline.training.checks` has the checks that training repeats.
"""

import copy
import dataclasses
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pipeline.config.fields import READ
from pipeline.errors import Problem, collect
from pipeline.files import as_list, is_missing_path
from pipeline.runner.steps import Step
from pipeline.stages import HELD_OUT


def check_steps(
    steps: Iterable[Step],
    due: Collection[str] | None = None,
    processes: int = 1,
    rewards: bool = True,
    data: bool = True,
) -> list[Problem]:
    """Return wrong or contradictory settings, and inputs that do not exist, prefixed with the step's name.

    Args:
        steps: All steps, each after the steps that it needs: the models that some make are what others start from.
        due: Names of the steps of which problems are reported; None means all.
        processes: Number of processes of a training step.
        rewards: Whether to load reward functions and trainers of the user, which may need packages that are not
            installed here.
        data: Whether to open the user's data files, and check their columns and first rows.
    """
    # These imports take seconds.
    from pipeline.evaluation.checks import check
    from pipeline.evaluation.evaluate_yaml import from_record
    from pipeline.launch import quiet_libraries
    from pipeline.models.checks import check_lengths

    quiet_libraries()
    problems: list[Problem] = []
    steps = list(steps)
    # Contents and sources of data that have been checked, because several steps may read the same.
    checked_data: list[tuple[Any, Any]] = []
    # Configurations of the models that the steps so far make, by `output_dir`.
    configs: dict[str, Any] = {}
    for step in steps:
        # A step that shares the file of another step is checked with that step.
        if not step.stage.module or step.stage.file_of:
            continue
        step_problems = _check_step(step, configs, processes, rewards)
        if due is not None and step.name not in due:
            continue
        if data:
            step_problems += _check_data(step, checked_data)
        for problem in step_problems:
            problems.append(dataclasses.replace(problem, field=f"{step.name}: {problem.field}"))

    # All evaluations have the same settings.
    evaluations = [step for step in steps if step.kind == "evaluate" and (due is None or step.name in due)]
    if not evaluations:
        return problems
    values = evaluations[0].values
    problems += check(*from_record(values), "evaluate.yaml: ")
    if data:
        problems += _check_measured_data(values)
    limit = values.get("max_new_tokens")
    if isinstance(limit, int):
        # An answer must fit into the shortest context of all models.
        contexts = [_context_length(config) for config in configs.values()]
        shortest = min(filter(None, contexts), default=None)
        problems += check_lengths(shortest, **{"evaluate.yaml: max_new_tokens": limit})
    return problems


def _context_length(config: Any) -> int | None:
    """Return the maximum number of tokens of a model's input; None if its configuration does not say it."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def _check_step(step: Step, configs: dict[str, Any], processes: int, rewards: bool) -> list[Problem]:
    """Return what is wrong with one step, and add the configuration of the model that it makes to `configs`.

    Args:
        step: The step, which has a recipe.
        configs: Configurations of the models that earlier steps make, by `output_dir`; changed in place.
        processes: Number of processes of a training step.
        rewards: Whether to load reward functions.
    """
    from transformers import TrainingArguments
    from trl import ModelConfig

    from pipeline.config.parser import check_values
    from pipeline.models.checks import check_lengths
    from pipeline.training.checks import preflight
    from pipeline.training.custom_trainer import TrainerArguments, load_trainer
    from pipeline.training.inputs import check_weights

    types = step.argument_types
    # The instances of the recipe's argument dataclasses, without those that cannot be built.
    arguments: list[Any] = []
    problems: list[Problem] = []
    if types:
        arguments, problems = check_values(step.values, types, processes)
    home = Path(step.values["output_dir"]).parent

    # Settings that contradict each other or this machine, and inputs that do not exist.
    training = next((item for item in arguments if isinstance(item, TrainingArguments)), None)
    sampling = next((item for item in arguments if hasattr(item, "preflight")), None)
    if training is not None:
        problems += preflight(training, early=True)
    if step.stage.check:
        problems += resolve_name(step.stage.check)(step.values)
    if sampling is not None and rewards:
        problems += sampling.preflight(training, None, None, early=True)
    custom = next((item for item in arguments if isinstance(item, TrainerArguments)), None)
    if custom is not None and custom.trainer is not None and rewards:
        with collect(problems):
            load_trainer(custom.trainer, resolve_name(step.stage.trainer))
    problems += _check_inputs(arguments, home)

    # Settings that do not suit the model that the step starts from.
    config = None
    with collect(problems):
        config = _find_config(arguments, configs, home)
    if config is None:
        return problems
    if step.stage.measured:
        # Training does not change the configuration.
        configs[str(step.values["output_dir"])] = config
    length_field = step.stage.length or "max_new_tokens"
    length = next((getattr(item, length_field) for item in arguments if hasattr(item, length_field)), None)
    problems += check_lengths(_context_length(config), **{length_field: length})
    loading = next((item for item in arguments if isinstance(item, ModelConfig)), None)
    if training is not None and loading is not None:
        problems += check_weights(copy.deepcopy(config), training, loading, sampling, early=True)
    return problems


def _check_inputs(arguments: Sequence[Any], home: Path) -> list[Problem]:
    """Return required models and data sets that are not named, and paths that do not exist.

    Args:
        arguments: Instances of the recipe's argument dataclasses.
        home: Directory of the run in the recipe. What is missing there will be made by an earlier step.
    """
    problems: list[Problem] = []
    for item in arguments:
        for field in (*READ, "chat_template_path"):
            if not hasattr(item, field):
                continue
            names = as_list(getattr(item, field))
            is_required = field in ("model_name_or_path", "dataset_name")
            if is_required and (not names or not all(names)):
                problems.append(Problem(field, "nothing", "give a Hub id, a file or a folder"))
            for name in filter(None, names):
                is_missing = is_missing_path(name) or (field == "chat_template_path" and not os.path.exists(name))
                if is_missing and not Path(name).is_relative_to(home):
                    problems.append(Problem(field, name, "there is no such file or folder; correct the path"))
    return problems


def _find_config(arguments: Sequence[Any], configs: Mapping[str, Any], home: Path) -> Any:
    """Return the configuration of the model that a step starts from; None if it is on the Hub, or unknown.

    Args:
        arguments: Instances of the recipe's argument dataclasses.
        configs: Configurations of the models that earlier steps make, by `output_dir`.
        home: Directory of the run in the recipe. Its models are not read, because they may be made again.

    Raises:
        UserError: If the model from scratch cannot be built, or the configuration cannot be loaded.
    """
    from pipeline.models.loading import load_config, user_error_for
    from pipeline.models.scratch import ScratchArguments, build_empty

    scratch = next((item for item in arguments if isinstance(item, ScratchArguments)), None)
    if scratch is not None:
        # The size of the vocabulary is not known yet, but no check depends on it.
        return build_empty(scratch, 1 << 15).config
    name = next((item.model_name_or_path for item in arguments if getattr(item, "model_name_or_path", None)), "")
    if name in configs:
        return configs[name]
    if name and Path(name).is_dir() and not Path(name).is_relative_to(home):
        with user_error_for("model_name_or_path", name):
            return load_config(name)
    return None


def _check_data(step: Step, checked_data: list[tuple[Any, Any]]) -> list[Problem]:
    """Return what is wrong with the columns and first rows of the user's data that a step reads.

    Args:
        step: The step, which has a recipe.
        checked_data: Contents and sources that have been checked, which are not checked again; changed in place.
    """
    from pipeline.config.parser import check_values
    from pipeline.data.arguments import DataArguments

    home = Path(step.values["output_dir"]).parent
    built, _ = check_values(step.values, step.argument_types, 1)
    arguments = next((item for item in built if getattr(item, "dataset_name", None)), None)
    if arguments is None or not step.stage.data:
        return []
    # The arguments of `recipes.preferences` have some of these fields only.
    fields: dict[str, Any] = {
        item.name: getattr(arguments, item.name, item.default) for item in dataclasses.fields(DataArguments)
    }
    fields["dataset_name"] = [name for name in as_list(fields["dataset_name"]) if not Path(name).is_relative_to(home)]
    fields["tokenizer_name_or_path"] = None
    if not fields["dataset_name"]:
        return []
    source = DataArguments(**fields)
    if (step.stage.data, source) in checked_data:
        return []
    checked_data.append((step.stage.data, source))
    return _check_first_rows(source, step.stage.data)


def _check_measured_data(values: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the columns and first rows of the user's data that only evaluations read.

    `values` are the settings of the evaluations, as in their steps.
    """
    from pipeline.evaluation.evaluate_yaml import Source

    problems = []
    for key, held_out in HELD_OUT.items():
        settings = values.get(key)
        if not isinstance(settings, Mapping) or settings == values["trained_on"].get(key):
            continue
        source = Source(**settings)
        if any(Path(name).is_relative_to(values["home"]) for name in source.dataset_names):
            continue
        splits = [source.dataset_test_split, "test", "validation", source.dataset_train_split]
        for problem in _check_first_rows(source, held_out.data, splits):
            problems.append(dataclasses.replace(problem, field=f"evaluate.yaml: {key}: {problem.field}"))
    return problems


def _check_first_rows(source: Any, content: Any, splits: Sequence[str] = ()) -> list[Problem]:
    """Return what `check_first_rows` rejects. Its warnings are not printed, because the step repeats them.

    Args:
        source: The data set, as `DataArguments` or `Source`.
        content: What its rows have to contain, as in `StageKind.data`.
        splits: Names of splits, of which the first that exists is checked; () for the training split.
    """
    from pipeline.data.splits import check_first_rows

    problems: list[Problem] = []
    logging.disable(logging.WARNING)
    try:
        with collect(problems):
            check_first_rows(source, content, splits)
    finally:
        logging.disable(logging.NOTSET)
    return problems
