"""What `accelerate launch` does on several processes, in forks of one process, which has imported the libraries.

`python -m tests.helpers.ranks` takes the arguments of `accelerate launch`; importing takes seconds a process.
`tests/runner/test_warm.py` holds that these forks get the environment of those processes.
"""

import os
import runpy
import signal
import sys

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env

from pipeline.errors import signal_with_parent


def main(argv: list[str]) -> int:
    """Run the module on each process. Return 0, or the code of the process that failed first."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(argv))
    # Port 0 lets the system choose a free one.
    args.main_process_port = 0
    several = prepare_multi_gpu_env(args) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.main_process_port)}
    several |= {name: str(args.num_processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    end_with_parent = signal_with_parent(signal.SIGKILL) if sys.platform == "linux" else None
    running = set()
    for rank in map(str, range(args.num_processes)):
        pid = os.fork()
        if pid == 0:
            if end_with_parent is not None:
                end_with_parent()
            os.environ.update(several | {"RANK": rank, "LOCAL_RANK": rank})
            sys.argv = [args.training_script, *args.training_script_args]
            runpy.run_module(args.training_script, run_name="__main__", alter_sys=True)
            return 0
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if code := os.waitstatus_to_exitcode(status):
            # The others would wait for it.
            for other in running:
                os.kill(other, signal.SIGKILL)
            return abs(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
