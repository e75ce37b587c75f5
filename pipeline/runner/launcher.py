"""Make `accelerate launch` end with the exit code of the launched program, and without a traceback of its own.

There are two ways in:

    a user types `accelerate launch -m recipes.sft ...`    torch calls `install_exit_hook`, because this project
                                                           registers it as an entry point of `torchrun.handlers`
    the runner starts `python -m` this module              `main` accepts the arguments of `accelerate launch`, checks
                                                           the launch file, and needs no installed project
"""

import argparse
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import safe_path
from pipeline.config.recipe_folder import LAUNCH_FILE, find_shipped
from pipeline.config.yaml_file import read_yaml
from pipeline.errors import EXIT_USER_ERROR, Problem

BEYOND_ONE_PROCESS = (
    "cpu", "debug", "enable_cpu_affinity", "log_dir", "mpirun_hostfile", "tpu", "use_cpu", "use_deepspeed", "use_fsdp",
    "use_megatron_lm", "use_parallelism_config",
)  # fmt: skip
"""Arguments of `accelerate launch` that do more than set environment variables of one process."""

OTHER_LAUNCHERS = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")
"""Arguments for which `accelerate launch` uses a launcher that starts workers, unless `cpu` is given. Otherwise, it
starts the program as one process with other environment variables."""

VALUES: Mapping[str, range | tuple[str, ...]] = {
    **dict.fromkeys(("num_machines", "machine_rank", "main_process_port"), range(1 << 16)),
    "num_processes": range(1, 1 << 16),
    "mixed_precision": ("no", "fp16", "bf16", "fp8"),
}
"""Allowed values of a launch file, by key. accelerate would accept others, and fail with a traceback later."""

PLUGIN_OPTIONS = {
    "deepspeed_config": ("deepspeed_", "zero", "offload_", "gradient_"),
    "megatron_lm_config": ("megatron_lm_",),
    "mpirun_config": ("mpirun_",),
    "parallelism_config": ("parallelism_config_",),
}
"""Prefixes of options that a mapping in a launch file may set. accelerate copies any key of these into its arguments,
even `main_process_ip`; to the keys of the others (`fsdp_config`), it adds the prefix itself."""

ON_THIS_MACHINE: dict[str, tuple[Any, ...]] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "num_machines": (None, 0, 1),
    "main_process_ip": (None, "", "localhost", "127.0.0.1", "::1"),
    "rdzv_backend": (None, "", "static"),
    "mpirun_config": (None, {}),
    "tpu_use_cluster": (None, False),
}
"""Allowed values in a launch file that the user has not named, such as that of a downloaded recipe folder. With other
values, launchers on several machines would meet at an address in the file, and start what they agree on."""


def exit_code(code: int) -> int:
    """Return the shell's exit code for a return code of `subprocess`: 128 + n if signal n ended the program."""
    if code < 0:
        return 128 - code
    return code


def find_launch_file(recipe: Path, config_file: str | None = None) -> str:
    """Return the path of the launch file of accelerate.

    It is `config_file` (`--config_file`), or else `accelerate_config.yaml` in the recipe folder, or else the one in the
    working folder, or the one that comes with the package.
    """
    if config_file is not None:
        path = Path(config_file)
    elif os.path.isfile(recipe / LAUNCH_FILE):
        path = recipe / LAUNCH_FILE
    else:
        path = Path(LAUNCH_FILE)
    return str(find_shipped(path))


def count_processes(num_processes: int | None, launch_file: str) -> int:
    """Return the number of processes of a training step.

    It is `num_processes` (`--num_processes`), or else the number in the launch file, or else one for each GPU.
    """
    from torch.cuda import device_count

    requested = num_processes or read_yaml(launch_file).get("num_processes")
    if isinstance(requested, int):
        return requested
    return max(1, device_count())


def shards_model(launch_file: str) -> bool:
    """Return whether a launch file splits the model over the processes, which PPO rejects."""
    return read_yaml(launch_file).get("distributed_type") in ("FSDP", "DEEPSPEED")


def machine_arguments(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the arguments by which `accelerate launch` joins the launchers on the other machines of a cluster.

    Args:
        environment: Its NUM_MACHINES is the number of machines; without it, there is one, and the result is [].
            MACHINE_RANK (or SLURM_NODEID) is the place of this machine among them, from 0. The launchers meet at
            MASTER_ADDR and MASTER_PORT.
    """
    number = environment.get("NUM_MACHINES", "1")
    if number == "1":
        return []
    rank = environment.get("MACHINE_RANK") or environment.get("SLURM_NODEID") or "0"
    return [
        *("--num_machines", number),
        *("--machine_rank", rank),
        *("--main_process_ip", environment.get("MASTER_ADDR", "")),
        *("--main_process_port", environment.get("MASTER_PORT", "29500")),
    ]


def check_launch_file(path: str, is_named: bool = True) -> Problem | None:
    """Check a launch file for what would give a traceback in `accelerate launch`, or is not allowed.

    Args:
        path: The launch file.
        is_named: Whether the user has named it. If not, somebody else may have written it, with the recipe that it
            belongs to, so it may not involve other machines.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config = load_config_from_file(path)
    except Exception as error:  # noqa: BLE001 - each kind of mistake raises a different error
        reason = " ".join(str(error).split())
        return Problem("--config_file", path, f"is not a launch file of accelerate ({reason}); correct it")
    remedy = ""
    for item in fields(config):
        remedy = remedy or _wrong_value(item.name, getattr(config, item.name), is_mapping="dict" in str(item.type))
    values = vars(config)
    if not remedy and (values.get("num_machines") or 1) > 1 and not values.get("main_process_ip"):
        remedy = "has several machines and no main_process_ip; add it"
    if not remedy and not is_named:
        elsewhere = [name for name, local_values in ON_THIS_MACHINE.items() if values.get(name) not in local_values]
        if elsewhere:
            remedy = f"asks for other machines ({', '.join(elsewhere)}); name it with --config_file if you want that"
    if not remedy:
        return None
    return Problem("--config_file", path, remedy)


def _wrong_value(name: str, value: Any, is_mapping: bool) -> str:
    """Return what is wrong with a value of a launch file and what to do, as a phrase, or "".

    Args:
        name: The key.
        value: The value, None if the file does not have the key.
        is_mapping: Whether the key needs a mapping, such as `fsdp_config`.
    """
    if is_mapping and not isinstance(value, dict | None):
        return f"{name} must be a mapping; correct it"
    if isinstance(value, dict):
        # The keys of a mapping become options, so they must be strings that begin as these options do.
        prefixes = PLUGIN_OPTIONS.get(name, ("",))
        unknown = [str(key) for key in value if not isinstance(key, str) or not key.startswith(prefixes)]
        if unknown:
            return f"{name} has no option {', '.join(unknown)}; remove it"
    choices = VALUES.get(name)
    if choices is None or value is None or value in choices:
        return ""
    if isinstance(choices, range):
        return f"{name} is {value}, but must be one of {choices[0]} to {choices[-1]}; correct it"
    return f"{name} is {value}, but must be one of {', '.join(choices)}; correct it"


def install_exit_hook() -> None:
    """Make this launcher end with the exit code of the program, if it launches a module of this project.

    torch calls this function in every launcher, of any project.
    """
    modules = [value for option, value in pairwise(sys.argv) if option in ("-m", "--module")]
    if modules and modules[0].split(".")[0] in ("pipeline", "recipes"):
        # The current folder may have its own `recipes.py`.
        for name, value in safe_path().items():
            os.environ.setdefault(name, value)
        _end_with_program()


def _end_with_program() -> None:
    """Make this process exit with the program's code, without messages of torch's agent.

    Also give the program time to save after a signal.
    """
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(lambda record: False)
    # Seconds in which processes may save after a signal; torch's default, 30, is short for large models.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        # Several processes may fail; the first one counts.
        if isinstance(error, ChildFailedError):
            sys.exit(exit_code(error.get_first_failure()[1].exitcode))
        if isinstance(error, subprocess.CalledProcessError):
            sys.exit(exit_code(error.returncode))
        # accelerate does this itself from 1.16 on.
        if isinstance(error, SignalException):
            sys.exit(128 + int(error.sigval))
        # An error of the launcher itself is printed as usual.
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = end


def main(argv: Sequence[str] | None = None, *, forked: bool = False) -> int:
    """Launch as `accelerate launch` does.

    There are three ways, from the fewest processes to the most:

        in a fork of the warm process, for one process        run the program's module in this process
        if accelerate would only set environment variables    replace this process by the program (exec)
        otherwise, such as for several processes              let accelerate start processes, and wait for them

    Args:
        argv: The arguments of `accelerate launch`, by default those of this process.
        forked: Whether this process was forked for the program, and has imported the libraries.

    Returns:
        0, or 2 for a broken launch file. If the program fails, an error that becomes its exit code is raised.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    words = list(sys.argv[1:] if argv is None else argv)
    # Options given by the user come last and take precedence.
    args = launch_command_parser().parse_args([*machine_arguments(), *words])
    if args.config_file:
        problem = check_launch_file(args.config_file)
        if problem is not None:
            print(problem, file=sys.stderr)
            return EXIT_USER_ERROR
    resolved, defaults, _ = _validate_launch_command(copy(args))
    if forked and _is_one_process(resolved):
        # A single process needs no launcher: this one becomes the program, in the environment of a launched one.
        if resolved.multi_gpu:
            environment = prepare_multi_gpu_env(resolved)
            environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        else:
            _, environment = prepare_simple_launcher_cmd_env(resolved)
        os.environ.update(environment)
        sys.argv = [args.training_script, *args.training_script_args]
        runpy.run_module(args.training_script, run_name="__main__", alter_sys=True)
        return 0
    is_local = defaults is None or defaults.compute_environment == "LOCAL_MACHINE"
    has_other_launcher = not resolved.cpu and any(getattr(resolved, name, None) for name in OTHER_LAUNCHERS)
    if is_local and not has_other_launcher:
        # From 1.16 on, accelerate would kill the program five seconds after a signal, while it saves.
        program, environment = prepare_simple_launcher_cmd_env(resolved)
        os.execvpe(program[0], program, environment)
    _end_with_program()
    launch_command(args)
    return 0


def _is_one_process(args: argparse.Namespace) -> bool:
    """Return whether arguments of `accelerate launch` only ask for one process that runs a module (`-m`)."""
    is_alone = args.num_processes == 1 and (args.num_machines or 1) == 1 and args.gpu_ids == "all"
    changes_more = args.mixed_precision == "fp8" or any(getattr(args, name, None) for name in BEYOND_ONE_PROCESS)
    return bool(args.module) and is_alone and not changes_more


if __name__ == "__main__":
    # Ctrl-C during imports ends this process without a traceback. torch handles it as soon as there are workers.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
