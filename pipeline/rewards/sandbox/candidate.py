"""The process of the sandbox that runs an answer's code, see `pipeline.rewards.sandbox.child`."""

from __future__ import annotations

import builtins
import contextlib
import io
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType

from pipeline.rewards.sandbox import confinement
from pipeline.rewards.sandbox.messages import BASES, CHANGEABLE, LOCAL, OPERATIONS, VIEWS, Peer, base_of

# Importing `typing` would take a tenth of the time in which the process starts.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Candidate(Peer):
    """Runs the code and answers the examiner's requests. The code can change anything in this process."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__(incoming, outgoing, {})
        # What the examiner knows by number lives on, so that its id stays its own.
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}
        # Stand-ins for the test's functions and objects, by the examiner's numbers.
        self.functions: dict[int, Any] = {}
        self.module = ModuleType("answer")
        self.loop: Any = None

    def answer(self, request: dict[str, Any]) -> None:
        """Do what the examiner asks for, and send what came of it."""
        # The test may have put something in place of the standard input.
        if "stdin" in request:
            sys.stdin = io.StringIO(request["stdin"])
        if "input" in request:
            builtins.input = self.decode(request["input"])
        with contextlib.redirect_stdout(io.StringIO()) if request["captured"] else contextlib.nullcontext():
            try:
                reply = self.work(request["operation"], request)
            # Whatever the code raises, SystemExit too, is for the examiner to judge.
            except BaseException as error:  # noqa: BLE001
                reply = self.failure(error)
                if reply["status"] != "failed" or request["operation"] == "define":
                    traceback.print_exc(limit=-3)
            if request["captured"]:
                reply["printed"] = self.printed()
        self.send(reply)

    def work(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        """Run the code, say what its names refer to, seed `random`, or do something with an object that is kept."""
        if operation == "define":
            code = request["content"]
            if "asyncio" in code:
                confinement.prepare_asyncio()
            if "threading" in code or "ThreadPool" in code:
                confinement.prepare_threads()
            # dataclasses and typing look names up in the module.
            sys.modules["answer"] = self.module
            # This process is confined for what comes now.
            exec(compile(code, "answer", "exec"), vars(self.module))  # noqa: S102
            return {"names": list(vars(self.module))}
        if operation == "names":
            described = {}
            for name in request["content"]:
                value = vars(self.module)[name]
                # Containers stay here, where the code may change them.
                described[name] = self.as_kept(value) if type(value) in CHANGEABLE else self.encode(value)
            return {"names": described}
        if operation == "seed":
            import random

            random.seed(*self.decode(request["content"]))
            return {}
        target = self.kept[request["target"]]
        args = self.decode(request["args"])
        value = self.operate(operation, target, args, self.decode(request["named"]))
        # The code may have changed its arguments in place, so they are sent back.
        return {"value": self.encode(value), "args": self.encode(args)}

    def operate(self, operation: str, target: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Do with an object what the test does with its stand-in."""
        if operation == "plain":
            base = base_of(type(target))
            return BASES[base](target) if base else None
        if operation == "has":
            # Not `hasattr`: by __getattr__, some objects have every attribute.
            defined = set().union(*(vars(kind) for kind in type(target).__mro__), getattr(target, "__dict__", ()))
            return not defined.isdisjoint(args)
        if operation == "isinstance":
            return isinstance(args[0], target)
        if operation == "issubclass":
            return issubclass(args[0], target)
        if operation in ("copy", "deepcopy"):
            import copy

            return getattr(copy, operation)(target)
        if operation == "await":
            confinement.prepare_asyncio()
            import asyncio

            async def finish() -> Any:
                return await target

            self.loop = self.loop or asyncio.new_event_loop()
            return self.loop.run_until_complete(finish())

        function = OPERATIONS.get(operation) or getattr(operator, operation, None)
        if function is None:
            function = getattr(type(target), operation, None)
        if function is None or (value := function(target, *args, **named)) is NotImplemented:
            raise TypeError(f"{type(target).__name__} has no {operation}")
        return value

    def describe(self, value: object) -> Any:
        """Describe a value that is not plain: an exception or module by name, a function of the test by number."""
        if isinstance(value, type) and issubclass(value, BaseException):
            self.exceptions.setdefault(value.__qualname__, value)
            return {"exception": self.describe_exception(value)}
        if type(value) is ModuleType:
            return {"module": value.__name__}
        for number, function in self.functions.items():
            if value is function:
                return {"function": number}
        if type(value) in VIEWS:
            make: Any = {"keys": dict.fromkeys, "values": lambda items: dict(enumerate(items)), "items": dict}
            view = VIEWS[type(value)]
            return {"view": [view, self.encode(make[view](value))]}
        return self.as_kept(value)

    def as_kept(self, value: object) -> Any:
        """Describe an object that stays here: its number, its class and what that extends, its value if it is fixed."""
        kind = type(value)
        base = base_of(kind)
        plain = self.encode(BASES[base](value)) if base and base not in CHANGEABLE else None
        extends = base.__name__ if base else "type" if isinstance(value, type) else ""
        return {"kept": [self.keep(value), kind.__name__, extends, plain, hasattr(kind, "__await__")]}

    def keep(self, value: object) -> int:
        """Return an object's number."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return self.numbers[id(value)]

    def failure(self, error: BaseException) -> dict[str, Any]:
        """Describe an exception that the code has raised."""
        kinds = {MemoryError: "memory", PermissionError: "refused"}
        status = next((name for kind, name in kinds.items() if isinstance(error, kind)), "failed")
        reply: dict[str, Any] = {"status": status, "message": "", "args": {"tuple": []}, "attributes": {"dict": []}}
        # The code may define the class, its __str__ and what it holds.
        with contextlib.suppress(BaseException):
            reply["message"] = str(error)[:500]
        with contextlib.suppress(BaseException):
            reply["args"] = self.encode(tuple(error.args))
            reply["attributes"] = self.encode(dict(vars(error)))
        self.exceptions.setdefault(type(error).__qualname__, type(error))
        if error.__cause__ and error.__cause__.__cause__ is None:
            reply["cause"] = self.failure(error.__cause__)
        return {**reply, "error": self.describe_exception(type(error)), "kept": self.keep(error)}

    def resolve(self, kind: str, content: Any, named: bool) -> object:
        """Return a kept object, or a stand-in for a function, iterator or object of the test."""
        if kind == "kept":
            return self.kept[content]
        number, name, doc = content
        if number in self.functions:
            return self.functions[number]
        stand_in: Any = self.function(number, "call")
        stand_in.__name__ = stand_in.__qualname__ = name
        stand_in.__doc__ = doc
        if kind == "iterator":
            stand_in = self.items(stand_in)
        elif kind == "local":
            # An instance of a class of the test: the examiner does whatever the code wants to do with it.
            ways = {operation: operation for operation in LOCAL} | {"__getattr__": "get", "__setattr__": "set"}
            members = {method: staticmethod(self.function(number, way)) for method, way in ways.items()}
            stand_in = type(name, (), members)()
        self.functions[number] = stand_in
        return stand_in

    def function(self, number: int, operation: str) -> Callable[..., Any]:
        """Return a stand-in for a function of the test, or for an operation on an object of the test."""

        def call(*args: object, **named: object) -> object:
            printed = self.printed()
            message = {"args": self.encode(args), "named": self.encode(named), "printed": printed}
            self.send({"call": number, "how": operation, **message})
            # The function may use what the code has defined.
            while "operation" in (reply := self.receive()):
                self.answer(reply)
            if "error" in reply:
                raise self.make_exception(reply["error"], self.decode(reply["args"]), {"__raised__": reply["raised"]})
            return self.decode(reply["value"])

        return call

    @staticmethod
    def items(following: Callable[[], Any]) -> Iterator[Any]:
        """Iterate over an iterator that lives in the examiner, where `following` takes the next item."""
        while True:
            try:
                item = following()
            except StopIteration:
                return
            yield item

    def printed(self) -> str:
        """Return what was printed into the test's hands, and forget it."""
        if not isinstance(sys.stdout, io.StringIO):
            return ""
        text = sys.stdout.getvalue()
        sys.stdout.seek(0)
        sys.stdout.truncate()
        return text
