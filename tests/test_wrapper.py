"""`./fourstage` makes its environment once, notices what is missing, and passes its words on.

The wrapper is tried in a small copy of the checkout, with Pythons and a pip that are shell scripts and write down what
they are called with.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = "cat cksum chmod cp date dirname find flock grep ln ls mkdir printf readlink rm sed sh sleep tail touch tr"
SETTINGS = "[options]\ninstall_requires =\n    torch\n\n[tool:pytest]\ntestpaths = tests\n"
PYTHON = r"""#!/bin/sh
# A Python of version $VERSION, without `ensurepip` if $WITHOUT_VENV is set.
here=$(cd "$(dirname "$0")" && pwd)
if [ -n "$PYTHONHOME" ]; then
    echo "ModuleNotFoundError: No module named 'encodings'" >&2
    exit 1
fi
minor=${VERSION#3.}
case "$*" in
    *sys.exit*) [ "$minor" -ge 11 ] ;;
    *print*) echo "$VERSION" ;;
    *ensurepip*) [ -z "$WITHOUT_VENV" ] ;;
    "-m venv "*)
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        touch "$3/pyvenv.cfg"
        ;;
    *urlopen*) [ -n "$CPU_INDEX" ] ;;
    "-m pip "*)
        echo "$*" >>"$CALLS"
        # Half of an installation; the tests stop it here, or let it go on.
        touch "$here/../half"
        if [ -n "$SLEEP" ]; then sleep "$SLEEP"; fi
        if [ "$PIP_USER" = 1 ]; then
            PIP_SAYS="ERROR: Can not perform a '--user' install. User site-packages are not visible in this virtualenv."
        fi
        if [ -n "$PIP_SAYS" ]; then
            echo "$PIP_SAYS"
            exit 1
        fi
        printf '#!/bin/sh\necho "$PWD: $FOURSTAGE_COMMAND: $*"\nexit 7\n' >"$here/fourstage"
        chmod +x "$here/fourstage"
        ;;
    "-m pytest "*) echo "$PWD: $*" ;;
    *) exit 99 ;;
esac
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of the wrapper in a folder of its own, and a PATH in which the tests choose the Pythons."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.wrapper = write_script(self.root / "fourstage", (ROOT / "fourstage").read_text())
        (self.root / "setup.cfg").write_text(SETTINGS)
        # What is typed, if it is not the whole path.
        self.command = ""
        # The whole path as a shell reads it: it has a space.
        self.quoted = shlex.quote(str(self.wrapper))
        self.venv = self.root / ".venv"
        self.calls = folder / "calls"
        self.calls.touch()
        self.bin = folder / "bin"
        self.tools = folder / "tools"
        self.tools.mkdir()
        # The Pythons of this machine are not in PATH.
        for name in TOOLS.split():
            tool = shutil.which(name)
            assert tool, name
            (self.tools / name).symlink_to(tool)
        self.add_python("python3", "3.12")
        write_script(self.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.environment = {"PATH": f"{self.bin}:{self.tools}", "CALLS": str(self.calls), "HOME": str(folder)}

    def add_python(self, name: str, version: str, without_venv: bool = False, folder: str = "") -> Path:
        settings = f"VERSION={version} WITHOUT_VENV={'yes' * without_venv}\n"
        return write_script(self.bin / folder / name, PYTHON.replace("here=", settings + "here=", 1))

    def start(self, *words: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.command or self.wrapper, *words],
            cwd=cwd or self.root.parent,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell starts jobs in the background with Ctrl-C ignored, and the tests may run in one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def call(self, *words: str, cwd: Path | None = None, **environment: str) -> tuple[int, str, str]:
        """Return exit code, output and messages."""
        process = self.start(*words, cwd=cwd, **environment)
        output, messages = process.communicate(timeout=60)
        return process.returncode, output, messages

    def installed(self) -> list[str]:
        """Return what each call of pip was asked for."""
        return [line.rpartition("-e ")[2] for line in self.calls.read_text().splitlines()]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_first_call_installs_and_the_second_does_not(checkout: Checkout, tmp_path: Path) -> None:
    code, output, messages = checkout.call("run", "pocket", "--seed", "1 2")
    assert code == 7
    assert output == f"{tmp_path}: {checkout.wrapper}: run pocket --seed 1 2\n"
    assert messages.count("\n") == 3 and str(checkout.venv) in messages and "GB" in messages
    assert checkout.call("run", "pocket")[1:] == (f"{tmp_path}: {checkout.wrapper}: run pocket\n", "")
    assert checkout.installed() == ["."]


def test_the_two_commands_of_the_readme(checkout: Checkout) -> None:
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("```bash\n")[2].partition("```")[0]
    run, test = (shlex.split(line, comments=True) for line in block.splitlines())
    checkout.command = run[0]
    assert checkout.call(*run[1:], cwd=checkout.root)[:2] == (7, f"{checkout.root}: ./fourstage: run pocket\n")
    assert test[0] == run[0]
    assert checkout.call(*test[1:], cwd=checkout.root)[:2] == (0, f"{checkout.root}: -m pytest -m not slow\n")


def test_an_extra_is_installed_when_it_is_first_needed(checkout: Checkout) -> None:
    checkout.call("status")
    checkout.call("app", "runs/pocket")
    code, output, _ = checkout.call("test", "tests/test_cli.py", "-x")
    assert code == 0 and output == f"{checkout.root}: -m pytest -m not slow tests/test_cli.py -x\n"
    for words in (["test"], ["app", "runs/pocket"], ["status"]):
        assert checkout.call(*words)[2] == ""
    assert checkout.installed() == [".", ".[app]", ".[test]"]


def test_what_setup_cfg_requires_is_installed_again_with_its_extras(checkout: Checkout) -> None:
    checkout.call("test")
    settings = checkout.root / "setup.cfg"
    settings.write_text(SETTINGS.replace("testpaths = tests", "testpaths = others"))
    assert checkout.call("status")[2] == ""
    settings.write_text(SETTINGS.replace("torch", "torch>=3"))
    assert "installed" in checkout.call("status")[2]
    assert checkout.installed() == [".[test]", ".[test]"]


def test_an_update_that_fails_leaves_the_environment_and_is_tried_again(checkout: Checkout) -> None:
    checkout.call("app")
    (checkout.venv / "kept").touch()
    (checkout.root / "setup.cfg").write_text(SETTINGS.replace("torch", "torch>=3"))
    code, _, messages = checkout.call("test", PIP_SAYS="ERROR: No matching distribution found for torch>=3")
    assert code == 1
    assert "ERROR: No matching distribution found for torch>=3" in messages
    assert str(checkout.venv / "fourstage-install.log") in messages
    checkout.call("app")
    assert (checkout.venv / "kept").exists()
    assert checkout.installed() == [".[app]", ".[test]", ".[app]"]


@pytest.mark.parametrize("group", [False, True], ids=["the wrapper alone", "the wrapper and pip"])
def test_a_first_call_that_was_killed_is_made_again(checkout: Checkout, group: bool) -> None:
    process = checkout.start("run", "pocket", SLEEP="2")
    while not (checkout.venv / "half").exists():
        time.sleep(0.01)
    (checkout.venv / "left").touch()
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    began = time.monotonic()
    code, output, messages = checkout.call("run", "pocket")
    assert code == 7 and output.endswith("run pocket\n")
    # A pip that goes on by itself is waited for.
    assert ("waiting" in messages) is not group
    assert group or time.monotonic() - began > 0.5
    assert not (checkout.venv / "left").exists()
    assert checkout.call("run", "pocket")[2] == ""
    process.communicate()


def test_ctrl_c_stops_the_installation_and_says_how_to_resume(checkout: Checkout) -> None:
    process = checkout.start("run", "pocket", SLEEP="30")
    while not (checkout.venv / "half").exists():
        time.sleep(0.01)
    # The script that stands for pip has to begin to sleep.
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    messages = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert messages.splitlines()[-1] == f"fourstage: stopped; to install: {checkout.quoted} run pocket"
    assert checkout.call("status")[0] == 7


def test_two_first_calls_install_once(checkout: Checkout) -> None:
    processes = [checkout.start("status", SLEEP="0.5") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [7, 7]
    assert sorted("waiting for another call" in messages for _, messages in outputs) == [False, True]
    assert checkout.installed() == ["."]


def test_an_older_python_is_passed_over_for_a_newer_one(checkout: Checkout) -> None:
    for name in ("python3", "python"):
        checkout.add_python(name, "3.9")
    write_script(checkout.bin / "python3.13", "#!/bin/sh\necho 'pyenv: python3.13: command not found'\nexit 127\n")
    newer = checkout.add_python("python3.13", "3.13", folder="later")
    path = f"{checkout.bin}:{checkout.bin}/later:{checkout.environment['PATH']}"
    assert f"with Python 3.13 ({newer})" in checkout.call("status", PATH=path)[2]


@pytest.mark.parametrize(
    ("version", "without_venv", "expected"),
    [
        (
            "3.9",
            False,
            "Python 3.11 or newer is not in PATH, only {} (3.9): install it (www.python.org), then ",
        ),
        ("3.12", True, "Python 3.12 cannot make environments: sudo apt install python3.12-venv, then "),
    ],
)
def test_a_python_that_does_not_do_is_one_line(
    checkout: Checkout, version: str, without_venv: bool, expected: str
) -> None:
    python = checkout.add_python("python3", version, without_venv)
    code, output, messages = checkout.call("run", "pocket")
    assert (code, output) == (2, "")
    assert messages == f"fourstage: {expected.format(python)}{checkout.quoted} run pocket\n"


def test_an_environment_of_an_older_python_is_named_with_the_remedy(checkout: Checkout) -> None:
    """Editors make .venv with the Python that they find."""
    older = checkout.add_python("python3.9", "3.9")
    subprocess.run([older, "-m", "venv", checkout.venv], check=True)
    files = sorted(checkout.venv.rglob("*"))
    code, output, messages = checkout.call("run", "pocket")
    assert (code, output) == (2, "")
    assert messages == (
        f"fourstage: {checkout.venv}: is an environment of Python 3.9, and 3.11 or newer is needed: remove that folder"
        f", then {checkout.quoted} run pocket; or name another one: FOURSTAGE_VENV=DIR {checkout.quoted} run pocket\n"
    )
    assert sorted(checkout.venv.rglob("*")) == files and checkout.installed() == []


def test_a_suggested_command_can_be_pasted(checkout: Checkout, tmp_path: Path) -> None:
    """Its words are quoted, and it names the same environment."""
    checkout.add_python("python3", "3.9")
    words = ["run", "my recipe", "it's", "", "a;b", "--seed=1"]
    messages = checkout.call(*words, FOURSTAGE_VENV="its venv")[2]
    suggested = shlex.split(messages.rpartition(", then ")[2])
    assert suggested == ["FOURSTAGE_VENV=its venv", str(checkout.wrapper), *words]
    shell = ["sh", "-c", messages.rpartition(", then ")[2]]
    checkout.add_python("python3", "3.12")
    result = subprocess.run(shell, cwd=tmp_path, env=checkout.environment, capture_output=True, text=True)
    assert result.returncode == 7 and result.stdout.endswith(f": {' '.join(words)}\n")
    assert (tmp_path / "its venv" / "fourstage-made").exists()


def test_a_link_to_an_environment_that_is_gone_is_named(checkout: Checkout, tmp_path: Path) -> None:
    checkout.venv.symlink_to(tmp_path / "gone")
    code, output, messages = checkout.call("run", "pocket")
    assert (code, output) == (2, "")
    assert messages == (
        f"fourstage: {checkout.venv}: is a link to {tmp_path / 'gone'}, which does not exist: remove the link, or make "
        f"that folder, then {checkout.quoted} run pocket\n"
    )
    (tmp_path / "gone").mkdir()
    assert checkout.call("run", "pocket")[0] == 7


@pytest.mark.parametrize("variables", [{"PYTHONHOME": "/opt/another"}, {"PIP_USER": "1"}])
def test_variables_for_other_pythons_do_not_matter(checkout: Checkout, variables: dict[str, str]) -> None:
    for _ in range(2):
        code, output, messages = checkout.call("run", "pocket", **variables)
        assert code == 7 and output.endswith("run pocket\n"), messages


@pytest.mark.parametrize(
    ("pip_says", "code", "remedy"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 2, "make room"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No match", 2, "network"),
        ("ERROR: Package 'fourstage' requires a different Python: 3.9.2 not in '>=3.11'", 1, "a different Python"),
    ],
)
def test_why_pip_failed_is_one_line(checkout: Checkout, pip_says: str, code: int, remedy: str) -> None:
    result, output, messages = checkout.call("run", "pocket", PIP_SAYS=pip_says)
    assert (result, output) == (code, "")
    last = messages.splitlines()[-1]
    assert remedy in last and "fourstage-install.log" in last
    assert checkout.call("status")[0] == 7


@pytest.mark.parametrize(("gpu", "index"), [(True, True), (False, True), (False, False)])
def test_torch_is_that_for_cpus_if_there_is_no_gpu_and_its_index_answers(
    checkout: Checkout, gpu: bool, index: bool
) -> None:
    write_script(checkout.bin / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    checkout.call("status", CPU_INDEX="yes" if index else "")
    assert ("whl/cpu" in checkout.calls.read_text()) == (index and not gpu)


def test_a_checkout_of_another_user_needs_an_environment_elsewhere() -> None:
    """Its folder cannot be written to; FOURSTAGE_VENV names a folder of the user's own."""
    # Root may write everywhere, so that another user calls.
    user: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    if subprocess.run(["sh", "-c", ": >/dev/null"], **user).returncode:
        pytest.skip("nothing runs as another user here")
    # The folders of pytest can only be read by the user who runs the tests.
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        checkout = Checkout(folder)
        checkout.calls.chmod(0o666)
        mine = folder / "mine"
        mine.mkdir()
        mine.chmod(0o777)
        checkout.root.chmod(0o555)

        def call(**environment: str) -> subprocess.CompletedProcess[str]:
            environment = checkout.environment | environment
            command = [checkout.wrapper, "status"]
            return subprocess.run(command, cwd=mine, env=environment, capture_output=True, text=True, **user)

        result = call()
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert f"{checkout.venv}: Permission denied" in result.stderr and "FOURSTAGE_VENV=DIR" in result.stderr
        for _ in range(2):
            result = call(FOURSTAGE_VENV="../mine/venv")
            assert result.returncode == 7, result.stderr
        assert result.stderr == ""
        # setuptools writes next to setup.cfg, which is a link here.
        assert (mine / "venv/fourstage-source/setup.cfg").samefile(checkout.root / "setup.cfg")
        checkout.root.chmod(0o755)


def test_nothing_of_the_user_is_deleted(checkout: Checkout, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").touch()
    code, _, messages = checkout.call("status", FOURSTAGE_VENV=str(home))
    assert code == 2 and "name a folder that does not exist" in messages
    # An environment that the user made is used, also after a call that failed.
    subprocess.run([checkout.bin / "python3", "-m", "venv", checkout.venv], check=True)
    (checkout.venv / "package").touch()
    assert checkout.call("status", PIP_SAYS="ERROR: failed")[0] == 1
    assert checkout.call("status")[0] == 7
    assert (home / "letter.txt").exists() and (checkout.venv / "package").exists()


def test_links_to_the_wrapper_and_folders_that_move(checkout: Checkout, tmp_path: Path) -> None:
    checkout.call("status")
    link = tmp_path / "short"
    link.symlink_to(checkout.wrapper)
    checkout.wrapper = link
    assert checkout.call("status")[1:] == (f"{tmp_path}: {link}: status\n", "")
    moved = checkout.root.rename(tmp_path / "moved")
    checkout.wrapper = moved / "fourstage"
    assert checkout.call("status")[0] == 7
    assert len(checkout.installed()) == 2
