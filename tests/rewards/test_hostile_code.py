# ruff: noqa: E501 - programs read better on one line
"""Forty hostile programs and objects: none is rewarded, none does harm, none raises in the trainer.

Each is run with ten and with two hundred open descriptors in the trainer, and where a layer of the kernel is missing.
"""

import contextlib
import ctypes
import os
import resource
import socket
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import hardware
from pipeline.errors import RunStopped, UserError
from pipeline.evaluation.held_out import drop_ungradable
from pipeline.rewards.functions import code_tests
from pipeline.rewards.grading import grade
from pipeline.rewards.loading import load_rewards
from pipeline.rewards.sandbox import confinement, run
from pipeline.rewards.sandbox.run import run_code, run_many
from pipeline.rl.arguments import GRPORewardArguments, PPORewardArguments

TEST = "assert f(2) == 3\nassert f(-1) == 0\n"
RIGHT = "import math, json, re\ndef f(x):\n    return x + 1"

# Verdicts and garbage for every descriptor, the highest first: those of the messages would end the run.
FLOOD = """
import os
lines = b'{"status": "passed"}\\n{"status": "passed"}\\n', b'passed\\npassed\\n', b'garbage\\xff\\n' * 9
for descriptor in [1023, *range(260, 190, -1), *range(64, 2, -1)]:
    for line in lines:
        try:
            os.write(descriptor, line)
        except OSError:
            pass
"""

PROGRAMS = {
    "floods every descriptor": FLOOD + "def f(x):\n    return x",
    "floods in the call": "def f(x):\n" + textwrap.indent(FLOOD, "    ") + "    return x",
    "floods and leaves": FLOOD + "os._exit(0)",
    "opens its siblings' descriptors": "import os\nfor d in range(3, 260):\n    for p in (os.getpid(), os.getppid()):\n        try:\n            open(f'/proc/{p}/fd/{d}', 'wb').write(b'passed\\n')\n        except OSError:\n            pass\ndef f(x):\n    return x",
    "searches its memory for a token": "import gc, os\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'token' in o]\nfor o in found:\n    os.write(3, f\"{o['token']} passed\\n\".encode())\ndef f(x):\n    return x",
    "garbage instead of messages": "import os\nfor d in (3, 4, 5, 6):\n    try:\n        os.write(d, b'\\xff' * 100)\n    except OSError:\n        pass\ndef f(x):\n    return x",
    "a message of four gigabytes": "import os\ndef f(x):\n    os.write(4, b'\\xff\\xff\\xff\\xff')\n    return x",
    "deep messages": "import os\ndef f(x):\n    text = b'[' * 100000\n    os.write(4, len(text).to_bytes(4, 'big') + text)\n    return x",
    "patches builtins, codecs and modules": "import builtins, codecs, json, sys\nbuiltins.abs = builtins.len = lambda x: 3\ncodecs.lookup = None\njson.dumps = lambda *a, **k: '{\"value\": 3}'\nsys.modules.clear()\ndef f(x):\n    return x",
    "brings modules of its own": "for name in ('math', 'test', 'json'):\n    open(name + '.py', 'w').write('import os; os._exit(0)')\ndef f(x):\n    return x",
    "leaves in a callback's time": "import os, threading\nthreading.Timer(0.01, os._exit, [0]).start()\ndef f(x):\n    return x",
    "recurses": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x)",
    "recurses in its answer": "def f(x):\n    xs = []\n    xs.append(xs)\n    return xs",
    "takes all memory": "def f(x):\n    xs = []\n    while True:\n        xs.append(bytes(10**7))",
    "answers with too much": "def f(x):\n    return 'x' * (100 << 20)",
    "prints without end": "def f(x):\n    while True:\n        print('passed ' * 10000)",
    "blocks its output": "import os\nos.set_blocking(1, False)\nwhile True:\n    try:\n        os.write(1, b'x' * 65536)\n    except OSError:\n        break\ndef f(x):\n    return x",
    "kills its parent": "import os, signal\nfor s in (9, 15, 19):\n    for p in (os.getppid(), 0):\n        try:\n            os.kill(p, s)\n        except OSError:\n            pass\ndef f(x):\n    return x",
    "kills itself": "import os, signal\nsignal.raise_signal(signal.SIGSEGV)\ndef f(x):\n    return x",
    "ignores signals and sleeps": "import signal, time\nfor s in (2, 15, 14):\n    signal.signal(s, signal.SIG_IGN)\ntime.sleep(99)",
    "reads a file of the user's": "print(open(SECRET).read())",
    "writes a file of the user's": "open(SECRET, 'w').write('harm')",
    "truncates a file of the user's": "import os\nos.open(SECRET, os.O_TRUNC)",
    "truncates without an access mode": "import os\nos.open(SECRET, os.O_TRUNC | 3)",
    "truncates the standard library": "import os, this\nos.open(this.__file__, os.O_TRUNC)",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
    "many files": "for n in range(10**6):\n    open(str(n), 'w').write('x' * 1000)",
}  # fmt: skip


def yes(name: str, base: str = "", **methods: str) -> str:
    body = "".join(f"    def {method}(self, *args):\n        return {value}\n" for method, value in methods.items())
    return f"class {name}({base}):\n{body or '    pass'}\n"


MAGIC = {f"__{name}__": "True" for name in ("bool", "eq", "ne", "lt", "le", "gt", "ge", "contains")}
SUMS = [
    f"__{r}{name}__" for r in ("", "r") for name in ("add", "sub", "mul", "truediv", "mod", "pow", "and", "or", "xor")
]
KITCHEN = MAGIC | dict.fromkeys(SUMS, "self") | dict.fromkeys(("__abs__", "__neg__", "__round__"), "self")
ZERO = MAGIC | dict.fromkeys(SUMS, "0.0") | {"__abs__": "0.0", "__float__": "0.0", "__int__": "0", "__index__": "0"}
SELF_ZERO = KITCHEN | dict.fromkeys(("__abs__", "__len__", "__index__", "__int__"), "0") | {"__float__": "0.0"}
ANY = {"__getattr__": "lambda *a, **k: True", "__call__": "True", "__len__": "1"}

OBJECTS = {
    "says yes": yes("A", **KITCHEN) + "def f(x):\n    return A()",
    "is the function itself": yes("f", __init__="None", **KITCHEN),
    "differs by zero": yes("A", **ZERO) + "def f(x):\n    return A()",
    "becomes zero": yes("A", **SELF_ZERO) + "def f(x):\n    return A()",
    "has every attribute": yes("A", **KITCHEN, **ANY) + "def f(x):\n    return A()",
    "lies about its length": yes("A", **KITCHEN, __len__="1", __iter__="iter([self])") + "def f(x):\n    return A()",
    "iterates over nothing": yes("A", **KITCHEN, __len__="0", __iter__="iter([])") + "def f(x):\n    return A()",
    "an int": yes("A", "int", **KITCHEN) + "def f(x):\n    return A(-9)",
    "a str": yes("A", "str", **KITCHEN) + "def f(x):\n    return A('')",
    "a float": yes("A", "float", **KITCHEN) + "def f(x):\n    return A(-9)",
    "a list": yes("A", "list", **KITCHEN) + "def f(x):\n    return A()",
    "a dict": yes("A", "dict", **KITCHEN) + "def f(x):\n    return A()",
    "remembers its operand": "class A:\n    y = 0\n    def __sub__(self, y):\n        A.y = y\n        return self\n    __add__ = __rsub__ = __sub__\n    def __abs__(self):\n        return 0 * self.y\n    def __getattr__(self, name):\n        return 0.0\ndef f(x):\n    return A()",
    "a Decimal": "from decimal import Decimal\n" + yes("A", "Decimal", **MAGIC) + "def f(x):\n    return A(-9)",
    "a set": yes("A", "set", issubset="True", isdisjoint="True", **KITCHEN) + "def f(x):\n    return A()",
    "a tuple": yes("A", "tuple", isalpha="True", startswith="True", **KITCHEN) + "def f(x):\n    return A()",
    "a tuple of zeros": yes("A", "tuple", __getitem__="9", __len__="2", **KITCHEN) + "def f(x):\n    return A((0, 0))",
    "an int with items": yes("A", "int", __getitem__="9", __len__="2", __iter__="iter([9])", **KITCHEN) + "def f(x):\n    return A(-9)",
    "a mock": "from unittest.mock import MagicMock\ndef f(x):\n    return MagicMock()",
    "a class of mocks": "from unittest.mock import MagicMock as f",
    "complex NaN": "def f(x):\n    return complex('nan')",
    "a coroutine": "async def f(x):\n    return -9",
    "empties its argument": "def f(x):\n    if isinstance(x, list):\n        x.clear()\n        return x\n    return None",
    "a generator": "import itertools\ndef f(x):\n    yield -1",
    "a module": "import math\ndef f(x):\n    return math",
    "a class of exceptions": "def f(x):\n    return ValueError",
    "is an exception itself": "class f(Exception):\n    pass",
    "is an exception of Python's": "f = KeyError",
    "ends the loop of the test": "def f(x):\n    raise StopIteration",
    "NaN": "def f(x):\n    return float('nan')",
    "edits what it is compared with": "def f(x):\n    if isinstance(x, list):\n        x.clear()\n        return []\n    return None",
    "its own math": yes("M", isclose="True", fabs="0.0") + "math = M()\ndef f(x):\n    return -9.0",
    "copies itself to what is right": yes("A", **KITCHEN, __copy__="3", __deepcopy__="0", __hash__="3") + "def f(x):\n    return A()",
    "an int that copies itself": yes("A", "int", **KITCHEN, __copy__="3", __deepcopy__="0") + "def f(x):\n    return A(-9)",
    "a tuple that copies itself": yes("A", "tuple", __copy__="(4, 5)", __deepcopy__="(4, 5)") + "def f(x):\n    return A((0, 0))",
    "keys that say yes": yes("A", **KITCHEN, __hash__="4") + "def f(x):\n    return {A(): A()}",
    "a view of its own": yes("dict_keys", **KITCHEN, keys="self", __iter__="iter([self])", __len__="1") + "dict_keys.__module__ = 'builtins'\ndef f(x):\n    return dict_keys()",
    "drains what it is compared with": yes("A", **KITCHEN) + "def f(x):\n    if hasattr(x, '__next__'):\n        list(x)\n        return x\n    return A()",
    "swallows assertions": yes("A", **KITCHEN, __enter__="self", __exit__="True") + "def f(x):\n    return A()",
}  # fmt: skip

# Each of these is met by a right answer, and by none of the objects.
JUDGEMENTS = [
    "assert f(2) == 3",
    "assert abs(f(2) - 3) < 1e-6",
    "assert abs(3 - f(2)) < 1e-6",
    "assert abs((f(2) - 3) * 2) < 1e-6",
    "import math\nassert math.fabs(f(2) - 3) < 1e-6",
    "assert float(f(2) - 3) == 0 or int(f(2) - 3) == 0",
    "assert (f(2) - 3).real == 0",
    "if not (f(2) > 2 and f(2) < 4):\n    raise AssertionError",
    "assert not abs(f(2) - 3) > 1e-6",
    "assert f(9) > 8",
    "assert 8 < f(9)",
    "assert f(2)",
    "answer = f(2)\nassert answer and answer is not None",
    "assert not f(-1)",
    "assert all(map(lambda x: f(x) == x + 1, [1, 2, 3]))",
    "assert round(f(2) / 2, 1) == 1.5",
    "assert 3 in [f(2)] and f(2) in (3, 4)",
    "assert math.isclose(f(2), 3)",
    "with f(2) if not isinstance(f(2), int) else open('x', 'w') as r:\n    assert f(2) == 3",
    "assert f(2) - 3 in (0, 0.0)",
    "assert divmod(f(5), 5) == (1, 1)",
    "assert type(f(2)) is int",
    "assert type(f(2)) in (int, bool) or type(f(2)) == int",
    "assert [10, 11, 12, 13][f(2)] == 13",
    "import copy\nassert copy.copy(f(2)) == 3",
    "import copy\nassert abs(copy.deepcopy(f(2) - 3)) < 1e-6",
    "import copy\nassert copy.deepcopy([f(2) - 3]) == [0]",
    "import copy\nx = f(2)\nassert 2 < copy.copy(x) < 4 and x == 3",
]
LISTS = [
    "assert 5 in f([4, 5])",
    "assert len(set(f([4, 5])) & {4, 5}) == 2",
    "assert not set([4, 5]) - set(f([4, 5]))",
    "assert f([4, 5]) and f([4, 5])[1] > 4",
    "xs = [4, 5]\nassert f(xs) == sorted(xs)",
    "assert all(x > 3 for x in f([4, 5])) and sum(f([4, 5])) == 9",
]
VIEWS = [
    "assert f({4: 5}).keys() == {4}",
    "assert 4 in f({4: 5}).keys() and len(f({4: 5}).keys() & {4}) == 1",
    "assert f({4: 5}).items() == {(4, 5)} and 5 in f({4: 5}).values()",
    "assert {4} == set(f({4: 5})) == f({4: 5}).keys()",
]
ITERATORS = [
    "assert list(f(iter([4, 5]))) == [4, 5]",
    "import copy\nassert copy.deepcopy(f(x for x in [4, 5])) == [4, 5]",
]
TRUTHS = {"assert f(2)", "assert not f(-1)", JUDGEMENTS[12]}
PLAIN = {
    "an int", "a str", "a float", "a list", "a dict", "NaN", "edits what it is compared with", "its own math",
    "a Decimal", "a set", "a tuple", "a tuple of zeros", "an int with items", "empties its argument",
    "an int that copies itself", "a tuple that copies itself", "keys that say yes",
}  # fmt: skip
"""Objects that arrive as plain values, whose truth is their own."""
TEXTS = ["assert f('a').startswith('a')", "assert f('a').isalpha()", "assert 'a' in f('a')"]
CASES = [
    *((test, "import math\ndef f(x):\n    return x + 1") for test in JUDGEMENTS),
    *((test, "def f(x):\n    return sorted(x)") for test in LISTS),
    *((test, "def f(x):\n    return x") for test in TEXTS),
    *((test, "def f(x):\n    return dict(x)") for test in VIEWS),
    *((test, "def f(x):\n    return list(x)") for test in ITERATORS),
]


@pytest.fixture
def hostile_place(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A secret file of the user's and a server, which no program may reach."""
    secret = tmp_path / "token"
    secret.write_text("hf_secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        yield {"SECRET": repr(str(secret)), "PORT": str(server.getsockname()[1])}
        with pytest.raises(TimeoutError):
            server.accept()
    assert secret.read_text() == "hf_secret"


def attack(programs: dict[str, str], place: dict[str, str]) -> dict[str, run.Outcome]:
    for word, value in place.items():
        programs = {name: code.replace(word, value) for name, code in programs.items()}
    outcomes = run_many([(code, TEST) for code in programs.values()], seconds=0.5, memory_mb=128)
    return dict(zip(programs, outcomes, strict=True))


@pytest.mark.parametrize("descriptors", [10, 200])
def test_no_hostile_program_passes_or_harms(descriptors: int, hostile_place: dict[str, str]) -> None:
    with contextlib.ExitStack() as opened:
        for _ in range(descriptors):
            opened.enter_context(open(os.devnull))
        outcomes = attack(PROGRAMS, hostile_place)
    assert not [name for name, outcome in outcomes.items() if outcome.passed]
    assert not [name for name, outcome in outcomes.items() if "hf_secret" in outcome.output]
    assert run_code(RIGHT, TEST).passed


def test_right_answers_meet_every_judgement() -> None:
    outcomes = run_many([(right, test) for test, right in CASES])
    assert not [
        (test, outcome.output) for (test, _), outcome in zip(CASES, outcomes, strict=True) if not outcome.passed
    ]


@pytest.mark.parametrize("name", OBJECTS)
def test_no_object_says_yes(name: str) -> None:
    # All judgements of one program in one run: each is tried, and none may hold.
    tried = "".join(
        f"try:\n{textwrap.indent(test, '    ')}\n    passed.append({test!r})\nexcept Exception:\n    pass\n"
        for test, _ in CASES
        if not (name in PLAIN and test in TRUTHS)
    )
    outcome = run_code(OBJECTS[name], f"passed = []\n{tried}print(passed)\nassert not passed", seconds=5)
    assert outcome.passed, outcome.output


@pytest.mark.parametrize("base", ["int", "list"])
def test_an_object_has_one_plain_value(base: str) -> None:
    code = f"""
import sys
values = iter([10**9, -10**9] * 9)
sys.modules["pipeline.rewards.sandbox.messages"].BASES[{base}] = lambda value: next(values)
class A({base}):
    pass
def f(x):
    return A()
"""
    assert not run_code(code, "x = f(2)\nassert 2 < x < 4").passed


def test_objects_of_honest_classes_do_what_their_class_is_for() -> None:
    code = textwrap.dedent("""
        import functools
        @functools.total_ordering
        class Vector:
            def __init__(self, x, y):
                self.x, self.y = x, y
            def __add__(self, o):
                return Vector(self.x + o.x, self.y + o.y)
            def __mul__(self, k):
                return self.x * k.x + self.y * k.y if isinstance(k, Vector) else Vector(self.x * k, self.y * k)
            __rmul__ = __mul__
            def __eq__(self, o):
                return (self.x, self.y) == (o.x, o.y)
            def __lt__(self, o):
                return (self.x, self.y) < (o.x, o.y)
            def __iter__(self):
                yield from (self.x, self.y)
            def __abs__(self):
                return (self.x ** 2 + self.y ** 2) ** 0.5
            def __repr__(self):
                return f"Vector({self.x}, {self.y})"
        class Account:
            class Empty(Exception):
                pass
            def __init__(self):
                self.total = 0
            def pay(self, n):
                if self.total + n < 0:
                    raise Account.Empty("no")
                self.total += n
                return self.total > 0
        """)
    test = textwrap.dedent("""
        v, w = Vector(1, 2), Vector(3, 4)
        assert v + w == Vector(4, 6) and v * w == 11 and v * 2 == 2 * v == Vector(2, 4) and (v * 3).x == 3
        assert str(v * 2) == "Vector(2, 4)" and abs(w) == 5 and list(v) == [1, 2] and 4 in w and 5 not in w
        assert v < w and sorted([w, v]) == [v, w] and max(v, w) == w and v in [v, w] and abs(abs(v) - 2.236) < 1e-3
        a = Account()
        assert a.pay(5) and a.total == 5 and not a.pay(-5)
        try:
            a.pay(-1)
        except Account.Empty:
            pass
        else:
            assert False
        """)
    outcome = run_code(code, test)
    assert outcome.passed, outcome.output


# The child with some layers of the kernel taken away.
CHILD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("child", {child!r})
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
confinement = child.confinement
{missing}
child.main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
"""
NO_FILES = "confinement.confine_files = lambda directory: False"
NO_CALLS = "confinement.confine_calls = lambda files_confined: False"
STAY_ROOT = "confinement.os.setuid = confinement.os.setgid = lambda number: None"
LAYERS = {
    "no Landlock": (NO_FILES, "read files"),
    "no seccomp": (NO_CALLS, "use the network"),
    "neither": (f"{NO_FILES}\n{NO_CALLS}", "read files"),
}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    def take_away(missing: str) -> None:
        child = tmp_path / "child.py"
        child.write_text(CHILD.format(child=str(run.CHILD), missing=missing))
        monkeypatch.setattr(run, "CHILD", child)
        monkeypatch.setattr(run, "allow_unconfined", False)
        run._probe.cache_clear()

    yield take_away
    run._probe.cache_clear()


@pytest.mark.parametrize("layer", LAYERS)
def test_where_a_layer_is_missing_code_runs_only_if_the_user_allows_it(
    layer: str, without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, hostile_place: dict[str, str]
) -> None:
    missing, promise = LAYERS[layer]
    without(f"{missing}\n{STAY_ROOT}")
    harm = "open('ran', 'w').write(str(import_))"
    with pytest.raises(UserError, match=promise) as refused:
        load_rewards(["code_tests"])
    assert str(refused.value).startswith("reward_funcs: code_tests: ") and len(str(refused.value).splitlines()) == 1
    with pytest.raises(RunStopped, match=promise):
        code_tests([RIGHT], [TEST])
    with pytest.raises(RunStopped, match=promise):
        grade([harm], [{"test": TEST}])
    rows = [{"test": TEST, "id": 0}, {"test": "", "id": 1}, {"id": 2}]
    assert drop_ungradable(rows) == rows[1:]
    assert run._run(RIGHT, TEST, 2, 256, unconfined=False).status == "unconfined"

    run.allow_unconfined = True
    load_rewards(["code_tests"])
    assert drop_ungradable(rows) == rows
    assert code_tests([RIGHT, "def f(x):\n    return x"], [TEST] * 2) == [1.0, 0.0]
    # What needs no kernel to refuse: forgeries. What the kernel would refuse, the audit hook still does.
    outcomes = attack(PROGRAMS, hostile_place)
    assert not [name for name, outcome in outcomes.items() if outcome.passed or "hf_secret" in outcome.output]


@pytest.mark.parametrize("arguments", [GRPORewardArguments, PPORewardArguments])
def test_a_field_of_the_rewards_allows_it(arguments: type, without: Callable[[str], None]) -> None:
    without(f"{NO_CALLS}\n{STAY_ROOT}")
    (problem,) = arguments(reward_funcs=["code_tests"]).preflight(None, None, None)
    assert str(problem).startswith("reward_funcs: code_tests: code could use the network")
    assert not arguments(reward_funcs=["code_tests"], allow_unconfined_code=True).preflight(None, None, None)


def test_python_that_the_code_cannot_read_is_found_before_training(without: Callable[[str], None]) -> None:
    unreadable = "confinement.drop_privileges = lambda files: sys.path.clear()"
    without(unreadable)
    run.allow_unconfined = True
    with pytest.raises(UserError, match=r"right code fails here .*ModuleNotFoundError") as refused:
        load_rewards(["code_tests"])
    assert sys.base_prefix in str(refused.value)


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")
@pytest.mark.parametrize("abi", [1, 2, 3])
def test_older_versions_of_landlock_confine_files_too(
    abi: int, without: Callable[[str], None], hostile_place: dict[str, str]
) -> None:
    without(f"confinement.landlock_abi = lambda libc: {abi}\nconfinement.watch = lambda directory: None")
    if run.validate_sandbox():
        pytest.skip("this kernel has no Landlock or no seccomp")
    stays = Path(textwrap.__file__).stat().st_size
    programs = {name: code for name, code in PROGRAMS.items() if any(word in name for word in ("file", "truncates"))}
    programs["keeps files"] = "open('a', 'w').write('x')\nopen('a', 'w').write('y')\nassert open('a').read() == 'y'"
    programs["truncates a module"] = f"import os\nos.open({textwrap.__file__!r}, os.O_TRUNC)"
    programs["truncates it without a mode"] = f"import os\nos.open({textwrap.__file__!r}, os.O_TRUNC | 3)"
    outcomes = attack(programs, hostile_place)
    assert Path(textwrap.__file__).stat().st_size == stays
    assert not [name for name, outcome in outcomes.items() if outcome.passed or "hf_secret" in outcome.output]
    assert "NameError" not in outcomes["keeps files"].output or "f" in outcomes["keeps files"].output


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Landlock is Linux's")
def test_landlock_keeps_signals_inside_where_seccomp_is_missing(without: Callable[[str], None]) -> None:
    if confinement.landlock_abi(ctypes.CDLL(None, use_errno=True)) < 6:
        pytest.skip("this kernel's Landlock does not know signals")
    without(NO_CALLS)
    run.allow_unconfined = True
    attempt = f"import os, signal\nsignal.pidfd_send_signal(os.pidfd_open({os.getpid()}), 0)\n"
    assert [run_code(code + RIGHT, TEST).status for code in ("", attempt)] == ["passed", "refused"]


def test_rewards_do_not_depend_on_the_load_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen answers that compute for a while, all at once."""
    slow = "import time\ndef f(x):\n    began = time.process_time()\n    while time.process_time() - began < 0.15:\n        pass\n    return x + 1"
    monkeypatch.setattr(hardware, "cores", lambda: 16)
    outcomes = run_many([(slow, TEST)] * 16, seconds=1.0)
    assert {outcome.status for outcome in outcomes} == {"passed"}


def test_where_the_machine_is_too_busy_to_tell_there_is_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_tests([RIGHT], [TEST]) == [1.0]
    monkeypatch.setattr(run, "PATIENCE_SECONDS", -2.0)
    assert code_tests([RIGHT, "no code"], [TEST] * 2) == [None, 0.0]
    with pytest.raises(RunStopped, match="too busy"):
        grade([RIGHT], [{"test": TEST}])
    monkeypatch.setattr(run, "_probe", run._probe.__wrapped__)
    assert "the machine is too busy" in str(run.validate_sandbox())


def test_a_trainer_without_descriptors_gets_no_reward_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Removing a directory takes a descriptor, too.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert code_tests([RIGHT], [TEST]) == [1.0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    rewards = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    opened: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(20):
            rewards += code_tests([RIGHT], [TEST])
            os.close(opened.pop())
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert rewards[0] is None and rewards[-1] == 1.0 and 0.0 not in rewards


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    pool = run.ThreadPoolExecutor
    monkeypatch.setattr(run, "ThreadPoolExecutor", lambda workers: seen.append(workers) or pool(workers))
    monkeypatch.setattr(hardware, "cores", lambda: 16)
    for ranks in ("1", "8", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        run_many([(RIGHT, TEST)] * 3)
    assert seen == [3, 2, 1]
