"""What the two processes of `pipeline.rewards.sandbox.child` have in common: messages of plain values, over pipes."""

# The test calls `f([1, 2])`. This is what travels over the two pipes, each line as JSON behind its length:
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
# Plain values are sent as what they are, and each process makes objects of its own classes of them, so that no class
# of the code reaches the test. Anything else stays in its process, and only its number is sent.

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
from collections.abc import Callable

# Importing `typing` would take a tenth of the time in which the process starts.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MESSAGE_BYTES = 8 << 20

# Instances of these travel as plain values: each process builds them with its own class.
VALUES = {
    "builtins": ("bytearray", "complex", "range", "slice"),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
}
CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
CHANGEABLE = (list, dict, set)
VIEWS: dict[type, str] = {type(getattr({}, name)()): name for name in ("keys", "values", "items")}
# Classes that travel by their name.
CLASSES = {name: ("builtins", name) for name in ("bool", "bytes", "dict", "float", "int", "str", *CONTAINERS)}
CLASSES["NoneType"] = ("types", "NoneType")
CLASSES |= {name: (module, name) for module, names in VALUES.items() for name in names}
# How to get the plain value of an instance of a subclass without calling anything that the subclass overrides.
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

OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "call": lambda target, *args, **named: target(*args, **named),
    "type": type,
    **{f"__{name}__": getattr(builtins, name) for name in (
        "str", "repr", "hash", "iter", "next", "reversed", "len", "int", "float", "bool", "format", "round", "divmod",
    )},
}  # fmt: skip
"""How an operation on an object is done; `operator` knows the others."""

LOCAL = tuple(f"__{name}__" for name in (
    "eq", "lt", "le", "gt", "ge", "len", "iter", "getitem", "setitem", "contains", "str", "repr", "hash", "bool",
    "add", "sub", "mul",
))  # fmt: skip
"""What the code may do with an instance of a test's class, apart from reading and setting its public attributes."""


class Gone(BaseException):
    """The other process has ended. It is a `BaseException`, which an `except Exception` in a test does not catch."""


class Endless(BaseException):
    """The code talks with its test without end."""


class NaN(float):
    """NaN from the code: comparing its order raises, because `not nan > 8` is true, and arithmetic returns it."""

    def _refuse(self, *args: Any) -> Any:
        raise TypeError("the sandbox does not order NaN")

    def _keep(self, *args: Any) -> Any:
        return self

    __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _keep
    __abs__ = __neg__ = __round__ = _keep


def base_of(kind: type) -> type | None:
    """Return the plain class that a class extends, or None."""
    return next((base for base in kind.__mro__ if base in BASES), None)


class Peer:
    """One of the two processes: how it sends values to the other one, and reads what it receives.

    A subclass says in `describe` and `resolve` what it sends in place of objects that do not travel.

    Args:
        incoming, outgoing: Descriptors to read messages from, and to write messages to.
        members: What the classes of exceptions have that this process makes, because the other one has defined them.
    """

    describe: Callable[[Any], Any]
    resolve: Callable[[str, Any, bool], Any]

    def __init__(self, incoming: int, outgoing: int, members: dict[str, Any]) -> None:
        self.incoming = open(incoming, "rb")  # noqa: SIM115 - as long as the process lives
        self.outgoing = outgoing
        self.gone = False
        self.members = members
        self.exceptions: dict[str, type[BaseException]] = {}

    def send(self, message: dict[str, Any]) -> None:
        """Write a message.

        Raises:
            Gone: If the other process has ended.
        """
        text = json.dumps(message).encode()
        data = len(text).to_bytes(4, "big") + text
        try:
            while data:
                data = data[os.write(self.outgoing, data) :]
        except BrokenPipeError as error:
            self.gone = True
            raise Gone from error

    def receive(self) -> dict[str, Any]:
        """Wait for a message.

        Raises:
            Gone: If the other process has ended.
            ValueError: If it is too long, or not a message.
        """
        header = self.incoming.read(4)
        size = int.from_bytes(header, "big")
        if len(header) == 4 and size > MESSAGE_BYTES:
            raise ValueError("a message of more than 8 MiB")
        text = self.incoming.read(size)
        if len(header) < 4 or len(text) < size:
            self.gone = True
            raise Gone
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message

    def encode(self, value: Any) -> Any:
        """Encode plain data as JSON: scalars as they are, containers and other values tagged, the rest described."""
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if kind is int:
            return value if abs(value) < 1 << 62 else {"int": hex(value)}
        if kind is dict:
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if kind in CONTAINERS.values():
            return {kind.__name__: [self.encode(item) for item in value]}
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind.__name__ in VALUES.get(kind.__module__, ()):
            # What pickle would write: a class, its arguments, its state (None for all of these), items of a list, items
            # of a dict.
            _, args, _, items, pairs = (*value.__reduce_ex__(2), None, None, None)[:5]
            args = args[1:] if args[:1] == (kind,) else args
            parts = (tuple(args), list(items or ()), [list(pair) for pair in pairs or ()])
            return {"value": [kind.__name__, *map(self.encode, parts)]}
        if kind is type:
            travels = value.__name__ in VALUES.get(value.__module__, ())
            if travels or value in BASES or value in (bool, type(None)):
                return {"class": value.__name__}
        return self.describe(value)

    def decode(self, data: Any, named: bool = False) -> Any:
        """Decode what `encode` returned; every value has exactly a class of this process's own.

        What was found by its name in the code (`named`) may also be a module or an exception class.
        """
        if not isinstance(data, dict):
            if isinstance(data, list):
                raise ValueError("not an encoded value")
            return NaN("nan") if data != data else data
        ((kind, content),) = data.items()
        if kind == "int":
            return int(content, 16)
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "dict":
            return {self.decode(key, named): self.decode(item, named) for key, item in content}
        if kind in CONTAINERS:
            return CONTAINERS[kind](self.decode(item, named) for item in content)
        if kind in ("class", "value"):
            module, attribute = CLASSES[content if kind == "class" else content[0]]
            own = getattr(importlib.import_module(module), attribute)
            if kind == "class":
                return own
            args, items, pairs = (self.decode(part, named) for part in content[1:])
            value = own(*args)
            if isinstance(value, complex) and value != value:
                raise TypeError("the sandbox does not compare NaN")
            if items:
                value.extend(items)
            for key, item in pairs:
                value[key] = item
            return value
        return self.resolve(kind, content, named)

    def describe_exception(self, kind: type) -> list[Any]:
        """Return the module and the name of a class of exceptions, and the same of the classes that it extends."""
        bases = [base for base in kind.__bases__ if issubclass(base, BaseException)]
        return [kind.__module__, kind.__qualname__, [self.describe_exception(base) for base in bases]]

    def find_exception(self, description: list[Any]) -> type[BaseException]:
        """Return the class of this process that is described, or make one that extends the same of Python's."""
        module, name, bases = description
        if name in self.exceptions:
            return self.exceptions[name]
        source: Any = builtins
        if not hasattr(builtins, name) and module.partition(".")[0] in sys.stdlib_module_names:
            source = importlib.import_module(module)
        kind = getattr(source, name, None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            found = tuple(self.find_exception(base) for base in bases) or (Exception,)
            kind = type(name.rpartition(".")[2], found, dict(self.members))
            self.exceptions[name] = kind
        return kind

    def make_exception(
        self, description: list[Any], args: tuple[Any, ...], attributes: dict[str, Any]
    ) -> BaseException:
        """Make an exception without its class's `__init__`, which is the other process's; Python's own have fields."""
        kind = self.find_exception(description)
        error = kind(*args) if kind.__module__ == "builtins" else kind.__new__(kind, *args)
        vars(error).update(attributes)
        return error
