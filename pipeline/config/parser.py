"""Build a recipe's argument dataclasses from a YAML file and the command line, reporting all mistakes at once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from transformers import TrainingArguments, set_seed
from trl import GRPOConfig

from pipeline import hardware, launch
from pipeline.config import checks, output_directory
from pipeline.config.command_line import Parser, read_command_line, take_config
from pipeline.config.yaml_file import convert, unknown_field
from pipeline.errors import Problem, UserError
from pipeline.files import split_revision

REQUIRED = "is required"

REFUSALS = (ValueError, ImportError, OSError)
"""What argument dataclasses raise for a value, for a package that is missing, and for a file that a field names."""

SAME_SETTING = {"bf16": "fp16", "fp16": "bf16", "activation_checkpointing": "gradient_checkpointing"}
"""Fields whose defaults depend on the machine, and the field with which the user may have set the same thing."""


OF_THE_MACHINE = (
    "use_cpu", "bf16", "fp16", "tf32", "fsdp", "fsdp_config", "deepspeed", "torch_compile", "ddp_backend",
)  # fmt: skip
"""Fields that only the process that will use them can judge."""


class RefusedArguments(UserError):
    """Arguments that are wrong.

    Args:
        problems: What is wrong with the YAML file and the command line.
        built: The dataclasses that could be built nevertheless; empty if the YAML file could not be read.
        types: All dataclasses of the recipe.
    """

    def __init__(self, problems: Sequence[Problem], built: Sequence[Any], types: Sequence[type]) -> None:
        super().__init__(*problems)
        self.built, self.types = built, types


def argument_types(main: Callable[..., Any]) -> list[type]:
    """Return the argument dataclasses in the signature of a recipe's `main`, in order."""
    hints = get_type_hints(main)
    return [hint for name, hint in hints.items() if name != "return" and isinstance(hint, type)]


def parse(*dataclass_types: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Build dataclasses from `--config FILE.yaml`, from the command line, which overrides it, and for this machine.

    What the machine decides (`hardware.training_defaults`: precision, backend, ...) applies where the user gave
    nothing. The process is prepared as well (`launch.prepare_process`): no telemetry, all of the machine's cores.

    Args:
        *dataclass_types: Dataclasses whose fields are the options, as for TRL's and transformers' parsers.
        argv: Command line without the program's name. Default: that of the process.

    Returns:
        One instance of each type, in order.

    Raises:
        RefusedArguments: With everything that is wrong with the file and the command line.
    """
    parser = Parser(dataclass_types)
    arguments = list(sys.argv[1:] if argv is None else argv)
    hints = field_types(*dataclass_types)
    command = list(arguments)
    config, problems = take_config(arguments)
    unreadable = bool(problems)
    problems += _set_environment(config.pop("env", None))
    from_file, more = _read_values(config, hints, parser)
    problems += more
    from_command_line, more = read_command_line(parser, arguments, hints)
    problems += more
    asked = {name: output_directory.expand(name, value) for name, value in {**from_file, **from_command_line}.items()}
    if asked.get("use_cpu") is True:
        hardware.keep_to_cpu()
    launch.prepare_process(shards=bool(asked.get("fsdp") or asked.get("deepspeed")))
    if asked.get("hub_token"):
        # As an argument it would be written to disk with all the others.
        os.environ["HF_TOKEN"] = token = asked.pop("hub_token")
        command = [text.replace(token, "hf_***") for text in command]
    problems += _check_each(asked, hints, dataclass_types)
    reported = dict.fromkeys(problem.field for problem in problems)
    kept = {name: value for name, value in asked.items() if name not in reported}
    machine = {
        name: choice.value
        for name, choice in hardware.training_defaults().items()
        if name in hints and name not in kept and SAME_SETTING.get(name) not in asked
    }
    built, refused = _build(dataclass_types, machine, kept)
    refused = [
        problem
        for problem in refused
        if not (unreadable and problem.remedy == REQUIRED)  # the field may be in that file
        # A field that is already reported was left out, and its default is not to be judged.
        and problem.field not in reported
        and _named_in(problem.remedy, reported) is None
    ]
    training = next((item for item in built if isinstance(item, TrainingArguments)), None)
    if training is not None:
        launch.use_one_gpu(training)
    problems += refused + _split_model_revision(built, asked)
    problems += checks.check_together(built, reported, from_command_line)
    problems += launch.check_launch(training) if training is not None else []
    problems += output_directory.check_output_directory(built, machine)
    if problems:
        raise RefusedArguments(problems, [] if unreadable else built, dataclass_types)
    if training is not None:
        # Trainers set the seed themselves, but only after TRL has drawn adapters and score heads.
        set_seed(training.seed)
        setattr(training, output_directory.RESOLVED, output_directory.to_record(built))
        settings = json.loads(json.dumps(asked, default=str))
        setattr(training, output_directory.ASKED, {"settings": settings, "command": command})
    for item in built:
        if isinstance(targets := getattr(item, "lora_target_modules", None), str) and targets.isidentifier():
            # TRL turns a list of one name into a string, which PEFT reads as a pattern of whole names.
            item.lora_target_modules = [targets]
    return tuple(built)


def _split_model_revision(arguments: Iterable[Any], asked: Mapping[str, Any]) -> list[Problem]:
    """Turn `model_name_or_path: NAME/repo@revision` into that name and `model_revision`, in place.

    Args:
        arguments: Argument dataclasses.
        asked: Values that the user gave.

    Returns:
        The problem of two different revisions, if both are given.
    """
    for item in arguments:
        name, revision = split_revision(str(getattr(item, "model_name_or_path", None) or ""))
        if revision is None or not hasattr(item, "model_revision"):
            continue
        if asked.get("model_revision") not in (None, revision):
            remedy = f"model_name_or_path asks for {revision}; omit one of them"
            return [Problem("model_revision", asked["model_revision"], remedy)]
        item.model_name_or_path, item.model_revision = name, revision
    return []


def check_values(config: Mapping[str, Any], dataclass_types: Sequence[Any]) -> tuple[list[Any], list[Problem]]:
    """Check the values of a YAML file (`config`), without the files that they name and the processes that will run.

    Returns:
        The dataclasses that do not depend on the number of processes, as far as they can be built, and the problems.
    """
    hints = field_types(*dataclass_types)
    config = dict(config)
    before = dict(os.environ)
    try:
        problems = _set_environment(config.pop("env", None))
        values, more = _read_values(config, hints, Parser(dataclass_types))
        problems += more + _check_each(values, hints, dataclass_types)
        reported = {problem.field for problem in problems}
        kept = {name: value for name, value in values.items() if name not in {*reported, *OF_THE_MACHINE}}
        # Whether the batches of GRPO and PPO can be divided depends on the number of processes.
        types = [kind for kind in dataclass_types if not issubclass(kind, GRPOConfig)]
        built, refused = _build(types, {"use_cpu": True, "bf16": False}, kept)
        problems += [problem for problem in refused if problem.field not in reported]
        problems += _split_model_revision(built, values)
        return built, problems + checks.check_together(built, reported, ())
    finally:
        os.environ.clear()
        os.environ.update(before)


def _check_each(asked: Mapping[str, Any], hints: Mapping[str, Any], types: Iterable[type]) -> list[Problem]:
    """Check each value by itself, and return the first problem of each field."""
    rollouts = [kind for kind in types if issubclass(kind, GRPOConfig)]
    problems = checks.check_ranges(asked) + checks.check_text(asked, hints, bool(rollouts))
    problems += checks.check_supported(asked) + checks.check_accelerator(asked)
    problems += [p for kind in rollouts for p in checks.check_unused(asked, kind, checks.UNUSED_IN_ROLLOUTS)]
    return list({problem.field: problem for problem in reversed(problems)}.values())[::-1]


def field_types(*dataclass_types: Any) -> dict[str, Any]:
    """Return the type of every field of argument dataclasses, by name."""
    resolved = {kind: get_type_hints(kind) for kind in dataclass_types}
    return {item.name: resolved[kind][item.name] for kind in resolved for item in dataclasses.fields(kind) if item.init}


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


def _read_values(
    config: Mapping[str, Any], hints: Mapping[str, Any], parser: Parser
) -> tuple[dict[str, Any], list[Problem]]:
    """Convert a YAML file's values to their fields' types; also return the problems of the others."""
    values: dict[str, Any] = {}
    problems = []
    for name, value in config.items():
        if name not in hints:
            problems.append(unknown_field(str(name), value, hints))
            continue
        try:
            converted = convert(value, hints[name])
        except TypeError as error:
            problems.append(Problem(name, repr(value), str(error)))
            continue
        known = parser.option_choices.get(name)
        items = converted if isinstance(converted, list) else [converted]
        if known is not None and converted is not None and any(item not in known for item in items):
            problems.append(Problem(name, repr(value), f"must be one of {', '.join(map(str, known))}"))
        else:
            values[name] = converted
    return values, problems


def _build(
    dataclass_types: Iterable[Any], machine: Mapping[str, Any], asked: Mapping[str, Any]
) -> tuple[list[Any], list[Problem]]:
    """Instantiate the dataclasses; also return what their own validation rejects, in its own words."""
    built: list[Any] = []
    problems: list[Problem] = []
    messages: set[str] = set()  # one that is repeated for a further field adds nothing
    for kind in dataclass_types:
        own = {name: value for name, value in {**machine, **asked}.items() if name in field_types(kind)}
        required = [
            item.name for item in dataclasses.fields(kind) if item.init and item.default is item.default_factory
        ]
        missing = [name for name in required if name not in own]  # without a default, both are MISSING
        problems += [Problem(name, "nothing", REQUIRED) for name in missing]
        while not missing:
            try:
                built.append(kind(**own))
                break
            except (UserError, *REFUSALS) as error:
                refused = _refused(error, kind, own, () if problems else asked)
                if not refused and not problems:
                    raise
                message = str(error)
            fields = [problem.field for problem in refused if problem.field in own]
            if not fields and problems:
                break  # a consequence of what was left out
            problems += refused if message not in messages else []
            messages.add(message)
            if not fields:
                break
            for name in fields:
                del own[name]  # and try again, to find what else is wrong
    return built, problems


def _refused(error: Exception, kind: Any, own: Mapping[str, Any], asked: Iterable[str]) -> Sequence[Problem]:
    """Return the problems that a dataclass lists, or its message as the problem of the field that is to blame.

    There is none if no field is: the dataclass fails whatever the user gives.
    """
    listed = error if isinstance(error, UserError) else error.__cause__
    if isinstance(listed, UserError):
        return listed.problems
    message = " ".join(str(error).split())
    name = _named_in(message, own) or _find_culprit(kind, own, asked, message)
    return [Problem(name, own[name], message)] if name else []


def _named_in(message: str, names: Iterable[str]) -> str | None:
    """Return the first field whose name is in a message."""
    return next((name for name in names if re.search(rf"\b{re.escape(name)}\b", message)), None)


def _find_culprit(kind: Any, values: Mapping[str, Any], asked: Iterable[str], message: str) -> str | None:
    """Return the field, of those that the user gave, without which a dataclass no longer raises this message."""
    for name in [name for name in asked if name in values]:
        try:
            kind(**{other: value for other, value in values.items() if other != name})
        except Exception as error:  # noqa: BLE001 - only the message counts
            if " ".join(str(error).split()) == message:
                continue
        return name
    return None
