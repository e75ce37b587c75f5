# ruff: noqa: E501 - programs read better on one line
"""Code from outside: right code passes, wrong code fails, hostile code neither passes nor hurts."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.rewards.sandbox import confinement, run
from pipeline.rewards.sandbox.run import OUTPUT_BYTES, run_code, run_many

TEST = "assert f(2) == 3\nassert f(-1) == 0\n"

RIGHT = [
    ("def f(x):\n    return x + 1", TEST),
    ("import math\ndef f(x):\n    return math.floor(x) + 1", TEST + "assert math.pi > 3"),
    ("def f(x):\n    print('working')\n    return x + 1", TEST),
    ("def f(*parts, end='.'):\n    return ' '.join(parts) + end", "assert f('a', 'b', end='!') == 'a b!'"),
    ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)", "import math\nassert f(500) == math.factorial(500)"),
    ("def f(x):\n    return {'a': [1, (2, {3})], b'k': None}", "assert f(0) == {'a': [1, (2, {3})], b'k': None}"),
    ("def f(xs):\n    xs.sort()", "xs = [3, 1, 2]\nassert f(xs) is None and xs == [1, 2, 3]"),
    ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2] and sum(f(4)) == 6"),
    ("def f(xs, key):\n    return sorted(xs, key=key)", "assert f([1, -2], lambda x: x) == [-2, 1]"),
    ("def f(x):\n    raise ValueError('no')", "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert 'no' in str(e)"),
    (
        "class Bad(Exception):\n    pass\ndef f():\n    raise Bad('x')",
        "try:\n    f()\nexcept Bad:\n    pass\nelse:\n    assert False",
    ),
    (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n        self.items.append(x)\n"
        "    def __len__(self):\n        return len(self.items)\n    def __getitem__(self, i):\n        return self.items[i]",
        "s = Stack()\ns.push(4)\ns.push(5)\nassert len(s) == 2 and s[0] == 4 and s.items == [4, 5] and s",
    ),
    (
        "class P:\n    def __init__(self, x):\n        self.x = x\n    def __eq__(self, o):\n        return self.x == o.x",
        "assert P(1) == P(1) and P(1) != P(2)",
    ),
    ("from collections import Counter\ndef f(s):\n    return Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
    ("def f(name):\n    open('x.txt', 'w').write(name)\n    return open('x.txt').read()", "assert f('hi') == 'hi'"),
    ("def check(c):\n    pass\ndef f(x):\n    return x", "def check(c):\n    assert c(1) == 1\ncheck(f)"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "test"), RIGHT)
def test_right_code_passes(code: str, test: str) -> None:
    outcome = run_code(code, test)
    assert outcome.passed and outcome.status == "passed", outcome.output


# Code as people write it, its test, and a mistake: what to replace in the code, and by what.
ORDINARY = {
    "money": ("from decimal import Decimal\ndef f(x):\n    return Decimal(x) / 4", "from decimal import Decimal\nassert f('1.5') == Decimal('0.375') and isinstance(f('1'), Decimal)", "/ 4", "/ 2"),
    "fractions": ("from fractions import Fraction\ndef f(n):\n    return sum(Fraction(1, k) for k in range(1, n + 1))", "from fractions import Fraction\nassert f(3) == Fraction(11, 6)", "n + 1", "n"),
    "dates": ("from datetime import date, timedelta\ndef f(d):\n    return d + timedelta(days=1)", "from datetime import date, timedelta\nassert f(date(2024, 2, 28)) == date(2024, 2, 29)", "days=1", "days=2"),
    "deque and range": ("from collections import deque\ndef f(xs, k):\n    d = deque(xs)\n    d.rotate(k)\n    return d", "from collections import deque\nassert f(range(3), 1) == deque([2, 0, 1]) and f(deque('ab'), 0)[1] == 'b'", "rotate(k)", "rotate(-k)"),
    "counter": ("from collections import Counter\nf = lambda s: Counter(s)", "assert f('aab').most_common(1) == [('a', 2)] and f('')['z'] == 0", "Counter(s)", "dict(Counter(s))"),
    "class of a value": ("def f(x):\n    return type(x)", "assert f(1) is int and f('') == str", "type(x)", "type(x).__name__"),
    "forward reference": ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Node:\n    v: int\n    next: Node | None = None\ndef f(xs):\n    head = None\n    for x in reversed(xs):\n        head = Node(x, head)\n    return head", "node, seen = f([1, 2, 3]), []\nwhile node:\n    seen.append(node.v)\n    node = node.next\nassert seen == [1, 2, 3] and f([1]) == Node(1)", "reversed(xs)", "xs"),
    "tree": ("class Tree:\n    def __init__(self):\n        self.keys = set()\n    def add(self, k):\n        self.keys.add(k)\n    def __contains__(self, k):\n        return k in self.keys\n    def find(self, k):\n        return self if k in self.keys else None\n    def startswith(self, k):\n        return any(key.startswith(k) for key in self.keys)", "t = Tree()\nt.add('ab')\nassert 'ab' in t and 'b' not in t and t.find('ab') and not t.find('b') and t.startswith('a')", "return k in self.keys", "return True"),
    "functions of the test": ("def f(g, xs):\n    return [g(x) for x in xs]", "assert f(str, [1]) == ['1'] and f(len, ['ab']) == [2] and f(lambda x: -x, (y for y in [1])) == [-1]", "g(x)", "x"),
    "a callback that raises": ("def f(g):\n    for _ in range(3):\n        try:\n            return g()\n        except ValueError:\n            pass", "calls = []\ndef g():\n    calls.append(1)\n    if len(calls) < 3:\n        raise ValueError\n    return 'ok'\nassert f(g) == 'ok'", "range(3)", "range(2)"),
    "an object of the test": ("def f(node):\n    last = None\n    while node:\n        node.next, last, node = last, node, node.next\n    return last", "class Node:\n    def __init__(self, v, next=None):\n        self.v, self.next = v, next\nn, seen = f(Node(1, Node(2))), []\nwhile n:\n    seen.append(n.v)\n    n = n.next\nassert seen == [2, 1]", "return last", "return node"),
    "inheritance": ("class Animal:\n    pass\nclass Dog(Animal):\n    pass\ndef f():\n    return Dog()", "assert isinstance(f(), Animal) and type(f()) is Dog and issubclass(Dog, Animal) and not isinstance(1, Dog)", "Dog(Animal)", "Dog"),
    "enum": ("from enum import Enum, IntEnum\nclass Color(Enum):\n    RED = 1\n    BLUE = 2\nclass Level(IntEnum):\n    HIGH = 3\ndef f(x):\n    return Color(x)", "assert f(1) is Color.RED and f(2) == Color['BLUE'] and [c.name for c in Color] == ['RED', 'BLUE'] and Level.HIGH == 3 and Level.HIGH.name == 'HIGH'", "Color(x)", "x"),
    "named tuple": ("from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n    y: int\n    def __add__(self, o):\n        return P(self.x + o.x, self.y + o.y)", "x, y = P(1, 2) + P(3, 4)\nassert (x, y) == (4, 6) and P(1, 2).y == 2 and P(1, 2) == (1, 2)", "self.y + o.y", "self.y"),
    "a class of lists": ("class Stack(list):\n    def push(self, x):\n        self.append(x)", "s = Stack()\ns.push(1)\ns.push(2)\nassert s == [1, 2] and s and len(s) == 2 and 2 in s and s.pop() == 2", "append(x)", "insert(0, x)"),
    "decorator": ("import functools\ndef twice(g):\n    @functools.wraps(g)\n    def inner(*a):\n        return g(g(*a))\n    return inner\n@twice\ndef f(x):\n    'Add two.'\n    return x + 1", "assert f.__name__ == 'f' and f.__doc__ == 'Add two.' and f(1) == 3", "@functools.wraps(g)", ""),
    "exceptions": ("import json\nclass Bad(Exception):\n    def __init__(self, key):\n        self.key = key\ndef f(text):\n    return json.loads(text)\ndef g(d, k):\n    if not d:\n        raise Bad(k)\n    return d[k]", "import json\ntry:\n    f('{')\nexcept json.JSONDecodeError as e:\n    assert e.pos == 1\ntry:\n    g({1: 2}, 'k')\nexcept KeyError as e:\n    assert e.args == ('k',)\ntry:\n    g({}, 7)\n    assert False\nexcept Bad as e:\n    assert e.key == 7", "self.key = key", "self.key = None"),
    "views": ("class Box:\n    def __init__(self):\n        self.held = {'a': 1}\n    def keys(self):\n        return self.held.keys()\n    def values(self):\n        return self.held.values()\n    def items(self):\n        return self.held.items()\ndef f(keys):\n    return keys & {4, 5}\ndef g(x):\n    return {x: 1}.keys()", "box = Box()\nassert box.keys() == {'a'} and box.keys() & {'a', 'b'} == {'a'} and g(2) == {2} and g(2) != [2]\nassert list(box.values()) == [1] and box.items() == {('a', 1)} and f({4: 5}.keys()) == {4}", "'a': 1", "'b': 1"),
    "iterators of the test": ("def f(xs):\n    total = 0\n    for x in xs:\n        total += x\n        if total > 5:\n            break\n    return total\ndef g(xs):\n    return xs", "import itertools\nassert f(iter([1, 2])) == 3 and f(x * x for x in [1, 2]) == 5 and f(itertools.count()) == 6\nit = iter([1, 5, 7])\nassert f(it) == 6 and g(it) is it and next(it) == 7 and f(it) == 0 and f(map(f, [[1], [2]])) == 3", "> 5", "> 6"),
    "copies": ("class Node:\n    def __init__(self, v):\n        self.v = v\nclass Stack(list):\n    def push(self, x):\n        self.append(x)\nlog = [[1]]\ndef f(v):\n    log.append(v)\n    return Node(v)", "import copy\na, before = f([1]), copy.deepcopy(log)\nb, c, d = copy.deepcopy(a), copy.copy(a), copy.deepcopy([a])\nb.v = [2]\nassert a.v == [1] and b.v == [2] and c.v == [1] and d[0].v == [1] and b is not a and isinstance(b, Node)\nf(3)\nassert before == [[1], [1]] and log == [[1], [1], 3]\ns = Stack()\ns.push(1)\nt = copy.copy(s)\nt.push(2)\nassert s == [1] and t == [1, 2]", "self.v = v", "self.v = 0"),
    "changed in place": ("def f(xs):\n    xs[:] = sorted(set(xs))\n    return len(xs)", "xs = [2, 1, 2]\nk = f(xs)\nassert k == 2 and xs[:k] == [1, 2]", "sorted(set(xs))", "sorted(xs)"),
    "changed by a method": ("class Solution:\n    def remove(self, xs, x):\n        while x in xs:\n            xs.remove(x)\n        return len(xs)", "xs = [3, -1, 3]\nassert Solution().remove(xs, 3) == 1\nassert xs == [-1]", "while x in xs", "for _ in xs[:1]"),
    "changed global": ("log = []\ndef f(x):\n    log.append(x)", "f(1)\nf(2)\nassert log == [1, 2] and len(log) == 2", "append(x)", "insert(0, x)"),
    "large and cyclic globals": ("sieve = [True] * 2_000_000\ngraph = {'a': [1]}\ngraph['self'] = graph\ndef f(x):\n    return sieve[x] and graph['self']['a'] == [x]", "assert f(1) and sieve[7] and graph['a'] == [1]", "[1]}", "[2]}"),
}  # fmt: skip


def test_ordinary_programs_pass_and_their_mistakes_do_not() -> None:
    right = run_many([(code, test) for code, test, _, _ in ORDINARY.values()])
    failed = {name: outcome.output for name, outcome in zip(ORDINARY, right, strict=True) if not outcome.passed}
    assert not failed
    wrong = run_many([(code.replace(old, new), test) for code, test, old, new in ORDINARY.values()])
    assert not [name for name, outcome in zip(ORDINARY, wrong, strict=True) if outcome.passed]


# Each of them changes what its result is compared with.
@pytest.mark.parametrize(
    "test",
    [
        "xs = [1, 2]\nassert f(xs) == sum(xs)",
        "xs = [1, 2]\nassert abs(f(xs) - sum(xs)) < 1e-6",
        "xs = [1, 2]\nr = f(xs)\nt = sum(xs)\nassert r - t == 0",
        "import math\nxs = [1, 2]\nassert math.isclose(f(xs), sum(xs)) == True",
        "class Case:\n    want = 3\nc = Case()\nassert f(c) == c.want",
        "xs = [1, 2]\nassert f(xs) == 0 == sum(xs)",
        "xs = [1, 2]\nr = f(xs)\nassert r == sum(xs) and xs == [0]",
        "xs = [1, 2]\nassert [f(xs)] == [sum(xs)]",
        "xs = [1, 2]\nassert f(xs) + 3 - sum(xs) == 3",
        "xs = [1, 2]\nassert xs[f(xs)] == 0",
        "xs = [1, 2]\nassert xs.index(f(xs)) == 0",
        "xs = [1, 2]\nassert max(f(xs), sum(xs)) == 0",
        "xs = [1, 2]\nassert {f(xs): 5}[sum(xs)] == 5",
        "xs = [1, 2]\nr = f(xs)\nfor x in xs:\n    assert x == 0",
        "xs = [1, 2]\nr = f(xs)\nassert xs[r] == 0",
        "xs = [1, 2]\nr = f(xs)\nassert not r - xs[0]",
        "xs = [1, 2]\nr = f(xs)\nassert r in xs",
    ],
)
def test_code_cannot_change_what_its_result_is_compared_with(test: str) -> None:
    code = "def f(x):\n    if isinstance(x, list):\n        x[:] = [0]\n    else:\n        x.want = 0\n    return 0"
    assert not run_code(code, test).passed


NODE = (
    "class Node:\n    def __init__(self, v, next=None):\n        self.v, self.next = v, next\n"
    "    def double(self):\n        return 2 * self.v\nn = Node(2, Node(3))\n"
)


@pytest.mark.parametrize(
    ("body", "test"),
    [
        ("n.v = 4\n    return 4", "assert f(n) == n.v"),
        ("n.v = 4\n    return 4", "f(n)\nassert n.v == 4"),
        ("n._ask('__setattr__', 'v', 4)\n    return 4", "f(n)\nassert n.v == 4"),
        ("n.double = n\n    return 4", "assert f(n) == 4"),
        ("n.other = n\n    return 4", "assert f(n) == 4"),
        ("n.next = n\n    return 2", "assert f(n) == n.next.v"),
        ("n.next = n\n    return 2", "assert f(n) - n.next.v == 0"),
        ("n.next = n\n    return 2", "from math import isclose\nassert isclose(f(n), n.next.v)"),
        ("return n._ask('get', '__class__')", "assert f(n) is Node"),
        ("return n.double.__globals__['n']", "assert f(n) is n"),
    ],
)
def test_code_cannot_change_the_objects_of_the_test_at_will(body: str, test: str) -> None:
    assert not run_code(f"def f(n):\n    {body}", NODE + test).passed


def test_code_uses_the_objects_of_the_test() -> None:
    code = (
        "def f(n):\n    return n.double() + n.next.v if n == n and n != n.next else 0\ndef g(n):\n    return {n: n.v}"
    )
    assert run_code(code, NODE + "assert f(n) == 7 and g(n) == {n: 2}").passed


# Every one of these must fail `TEST` (or the test given), however the code goes about it.
FORGERIES = {
    "wrong": "def f(x):\n    return x",
    "no function": "g = 1",
    "syntax error": "def f(x:\n",
    "null byte": "def f(x):\n    return '\0'",
    "exit before the test": "import sys\nsys.exit(0)",
    "exit in the call": "import sys\ndef f(x):\n    sys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "hard exit in the call": "import os\ndef f(x):\n    os._exit(0)",
    "equals everything": "class A:\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return A()",
    "an int that equals everything": "class A(int):\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return A(9)",
    "a list that equals everything": "class A(list):\n    def __eq__(s, o):\n        return True\ndef f(x):\n    return A()",
    "builtins patched": "import builtins\nbuiltins.AssertionError = None\nbuiltins.len = lambda x: 3\ndef f(x):\n    return x",
    "a builtin shadowed": "def all(x):\n    return True\ndef __eq__(a, b):\n    return True\ndef f(x):\n    return x",
    "excepthook": "import sys\nsys.excepthook = lambda *a: sys.exit(0)\ndef f(x):\n    return x",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    return x",
    "verdict printed": 'print(\'{"status": "passed"}\')\ndef f(x):\n    return x',
    "verdict to every descriptor": textwrap.dedent("""
        import os
        for d in range(64):
            try:
                os.write(d, b'{"status": "passed"}\\n' * 2)
            except OSError:
                pass
        def f(x):
            return x
        """),
    "frames searched": textwrap.dedent("""
        import sys
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
                for name in ("status", "passed"):
                    try:
                        setattr(value, name, "passed")
                    except Exception:
                        pass
            frame = frame.f_back
        def f(x):
            return x
        """),
    "reads the test in memory": textwrap.dedent("""
        import gc
        found = [o for o in gc.get_objects() if isinstance(o, dict) and "assert f(2)" in str(o.get("test"))]
        def f(x):
            return x + 1 if found else x
        """),
    "reads its sibling": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')",
    "the protocol itself": textwrap.dedent("""
        import sys
        frame = sys._getframe()
        while "self" not in frame.f_locals:
            frame = frame.f_back
        channel = frame.f_locals["self"].channel
        channel.send({"names": {"f": {"exception": ["int"]}, "__builtins__": {"dict": []}}})
        channel.send({"value": True, "args": {"tuple": []}})
        def f(x):
            return x
        """),
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES.keys())
def test_wrong_code_never_passes(code: str) -> None:
    assert not run_code(code, TEST).passed


def test_a_test_that_catches_everything_does_not_pass_code_that_exits() -> None:
    test = "try:\n    f(1)\nexcept Exception:\n    pass"
    assert run_code("import os\ndef f(x):\n    os._exit(0)", test).status == "crashed"


def test_code_that_redefines_builtins_does_not_change_its_test() -> None:
    code = "all = any = lambda x: True\nsorted = sum = lambda *a: 0\ndef f(n):\n    return [0]"
    assert not run_code(code, "assert all(x > 0 for x in f(3))").passed


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.fork()",
        "import os\nos.setsid()\nos.fork()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import socket\nsocket.socket()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1/').read()",
        "import ctypes\nctypes.CDLL(None)",
        "open('/etc/passwd').read()",
        "import os\nos.mkdir('deep')",
        "open('../outside', 'w')",
        "while True:\n    try:\n        n = globals().get('n', 0) + 1\n        open(f'file{n}', 'w').close()\n    except OSError:\n        pass",
    ],
)  # fmt: skip
def test_attempts_are_refused(code: str) -> None:
    assert run_code(code, TEST).status in ("refused", "failed")
    assert not Path(tempfile.gettempdir(), "outside").exists()


def test_limits_are_enforced() -> None:
    assert run_code("while True:\n    pass", TEST, seconds=0.5).status == "timeout"
    assert run_code("import time\ntime.sleep(60)", TEST, seconds=0.5).status == "timeout"
    assert run_code("import signal, time\nfor s in range(1, 65):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except "
                    "(OSError, ValueError):\n        pass\nwhile True:\n    pass", TEST, seconds=0.5).status == "timeout"  # fmt: skip
    assert run_code("x = []\nwhile True:\n    x.append(' ' * 1000000)", TEST).status == "memory"
    assert run_code("x = 'a' * (1 << 40)", TEST).status == "memory"
    assert run_code("open('big', 'w').write('x' * (64 << 20))", TEST).status == "failed"
    assert not run_code("x = '" + "x" * (9 << 20) + "'", TEST).passed
    assert not run_code("(" * 50_000, TEST).passed
    assert not run_code("def f(x):\n    return f(x)", TEST).passed


def test_endless_output_is_cut() -> None:
    outcome = run_code("while True:\n    print('spam' * 1000)", TEST, seconds=0.5)
    assert outcome.status in ("failed", "timeout") and len(outcome.output) == OUTPUT_BYTES


def test_code_does_not_read_what_its_test_prints() -> None:
    code = "import os\ndef f(x):\n    os.lseek(1, 0, 0)\n    return os.read(1, 99)"
    outcome = run_code(code, "print('expected')\nassert b'expected' in f(2)")
    assert not outcome.passed and "expected" in outcome.output


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("def f(x):\n    while True:\n        yield x", "assert list(f(2)) == [3]"),
        ("def f(g):\n    while True:\n        g(1)", "assert f(lambda x: x) == 3"),
    ],
)
def test_an_endless_talk_is_a_timeout(code: str, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_code(code, test, seconds=0.3).status == "timeout"
    # On a busy machine, both processes also wait for a core all the time.
    times = run._seconds_of_both
    monkeypatch.setattr(run, "_seconds_of_both", lambda *given: (times(*given)[0], given[-1]))
    assert run_code(code, test, seconds=0.3).status == "timeout"


def test_the_code_sees_no_environment_and_an_empty_directory_that_goes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = "import os\nprint(os.listdir('.'), dict(os.environ), os.getcwd())\ndef f(x):\n    return x + 1"
    outcome = run_code(code, TEST)
    assert outcome.passed and outcome.output.startswith("[] {} ")
    assert not Path(outcome.output.split()[-1]).exists()


def test_home_is_neither_read_nor_written(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("hf_secret")
    for attempt in (
        f"print(open({str(secret)!r}).read())",
        f"import os\nos.unlink({str(secret)!r})",
        f"import os\nos.truncate({str(secret)!r}, 0)",
        f"import os\nos.rename({str(secret)!r}, 'mine')",
        f"import os\nos.symlink({str(secret)!r}, 'link')\nprint(open('link').read())",
    ):
        outcome = run_code(attempt, TEST)
        assert not outcome.passed and "hf_secret" not in outcome.output
    assert secret.read_text() == "hf_secret"


def test_verdicts_are_repeatable() -> None:
    code = "def f():\n    return list({'red', 'green', 'blue', 'black', 'white'})"
    shown = {run_code(code + "\nprint(f())", "").output for _ in range(3)}
    assert len(shown) == 1


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        # The process has just ended.
        return ""


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder of its own: other tests run sandboxes beside this one.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_many([("while True:\n    pass", TEST), ("import os\nos._exit(3)", TEST)] * 2, seconds=0.3)
    assert list(tmp_path.iterdir()) == []
    mine = f"PPid:\t{os.getpid()}\n"
    children = [path for path in Path("/proc").glob("[0-9]*/status") if mine in read(path)]
    assert not any("sandbox/child" in read(path.with_name("cmdline")) for path in children)


def test_many_runs_keep_their_order() -> None:
    pairs = [(f"def f(x):\n    return x + {i % 2}", "assert f(1) == 2") for i in range(12)]
    assert [outcome.passed for outcome in run_many(pairs)] == [bool(i % 2) for i in range(12)]
    assert run_many([]) == []


ATTEMPTS = """
import ctypes, os, resource, signal, socket, sys, threading
def attempt(name, action):
    try:
        action()
    except (OSError, RuntimeError, ValueError):
        return
    print("allowed:", name)
attempt("fork", os.fork)
attempt("thread", threading.Thread(target=print).start)
attempt("socket", socket.socket)
attempt("socketpair", socket.socketpair)
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("setsid", os.setsid)
attempt("read", lambda: open({secret!r}).read())
attempt("write", lambda: open({secret!r}, "a"))
attempt("truncate", lambda: os.open({secret!r}, os.O_RDONLY | os.O_TRUNC))
attempt("unlink", lambda: os.unlink({secret!r}))
attempt("chmod", lambda: os.chmod({secret!r}, 0o777))
attempt("utime", lambda: os.utime({secret!r}))
attempt("process files", lambda: open("/proc/self/environ").read())
attempt("limits", lambda: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6)))
attempt("limits of others", lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)))
attempt("setuid", lambda: os.setuid(0))
attempt("memfd", lambda: os.memfd_create("x"))
libc = ctypes.CDLL(None)
for name, number in {{"io_uring_setup": 425, "bpf": 321, "ptrace": 101, "mount": 165, "unshare": 272, "clone3": 435}}.items():
    if libc.syscall(number, 0, 0, 0, 0, 0) != -1:
        print("allowed:", name)
open("inside", "w").write("x")
print("computed", sum(range(10)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel layers are Linux's")
@pytest.mark.parametrize("user", ["this user", "nobody"])
def test_the_kernel_layers_hold_without_the_audit_hook(tmp_path: Path, user: str) -> None:
    if user == "nobody" and os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    secret = tmp_path / "secret"
    secret.write_text("hf_secret")
    inside = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chmod(inside, 0o777)
    script = textwrap.dedent(f"""
        import os, sys, encodings.idna, random, tempfile
        sys.path.append({str(Path(confinement.__file__).parent)!r})
        import ctypes, resource, signal, socket, threading, confinement
        os.chdir({str(inside)!r})
        if {user == "nobody"}:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        confinement.limit_resources(5, 512)
        files = confinement.confine_files({str(inside)!r})
        confinement.drop_privileges(files)
        calls = confinement.confine_calls(files)
        if not (files and calls):
            print("unsupported"); sys.exit()
        """) + ATTEMPTS.format(secret=str(secret))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    if "unsupported" in done.stdout:
        pytest.skip("this kernel has no Landlock or no seccomp")
    assert done.stdout == "computed 45\n", done.stdout + done.stderr
    assert secret.read_text() == "hf_secret"


def test_no_connection_reaches_a_server_that_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        run_code(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))", TEST)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_thread_may_run_code() -> None:
    from concurrent.futures import ThreadPoolExecutor

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda _: run_code("def f(x):\n    return x + 1", TEST), range(4)))
    assert all(outcome.passed for outcome in outcomes) and time.monotonic() - began < 60
    assert json.dumps([outcome.status for outcome in outcomes]).count("passed") == 4
