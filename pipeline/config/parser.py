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

OF_THE_MACHINE = (
    "use_cpu", "bf16", "fp16", "tf32", "fsdp", "fsdp_config", "deepspeed", "torch_compile", "ddp_backend",
)  # fmt: skip
"""Fields that only the process that uses them can check."""

SAME_SETTING = {"bf16": "fp16", "fp16": "bf16", "activation_checkpointing": "gradient_checkpointing"}
"""Fields whose defaults depend on the machine, and the field with which the user may have set the same thing."""

UNNAMED = {"generations per prompt": "num_generations"}
"""Words in messages of the libraries that do not name their field, and the field that they are about."""


def parse(*dataclass_types: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Build dataclasses from `--config FILE.yaml`, from the command line, which overrides it, and for this machine.

    Fields that the user did not set get the machine's defaults (`hardware.training_defaults`: precision, backend, ...).
    The process is prepared as well (`launch.prepare_process`): no telemetry, all of the machine's cores.

    Args:
        *dataclass_types: Dataclasses whose fields are the options, as for TRL's and transformers' parsers.
        argv: Command line without the program's name. Default: `sys.argv`.

    Returns:
        One instance of each type, in order.

    Raises:
        UserError: With everything that is wrong with the file and the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    content, options, problems = _read_config(words)
    is_unreadable = bool(problems)
    problems += _set_environment(content.pop("env", None))
    from_command_line, wrong_options = read_command_line(options, dataclass_types)
    # Another recipe's file may have values that this one does not accept, such as a DPO loss.
    used = {name: value for name, value in content.items() if name not in from_command_line}
    from_file, wrong_values = read_values(used, dataclass_types)
    problems += wrong_values + wrong_options
    requested = from_file | from_command_line
    _expand_paths(requested)

    if requested.get("use_cpu") is True:
        hardware.keep_to_cpu()
    launch.prepare_process(shards=bool(requested.get("fsdp") or requested.get("deepspeed")))
    token = requested.get("hub_token")
    if token:
        # As an argument it would be written to disk with all the others.
        del requested["hub_token"]
        os.environ["HF_TOKEN"] = token
        words = [text.replace(token, "hf_***") for text in words]

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
        output_directory.keep_arguments(training, built, requested, words)
    for item in built:
        targets = getattr(item, "lora_target_modules", None)
        # TRL turns a list of one name into a string, which PEFT reads as a pattern that must match whole names.
        if isinstance(targets, str) and targets.isidentifier():
            item.lora_target_modules = [targets]
    return tuple(built)


def check_values(
    config: Mapping[str, Any], dataclass_types: Sequence[Any], processes: int = 1
) -> tuple[list[Any], list[Problem]]:
    """Check the values of a YAML file, without the files that they name and the machine that will use them.

    Args:
        config: Content of the file.
        dataclass_types: Argument dataclasses of the recipe.
        processes: Number of processes that will train. Only this one exists yet.

    Returns:
        The dataclasses that can be built, and what is wrong with the values.
    """
    config = dict(config)
    environment = dict(os.environ)
    try:
        problems = _set_environment(config.pop("env", None))
        values, wrong_values = read_values(config, dataclass_types)
        problems += wrong_values
        problems += _check_each(values, dataclass_types)
        values = {name: value for name, value in values.items() if name not in OF_THE_MACHINE}
        types = []
        for kind in dataclass_types:
            if samples_completions(kind):
                # It divides its batches among the processes as soon as it is built.
                types.append(type(kind.__name__, (kind,), {"world_size": processes}))
            else:
                types.append(kind)
        return _build_checked(types, values, {"use_cpu": True, "bf16": False}, problems), problems
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _read_config(words: Sequence[str]) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """Read the file that `--config` names.

    Returns:
        The content of the file ({} if none is named), the command line without `--config`, and the problems with it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", const="", default=[])
    namespace, options = parser.parse_known_args(words)
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
    """Set the variables of a YAML file's `env` that the user's environment does not set."""
    if variables is not None and not isinstance(variables, dict):
        return [Problem("env", repr(variables), "must be a mapping from variables to values")]
    problems = []
    for name, value in (variables or {}).items():
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
    """Return the values that suit this machine, for fields that the user has not set by another field."""
    fields = field_types(*dataclass_types)
    values = {}
    for name, choice in hardware.training_defaults().items():
        if name in fields and SAME_SETTING.get(name) not in requested:
            values[name] = choice.value
    return values


def _check_each(requested: Mapping[str, Any], types: Sequence[Any]) -> list[Problem]:
    """Check each value by itself, and return the first problem of each field."""
    rollouts = [kind for kind in types if samples_completions(kind)]
    problems = checks.check_ranges(requested)
    problems += checks.check_text(requested, field_types(*types), bool(rollouts))
    problems += checks.check_supported(requested)
    for kind in rollouts:
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
    """Build a dataclass without the fields that it rejects, and append them to `problems` and `rejected`.

    Return None if a required field is missing, or if an error does not name one of its fields.
    """
    values = {name: accepted[name] for name in field_types(kind) if name in accepted}
    # If a field has no default, both are `MISSING`.
    required = [item.name for item in dataclasses.fields(kind) if item.init and item.default is item.default_factory]
    missing = [name for name in required if name not in values]
    problems += [Problem(name, "nothing", "is required") for name in missing if name not in rejected]
    if missing:
        return None
    # Without the fields that it rejects, the class may find the next mistake.
    while True:
        try:
            return kind(**values)
        # These are raised for a wrong value, a missing package, and a file that a field names.
        except (UserError, ValueError, ImportError, OSError) as error:
            faults = _problems_of(error, kind, values, is_expected=bool(problems))
        for fault in faults:
            # A field that was rejected before was omitted, and its default must not be reported.
            if fault.field not in rejected and _field_named_in(fault.remedy, rejected) is None:
                problems.append(fault)
        culprits = [fault.field for fault in faults if fault.field in values]
        if not culprits:
            return None
        for name in culprits:
            rejected.add(name)
            del values[name]


def _problems_of(error: Exception, kind: Any, values: Mapping[str, Any], is_expected: bool) -> list[Problem]:
    """Return the problems that a dataclass lists, or its message under the field that it names.

    An `error` without a field is a defect and is raised, unless it `is_expected` because values of the user were
    omitted. `values` are those that the dataclass was built with.
    """
    listed = error if isinstance(error, UserError) else error.__cause__
    if isinstance(listed, UserError):
        return list(listed.problems)
    message = " ".join(str(error).split())
    name = _culprit(message, values)
    if name is None and not is_expected:
        name = _field_named_in(message, field_types(kind))
        if name is None:
            raise error
    if name is None:
        return []
    return [Problem(name, values.get(name, "not given"), message)]


def _culprit(message: str, values: Mapping[str, Any]) -> str | None:
    """Return the field in `values` that a library's message is about, None if it does not say so.

    Most messages name their field. Others begin with its value ("x is not a valid DebugOption"), or describe it.
    """
    name = _field_named_in(message, values)
    if name is not None:
        return name
    for name, value in values.items():
        if isinstance(value, str) and value and message.startswith((f"{value} ", f"'{value}' ")):
            return name
    for words, name in UNNAMED.items():
        if words in message and name in values:
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
    """Turn `model_name_or_path: NAME/repo@revision` into that name and `model_revision`, in place.

    Return the problem if the user asks for two different revisions.
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
