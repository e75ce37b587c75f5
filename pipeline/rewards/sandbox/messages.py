"""Messages of plain values over pipes, for both processes of `pipeline.rewards.sandbox.child`."""

# The test calls `f([1, 2])`. This is what travels over the two pipes, each message as JSON preceded by its length:
#
#     examiner (the test)                                      candidate (the code)
#     {"operation": "call", "target": 7,                  ->   kept[7](*args, **named)
#      "args": {"tuple": [{"list": [1, 2]}]}, …}
#                                                         <-   {"value": {"value": ["Fraction", …]}, "args": …}
#
# Before it answers, the code may call a function that the test has passed to it:
#
#                                                         <-   {"call": 0, "how": "call", "args": …, "named": …}
#     {"value": 3}                                        ->
#
# Plain values are sent by value, and each process rebuilds them with its own classes, so that no class of the code
# reaches the test. Anything else stays in its process, and only its number is sent.

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable

# Importing `typing` would take a tenth of the process's start time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Classes whose instances travel as plain values, and their modules: each process builds them with its own class.
VALUES = {
    **dict.fromkeys(("bytearray", "complex", "range", "slice"), "builtins"),
    **dict.fromkeys(("Counter", "OrderedDict", "defaultdict", "deque"), "collections"),
    **dict.fromkeys(("date", "datetime", "time", "timedelta", "timezone"), "datetime"),
    **{"Decimal": "decimal", "Fraction": "fractions"},
}
CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
CHANGEABLE = (list, dict, set)
# How to make a view of a dict from its items.
VIEWS: dict[type, Callable[[Any], Any]] = {
    type({}.keys()): lambda items: dict.fromkeys(items).keys(),
    type({}.values()): lambda items: dict(enumerate(items)).values(),
    type({}.items()): lambda items: dict(items).items(),
}
# How to make containers and views from their items, by the name of the class.
MAKERS = CONTAINERS | {kind.__name__: make for kind, make in VIEWS.items()}
# Classes that are sent by name.
CLASSES = VALUES | dict.fromkeys(("bool", "bytes", "dict", "float", "int", "str", *CONTAINERS), "builtins")
# How to get the plain value of a subclass's instance without calling anything that the subclass overrides.
BASES: dict[type, Callable[[Any], Any]] = {
    int: int.__index__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    dict: lambda value: dict(dict.items(value)),
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}
# What the code may do with an object of the test, apart from its public attributes.
COMPARISONS = ("__eq__", "__lt__", "__le__", "__gt__", "__ge__")


class Gone(BaseException):
    """The other process has ended. It is a `BaseException`, which an `except Exception` in a test does not catch."""


def base_of(kind: type) -> type | None:
    """Return the plain class that a class extends, or None."""
    return next((base for base in kind.__mro__ if base in BASES), None)


def class_named(name: str) -> Any:
    """Return the class of this process for a name in `CLASSES`; a `KeyError` means that there is none."""
    return getattr(importlib.import_module(CLASSES[name]), name)


class Peer:
    """One of the two processes, which exchange values through pipes.

    Attributes:
        describe: Method of a subclass. It returns the JSON that is sent instead of an object that is not plain.
        resolve: Method of a subclass. It returns the object for what the other process's `describe` has sent.
        gone: Whether the other process has ended.
        members: Attributes of each exception class that is made in place of the other process's class.
        exceptions: Exception classes that one of the processes has sent, by name.
    """

    describe: Callable[[Any], Any]
    resolve: Callable[[str, Any, bool], Any]

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming = open(incoming, "rb")  # noqa: SIM115 - as long as the process lives
        self.outgoing = outgoing
        self.gone = False
        self.members: dict[str, Any] = {}
        self.exceptions: dict[str, type[BaseException]] = {}

    def send(self, message: dict[str, Any]) -> None:
        """Write a message, or raise `Gone`."""
        text = json.dumps(message).encode()
        data = len(text).to_bytes(4, "big") + text
        try:
            while data:
                data = data[os.write(self.outgoing, data) :]
        except BrokenPipeError as error:
            self.gone = True
            raise Gone from error

    def receive(self) -> dict[str, Any]:
        """Wait for a message. Raise `Gone` if the other process has ended, a `ValueError` if it is too long."""
        header = self.incoming.read(4)
        size = int.from_bytes(header, "big")
        if len(header) == 4 and size > 8 << 20:
            raise ValueError("a message of more than 8 MiB")
        text = self.incoming.read(size)
        if len(header) < 4 or len(text) < size:
            self.gone = True
            raise Gone
        return json.loads(text)

    def encode(self, value: Any) -> Any:
        """Encode plain data as JSON: scalars as they are, containers and other values tagged, the rest described."""
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if kind is int:
            return value if abs(value) < 1 << 62 else {"int": hex(value)}
        if kind is dict:
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if kind in VIEWS or kind in CONTAINERS.values():
            return {kind.__name__: [self.encode(item) for item in value]}
        if kind is bytes:
            return {"bytes": value.hex()}
        if VALUES.get(kind.__name__) == kind.__module__:
            # What pickle would write: class, arguments, state (None for all plain classes), list items and dict items.
            _, args, _, items, pairs = (*value.__reduce_ex__(2), None, None, None)[:5]
            # Without the class, which is sent by its name.
            if args[:1] == (kind,):
                args = args[1:]
            parts = (tuple(args), list(items or ()), [list(pair) for pair in pairs or ()])
            return {"value": [kind.__name__, *map(self.encode, parts)]}
        if kind is type and CLASSES.get(value.__name__) == value.__module__:
            return {"class": value.__name__}
        return self.describe(value)

    def decode(self, data: Any, named: bool = False) -> Any:
        """Return the value that `encode` encoded.

        Args:
            data: JSON. The other process may have written anything.
            named: Whether the value has a name in the code. Only then it may be a module or an exception class.

        Raises:
            ValueError: If the value is NaN, or if `encode` would not return such data.
        """
        # `encode` tags lists.
        if isinstance(data, list):
            raise ValueError("not a value that the sandbox compares")
        # Only NaN differs from itself. `not nan > 8` is true, so NaN would pass tests.
        if data != data:
            raise ValueError("not a value that the sandbox compares")
        if not isinstance(data, dict):
            return data
        ((kind, content),) = data.items()
        if kind == "int":
            return int(content, 16)
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in content}
        if kind in MAKERS:
            return MAKERS[kind](map(self.decode, content))
        if kind == "class":
            return class_named(content)
        if kind == "value":
            name, *parts = content
            args, items, pairs = map(self.decode, parts)
            value = class_named(name)(*args)
            # NaN again, such as `complex("nan")`.
            if value != value:
                raise ValueError("not a value that the sandbox compares")
            if items:
                value.extend(items)
            for key, item in pairs:
                value[key] = item
            return value
        return self.resolve(kind, content, named)

    def describe_exception(self, kind: type[BaseException]) -> list[list[str]]:
        """Return module and name of an exception class and of its bases, the nearest first."""
        self.exceptions.setdefault(kind.__qualname__, kind)
        lineage = [base for base in kind.__mro__ if issubclass(base, BaseException)]
        return [[base.__module__, base.__qualname__] for base in lineage]

    def find_exception(self, lineage: list[list[str]]) -> type[BaseException]:
        """Return this process's class for a description, or make one that extends the same Python exceptions.

        `lineage` is what `describe_exception` returns: [["answer", "Full"], ["builtins", "ValueError"], …].
        """
        (module, name), *bases = lineage
        if name in self.exceptions:
            return self.exceptions[name]
        source: Any = builtins
        if not hasattr(builtins, name) and module.partition(".")[0] in sys.stdlib_module_names:
            source = importlib.import_module(module)
        kind = getattr(source, name, None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            base = self.find_exception(bases) if bases else Exception
            kind = type(name.rpartition(".")[2], (base,), dict(self.members))
            self.exceptions[name] = kind
        return kind


def print_error(error: BaseException, frames: int) -> None:
    """Print an error as Python does, with the last `frames` frames of the answer and of the test alone.

    The other frames belong to the sandbox and the standard library. Their paths differ between machines, and a model
    that reads the output would answer differently.
    """
    report = traceback.TracebackException.from_exception(error, lookup_lines=False)
    stack = [frame for frame in report.stack if frame.filename in ("answer", "test")]
    report.stack = traceback.StackSummary.from_list(stack[-frames:])
    print("".join(report.format(chain=False)), end="", file=sys.stderr)
