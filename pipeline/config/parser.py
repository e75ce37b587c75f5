"""Build a recipe's argument dataclasses from a YAML file and the command line, reporting all mistakes at once.

A value goes through four checks, and stops at the first that rejects it:

    read_values       its type, for the YAML file and for the command line, which overrides the file
    _check_each       the value by itself: ranges, words, what this machine supports
    _build_checked    the dataclass that has the field, as far as the library that it belongs to checks it
    check_together    fields that contradict each other

A rejected field is omitted from the later checks, and what is wrong only because it is missing is not reported.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from pipeline import hardware, launch
from pipeline.config import checks, output_directory
from pipeline.config.command_line import read_command_line
from pipeline.config.fields import READ, field_types, read_values, samples_completions
from pipeline.config.recipe_folder import find_shipped
from pipeline.config.yaml_file import read_yaml
from pipeline.errors import Problem, UserError, collect, refuse
from pipeline.files import split_revision

MACHINE_FIELDS = (
    "use_cpu", "bf16", "fp16", "tf32", "fsdp", "fsdp_config", "deepspeed", "torch_compile", "ddp_backend",
)  # fmt: skip
"""Fields that can only be checked on the machine that trains, and in a process that was launched for it."""

SAME_SETTING = {"bf16": "fp16", "fp16": "bf16", "activation_checkpointing": "gradient_checkpointing"}
"""Fields with a default that depends on the machine -> the field with which a user may have set the same thing."""

PHRASES = {"generations per prompt": "num_generations"}
"""Phrases with which messages of the libraries describe a field instead of naming it, and that field."""


def parse(*dataclass_types: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Build a recipe's argument dataclasses from `--config FILE.yaml` and the command line, which overrides the file.

    Fields that the user did not set get the machine's defaults (`hardware.training_defaults`: precision, backend, ...).
    The process is prepared for training as well: environment variables of the file are set, telemetry is turned off
    (`launch.prepare_process`), and the random number generators are seeded.

    Args:
        *dataclass_types: Dataclasses whose fields are the options, as for TRL's and transformers' parsers.
        argv: Command line without the program's name. Default: `sys.argv`.

    Returns:
        One instance of each type, in order.

    Raises:
        UserError: With everything that is wrong with the file and the command line.
    """
    if argv is None:
        argv = sys.argv[1:]
    command = list(argv)
    content, options, problems = _read_config(command)
    is_unreadable = bool(problems)
    problems += _set_environment(content.pop("env", None))
    from_command_line, wrong_options = read_command_line(options, dataclass_types)
    # An overridden value is not checked: the file may be another recipe's, with a loss that only DPO has.
    not_overridden = {name: value for name, value in content.items() if name not in from_command_line}
    from_file, wrong_values = read_values(not_overridden, dataclass_types)
    problems += wrong_values + wrong_options
    requested = from_file | from_command_line
    _expand_paths(requested)

    if requested.get("use_cpu") is True:
        hardware.keep_to_cpu()
    launch.prepare_process(shards=bool(requested.get("fsdp") or requested.get("deepspeed")))
    token = requested.get("hub_token")
    if token:
        # Arguments and command are written to disk, which a token must not be.
        del requested["hub_token"]
        os.environ["HF_TOKEN"] = token
        command = [word.replace(token, "hf_***") for word in command]

    machine = _machine_defaults(requested, dataclass_types)
    problems += _check_each(requested, dataclass_types)
    built = _build_checked(dataclass_types, requested, machine, problems, from_command_line)
    if is_unreadable:
        # A required field may be in the file that could not be read.
        problems = [problem for problem in problems if problem.remedy != "is required"]
    training = next((item for item in built if isinstance(item, TrainingArguments)), None)
    if training is not None:
        problems += launch.check_launch(training)
    problems += output_directory.check_output_directory(built, machine.keys() - requested.keys())
    refuse(*problems)

    if training is not None:
        # Trainers set the seed themselves, but only after TRL has initialised adapters and score heads.
        set_seed(training.seed)
        output_directory.attach_arguments(training, built, requested, command)
    for item in built:
        targets = getattr(item, "lora_target_modules", None)
        # TRL turns a list of one name, such as "q_proj", into a string. PEFT would read that as a pattern for the full
        # names of modules, and none matches.
        if isinstance(targets, str) and targets.isidentifier():
            item.lora_target_modules = [targets]
    return tuple(built)


def check_values(
    config: Mapping[str, Any], dataclass_types: Sequence[Any], processes: int = 1
) -> tuple[list[Any], list[Problem]]:
    """Check the values of a YAML file before the step that has them is launched.

    `parse` checks everything once more in the step itself. This checks what does not depend on the machine or on the
    output of earlier steps, and leaves the environment of this process as it is.

    Args:
        config: Content of the file.
        dataclass_types: Argument dataclasses of the recipe.
        processes: Number of processes that will train.

    Returns:
        The dataclasses that can be built, which are for a CPU, and what is wrong with the values.
    """
    config = dict(config)
    environment = dict(os.environ)
    try:
        problems = _set_environment(config.pop("env", None))
        values, wrong_values = read_values(config, dataclass_types)
        problems += wrong_values
        problems += _check_each(values, dataclass_types)
        values = {name: value for name, value in values.items() if name not in MACHINE_FIELDS}
        types = [_for_processes(kind, processes) for kind in dataclass_types]
        machine = {"use_cpu": True, "bf16": False}
        return _build_checked(types, values, machine, problems), problems
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _for_processes(kind: Any, processes: int) -> Any:
    """Return an argument dataclass that can be built as in a launch of several processes, though this is only one."""
    if not samples_completions(kind):
        return kind
    # TRL's constructor divides the batch by `world_size`, a property that counts the processes of this launch.
    return type(kind.__name__, (kind,), {"world_size": processes})


def _read_config(command: Sequence[str]) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """Read the file that `--config` names.

    Returns:
        The content of the file ({} if none is named or it cannot be read), the command line without `--config`, and
        what is wrong with the option or the file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", const="", default=[])
    namespace, options = parser.parse_known_args(command)
    paths: list[str] = namespace.config
    content: dict[str, Any] = {}
    problems: list[Problem] = []
    if "" in paths:
        problems.append(Problem("--config", "nothing", "give the path of a YAML file"))
    elif len(paths) > 1:
        problems.append(Problem("--config", " and ".join(paths), "only one file is read; name one"))
    elif paths:
        with collect(problems):
            content = read_yaml(str(find_shipped(Path(paths[0]))))
    return content, options, problems


def _set_environment(variables: Any) -> list[Problem]:
    """Set the environment variables in the `env` of a YAML file, and return what is wrong with them.

    A variable that the user's environment sets already keeps its value. `variables` is None if the file has no `env`.
    """
    if variables is None:
        return []
    if not isinstance(variables, dict):
        return [Problem("env", repr(variables), "must be a mapping from variables to values")]
    problems = []
    for name, value in variables.items():
        try:
            if not isinstance(value, str | int | float):
                raise ValueError(f"its value is {value}, not text or a number")
            os.environ.setdefault(str(name), str(value))
        except (ValueError, OSError) as error:
            problems.append(Problem("env", repr(name), f"cannot be set ({error}); correct it"))
    return problems


def _expand_paths(values: dict[str, Any]) -> None:
    """Replace `~` in the fields that name files and folders, in place."""
    for name in values.keys() & {*READ, "output_dir", "resume_from_checkpoint"}:
        value = values[name]
        if isinstance(value, list):
            values[name] = [os.path.expanduser(path) for path in value]
        elif value is not None:
            values[name] = os.path.expanduser(value)


def _machine_defaults(requested: Mapping[str, Any], dataclass_types: Sequence[Any]) -> dict[str, Any]:
    """Return the values that suit this machine, by field, for the fields of the dataclasses.

    A field is omitted if the user has set the same thing by another field (`SAME_SETTING`).
    """
    fields = field_types(*dataclass_types)
    values = {}
    for name, choice in hardware.training_defaults().items():
        if name in fields and SAME_SETTING.get(name) not in requested:
            values[name] = choice.value
    return values


def _check_each(requested: Mapping[str, Any], types: Sequence[Any]) -> list[Problem]:
    """Check each value by itself, and return the first problem of each field."""
    sampling_types = [kind for kind in types if samples_completions(kind)]
    problems = checks.check_ranges(requested)
    problems += checks.check_text(requested, field_types(*types), bool(sampling_types))
    problems += checks.check_supported(requested)
    for kind in sampling_types:
        problems += checks.check_unused(requested, kind, checks.UNUSED_IN_ROLLOUTS)
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.field, problem)
    return list(first.values())


def _build_checked(
    dataclass_types: Iterable[Any],
    requested: Mapping[str, Any],
    machine: Mapping[str, Any],
    problems: list[Problem],
    on_command_line: Collection[str] = (),
) -> list[Any]:
    """Build as many of the dataclasses as possible, and check their fields together.

    Args:
        dataclass_types: Argument dataclasses of the recipe.
        requested: Values that the user gave, of the right types.
        machine: Defaults for this machine, by field.
        problems: What is wrong with `requested`. The problems that are found here are appended.
        on_command_line: Fields that the user gave on the command line.

    Returns:
        The dataclasses that could be built, perhaps without some of their values.
    """
    rejected = {problem.field for problem in problems}
    accepted = {name: value for name, value in requested.items() if name not in rejected}
    built = []
    for kind in dataclass_types:
        instance = _build(kind, {**machine, **accepted}, problems, rejected)
        if instance is not None:
            built.append(instance)
    for item in built:
        if isinstance(item, TrainingArguments):
            launch.use_one_gpu(item)
        problems += _split_model_revision(item, requested)
    problems += checks.check_together(built, rejected, on_command_line)
    return built


def _build(kind: Any, accepted: Mapping[str, Any], problems: list[Problem], rejected: set[str]) -> Any | None:
    """Build a dataclass, without the fields that its constructor rejects.

    Args:
        kind: The dataclass.
        accepted: Values by field, of this and other dataclasses.
        problems: What is wrong so far. What the constructor rejects is appended.
        rejected: Fields that were rejected so far, and are not in `accepted`. Those that the constructor rejects are
            added.

    Returns:
        The instance, or None if a required field is missing, or if the constructor fails whatever is omitted.
    """
    values = {name: accepted[name] for name in field_types(kind) if name in accepted}
    # If a field has no default, both are `MISSING`.
    required = [item.name for item in dataclasses.fields(kind) if item.init and item.default is item.default_factory]
    missing = [name for name in required if name not in values]
    problems += [Problem(name, "nothing", "is required") for name in missing if name not in rejected]
    if missing:
        return None
    # A constructor stops at the first mistake. It is called again without that field, to find the next one.
    while True:
        try:
            return kind(**values)
        # These are raised for a wrong value, a missing package, and a file that a field names.
        except (UserError, ValueError, ImportError, OSError) as error:
            faults = _constructor_problems(error, kind, values, is_incomplete=bool(problems))
        for fault in faults:
            # A field that was rejected before has its default now, which must not be reported.
            if fault.field not in rejected and _field_named_in(fault.remedy, rejected) is None:
                problems.append(fault)
        culprits = [fault.field for fault in faults if fault.field in values]
        if not culprits:
            return None
        for name in culprits:
            rejected.add(name)
            del values[name]


def _constructor_problems(error: Exception, kind: Any, values: Mapping[str, Any], is_incomplete: bool) -> list[Problem]:
    """Return the problems that the constructor of a dataclass has found.

    Args:
        error: What the constructor raised. This project's dataclasses raise a `UserError`, or an error that has one as
            its cause; those of the libraries raise a message about one field.
        kind: The dataclass.
        values: What the constructor was called with.
        is_incomplete: Whether values of the user were omitted, because they were rejected before.

    Returns:
        The problems. The list is empty if the message is about no field, and may be due to what was omitted.

    Raises:
        Exception: `error` itself, if it is about no field and nothing was omitted. Then it is a defect.
    """
    user_error = error if isinstance(error, UserError) else error.__cause__
    if isinstance(user_error, UserError):
        return list(user_error.problems)
    message = " ".join(str(error).split())
    name = _culprit(message, values)
    if name is not None:
        return [Problem(name, values[name], message)]
    if is_incomplete:
        return []
    # The default of a field may not fit to what the user gave.
    name = _field_named_in(message, field_types(kind))
    if name is None:
        raise error
    return [Problem(name, "not given", message)]


def _culprit(message: str, values: Mapping[str, Any]) -> str | None:
    """Return the field in `values` that a library's message is about, or None if it is about none of them.

    Most messages name their field. Others begin with its value ("x is not a valid DebugOption"), or have one of the
    `PHRASES`.
    """
    name = _field_named_in(message, values)
    if name is not None:
        return name
    for name, value in values.items():
        if isinstance(value, str) and value and message.startswith((f"{value} ", f"'{value}' ")):
            return name
    for phrase, name in PHRASES.items():
        if phrase in message and name in values:
            return name
    return None


def _field_named_in(message: str, names: Iterable[str]) -> str | None:
    """Return the field that a message names first, None if it names none of them."""
    places: dict[str, int] = {}
    for name in names:
        match = re.search(rf"\b{re.escape(name)}\b", message)
        if match:
            places[name] = match.start()
    return min(places, key=lambda name: places[name], default=None)


def _split_model_revision(item: Any, requested: Mapping[str, Any]) -> list[Problem]:
    """Split `model_name_or_path: NAME/repo@revision` into that name and `model_revision`, in place.

    Args:
        item: An argument dataclass. One without these two fields stays as it is.
        requested: Values that the user gave, by field.

    Returns:
        A list with the problem if the user asks for two different revisions, otherwise an empty one.
    """
    name, revision = split_revision(str(getattr(item, "model_name_or_path", None) or ""))
    if revision is None or not hasattr(item, "model_revision"):
        return []
    item.model_name_or_path = name
    item.model_revision = revision
    other = requested.get("model_revision")
    if other in (None, revision):
        return []
    return [Problem("model_revision", other, f"model_name_or_path asks for {revision}; omit one of them")]
