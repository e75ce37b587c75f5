"""Build a recipe's argument dataclasses from a YAML file and the command line, reporting all mistakes at once.

A value goes through four checks, and stops at the first that refuses it:

    read_values       its type, for the YAML file and for the command line, which overrides the file
    _check_each       the value by itself: ranges, words, what this machine supports
    _build_checked    the dataclass that has the field, as far as the library that it belongs to checks it
    check_together    fields that contradict each other

A field that was refused is omitted from the later checks, and what is wrong only because it is missing is not reported.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from trl import GRPOConfig

from pipeline import hardware, launch
from pipeline.config import checks, output_directory
from pipeline.config.command_line import read_command_line
from pipeline.config.fields import READ, field_types, read_values
from pipeline.config.recipe_folder import find_shipped
from pipeline.config.yaml_file import read_yaml
from pipeline.errors import Problem, UserError, collect, refuse
from pipeline.files import split_revision

OF_THE_MACHINE = (
    "use_cpu", "bf16", "fp16", "tf32", "fsdp", "fsdp_config", "deepspeed", "torch_compile", "ddp_backend",
)  # fmt: skip
"""Fields that only the process that uses them can check."""


def parse(*dataclass_types: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Build dataclasses from `--config FILE.yaml`, from the command line, which overrides it, and for this machine.

    Fields that the user did not set get the machine's defaults (`hardware.training_defaults`: precision, backend, ...).
    The process is prepared as well (`launch.prepare_process`): no telemetry, all of the machine's cores.

    `argv` is a command line without the program's name, by default `sys.argv`. A `UserError` lists all problems.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", const="", default=[])
    known, options = parser.parse_known_args(words)
    paths: list[str] = known.config
    content: dict[str, Any] = {}
    problems: list[Problem] = []
    if "" in paths:
        problems.append(Problem("--config", "nothing", "give the path of a YAML file"))
    elif len(paths) > 1:
        problems.append(Problem("--config", " and ".join(paths), "only one file is read; name one"))
    elif paths:
        with collect(problems):
            content = read_yaml(str(find_shipped(Path(paths[0]))))
    is_unreadable = bool(problems)
    problems += _set_environment(content.pop("env", None))
    from_command_line, more = read_command_line(options, dataclass_types)
    # Another recipe's file may have values that this one does not know, such as a DPO loss.
    used = {name: value for name, value in content.items() if name not in from_command_line}
    from_file, wrong = read_values(used, dataclass_types)
    problems += wrong + more
    asked = from_file | from_command_line
    for name in asked.keys() & {*READ, "output_dir", "resume_from_checkpoint"}:
        if isinstance(value := asked[name], list):
            asked[name] = [os.path.expanduser(path) for path in value]
        elif value is not None:
            asked[name] = os.path.expanduser(value)

    if asked.get("use_cpu") is True:
        hardware.keep_to_cpu()
    launch.prepare_process(shards=bool(asked.get("fsdp") or asked.get("deepspeed")))
    if asked.get("hub_token"):
        # As an argument it would be written to disk with all the others.
        os.environ["HF_TOKEN"] = token = asked.pop("hub_token")
        words = [text.replace(token, "hf_***") for text in words]

    # The user may have set the same thing with another field.
    same = {"bf16": "fp16", "fp16": "bf16", "activation_checkpointing": "gradient_checkpointing"}
    defaults, known_fields = hardware.training_defaults(), field_types(*dataclass_types)
    machine = {name: defaults[name].value for name in defaults if name in known_fields and same.get(name) not in asked}
    problems += _check_each(asked, dataclass_types)
    built = _build_checked(dataclass_types, asked, machine, problems, from_command_line)
    if is_unreadable:
        # A required field may be in the file that could not be read.
        problems = [problem for problem in problems if problem.remedy != "is required"]
    training = next((item for item in built if isinstance(item, TrainingArguments)), None)
    problems += launch.check_launch(training) if training is not None else []
    problems += output_directory.check_output_directory(built, machine.keys() - asked.keys())
    refuse(*problems)

    if training is not None:
        # Trainers set the seed themselves, but only after TRL has initialised adapters and score heads.
        set_seed(training.seed)
        setattr(training, output_directory.RESOLVED, output_directory.to_record(built))
        settings = json.loads(json.dumps(asked, default=str))
        setattr(training, output_directory.ASKED, {"settings": settings, "command": words})
    for item in built:
        # TRL turns a list of one name into a string, which PEFT reads as a pattern that must match whole names.
        if isinstance(targets := getattr(item, "lora_target_modules", None), str) and targets.isidentifier():
            item.lora_target_modules = [targets]
    return tuple(built)


def check_values(
    config: Mapping[str, Any], dataclass_types: Sequence[Any], processes: int = 1
) -> tuple[list[Any], list[Problem]]:
    """Return the dataclasses that can be built from a YAML file's values, and what is wrong with the values."""
    config, before = dict(config), dict(os.environ)
    try:
        problems = _set_environment(config.pop("env", None))
        values, wrong = read_values(config, dataclass_types)
        problems += wrong + _check_each(values, dataclass_types)
        values = {name: value for name, value in values.items() if name not in OF_THE_MACHINE}
        # GRPO and PPO divide their batches among the processes, and only this one exists yet.
        types = [
            type(kind.__name__, (kind,), {"world_size": processes}) if issubclass(kind, GRPOConfig) else kind
            for kind in dataclass_types
        ]
        return _build_checked(types, values, {"use_cpu": True, "bf16": False}, problems), problems
    finally:
        os.environ.clear()
        os.environ.update(before)


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


def _check_each(asked: Mapping[str, Any], types: Sequence[Any]) -> list[Problem]:
    """Check each value by itself, and return the first problem of each field."""
    rollouts = [kind for kind in types if issubclass(kind, GRPOConfig)]
    problems = checks.check_ranges(asked) + checks.check_text(asked, field_types(*types), bool(rollouts))
    problems += checks.check_supported(asked)
    for kind in rollouts:
        problems += checks.check_unused(asked, kind, checks.UNUSED_IN_ROLLOUTS)
    # Subclasses have groups of one, and TRL's message does not name the field.
    if GRPOConfig in types and asked.get("num_generations") == 1:
        problems.append(Problem("num_generations", 1, "must be at least 2: answers are compared within a group"))
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.field, problem)
    return list(first.values())


def _build_checked(
    dataclass_types: Iterable[Any],
    asked: Mapping[str, Any],
    machine: Mapping[str, Any],
    problems: list[Problem],
    on_command_line: Collection[str] = (),
) -> list[Any]:
    """Build as many of the dataclasses as possible, check their fields together, and append to `problems`."""
    reported = {problem.field for problem in problems}
    kept = {**machine, **{name: value for name, value in asked.items() if name not in reported}}
    built = []
    for kind in dataclass_types:
        own = {name: kept[name] for name in field_types(kind) if name in kept}
        # If a field has no default, both are `MISSING`.
        required = [item for item in dataclasses.fields(kind) if item.init and item.default is item.default_factory]
        missing = [item.name for item in required if item.name not in own]
        problems += [Problem(name, "nothing", "is required") for name in missing if name not in reported]
        # Without the fields that it refuses, a class may find the next mistake.
        while not missing:
            try:
                built.append(kind(**own))
                break
            # These are raised for a wrong value, a missing package, and a file that a field names.
            except (UserError, ValueError, ImportError, OSError) as error:
                refused = _problems_of(error, kind, own, is_expected=bool(problems))
            # A field that is already reported was omitted, and its default must not be reported.
            problems += [p for p in refused if p.field not in reported and _named_in(p.remedy, reported) is None]
            culprits = [problem.field for problem in refused if problem.field in own]
            if not culprits:
                break
            for name in culprits:
                reported.add(name)
                del own[name]
    for item in built:
        if isinstance(item, TrainingArguments):
            launch.use_one_gpu(item)
        # `model_name_or_path: NAME/repo@revision` also sets `model_revision`.
        name, revision = split_revision(str(getattr(item, "model_name_or_path", None) or ""))
        if revision is not None and hasattr(item, "model_revision"):
            if (other := asked.get("model_revision")) not in (None, revision):
                remedy = f"model_name_or_path asks for {revision}; omit one of them"
                problems.append(Problem("model_revision", other, remedy))
            item.model_name_or_path, item.model_revision = name, revision
    problems += checks.check_together(built, reported, on_command_line)
    return built


def _problems_of(error: Exception, kind: Any, own: Mapping[str, Any], is_expected: bool) -> list[Problem]:
    """Return the problems that a dataclass of the values `own` lists, or its message under the field that it names.

    An `error` without a field is a defect and is raised, unless it `is_expected` because user values are missing.
    """
    listed = error if isinstance(error, UserError) else error.__cause__
    if isinstance(listed, UserError):
        return list(listed.problems)
    message = " ".join(str(error).split())
    # Most messages of the libraries name their field; others begin with the value: "x is not a valid DebugOption".
    texts = {name: value for name, value in own.items() if isinstance(value, str) and value}
    begins = (name for name, text in texts.items() if message.startswith((f"{text} ", f"'{text}' ")))
    name = _named_in(message, own) or next(begins, None)
    if name is None and not is_expected and (name := _named_in(message, field_types(kind))) is None:
        raise error
    return [Problem(name, own.get(name, "not given"), message)] if name else []


def _named_in(message: str, names: Iterable[str]) -> str | None:
    """Return the field that a message names first."""
    found = {name: re.search(rf"\b{re.escape(name)}\b", message) for name in names}
    places = {name: match.start() for name, match in found.items() if match}
    return min(places, key=lambda name: places[name], default=None)
