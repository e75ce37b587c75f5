"""The command line: `fourstage COMMAND`, or `python -m pipeline COMMAND`.

Only the standard library and the module of the chosen subcommand are imported, so that `--help` is instant.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

from pipeline import leave_out_working_directory
from pipeline.errors import EXIT_USER_ERROR, Problem, UserError, as_typed, exit_on_user_error

COMMANDS = {
    "run": ("pipeline.runner.cli", "run every step of a recipe folder, in order"),
    "plan": ("pipeline.runner.estimate", "estimate memory, disk, hours and cost of a run, before a node is rented"),
    "status": ("pipeline.runner.status", "show what each step of a run has done, and what is out of date and why"),
    "copy": ("pipeline.runner.copy_recipe", "copy a recipe that comes with the package to a folder of your own"),
    "evaluate": ("pipeline.evaluation.cli", "measure one stage on held-out data"),
    "report": ("pipeline.report.cli", "write the report of a run: index.html and metrics.json"),
    "compare": ("pipeline.report.compare", "compare runs of two recipes, paired by seed and by test row"),
    "app": ("pipeline.app.cli", "open a page that shows a run, and on which people vote for answers"),
    "chat": ("pipeline.app.chat", "talk with a model in the terminal"),
    "check-overlap": ("pipeline.data.overlap", "look for test examples inside the training data"),
    "push": ("pipeline.hub.push", "push what a run has made to the Hub: models, data, report"),
    "merge": ("pipeline.models.merge", "merge a LoRA adapter into its base model"),
    "gguf": ("pipeline.models.gguf", "convert a model for llama.cpp"),
    "import-gguf": ("pipeline.models.import_gguf", "convert a file for llama.cpp into a model to start from"),
}
"""Subcommand -> module with `add_arguments(parser)` and `main(args)`, and a line for --help."""


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {message}; see --help\n")


def build_parser(argv: Sequence[str]) -> Parser:
    """Return the parser for `argv`. It lists all subcommands, and knows the arguments of the one that `argv` names."""
    description = "Train a language model from random weights to a reasoning chat model."
    parser = Parser(prog=as_typed(), description=description)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in argv[:1]:
            importlib.import_module(module).add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code. A `UserError` ends the process with code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may not be UTF-8, and a log file is read while the command runs.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if argv is None:
        argv = sys.argv[1:]
    parser = build_parser(argv)
    args, rest = parser.parse_known_args(argv)
    # Only `plan` sets a default for `overrides`: it also accepts the options of its steps, and parses them itself.
    if rest and not hasattr(args, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    with exit_on_user_error():
        for option, value in pairwise(argv):
            # An unset shell variable, for instance, makes an option empty.
            if not value.strip():
                raise UserError(Problem(option, repr(value), "is empty; give a value, or omit it"))
        try:
            module, _ = COMMANDS[args.command]
            return importlib.import_module(module).main(args) or 0
        except OSError as error:
            if error.filename is not None:
                remedy = f"{error.strerror}; correct it and try again"
                raise UserError(Problem("file", error.filename, remedy)) from error
            if _has_closed_output():
                # A reader such as `| head` has read enough.
                if isinstance(error, BrokenPipeError):
                    return 1
                raise UserError(Problem("output", "stdout", f"{error.strerror}; redirect it elsewhere")) from error
            raise
    return EXIT_USER_ERROR


def _has_closed_output() -> bool:
    """Return whether stdout cannot be written to. If so, write to the null device from now on.

    Python flushes once more at its end, which must not fail.
    """
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def command() -> int:
    """Run the console script `fourstage`."""
    leave_out_working_directory()
    return main()


if __name__ == "__main__":
    sys.exit(command())
