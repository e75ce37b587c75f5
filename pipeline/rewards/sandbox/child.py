"""The child process of the sandbox, which runs an answer's code in one process and its test in another.

In a single process, wrong code could always pass its test: it could end the process, patch `builtins`, walk the frames
to the variable that says "passed", or return an object that equals everything. Therefore this process, the examiner,
keeps the test and the only descriptor for the verdict, and forks a second one, the candidate, that sees only the code.
The test is read after the fork, as is the token that each line of the verdict begins with. The test calls the code's
functions through stand-ins. Arguments and results travel as plain values in JSON. Anything else (instances, generators,
…) stays with the candidate behind a `Remote`. The builtins and the modules of a test are Python's own, whatever the
code defines; what else a test judges with, it must define or import.

A test can neither pass an instance of its own class to the code nor call `isinstance` on a `Remote`. A list, dict or
set that the code changes in place changes in the test only if the call returns None, so that the code cannot edit what
its result is compared with.

Only `pipeline.rewards.sandbox.run` starts it: python child.py VERDICT_FD SECONDS MEMORY_MB ALLOW_UNCONFINED < JSON
"""

import builtins
import importlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

sys.path.insert(0, os.path.abspath(os.path.join(__file__, *[os.pardir] * 4)))
from pipeline.rewards.sandbox import confinement  # found on that path; everything else is from the standard library
from pipeline.rewards.sandbox.messages import Channel, Gone, decode, encode

del sys.path[0]

VERDICT = 3
MAX_SECONDS = 90  # ends both processes if the parent has died
PLAIN_TYPES = (int, float, complex, str, bytes, list, tuple, dict, set)
OPERATORS = ("getitem", "setitem", "delitem", "enter", "exit", "str", "repr", "hash")
CONVERSIONS = ("iter", "next", "reversed", "len", "neg", "abs", "invert", "int", "float", "index")
COMPARISONS = ("lt", "le", "gt", "ge")
ARITHMETIC = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul",
    "radd", "rsub", "rmul", "rtruediv",
)  # fmt: skip
OPERATIONS: dict[str, Callable[..., Any]] = {"get": getattr, "set": setattr, "__iter__": iter}


class Candidate:
    """Runs the code and answers the examiner's requests. The code can change anything in this process."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.kept: list[Any] = []

    def other(self, value: object) -> Any:
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [kind.__name__ for kind in value.__mro__]}
        if isinstance(value, ModuleType):
            return {"module": value.__name__}
        self.kept.append(value)
        return {"kept": len(self.kept) - 1}

    def incoming(self, kind: str, content: Any) -> object:
        return self.kept[content] if kind == "kept" else lambda *args, **named: self.call_back(content, args, named)

    def call_back(self, number: int, args: tuple[object, ...], named: dict[str, object]) -> object:
        self.channel.send({"call": number, "args": encode(args, self.other), "named": encode(named, self.other)})
        return decode(self.channel.receive()["value"], self.incoming)

    def failure(self, error: BaseException) -> dict[str, Any]:
        kinds = {MemoryError: "memory", PermissionError: "refused"}
        status = next((name for kind, name in kinds.items() if isinstance(error, kind)), "failed")
        try:
            message = str(error)[:500]
        except BaseException:  # noqa: BLE001 - the code may define the class and its __str__
            message = ""
        return {"status": status, "error": [base.__name__ for base in type(error).__mro__], "message": message}

    def define(self, code: str) -> dict[str, Any]:
        namespace: dict[str, Any] = {"__name__": "answer"}
        exec(compile(code, "answer", "exec"), namespace)  # noqa: S102 - this process is confined for it
        names = {name: value for name, value in namespace.items() if not name.startswith("__")}
        return {"names": {name: encode(value, self.other) for name, value in names.items()}}

    def apply(self, request: dict[str, Any]) -> dict[str, Any]:
        target = self.kept[request["target"]]
        args = decode(request["args"], self.incoming)
        named = decode(request["named"], self.incoming)
        operation = request["operation"]
        if operation == "call":
            value = target(*args, **named)
        elif operation in OPERATIONS:
            value = OPERATIONS[operation](target, *args)
        elif method := getattr(type(target), operation, None):
            value = method(target, *args)
        else:
            raise TypeError(f"{type(target).__name__} has no {operation}")
        return {"value": encode(value, self.other), "args": encode(args, self.other)}

    def serve(self) -> None:
        work: Callable[[Any], dict[str, Any]] = self.define
        while True:
            request = self.channel.receive()
            try:
                reply = work(request.get("code", request))
            except BaseException as error:  # noqa: BLE001 - SystemExit too: the examiner judges
                reply = self.failure(error)
                if reply["status"] != "failed" or "code" in request:
                    traceback.print_exc(limit=-3)
            self.channel.send(reply)
            work = self.apply


class Examiner:
    """Runs the test against stand-ins for what the code defines."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.status = channel, "failed"
        self.functions: list[Callable[..., object]] = []
        self.exceptions: dict[str, type] = {}

    def other(self, value: object) -> Any:
        if isinstance(value, Remote):
            return {"kept": object.__getattribute__(value, "_number")}
        if isinstance(value, FunctionType):
            self.functions.append(value)
            return {"function": len(self.functions) - 1}
        raise TypeError(f"a test cannot pass a {type(value).__name__} to the code")

    def incoming(self, kind: str, content: Any) -> object:
        if kind != "kept":
            raise ValueError(f"not a value: {kind}")
        return Remote(self, int(content))

    def named(self, kind: str, content: Any) -> object:
        """Decode what a name of the code refers to, which may also be a module or a class of exceptions."""
        if kind == "module" and content.partition(".")[0] in sys.stdlib_module_names:
            return importlib.import_module(content)
        return self.exception(content) if kind == "exception" else self.incoming(kind, content)

    def exception(self, names: list[str]) -> type:
        known = getattr(builtins, names[0], None) or self.exceptions.get(names[0])
        if isinstance(known, type) and issubclass(known, BaseException):
            return known
        base = self.exception(names[1:]) if len(names) > 1 else Exception
        return self.exceptions.setdefault(names[0], type(names[0], (base,), {"__bool__": _was_raised}))

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        self.channel.send(message)
        while "call" in (reply := self.channel.receive()):
            function = self.functions[reply["call"]]
            args, named = decode(reply["args"], self.incoming), decode(reply["named"], self.incoming)
            self.channel.send({"value": encode(function(*args, **named), self.other)})
        if "error" in reply:
            if reply["status"] in ("memory", "refused"):
                self.status = reply["status"]
            kind = self.exception(reply["error"])
            if issubclass(kind, StopIteration) and message.get("operation") != "__next__":
                kind = RuntimeError  # as in a generator: it would end a loop of the test
            raise kind(reply["message"])
        return reply

    def ask(self, target: int, operation: str, *args: object, **named: object) -> Any:
        sent = {"args": encode(args, self.other), "named": encode(named, self.other)}
        reply = self.request({"target": target, "operation": operation, **sent})
        before: Any
        for before, after in zip(args, decode(reply["args"], self.incoming), strict=True):
            changeable = reply["value"] is None and isinstance(before, list | dict | set)
            if changeable and type(before) is type(after) and before != after:
                before.clear()  # because the code changed its argument in place
                before.extend(after) if isinstance(before, list) else before.update(after)
        return decode(reply["value"], self.named if operation == "get" else self.incoming)

    @staticmethod
    def may_define(name: str, item: Any) -> bool:
        """Return whether the code may give the test this name: not a builtin's, nor a name for another exception."""
        renamed = isinstance(item, dict) and item.get("exception", [name])[0] != name
        return not (renamed or name.startswith("__") or hasattr(builtins, name))

    def examine(self, code: str, test: str) -> None:
        """Run the code and its test, and raise whatever stops the test."""
        names = self.request({"code": code})["names"].items()
        namespace = {name: decode(item, self.named) for name, item in names if self.may_define(name, item)}
        for name in sys.stdlib_module_names & namespace.keys():  # so that `math.isclose` is Python's
            used = re.findall(rf"\b{name}\.(\w+)", test)
            if used and all(hasattr(importlib.import_module(name), attribute) for attribute in used):
                namespace[name] = importlib.import_module(name)
        exec(compile(test, "test", "exec"), namespace | {"__name__": "test"})  # noqa: S102 - this process is confined, too
        if self.channel.gone:  # even if the test has caught it
            raise Gone


class Remote:
    """An object that stays with the candidate, which must not decide what the test asks about plain values.

    It never equals a plain value and is not ordered with one; `in` compares its items. The result of arithmetic with a
    plain value must be an object (`_mixed`), which no operator turns into a plain value. An object is true or false by
    its length, once the test has used an attribute that plain values lack (`_known`). Methods and attributes are the
    code's own, and its class compares two objects.
    """

    def __init__(self, examiner: Examiner, number: int) -> None:
        for name, value in {"_examiner": examiner, "_number": number, "_mixed": False, "_known": False}.items():
            object.__setattr__(self, name, value)

    def _ask(self, operation: str, *args: object, **named: object) -> Any:
        return self._examiner.ask(self._number, operation, *args, **named)

    def __call__(self, *args: object, **named: object) -> Any:
        return self._ask("call", *args, **named)

    def __getattr__(self, name: str) -> Any:
        plain = any(hasattr(kind, name) for kind in PLAIN_TYPES)
        if plain and (self._mixed or name.startswith(("is", "starts", "ends"))):
            raise _refusal(name)
        object.__setattr__(self, "_known", self._known or not plain)
        return self._ask("get", name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("set", name, value)

    def __contains__(self, value: object) -> bool:
        return value in list(self)  # type: ignore[call-overload]

    def __bool__(self) -> bool:
        if not self._known:
            raise _refusal("__bool__")
        return len(self) > 0  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._ask("__eq__", other) is True


def _was_raised(error: BaseException) -> bool:
    if error.__traceback__ is None:  # an object like any other, if the test has only called its class
        raise _refusal("__bool__")
    return True


def _refusal(name: str) -> TypeError:
    return TypeError(f"an object must not decide {name} for a plain value; return a plain value")


def _operator(name: str, kind: tuple[str, ...]) -> Callable[..., Any]:
    def operate(self: Remote, *args: object) -> Any:
        plain = not all(isinstance(operand, Remote) for operand in args)
        if (kind is COMPARISONS and plain) or (kind is CONVERSIONS and self._mixed):
            raise _refusal(name)
        result = self._ask(name, *args)
        if kind is ARITHMETIC and (plain or any(operand._mixed for operand in (self, *args))):  # type: ignore[attr-defined]
            if not isinstance(result, Remote):
                raise _refusal(name)
            object.__setattr__(result, "_mixed", True)
        return result

    return operate


for _kind in (OPERATORS, CONVERSIONS, COMPARISONS, ARITHMETIC):
    for _name in _kind:
        setattr(Remote, f"__{_name}__", _operator(f"__{_name}__", _kind))


def main(verdict: int, seconds: float, memory_mb: int, allow_unconfined: bool) -> None:
    """Confine both processes, run the code and the test, and write two lines: the candidate's id, and the verdict."""
    os.environ.clear()
    os.dup2(verdict, VERDICT)
    os.closerange(VERDICT + 1, 1 << 16)
    directory = os.getcwd()
    confinement.limit_resources(seconds, memory_mb)
    files_confined = confinement.confine_files(directory)
    confinement.drop_privileges(files_confined)
    requests, replies = os.pipe(), os.pipe()  # descriptors 4 and 5, 6 and 7
    candidate = os.fork()
    if candidate == 0:
        for old, new in ((os.pipe()[0], 0), (requests[0], 3), (replies[1], 4)):
            os.dup2(old, new)
        os.closerange(5, 1 << 16)
        confinement.die_with_parent()
        confinement.confine_calls(files_confined)
        confinement.watch(directory)
        try:
            Candidate(Channel(3, 4)).serve()
        finally:
            os._exit(1)
    os.close(requests[0])
    os.close(replies[1])
    signal.setitimer(signal.ITIMER_REAL, seconds + MAX_SECONDS)
    confined = confinement.confine_calls(files_confined) and files_confined
    work = json.loads(sys.stdin.buffer.read())
    os.write(VERDICT, f"{work['token']} {candidate}\n".encode())
    examiner = Examiner(Channel(replies[0], requests[1]))
    try:
        if confined or allow_unconfined:
            examiner.examine(work["code"], work["test"])
        status = "passed" if confined or allow_unconfined else "unconfined"
    except Gone:
        ended = os.waitstatus_to_exitcode(os.waitpid(candidate, 0)[1])
        status = "timeout" if ended in (-9, -24) else "crashed"  # -9 and -24: killed for its CPU time
    except BaseException:  # noqa: BLE001 - a test may raise anything; none of it is a pass
        status = examiner.status
        traceback.print_exc(limit=-1)
        sys.stderr.flush()
    sys.stdout.flush()
    os.write(VERDICT, f"{work['token']} {status}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
