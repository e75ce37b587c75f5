"""The start of every recipe: parse the arguments in the signature of its `main`, and call it."""

import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import leave_out_working_directory
from pipeline.config.command_line import FLAGS, describe_options
from pipeline.config.fields import argument_types
from pipeline.config.recipe_folder import missing_input
from pipeline.errors import UserError, exit_on_user_error


def run(main: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Parse the dataclasses in the signature of `main` from the command line, and call it with them.

    All problems with the arguments are reported together. If an earlier step of the recipe has not run yet, the command
    that makes the missing input is reported. Problems with the inputs are reported by `main`.

    Args:
        main: The recipe. Its parameters are annotated with dataclasses.
        argv: The command line without the program's name. Default: `sys.argv`. `--help` prints the options.
    """
    if argv is None:
        leave_out_working_directory()
    words = sys.argv[1:] if argv is None else argv
    help_flags = set(FLAGS).intersection(words)
    if help_flags:
        module = f"recipes.{Path(sys.argv[0]).stem}"
        # Any other flag asks for all options.
        everything = not help_flags <= {"-h", "--help"}
        print(describe_options(argument_types(main), module, everything=everything))
        return
    # Importing torch and transformers takes seconds, too long for `--help`.
    from pipeline.config.parser import parse
    from pipeline.launch import stop_as_one

    with exit_on_user_error():
        # `recipes/__init__.py` leaves Ctrl-C to the system while a recipe's modules are imported.
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        arguments = parse(*argument_types(main), argv=argv)
        values: dict[str, Any] = {}
        for item in arguments:
            values |= vars(item)
        config = _config_of(words)
        if config is not None:
            missing = missing_input(values, config)
            if missing:
                raise UserError(missing)
        # `recipes/__init__.py` disables the garbage collector while a recipe's modules are imported. Their million
        # objects live as long as the process: unless they are frozen, each collection traverses all of them. At exit,
        # triton, which torch for CUDA imports, would print frozen types as leaks.
        gc.enable()
        if "triton" not in sys.modules:
            gc.freeze()
        output = Path(values.get("output_dir", ".")).absolute()
        new_folders = [folder for folder in (output, *output.parents) if not folder.exists()]
        try:
            with stop_as_one():
                main(*arguments)
        except UserError:
            # A trainer's constructor may have created the directory of a rejected run. It is removed if it is empty.
            for folder in new_folders:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


def _config_of(words: Sequence[str]) -> str | None:
    """Return the value of `--config` on a command line, with or without `=`; None if there is none."""
    for position, word in enumerate(words):
        if word == "--config":
            return words[position + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None
