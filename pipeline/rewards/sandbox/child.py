"""The child process of the sandbox, which runs an answer's code in one process and its test in another.

In a single process, wrong code could always pass its test: it could end the process, patch `builtins`, walk the frames
to the variable that says "passed", or return an object that equals everything. Therefore this process, the examiner,
keeps the test and the only descriptor for the verdict, and forks a second one, the candidate, that sees only the code
(the test is read after the fork). The test calls the code's functions through stand-ins. Arguments and results travel
as plain values in JSON. Anything else (instances, generators, …) stays with the candidate behind a `Remote`, which
never equals a plain value. The builtins of a test are Python's own, whatever the code defines.

A test can neither pass an instance of its own class to the code nor call `isinstance` on a `Remote`.

Only `pipeline.rewards.sandbox.run` starts it: python child.py VERDICT_FD SECONDS MEMORY_MB < JSON of code and test
"""

import builtins
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any


def _load(name: str) -> Any:
    """Load a sibling module by path, because this process can import only the standard library."""
    spec = importlib.util.spec_from_file_location(name, os.path.join(os.path.dirname(__file__), f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from pipeline.rewards.sandbox import confinement
    from pipeline.rewards.sandbox.messages import Channel, Gone, decode, encode
else:
    confinement, _messages = _load("confinement"), _load("messages")
    Channel, Gone, decode, encode = _messages.Channel, _messages.Gone, _messages.decode, _messages.encode

GRACE_SECONDS = 5.0
OPERATORS = (
    "len", "getitem", "setitem", "delitem", "contains", "next", "add", "sub", "mul", "truediv", "floordiv",
    "mod", "pow", "neg", "abs", "and", "or", "xor", "lt", "le", "gt", "ge", "int", "float", "index",
    "enter", "exit", "radd", "rsub", "rmul", "matmul", "invert", "reversed",
)  # fmt: skip
OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": getattr, "set": setattr, "iter": iter, "bool": bool, "str": str, "repr": repr, "hash": hash,
}  # fmt: skip


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
        elif operation.startswith("__"):
            method = getattr(type(target), operation, None)
            if method is None:
                raise TypeError(f"{type(target).__name__} has no {operation}")
            value = method(target, *args)
        else:
            value = OPERATIONS[operation](target, *args)
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
        if kind == "kept":
            return Remote(self, int(content))
        if kind == "module" and content.partition(".")[0] in sys.stdlib_module_names:
            return importlib.import_module(content)
        if kind == "exception":
            return self.exception(content)
        raise ValueError(f"unknown kind of value {kind}")

    def exception(self, names: list[str]) -> type:
        known = getattr(builtins, names[0], None) or self.exceptions.get(names[0])
        if isinstance(known, type) and issubclass(known, BaseException):
            return known
        base = self.exception(names[1:]) if len(names) > 1 else Exception
        return self.exceptions.setdefault(names[0], type(names[0], (base,), {}))

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        self.channel.send(message)
        while "call" in (reply := self.channel.receive()):
            function = self.functions[reply["call"]]
            args, named = decode(reply["args"], self.incoming), decode(reply["named"], self.incoming)
            self.channel.send({"value": encode(function(*args, **named), self.other)})
        if "error" in reply:
            if reply["status"] in ("memory", "refused"):
                self.status = reply["status"]
            raise self.exception(reply["error"])(reply["message"])
        return reply

    def ask(self, target: int, operation: str, *args: object, **named: object) -> Any:
        sent = {"args": encode(args, self.other), "named": encode(named, self.other)}
        reply = self.request({"target": target, "operation": operation, **sent})
        before: Any
        for before, after in zip(args, decode(reply["args"], self.incoming), strict=True):
            if type(before) is type(after) and isinstance(before, list | dict | set) and before != after:
                before.clear()  # because the code changed its argument in place
                before.extend(after) if isinstance(before, list) else before.update(after)
        return decode(reply["value"], self.incoming)

    def examine(self, code: str, test: str) -> None:
        """Run the code and its test, and raise whatever stops the test."""
        names = self.request({"code": code})["names"]
        names = {name: item for name, item in names.items() if not (name.startswith("__") or hasattr(builtins, name))}
        namespace = {name: decode(item, self.incoming) for name, item in names.items()}
        exec(compile(test, "test", "exec"), namespace | {"__name__": "test"})  # noqa: S102 - this process is confined, too


class Remote:
    """An object that stays with the candidate. Its class there decides which other `Remote` equals it."""

    def __init__(self, examiner: Examiner, number: int) -> None:
        object.__setattr__(self, "_examiner", examiner)
        object.__setattr__(self, "_number", number)

    def _ask(self, operation: str, *args: object, **named: object) -> Any:
        get = object.__getattribute__
        return get(self, "_examiner").ask(get(self, "_number"), operation, *args, **named)

    def __call__(self, *args: object, **named: object) -> Any:
        return self._ask("call", *args, **named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("set", name, value)

    def __iter__(self) -> Any:
        return self._ask("iter")

    def __bool__(self) -> bool:
        return self._ask("bool") is True

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __hash__(self) -> int:
        return int(self._ask("hash"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._ask("__eq__", other) is True


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *args: Remote._ask(self, name, *args)


for _name in OPERATORS:
    setattr(Remote, f"__{_name}__", _operator(f"__{_name}__"))


def main(verdict: int, seconds: float, memory_mb: int) -> None:
    """Confine both processes, run the code and the test, and write the verdict as a line of JSON."""
    os.environ.clear()
    directory = os.getcwd()
    confinement.limit_resources(seconds, memory_mb)
    files_confined = confinement.confine_files(directory)
    confinement.drop_privileges(files_confined)
    requests, replies = os.pipe(), os.pipe()
    candidate = os.fork()
    if candidate == 0:
        nothing = os.pipe()
        os.close(nothing[1])
        os.dup2(nothing[0], 0)
        for descriptor in range(3, confinement.OPEN_FILES):
            if descriptor not in (requests[0], replies[1]):
                try:
                    os.close(descriptor)
                except OSError:
                    continue
        confinement.die_with_parent()
        confinement.confine_calls(files_confined)
        confinement.watch(directory)
        try:
            Candidate(Channel(requests[0], replies[1])).serve()
        finally:
            os._exit(1)
    os.close(requests[0])
    os.close(replies[1])
    signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)  # ends both if the parent has died
    calls_confined = confinement.confine_calls(files_confined)
    started = {"candidate": candidate, "confined": files_confined and calls_confined}
    os.write(verdict, json.dumps(started).encode() + b"\n")
    work = json.loads(sys.stdin.buffer.read())
    examiner = Examiner(Channel(replies[0], requests[1]))
    try:
        examiner.examine(work["code"], work["test"])
        status = "passed"
    except Gone:
        ended = os.waitstatus_to_exitcode(os.waitpid(candidate, 0)[1])
        status = "timeout" if ended in (-9, -24) else "crashed"  # -9 and -24: killed for its CPU time
    except BaseException:  # noqa: BLE001 - a test may raise anything; none of it is a pass
        status = examiner.status
        traceback.print_exc(limit=-1)
        sys.stderr.flush()
    sys.stdout.flush()
    os.write(verdict, json.dumps({"status": status}).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
