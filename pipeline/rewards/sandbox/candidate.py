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
from pipeline.rewards.sandbox.messages import (
    BASES,
    CHANGEABLE,
    LOCAL,
    OPERATIONS,
    VIEWS,
    Channel,
    Exceptions,
    base_of,
    decode,
    encode,
)

# Importing `typing` would take a tenth of the time in which the process starts.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Candidate:
    """Runs the code and answers the examiner's requests. The code can change anything in this process."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.functions: dict[int, Any] = {}
        self.exceptions = Exceptions({})
        self.module = ModuleType("answer")
        self.loop: Any = None

    def keep(self, value: object) -> int:
        """Return an object's number; what is kept lives on, so that its id stays its own."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return self.numbers[id(value)]

    def other(self, value: object) -> Any:
        kind = type(value)
        if isinstance(value, type) and issubclass(value, BaseException):
            self.exceptions.known.setdefault(value.__qualname__, value)
            return {"exception": Exceptions.describe(value)}
        if kind is ModuleType:
            return {"module": value.__name__}  # type: ignore[attr-defined]
        for number, function in self.functions.items():
            if value is function:
                return {"function": number}
        if kind in VIEWS:
            make: Any = {"keys": dict.fromkeys, "values": lambda items: dict(enumerate(items)), "items": dict}
            return {"view": [VIEWS[kind], encode(make[VIEWS[kind]](value), self.other)]}
        return self.as_kept(value)

    def as_kept(self, value: object) -> Any:
        """Describe an object that stays here: its number, its class and what that extends, its value if it is fixed."""
        kind = type(value)
        base = base_of(kind)
        plain = encode(BASES[base](value), self.other) if base and base not in CHANGEABLE else None
        extends = base.__name__ if base else "type" if isinstance(value, type) else ""
        return {"kept": [self.keep(value), kind.__name__, extends, plain, hasattr(kind, "__await__")]}

    def incoming(self, kind: str, content: Any) -> object:
        if kind == "kept":
            return self.kept[content]
        number, name, doc = content
        if number not in self.functions:
            function = self.function(number, "call")
            function.__name__ = function.__qualname__ = name
            function.__doc__ = doc
            made = {"iterator": self.items, "local": lambda function: self.local(number, name)}
            self.functions[number] = made.get(kind, lambda function: function)(function)
        return self.functions[number]

    def local(self, number: int, name: str) -> object:
        """Return a stand-in for an instance of a class of the test's."""

        def operator_of(operation: str) -> Callable[..., Any]:
            return lambda target, *args: self.function(number, operation)(*args)

        members = {operation: operator_of(operation) for operation in LOCAL}
        members |= {"__getattr__": operator_of("get"), "__setattr__": operator_of("set")}
        return type(name, (), members)()

    def function(self, number: int, operation: str) -> Callable[..., Any]:
        """Return a stand-in for a function of the test, or for an operation on an object of the test."""

        def call(*args: object, **named: object) -> object:
            printed = self.printed()
            message = {"args": encode(args, self.other), "named": encode(named, self.other), "printed": printed}
            self.channel.send({"call": number, "how": operation, **message})
            while "operation" in (reply := self.channel.receive()):
                self.answer(reply)
            if "error" in reply:
                args = decode(reply["args"], self.incoming)
                raise self.exceptions.make(reply["error"], args, {"__raised__": reply["raised"]})
            return decode(reply["value"], self.incoming)

        return call

    @staticmethod
    def items(following: Callable[[], Any]) -> Iterator[Any]:
        """Go through an iterator of the test."""
        while True:
            try:
                item = following()
            except StopIteration:
                return
            yield item

    def failure(self, error: BaseException) -> dict[str, Any]:
        kinds = {MemoryError: "memory", PermissionError: "refused"}
        status = next((name for kind, name in kinds.items() if isinstance(error, kind)), "failed")
        reply: dict[str, Any] = {"status": status, "message": "", "args": {"tuple": []}, "attributes": {"dict": []}}
        # The code may define the class, its __str__ and what it holds.
        with contextlib.suppress(BaseException):
            reply["message"] = str(error)[:500]
        with contextlib.suppress(BaseException):
            reply["args"] = encode(tuple(error.args), self.other)
            reply["attributes"] = encode(dict(vars(error)), self.other)
        self.exceptions.known.setdefault(type(error).__qualname__, type(error))
        if error.__cause__ and error.__cause__.__cause__ is None:
            reply["cause"] = self.failure(error.__cause__)
        return {**reply, "error": Exceptions.describe(type(error)), "kept": self.keep(error)}

    def define(self, code: str) -> dict[str, Any]:
        if "asyncio" in code:
            confinement.prepare_asyncio()
        if "threading" in code or "ThreadPool" in code:
            confinement.prepare_threads()
        sys.modules["answer"] = self.module  # dataclasses and typing look names up there
        exec(compile(code, "answer", "exec"), vars(self.module))  # noqa: S102 - this process is confined for it
        return {"names": list(vars(self.module))}

    def named(self, names: list[str]) -> dict[str, Any]:
        # Containers stay here, where the code may change them.
        values = {name: vars(self.module)[name] for name in names}
        ways = {name: self.as_kept if type(value) in CHANGEABLE else self.encoded for name, value in values.items()}
        return {"names": {name: ways[name](value) for name, value in values.items()}}

    def encoded(self, value: object) -> Any:
        return encode(value, self.other)

    def apply(self, request: dict[str, Any]) -> dict[str, Any]:
        target = self.kept[request["target"]]
        args = decode(request["args"], self.incoming)
        named = decode(request["named"], self.incoming)
        value = self.operate(request["operation"], target, args, named)
        return {"value": encode(value, self.other), "args": encode(args, self.other)}

    def operate(self, operation: str, target: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
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
        if operation == "await":
            return self.wait(target)
        if operation in ("copy", "deepcopy"):
            import copy

            return getattr(copy, operation)(target)
        function = OPERATIONS.get(operation) or getattr(operator, operation, None)
        if function is None:
            function = getattr(type(target), operation, None)
        if function is None or (value := function(target, *args, **named)) is NotImplemented:
            raise TypeError(f"{type(target).__name__} has no {operation}")
        return value

    def wait(self, target: Any) -> Any:
        confinement.prepare_asyncio()
        import asyncio

        async def finish() -> Any:
            return await target

        self.loop = self.loop or asyncio.new_event_loop()
        return self.loop.run_until_complete(finish())

    def seed(self, args: Any) -> dict[str, Any]:
        import random

        random.seed(*decode(args, self.incoming))
        return {}

    def read(self, request: dict[str, Any]) -> None:
        """Take what the test has put in place of the standard input."""
        if "stdin" in request:
            sys.stdin = io.StringIO(request["stdin"])
        if "input" in request:
            builtins.input = decode(request["input"], self.incoming)

    def printed(self) -> str:
        """Return what was printed into the test's hands, and forget it."""
        if not isinstance(sys.stdout, io.StringIO):
            return ""
        text = sys.stdout.getvalue()
        sys.stdout.seek(0)
        sys.stdout.truncate()
        return text

    def answer(self, request: dict[str, Any]) -> None:
        works: dict[str, Callable[[Any], dict[str, Any]]] = {
            "define": self.define,
            "names": self.named,
            "seed": self.seed,
        }
        self.read(request)
        work, content = works.get(request["operation"], self.apply), request.get("content", request)
        with contextlib.redirect_stdout(io.StringIO()) if request["captured"] else contextlib.nullcontext():
            try:
                reply = work(content)
            except BaseException as error:  # noqa: BLE001 - SystemExit too: the examiner judges
                reply = self.failure(error)
                if reply["status"] != "failed" or work == self.define:
                    traceback.print_exc(limit=-3)
            if request["captured"]:
                reply["printed"] = self.printed()
        self.channel.send(reply)

    def serve(self) -> None:
        while True:
            self.answer(self.channel.receive())
