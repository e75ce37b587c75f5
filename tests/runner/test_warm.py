"""Steps that are forked from a warm process behave as new processes do; each test of `run` is made both ways."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.runner import processes
from pipeline.runner.processes import WarmProcess, run_command

ROOT = Path(__file__).parents[2]

Step = Callable[..., tuple[int, str]]


@pytest.fixture(params=["new process", "fork"])
def warm(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WarmProcess | None]:
    """A warm process that has imported nothing, which is quick, or None."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(processes, "PRELOADED", ())
    if request.param == "new process":
        yield None
        return
    if sys.platform != "linux":
        pytest.skip("forks are made on Linux only")
    with WarmProcess(os.environ) as process:
        yield process


@pytest.fixture
def step(warm: WarmProcess | None) -> Step:
    """Run the code as a module; returns its return code and what it wrote to stdout and stderr."""

    def step(code: str, *arguments: str, **variables: str) -> tuple[int, str]:
        Path("stand_in.py").write_text(code)
        with Path("log").open("w") as log:
            command = [sys.executable, "-m", "stand_in", *arguments]
            returned, received, _ = run_command(command, os.environ | variables, (), log.fileno(), warm)
        assert received is None
        return returned, Path("log").read_text()

    return step


def test_a_step_can_write_to_a_pipe(warm: WarmProcess | None) -> None:
    """`fourstage run --seeds 0 1 | tail`: the report over the seeds writes where the runner does."""
    Path("stand_in.py").write_text("import sys; sys.stdout.reconfigure(errors='replace'); print('done')")
    reader, writer = os.pipe()
    with open(reader) as printed:
        returned, _, _ = run_command([sys.executable, "-m", "stand_in"], os.environ, (), writer, warm)
        os.close(writer)
        assert (returned, printed.read()) == (0, "done\n")


def is_forked(process: psutil.Process) -> bool:
    return "pipeline.runner.processes" in process.cmdline()


@pytest.mark.parametrize(
    ("code", "returned", "last"),
    [
        ("print('done')", 0, "done"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('the message')", 1, "the message"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os; os._exit(4)", 4, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'at the end')", 0, "at the end"),
    ],
)
def test_a_step_ends_with_its_own_code_and_message(step: Step, code: str, returned: int, last: str) -> None:
    got, log = step(code)
    assert (got, log.strip().split("\n")[-1]) == (returned, last)


def test_a_step_waits_for_its_threads_and_writes_to_files_that_it_leaves_open(step: Step) -> None:
    code = """
import sys, threading, time
sys.left = open("left.txt", "w")
sys.left.write("to the end")
threading.Thread(target=lambda: (time.sleep(0.3), print("late"))).start()
"""
    assert step(code) == (0, "late\n")
    assert Path("left.txt").read_text() == "to the end"


def test_a_step_sees_what_a_new_process_would(step: Step) -> None:
    code = """
import gc, os, signal, sys, threading
assert __name__ == "__main__" and sys.modules["__main__"].__file__ == __file__
assert sys.argv == [__file__, "--a", "b c"] and sys.path[0] != os.getcwd()
assert os.environ["OWN"] == "\\u00e4\\n" and "GONE" not in os.environ and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
assert sys.stdin.read() == "" and os.getpgid(0) == os.getpid() and gc.isenabled()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert threading.active_count() == 1 and threading.current_thread() is threading.main_thread()
print("out"); print("err", file=sys.stderr); os.system("echo child")
"""
    os.environ["GONE"] = "1"
    del os.environ["GONE"]
    assert step(code, "--a", "b c", OWN="\u00e4\n") == (0, "out\nerr\nchild\n")


def test_steps_leave_each_other_alone(step: Step) -> None:
    leaves = "import os, sys, string; os.environ['LEFT'] = sys.left = string.left = '1'; os.chdir('/')"
    assert step(leaves) == (0, "")
    assert step("import os, sys, string; print(os.getcwd() == '/', 'LEFT' in os.environ, hasattr(sys, 'left'))") == (
        0,
        "False False False\n",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_step_holds_the_locks_of_its_runner_and_nothing_holds_them_after_it(warm: WarmProcess | None) -> None:
    import fcntl

    Path("stand_in.py").write_text("""
import os
assert os.path.abspath("lock") in [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
""")
    with Path("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_command([sys.executable, "-m", "stand_in"], os.environ, (lock.fileno(),), warm=warm)[:2] == (0, None)
    with Path("lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_peak_of_a_steps_memory_is_measured(warm: WarmProcess | None) -> None:
    Path("stand_in.py").write_text("""
import subprocess, sys
if len(sys.argv) > 1:
    large = bytes(10**6 * int(sys.argv[1]))
    large = b"x" * len(large)
    sys.exit(7)
sys.exit(subprocess.run([sys.executable, "stand_in.py", "400"]).returncode)
""")
    # The memory is that of a descendant, as that of a launched worker is.
    code, _, peak = run_command([sys.executable, "-m", "stand_in"], os.environ, (), warm=warm)
    # Linux counts what a new process had in common with its parent, here the tests, before it ran its program.
    tests = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if warm is None else 0
    assert code == 7 and 400e6 < peak < max(1000e6, 1.01 * tests)
    code, _, peak = run_command([sys.executable, "-m", "stand_in", "1"], os.environ, (), warm=warm)
    assert code == 7 and 1e6 < peak < max(400e6, 1.01 * tests)


RUNNER = """
import os, sys
from pipeline.runner import processes
from pipeline.runner.processes import run_command
processes.PRELOADED = ()
command = [sys.executable, "-m", "stand_in"]
if sys.argv[1] == "fork":
    with processes.WarmProcess(os.environ) as process:
        print(*run_command(command, os.environ, (), warm=process)[:2], flush=True)
        print(*run_command([sys.executable, "-m", "next"], os.environ, (), warm=process)[:2], flush=True)
else:
    print(*run_command(command, os.environ, ())[:2])
"""
SAVES = """
import os, signal, subprocess, sys, time
from pathlib import Path
def save(number, _):
    time.sleep(0.5)
    Path("saved").write_text(str(number))
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
sleep = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
Path("descendant").write_text(str(sleep.pid))
Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""
IGNORES = SAVES.replace("time.sleep(0.5)", "Path('signalled').touch(); time.sleep(60)")


def wait_for(name: str) -> int:
    deadline = time.monotonic() + 60
    while not Path(name).exists() or not Path(name).read_text():
        assert time.monotonic() < deadline, name
        time.sleep(0.02)
    return int(Path(name).read_text())


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(params=["new process", "fork"])
def runner(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a runner of the code, as a program of its own, and wait until the step runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    started = []

    def start(code: str) -> subprocess.Popen[str]:
        Path("stand_in.py").write_text(code)
        Path("next.py").write_text("print('the next step')")
        command = [sys.executable, "-c", RUNNER, request.param]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        assert is_forked(psutil.Process(wait_for("pid"))) == (request.param == "fork")
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for name in ("pid", "descendant"):
        if Path(name).exists() and psutil.pid_exists(pid := wait_for(name)):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_reaches_the_step_once_which_saves(
    runner: Callable[[str], subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = runner(SAVES)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert out.startswith(f"{128 + number} {number!r}") or out.startswith(f"{128 + number} {number.value}")
    assert wait_for("saved") == number


def test_the_second_signal_kills_the_step_and_its_descendants(runner: Callable[[str], subprocess.Popen[str]]) -> None:
    process = runner(IGNORES)
    process.send_signal(signal.SIGINT)
    while not Path("signalled").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out.startswith(f"{-signal.SIGKILL} ")
    wait_until_gone(wait_for("descendant"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a child that its parent has died")
def test_a_killed_runners_step_saves(runner: Callable[[str], subprocess.Popen[str]]) -> None:
    process = runner(SAVES)
    process.kill()
    assert wait_for("saved") == signal.SIGTERM
    wait_until_gone(wait_for("pid"))


@pytest.mark.parametrize("runner", ["fork"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_warm_process_is_replaced(
    runner: Callable[[str], subprocess.Popen[str]], number: signal.Signals
) -> None:
    """Its step saves, and counts as failed; the next step runs in a new process."""
    process = runner(SAVES)
    psutil.Process(wait_for("pid")).parent().send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert wait_for("saved") == signal.SIGTERM
    assert out.split("\n")[:3] == [f"{-signal.SIGTERM} None", "the next step", "0 None"]


COMPUTES = """
import multiprocessing, torch
from pipeline.rewards.grading import grade

if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.manual_seed(0)
    a = torch.randn(300, 300)
    print((a @ a).sum().item(), torch.nn.functional.scaled_dot_product_attention(*a.view(3, 4, 25, 300)).sum().item())
    loader = torch.utils.data.DataLoader(torch.arange(8.0), batch_size=4, num_workers=2)
    print([batch.tolist() for batch in loader])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(len, ["ab"]))
    row = {"test": "assert f(2) == 3"}
    print(grade(["def f(x): return x + 1", "def f(x): return x", "while True: pass"], [row] * 3))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks are made on Linux only")
def test_a_fork_computes_grades_code_and_starts_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stand_in.py").write_text(COMPUTES)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(processes, "PRELOADED", ("datasets", "torch:nn", "pipeline.rewards.grading"))
    command = [sys.executable, "-m", "stand_in"]
    with Path("new").open("w") as new:
        assert run_command(command, os.environ, (), new.fileno())[:2] == (0, None)
    with WarmProcess(os.environ) as warm:
        for name in ("fork", "second"):
            with Path(name).open("w") as log:
                assert run_command(command, os.environ, (), log.fileno(), warm)[:2] == (0, None)
    assert Path("new").read_text().endswith("[True, False, False]\n")
    assert Path("fork").read_text() == Path("second").read_text() == Path("new").read_text()


LAUNCHED = """
import os, psutil, sys
forked = "pipeline.runner.processes" in psutil.Process().cmdline()
names = [n for n in os.environ if n.startswith("ACCELERATE_")] + ["OMP_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE"]
# A single write: nothing of another process may come between.
sys.stdout.write(f"{forked} { {name: os.environ.get(name) for name in sorted(names)} }\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks are made on Linux only")
@pytest.mark.parametrize(
    ("options", "number"),
    [((), 1), (("--mixed_precision", "bf16"), 1), (("--num_processes", "2"), 2), (("--debug",), 1)],
)
def test_a_fork_gets_the_environment_of_a_launched_process_or_launches(
    options: tuple[str, ...], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stand_in.py").write_text(LAUNCHED)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(processes, "PRELOADED", ())
    launch = ["--config_file", str(ROOT / "accelerate_config.yaml"), *options, "-m", "stand_in"]
    launcher = "pipeline.runner.launcher"
    # Tests launch several processes as forks of a fork.
    ranks = {"ranks": "tests.helpers.ranks"} if number > 1 else {}
    found = {}
    with WarmProcess(os.environ) as process:
        for name, module in ({"new": launcher, "fork": launcher} | ranks).items():
            with Path(name).open("w") as log:
                command, warm = [sys.executable, "-m", module, *launch], None if name == "new" else process
                assert run_command(command, os.environ, (), log.fileno(), warm)[:2] == (0, None)
            lines = [line for line in Path(name).read_text().split("\n") if line.startswith(("True ", "False "))]
            found[name] = [line.partition(" ") for line in sorted(lines)]
            assert len(lines) == number, Path(name).read_text()
    for name, lines in found.items():
        forked = name == "ranks" or (name == "fork" and options not in (("--num_processes", "2"), ("--debug",)))
        assert lines == [(str(forked), " ", environment) for _, _, environment in found["new"]]


@pytest.mark.parametrize("preloaded", ["no_such_module", "starts_a_thread"])
def test_where_a_fork_is_not_possible_the_step_is_a_new_process(
    preloaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("starts_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()"
    )
    Path("stand_in.py").write_text(
        "import psutil, sys\nsys.exit('pipeline.runner.processes' in psutil.Process().cmdline())"
    )
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(processes, "PRELOADED", (preloaded,))
    with WarmProcess(os.environ) as warm:
        assert run_command([sys.executable, "-m", "stand_in"], os.environ, (), warm=warm)[:2] == (0, None)
