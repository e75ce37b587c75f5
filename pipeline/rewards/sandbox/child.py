"""The child process of the sandbox, which runs an answer's code in one process and its test in another.

In a single process, wrong code could always pass: it could end the process, patch `builtins`, walk the frames to the
variable that says "passed", or return an object that equals everything. Therefore this process, the examiner, keeps the
test and the only descriptor for the verdict, and forks a second one, the candidate, that sees only the code. A test
uses Python's own builtins and modules; anything else that it needs, it must define.

Arguments and results travel as plain values in JSON. Anything else (instances, generators, …) stays with the candidate,
behind a stand-in. A list, dict or set that the code changes in place changes in the test only if the call returns None,
or if the test compares with nothing but literals. So the code cannot edit what its result is compared with.

Only `run.py` starts it: `python child.py VERDICT_DESCRIPTOR SECONDS MEMORY_MB ALLOW_UNCONFINED < JSON`.
"""

# What runs where, and who can write what:
#
#     run.py, the parent                   waits, watches the clock and the directory, kills
#       ^ output   ^ verdict: TOKEN status
#       |          |
#     child.py, the examiner               confined; has the test, the token and the verdict's descriptor
#       |  ^                               stdin: {"code": …, "test": …, "token": …}, read after the fork
#       v  | two pipes (messages.py)       plain values; anything else is a stand-in (remote.py)
#     child.py, the candidate              confined; has the code
#
# The candidate can write lies into the pipe of messages, but the examiner treats them only as values that the code has
# returned, and it can spam the output, which is never read as a verdict. A verdict without the token is a crash.

import contextlib
import ctypes
import json
import os
import signal
import sys

# Everything not found on this path comes from the standard library.
sys.path.insert(0, os.path.abspath(os.path.join(__file__, *[os.pardir] * 4)))
from pipeline.rewards.sandbox import confinement
from pipeline.rewards.sandbox.candidate import Candidate
from pipeline.rewards.sandbox.examiner import Examiner
from pipeline.rewards.sandbox.messages import Gone, print_error

# From here on, the code chooses what is imported.
del sys.path[0]
sys.dont_write_bytecode = True

VERDICT = 3


def main(verdict: int, seconds: float, memory_mb: int, allow_unconfined: bool) -> None:
    """Confine both processes, run the code and the test, and write two lines: the candidate's id, and the verdict."""
    os.environ.clear()
    os.dup2(verdict, VERDICT)
    os.closerange(VERDICT + 1, 1 << 16)
    directory = os.getcwd()
    confinement.limit_resources(seconds, memory_mb)
    files_confined = confinement.confine_files(directory)
    confinement.drop_privileges(files_confined)
    # These are the descriptors 4 and 5, and 6 and 7.
    requests = os.pipe()
    replies = os.pipe()
    candidate = os.fork()
    if candidate == 0:
        # The candidate only keeps an empty standard input, its output and two pipes.
        os.dup2(os.pipe()[0], 0)
        os.dup2(requests[0], 3)
        os.dup2(replies[1], 4)
        os.closerange(5, 1 << 16)
        # The kernel kills the candidate when the examiner ends.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(confinement.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        confinement.confine_calls(files_confined)
        confinement.watch(directory)
        try:
            process = Candidate(3, 4)
            while True:
                process.answer(process.receive())
        finally:
            os._exit(1)
    os.close(requests[0])
    os.close(replies[1])

    # This ends both processes if the parent has died.
    signal.setitimer(signal.ITIMER_REAL, seconds + 90)
    is_confined = confinement.confine_calls(files_confined) and files_confined
    task = json.loads(sys.stdin.buffer.read())
    os.write(VERDICT, f"{task['token']} {candidate}\n".encode())
    examiner = Examiner(replies[0], requests[1])
    status = "unconfined"
    try:
        if is_confined or allow_unconfined:
            examiner.examine(task["code"], task["test"])
            status = "passed"
    except Gone:
        _, wait_status = os.waitpid(candidate, 0)
        # SIGKILL and SIGXCPU mean that it exceeded its CPU time.
        exceeded_time = os.waitstatus_to_exitcode(wait_status) in (-9, -24)
        status = "timeout" if exceeded_time else "crashed"
    # Whatever a test raises, it did not pass.
    except BaseException as error:  # noqa: BLE001
        status = examiner.status
        # Printing may fail because the output limit is reached.
        with contextlib.suppress(OSError):
            if not vars(error).get("__printed__"):
                print_error(error, frames=1)
    os.write(VERDICT, f"{task['token']} {status}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
