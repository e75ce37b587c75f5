"""From a YAML file and the command line to dataclasses: TRL's parser, with every mistake told at once."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from transformers import set_seed

from pipeline import hardware, launch
from pipeline.config import checks, output_directory
from pipeline.config.command_line import Parser, read_command_line, take_config, unknown
from pipeline.config.yaml_file import convert, describe
from pipeline.errors import Problem, UserError, begin_preparation, field_named_in

REQUIRED = "is required"


class RefusedArguments(UserError):
    """Arguments that are wrong, and those dataclasses that could be built all the same.

    Args:
        problems: What is wrong with the YAML file and the command line.
        built: The dataclasses that could be built; empty if the YAML file could not be read.
        hints: Type of every field, by name.
    """

    def __init__(self, problems: Sequence[Problem], built: Sequence[Any], hints: Mapping[str, Any]) -> None:
        super().__init__(*problems)
        self.built, self.hints = built, hints


def argument_types(main: Callable[..., Any]) -> list[type]:
    """Return the argument dataclasses in the signature of a recipe's `main`, in order."""
    hints = get_type_hints(main)
    return [hint for name, hint in hints.items() if name != "return" and isinstance(hint, type)]


def parse(*dataclass_types: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Build dataclasses from `--config FILE.yaml`, from the command line, which overrides it, and for this
    machine.

    What the machine decides (`hardware.training_defaults`: precision, backend, ...) holds where the user said
    nothing. A run that begins with this function sends no telemetry and uses the machine's cores
    (`hardware.threads`).

    Args:
        *dataclass_types: Dataclasses whose fields are the options, as for TRL's and transformers' parsers.
        argv: Command line without the program's name; that of the process if not given.

    Returns:
        One instance for each type, in order.

    Raises:
        UserError: With all that is wrong with the file and the command line.
    """
    launch.prepare_process()
    parser = Parser(dataclass_types)
    if not dataclass_types:
        parser.dataclass_types = []
    arguments = list(sys.argv[1:] if argv is None else argv)
    config, problems = take_config(arguments)
    unreadable = bool(problems)
    hints = {name: hint for kind in dataclass_types for name, hint in _hints(kind).items()}
    choices = _choices(parser)
    problems += _set_environment(config.pop("env", None))
    values, more = _read_values(config, hints, choices)
    problems += more
    given, more = read_command_line(parser, arguments, hints)
    problems += more
    asked = {name: output_directory.expand(name, value) for name, value in {**values, **given}.items()}
    if asked.get("hub_token"):
        # As an argument it would be written to disk with all the others.
        os.environ["HF_TOKEN"] = asked.pop("hub_token")
    # What is told once is left out from there on, or its default would be judged next.
    wrong = _check_each(asked, hints)
    problems += wrong
    told = {problem.field for problem in wrong}
    kept = {name: value for name, value in asked.items() if name not in told}
    machine = {
        name: choice.value
        for name, choice in hardware.training_defaults().items()
        if name in hints and name not in kept and not _replaces(name, asked)
    }
    built, refused = _build(dataclass_types, machine, kept)
    if unreadable:  # what is missing is in the file
        refused = [problem for problem in refused if problem.remedy != REQUIRED]
    problems += refused + checks.check_together(built, told)
    problems += [problem for item in built if hasattr(item, "world_size") for problem in launch.check_launch(item)]
    problems += output_directory.check(built)
    if problems:
        raise RefusedArguments(problems, [] if unreadable else built, hints)
    for item in built:
        if hasattr(item, "world_size"):
            # Trainers set the seed themselves, but only after TRL has drawn adapters and score heads.
            set_seed(item.seed)
            setattr(item, output_directory.RESOLVED, output_directory.describe(built))
            begin_preparation(asked, hints, item.output_dir)
        if isinstance(targets := getattr(item, "lora_target_modules", None), str) and targets.isidentifier():
            # TRL makes text of a list of one name, which PEFT takes for a pattern of whole names.
            item.lora_target_modules = [targets]
    return tuple(built)


def check_values(config: Mapping[str, Any], dataclass_types: Iterable[Any]) -> list[Problem]:
    """What `parse` would say about single values of a YAML file, without what they name or what they are together.

    Args:
        config: Content of the file.
        dataclass_types: As of `parse`.
    """
    kinds = list(dataclass_types)
    hints = {name: hint for kind in kinds for name, hint in _hints(kind).items()}
    values = {name: value for name, value in config.items() if name != "env"}
    values, problems = _read_values(values, hints, _choices(Parser(kinds)))
    return problems + _check_each(values, hints)


def _check_each(asked: dict[str, Any], hints: dict[str, Any]) -> list[Problem]:
    return checks.check_ranges(asked) + checks.check_choices(asked, hints) + _unsupported(asked)


def _choices(parser: Parser) -> dict[str, list[Any]]:
    return {action.dest: list(action.choices) for action in parser._actions if action.choices}


def _set_environment(variables: Any) -> list[Problem]:
    """Set what a YAML file's `env` says, where the user's environment says nothing."""
    if variables is not None and not isinstance(variables, dict):
        return [Problem("env", repr(variables), "must be a mapping from variables to values")]
    problems = []
    for name, value in (variables or {}).items():
        try:
            os.environ.setdefault(str(name), str(value))
        except ValueError as error:
            problems.append(Problem("env", repr(name), f"cannot be set ({error}); correct it"))
    return problems


def _read_values(
    config: Mapping[str, Any], hints: dict[str, Any], choices: dict[str, list[Any]]
) -> tuple[dict[str, Any], list[Problem]]:
    """A YAML file's values as their fields take them, and what is wrong with the others."""
    values: dict[str, Any] = {}
    problems = []
    for name, value in config.items():
        if name not in hints:
            problems.append(unknown(str(name), value, hints))
            continue
        accepted, converted = convert(value, hints[name])
        known = choices.get(name)
        items = converted if isinstance(converted, list) else [converted]
        if not accepted:
            problems.append(Problem(name, repr(value), f"must be {describe(hints[name])}"))
        elif known is not None and converted is not None and any(item not in known for item in items):
            problems.append(Problem(name, repr(value), f"must be one of {', '.join(map(str, known))}"))
        else:
            values[name] = converted
    return values, problems


def _hints(kind: Any) -> dict[str, Any]:
    resolved = get_type_hints(kind)
    return {item.name: resolved[item.name] for item in dataclasses.fields(kind) if item.init}


def _replaces(name: str, asked: Iterable[str]) -> bool:
    """Whether the user spoke about the same thing under another name."""
    same = {"bf16": {"fp16"}, "fp16": {"bf16"}, "activation_checkpointing": {"gradient_checkpointing"}}
    return bool(same.get(name, set()) & set(asked))


def _unsupported(asked: dict[str, Any]) -> list[Problem]:
    """What this machine lacks, and what the recipes don't do."""
    problems = []
    best = hardware.precision()
    for name, dtype in (("bf16", "bf16"), ("fp16", "fp16"), ("fp16_full_eval", "fp16")):
        if asked.get(name) and not hardware.supports(dtype):
            remedy = f"this machine lacks it; leave it out to use {best.value} ({best.reason})"
            problems.append(Problem(name, True, remedy))
    if asked.get("bf16") and asked.get("fp16"):
        problems.append(Problem("bf16", True, "excludes fp16; choose one"))
    if asked.get("use_cpu") is False and hardware.accelerator() is None:
        problems.append(Problem("use_cpu", False, "this machine has nothing else; leave it out"))
    if asked.get("trust_remote_code"):
        remedy = "code from the Hub is never run here; leave it out"
        problems.append(Problem("trust_remote_code", True, remedy))
    for name in ("load_in_8bit", "load_in_4bit"):
        if asked.get(name):
            problems.append(Problem(name, True, "models are not quantised here; leave it out"))
    if asked.get("push_to_hub"):
        from huggingface_hub import get_token

        if get_token() is None:
            remedy = "needs a token: log in by `hf auth login`, or set HF_TOKEN"
            problems.append(Problem("push_to_hub", True, remedy))
    return problems


def _build(
    dataclass_types: Iterable[Any], machine: dict[str, Any], asked: dict[str, Any]
) -> tuple[list[Any], list[Problem]]:
    """Instantiate the dataclasses; what their own validation refuses is told in their own words."""
    built: list[Any] = []
    problems: list[Problem] = []
    messages: set[str] = set()  # the same one, about another field, tells nothing new
    for kind in dataclass_types:
        own = {name: value for name, value in {**machine, **asked}.items() if name in _hints(kind)}
        missing = [
            item.name
            for item in dataclasses.fields(kind)
            if item.init
            and item.name not in own
            and item.default is dataclasses.MISSING
            and item.default_factory is dataclasses.MISSING
        ]
        if missing:
            problems += [Problem(name, "nothing", REQUIRED) for name in missing]
            continue
        while True:
            try:
                built.append(kind(**own))
                break
            except (
                UserError,
                ValueError,
                TypeError,
                NotImplementedError,
                ImportError,
                OSError,
                ArithmeticError,
            ) as error:
                refused = _refused(error, kind, own, () if problems else asked)
                message = str(error)
            fields = [problem.field for problem in refused if problem.field in own]
            if not fields and problems:
                break  # a consequence of what was left out
            problems += refused if message not in messages else []
            messages.add(message)
            if not fields:
                break
            for name in fields:
                del own[name]  # to find out what else is wrong
    return built, problems


def _refused(error: Exception, kind: Any, own: dict[str, Any], asked: Iterable[str]) -> Sequence[Problem]:
    """What a dataclass refuses: as it lists it, or else its message, for the field that this speaks of."""
    listed = error if isinstance(error, UserError) else error.__cause__
    if isinstance(listed, UserError):
        return listed.problems
    message = " ".join(str(error).split())
    name = field_named_in(message, own) or _culprit(kind, own, asked, message)
    return [Problem(name or kind.__name__, own[name] if name else "refused", message)]


def _culprit(kind: Any, values: dict[str, Any], asked: Iterable[str], message: str) -> str | None:
    """The field of those that the user gave without which a dataclass does not refuse the others with this message."""
    for name in [name for name in asked if name in values]:
        try:
            kind(**{other: value for other, value in values.items() if other != name})
        except Exception as error:  # noqa: BLE001 - another message is all that counts
            if " ".join(str(error).split()) == message:
                continue
        return name
    return None
