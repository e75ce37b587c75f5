"""The process of the sandbox that runs the code in an answer.

`pipeline.rewards.sandbox.child` explains its part, and `messages` draws what it exchanges with the examiner.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import operator
import sys
from collections.abc import Callable
from functools import partial, partialmethod
from types import ModuleType, SimpleNamespace

from pipeline.rewards.sandbox.messages import BASES, COMPARISONS, CONTAINERS, TYPE_CHECKING, Peer, base_of, print_error

if TYPE_CHECKING:
    from typing import Any


def has_any(target: object, *names: str) -> bool:
    """Return whether an object has any of these attributes.

    `hasattr` is not used, because a class with `__getattr__` may claim to have every attribute.
    """
    attributes = set().union(*map(vars, type(target).__mro__), getattr(target, "__dict__", ()))
    return not attributes.isdisjoint(names)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "call": lambda target, *args, **named: target(*args, **named),
    "has": has_any,
    "copy": lambda target, how: getattr(importlib.import_module("copy"), how)(target),
    "isinstance": lambda target, instance: isinstance(instance, target),
    "issubclass": lambda target, kind: issubclass(kind, target),
    "type": type,
    "plain": lambda target: BASES[base_of(type(target)) or object](target),
    **{f"__{name}__": getattr(builtins, name) for name in (
        "str", "repr", "hash", "iter", "next", "reversed", "len", "int", "float", "bool", "format", "round", "divmod",
    )},
}  # fmt: skip
"""Operations that the test may do with an object, by the name in a request.

For other names, `operate` uses the function of the `operator` module or the method of the object's class.
"""


class Guest(SimpleNamespace):
    """Stand-in for an object of the test, which stays in the test's process.

    Reading or setting an attribute and comparing are requests to the examiner, which decides whether they are allowed.
    `_ask(how, *args)` sends such a request and returns the result.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._ask("get", name)


# `guest == 3` becomes `guest._ask("__eq__", 3)`.
for _name in ("__setattr__", *COMPARISONS):
    setattr(Guest, _name, partialmethod(lambda self, *request: self._ask(*request), _name))


class Candidate(Peer):
    """Run the code and answer the examiner's requests. The code can change anything in this process.

    Args:
        incoming: Descriptor of the pipe from the examiner.
        outgoing: Descriptor of the pipe to the examiner.
    """

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__(incoming, outgoing)
        # Objects that the examiner has stand-ins for. An object's number is its index in this list, which also keeps
        # the object alive, so that no other object gets its id.
        self.objects: list[Any] = []
        # The number of each object, by its id.
        self.numbers: dict[int, int] = {}
        # Stand-ins for the test's functions, iterators and objects, by the examiner's numbers.
        self.functions: dict[int, Any] = {}
        # The module whose globals the code defines.
        self.module = ModuleType("answer")

    def answer(self, request: dict[str, Any]) -> None:
        """Run the code, or do an operation with a kept object, and send the result or the error."""
        try:
            if "operation" in request:
                reply = self.operate(request)
            else:
                # dataclasses and typing look names up in the module.
                sys.modules["answer"] = self.module
                # This process was confined in order to run this.
                exec(compile(request["code"], "answer", "exec"), vars(self.module))  # noqa: S102
                reply = {"names": self.definitions()}
        # Whatever the code raises, SystemExit too, is for the examiner to judge.
        except BaseException as error:  # noqa: BLE001
            reply = self.report(error)
            if reply["status"] != "failed" or "code" in request:
                # Printing may fail because the output limit is reached.
                with contextlib.suppress(OSError):
                    print_error(error, frames=3)
        self.send(reply)

    def definitions(self) -> dict[str, Any]:
        """Return what the code has defined, encoded, by name."""
        containers = {dict, *CONTAINERS.values()}
        names = {}
        for name, value in vars(self.module).items():
            # Containers stay in this process, where the code may change them.
            names[name] = self.keep(value) if type(value) in containers else self.encode(value)
        return names

    def report(self, error: BaseException) -> dict[str, Any]:
        """Return the reply that describes what the code has raised."""
        status = "failed"
        if isinstance(error, MemoryError):
            status = "memory"
        elif isinstance(error, PermissionError):
            status = "refused"
        reply: dict[str, Any] = {"status": status, "message": "", "args": {"tuple": []}, "attributes": {"dict": []}}
        # The code may define the exception's class, its __str__ and its arguments.
        with contextlib.suppress(BaseException):
            reply["message"] = str(error)[:500]
        with contextlib.suppress(BaseException):
            reply["args"] = self.encode(tuple(error.args))
            reply["attributes"] = self.encode(dict(vars(error)))
        reply["error"] = self.describe_exception(type(error))
        return reply

    def operate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do with an object what the test did with its stand-in, and return the result and the arguments."""
        operation = request["operation"]
        target = self.objects[request["target"]]
        args = self.decode(request["args"])
        named = self.decode(request["named"])
        method = getattr(type(target), operation, None)
        function = OPERATIONS.get(operation) or getattr(operator, operation, method)
        value = NotImplemented
        if function is not None:
            value = function(target, *args, **named)
        if value is NotImplemented:
            raise TypeError(f"{type(target).__name__} has no {operation}")
        # The code may have changed its arguments in place, so they are sent back.
        return {"value": self.encode(value), "args": self.encode(args)}

    def describe(self, value: object) -> Any:
        """Describe a value that is not plain: an exception or module by name, a function of the test by number."""
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": self.describe_exception(value)}
        if type(value) is ModuleType:
            return {"module": value.__name__}
        for number, function in self.functions.items():
            if value is function:
                return {"function": number}
        return self.keep(value)

    def keep(self, value: object) -> Any:
        """Describe an object that stays here: its number, and the name of the plain class that its class extends.

        The name is "type" for a class, and None for an object of another class.
        """
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        base = type if isinstance(value, type) else base_of(type(value))
        return {"kept": [self.numbers[id(value)], base.__name__ if base else None]}

    def resolve(self, kind: str, content: Any, named: bool) -> object:
        """Return a kept object, or a stand-in for a function, an iterator or an object of the test.

        Args:
            kind: "kept", "function", "iterator" or "object".
            content: The object's number.
            named: Not used here; see `Peer.decode`.
        """
        if kind == "kept":
            return self.objects[content]

        def ask(how: str, /, *args: object, **named: object) -> object:
            self.send({"call": content, "how": how, "args": self.encode(args), "named": self.encode(named)})
            # While the test's function runs, it may use what the code has defined.
            while "operation" in (reply := self.receive()):
                self.answer(reply)
            if "error" in reply:
                raise self.find_exception(reply["error"])(*self.decode(reply["args"]))
            return self.decode(reply["value"])

        call = partial(ask, "call")
        stand_in: Any = call
        if kind == "object":
            stand_in = Guest(_ask=ask)
        elif kind == "iterator":
            # An iterator that calls until the call raises StopIteration; no result equals the new object.
            stand_in = iter(call, object())
        return self.functions.setdefault(content, stand_in)
