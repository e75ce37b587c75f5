"""From a YAML file and the command line to dataclasses: TRL's parser, with every mistake told at once."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from transformers import set_seed
from trl import TrlParser

from pipeline import checks, hardware, launch, output_directory
from pipeline.errors import Problem, UserError
from pipeline.yaml_fields import convert, describe, read_yaml


@dataclass
class DataArguments:
    """Which data set a stage reads, and what its columns mean."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Id on the Hugging Face Hub, or a local file or folder: a data set repository, "
            "parquet, JSONL, "
            "JSON, CSV or text, also compressed (.gz)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="validation", metadata={"help": "Split to evaluate on meanwhile."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the data while training, in constant memory."}
    )
    validation_share: float = field(
        default=0.05,
        metadata={
            "help": "Share of the rows held out for evaluation if the data set has one split only (a "
            "plain file, "
            "say): every 20th row for 0.05."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first rows to train."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first rows to evaluate."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the documents (pretraining)."})
    messages_column: str = field(
        default="messages", metadata={"help": "Column of the conversations: a list of {role, content}."}
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column of the prompts: a list of {role, content}, or a question."},
    )
    completion_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the answers to `prompt_column`, if there are no conversations to tune on."
        },
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "Column of the right answer to a prompt, which rewards compare with."},
    )
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression that finds the final answer inside `answer_column` (its first "
            "group, if it "
            "has one). Without it an answer with GSM8K's `#### ` mark is cut there, and any other is "
            "taken whole."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before conversations and prompts that have none."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer; that of `model_name_or_path` if not given."}
    )


class _Parser(TrlParser):
    """TRL's parser; a mistake on the command line is raised as `argparse.ArgumentError`, never printed."""

    def __init__(self, dataclass_types: Iterable[Any]) -> None:
        # An abbreviation (`--learn 1`) would be accepted, and start to mean something else with the next
        # release.
        super().__init__(dataclass_types, allow_abbrev=False, exit_on_error=False)

    def error(self, message: str) -> Any:
        raise argparse.ArgumentError(None, message)


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
    parser = _Parser(dataclass_types)
    if not dataclass_types:
        parser.dataclass_types = []
    arguments = list(sys.argv[1:] if argv is None else argv)
    config, problems = _take_config(arguments)
    hints = {name: hint for kind in dataclass_types for name, hint in _hints(kind).items()}

    for name, value in (config.pop("env", None) or {}).items():
        os.environ.setdefault(str(name), str(value))
    values: dict[str, Any] = {}
    for name, value in config.items():
        if name not in hints:
            problems.append(_unknown(str(name), value, hints))
            continue
        accepted, converted = convert(value, hints[name])
        if accepted:
            values[name] = converted
        else:
            problems.append(Problem(name, repr(value), f"must be {describe(hints[name])}"))

    given, more = _read_command_line(parser, arguments, hints)
    problems += more
    asked = {**values, **given}
    if asked.get("hub_token"):
        # As an argument it would be written to disk with all the others.
        os.environ["HF_TOKEN"] = asked.pop("hub_token")
    unsupported = _unsupported(asked)
    problems += unsupported
    asked = {
        name: value for name, value in asked.items() if name not in {problem.field for problem in unsupported}
    }
    machine = {
        name: choice.value
        for name, choice in hardware.training_defaults().items()
        if name in hints and name not in asked and not _replaces(name, asked)
    }
    built, refused = _build(dataclass_types, {**machine, **asked})
    problems += refused + checks.check_ranges(built)
    problems += [
        problem for item in built if hasattr(item, "world_size") for problem in launch.check_launch(item)
    ]
    problems += output_directory.check(built)
    if problems:
        from pipeline import inputs  # which takes its time, and imports this module

        problems += inputs.find_problems(built, hints)
        raise UserError(*dict.fromkeys(problems))
    for item in built:
        if hasattr(item, "world_size"):
            # Trainers set the seed themselves, but only after TRL has drawn adapters and score heads.
            set_seed(item.seed)
            setattr(item, output_directory.RESOLVED, output_directory.describe(built))
    return tuple(built)


def _take_config(arguments: list[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Remove `--config PATH` from the command line, and read what it names."""
    config: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            path = argument.partition("=")[2]
            width = 1
            if not path:
                if position + 1 == len(arguments):
                    del arguments[position]
                    return {}, [Problem("--config", "nothing", "give the path of a YAML file")]
                path, width = arguments[position + 1], 2
            del arguments[position : position + width]
            try:
                config = read_yaml(path)
            except UserError as error:
                return {}, list(error.problems)
            break
    return config, []


def _hints(kind: Any) -> dict[str, Any]:
    resolved = get_type_hints(kind)
    return {item.name: resolved[item.name] for item in dataclasses.fields(kind) if item.init}


def _unknown(name: str, value: object, known: Iterable[str]) -> Problem:
    nearest = difflib.get_close_matches(name.lstrip("-"), list(known), n=1)
    remedy = (
        f"unknown field; did you mean `{nearest[0]}`?"
        if nearest
        else "unknown field; see --help for those known"
    )
    return Problem(name, value, remedy)


def _replaces(name: str, asked: Iterable[str]) -> bool:
    """Whether the user spoke about the same thing under another name."""
    same = {"bf16": {"fp16"}, "fp16": {"bf16"}, "activation_checkpointing": {"gradient_checkpointing"}}
    return bool(same.get(name, set()) & set(asked))


def _unsupported(asked: dict[str, Any]) -> list[Problem]:
    problems = []
    for dtype in ("bf16", "fp16"):
        if asked.get(dtype) and not hardware.supports(dtype):
            best = hardware.precision()
            problems.append(
                Problem(
                    dtype, True, f"this machine lacks it; leave it out to use {best.value} ({best.reason})"
                )
            )
    if asked.get("bf16") and asked.get("fp16"):
        problems.append(Problem("bf16", True, "excludes fp16; choose one"))
    if asked.get("trust_remote_code"):
        problems.append(
            Problem("trust_remote_code", True, "code from the Hub is never run here; leave it out")
        )
    return problems


def _read_command_line(
    parser: _Parser, arguments: list[str], hints: dict[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """Values given on the command line, by field name, and what is wrong with the rest."""
    problems: list[Problem] = []
    for action in parser._actions:
        action.required = False
        if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True  # `--bf16` alone, as for every other switch
        if action.dest in hints:
            action.default = argparse.SUPPRESS
    while True:
        try:
            namespace, rest = parser.parse_known_args(arguments)
        except argparse.ArgumentError as error:
            # argparse stops at the first mistake: note it, take that option away, and go on to the next.
            option = (error.argument_name or "").split("/")[0]
            names = (error.argument_name or "").split("/")
            at = [i for i, text in enumerate(arguments) if text.partition("=")[0] in names]
            if not at:
                problems.append(Problem("command line", " ".join(arguments), error.message))
                return {}, problems
            values = {i: _value_at(arguments, i) for i in at}
            # An option may stand there twice; the message tells the value of the wrong one.
            wrong = next(
                (i for i in reversed(at) if repr(values[i][-1:]).strip("[]") in error.message), at[0]
            )
            name = option.lstrip("-").replace("-", "_")
            value = " ".join(values[wrong])
            problems.append(Problem(name, repr(value), f"must be {describe(hints.get(name, str))}"))
            del arguments[wrong : wrong + 1 + (0 if "=" in arguments[wrong] else len(values[wrong]))]
            continue
        break
    position = 0
    while position < len(rest):
        name, _, value = rest[position].partition("=")
        position += 1
        if name.startswith("--"):
            if not value and position < len(rest) and not rest[position].startswith("--"):
                value = rest[position]
                position += 1
            problems.append(_unknown(name[2:].replace("-", "_"), value, hints))
        else:
            problems.append(Problem("command line", name, "belongs to no option; see --help"))
    given = {name: value for name, value in vars(namespace).items() if name in hints}
    # `null`, as in YAML, takes back what the file says; argparse would take it for text.
    optional = {name for name in given if type(None) in get_args(hints[name])}
    return {n: None if value == "null" and n in optional else value for n, value in given.items()}, problems


def _value_at(arguments: list[str], position: int) -> list[str]:
    """What an option on the command line is given: `--option=value`, or all words until the next option."""
    _, sign, value = arguments[position].partition("=")
    if sign:
        return [value]
    rest = arguments[position + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:end]


def _build(dataclass_types: Iterable[Any], values: dict[str, Any]) -> tuple[list[Any], list[Problem]]:
    """Instantiate the dataclasses; what their own validation refuses is told in their own words."""
    built, problems = [], []
    for kind in dataclass_types:
        own = {name: value for name, value in values.items() if name in _hints(kind)}
        missing = [
            item.name
            for item in dataclasses.fields(kind)
            if item.init
            and item.name not in own
            and item.default is dataclasses.MISSING
            and item.default_factory is dataclasses.MISSING
        ]
        if missing:
            problems += [Problem(name, "nothing", "is required") for name in missing]
            continue
        while True:
            try:
                built.append(kind(**own))
                break
            except (
                ValueError,
                TypeError,
                NotImplementedError,
                ImportError,
                OSError,
                ArithmeticError,
            ) as error:
                message = " ".join(str(error).split())
                name = _field_in(message, own)
                problems.append(Problem(name or kind.__name__, own[name] if name else "refused", message))
                if name is None:
                    break
                del own[name]  # to find out what else is wrong
    return built, problems


def _field_in(message: str, values: dict[str, Any]) -> str | None:
    """The field that an error message speaks of, by its name or else by its value."""
    for name in values:
        if re.search(rf"\b{re.escape(name)}\b", message):
            return name
    for name, value in values.items():
        if isinstance(value, str) and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message):
            return name
    return None
