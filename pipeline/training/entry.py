"""The start of every recipe: parse the arguments in the signature of its `main`, and call it."""

import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import search_here_last
from pipeline.config.command_line import FLAGS, describe_options
from pipeline.config.fields import argument_types
from pipeline.config.recipe_folder import missing_input
from pipeline.errors import UserError, exit_on_user_error


def run(main: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Parse the dataclasses in the signature of `main` from the command line, and call it with them.

    All problems with the arguments are reported together, and then, by `main`, all problems with their inputs; or the
    command that makes an input, if an earlier step of the recipe has not run yet.

    `argv` is without the program's name, by default `sys.argv`; `--help` prints its options.
    """
    if argv is None:
        search_here_last()
    words = sys.argv[1:] if argv is None else argv
    if asked := set(FLAGS).intersection(words):
        module = f"recipes.{Path(sys.argv[0]).stem}"
        print(describe_options(argument_types(main), module, everything=not asked <= {"-h", "--help"}))
        return
    # Importing torch and transformers takes seconds, too long for `--help`.
    from pipeline.config.parser import parse
    from pipeline.launch import stop_as_one

    with exit_on_user_error():
        # `recipes/__init__.py` leaves Ctrl-C to the system while a recipe's modules are imported.
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        arguments = parse(*argument_types(main), argv=argv)
        parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        values = {name: value for item in arguments for name, value in vars(item).items()}
        if "--config" in parts and (missing := missing_input(values, parts[parts.index("--config") + 1])):
            raise UserError(missing)
        # `recipes/__init__.py` disables the garbage collector while a recipe's modules are imported. Their million
        # objects live as long as the process: unless they are frozen, each collection traverses all of them. At exit,
        # triton, which torch for CUDA imports, would print frozen types as leaks.
        gc.enable()
        if "triton" not in sys.modules:
            gc.freeze()
        output = Path(next((item.output_dir for item in arguments if hasattr(item, "output_dir")), ".")).absolute()
        new = [folder for folder in (output, *output.parents) if not folder.exists()]
        try:
            with stop_as_one():
                main(*arguments)
        except UserError:
            # A trainer's constructor may have created the directory of a refused run. It is removed if it is empty.
            for folder in new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
