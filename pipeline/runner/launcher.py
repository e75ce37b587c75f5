"""`accelerate launch`, ending as the launched program ended: with its exit code, and no further traceback.

    python -m pipeline.runner.launcher --config_file accelerate_config.yaml -m recipes.sft --config FILE

takes the arguments of `accelerate launch` and does the same. `accelerate launch` itself turns every exit code
into 1 and prints a traceback of its own below the program's message.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from pipeline.errors import EXIT_USER_ERROR, Problem

# How long the processes may take to save when a signal ends them; read by torch's agent.
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SAVE_SECONDS = 600


def exit_code(code: int) -> int:
    """The shell's exit code for a return code of `subprocess`: 128 + n for a program that signal n ended."""
    return 128 - code if code < 0 else code


def check_launch_file(path: str) -> Problem | None:
    """What is wrong with a launch file, of which `accelerate launch` tells by a traceback."""
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(path)
    except Exception as error:  # noqa: BLE001 - each kind of mistake raises another one
        reason = " ".join(str(error).split())
        return Problem("--config_file", path, f"is no launch file of accelerate ({reason}); correct it")
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Launch as `accelerate launch` does.

    Args:
        argv: arguments of `accelerate launch`; by default those of this process.

    Returns:
        The exit code of the process that failed first; 0 if all ended well; 128 + n if signal n ended them.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(argv)
    if args.config_file and (problem := check_launch_file(args.config_file)):
        print(problem, file=sys.stderr)
        return EXIT_USER_ERROR
    # torch's agent reports what the program itself has already said
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    # after the 30 s that are usual, a large model is still being saved
    os.environ.setdefault(SHUTDOWN_TIMEOUT, str(SAVE_SECONDS))
    try:
        launch_command(args)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return exit_code(failure.exitcode)
    except subprocess.CalledProcessError as error:
        return exit_code(error.returncode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
