"""Messages between the two processes of `pipeline.rewards.sandbox.child`: plain values as JSON, over pipes."""

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
# The value of an instance of a subclass, whatever that subclass overrides.
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

# What the code may do with an instance of a class of the test's, apart from reading and setting its public attributes.
_LOCAL = (
    "eq", "lt", "le", "gt", "ge", "len", "iter", "getitem", "setitem", "contains", "str", "repr", "hash", "bool",
    "add", "sub", "mul",
)  # fmt: skip
LOCAL = tuple(f"__{name}__" for name in _LOCAL)


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


class Channel:
    """Length-prefixed JSON over two file descriptors."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming, self.outgoing, self.gone = incoming, outgoing, False

    def send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message).encode()
        data = len(text).to_bytes(4, "big") + text
        try:
            while data:
                data = data[os.write(self.outgoing, data) :]
        except BrokenPipeError as error:
            self.gone = True
            raise Gone from error

    def receive(self) -> dict[str, Any]:
        size = int.from_bytes(self._read(4), "big")
        if size > MESSAGE_BYTES:
            raise ValueError("a message of more than 8 MiB")
        message = json.loads(self._read(size))
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = os.read(self.incoming, min(size - len(data), 1 << 16))
            if not part:
                self.gone = True
                raise Gone
            data += part
        return data


def base_of(kind: type) -> type | None:
    """Return the plain class that a class extends, or None."""
    return next((base for base in kind.__mro__ if base in BASES), None)


def encode(value: Any, other: Callable[[object], Any]) -> Any:
    """Encode plain data as JSON: scalars as they are, containers and other values tagged, the rest by `other`."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if abs(value) < 1 << 62 else {"int": hex(value)}
    if kind is dict:
        return {"dict": [[encode(key, other), encode(item, other)] for key, item in value.items()]}
    if kind in CONTAINERS.values():
        return {kind.__name__: [encode(item, other) for item in value]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if _travels(kind):
        # As for pickle: a class, its arguments, its state (of none of these), then items of a list and of a dict.
        _, args, _, items, pairs = (*value.__reduce_ex__(2), None, None, None)[:5]
        args = args[1:] if args[:1] == (kind,) else args
        parts = (tuple(args), list(items or ()), [list(pair) for pair in pairs or ()])
        return {"value": [kind.__name__, *(encode(part, other) for part in parts)]}
    if kind is type and (_travels(value) or value in BASES or value in (bool, type(None))):
        return {"class": value.__name__}
    return other(value)


def decode(data: Any, other: Callable[[str, Any], object]) -> Any:
    """Decode what `encode` returned; every value has exactly a class of this process's own."""
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
        return {decode(key, other): decode(item, other) for key, item in content}
    if kind in CONTAINERS:
        return CONTAINERS[kind](decode(item, other) for item in content)
    if kind == "class":
        return _own(content)
    if kind == "value":
        args, items, pairs = (decode(part, other) for part in content[1:])
        value = _own(content[0])(*args)
        if isinstance(value, complex) and value != value:
            raise TypeError("the sandbox does not compare NaN")
        if items:
            value.extend(items)
        for key, item in pairs:
            value[key] = item
        return value
    return other(kind, content)


def _travels(kind: type) -> bool:
    return kind.__name__ in VALUES.get(kind.__module__, ())


def _own(name: str) -> Any:
    module, attribute = CLASSES[name]
    return getattr(importlib.import_module(module), attribute)


class Exceptions:
    """The classes of exceptions that one process knows of the other.

    Args:
        methods: What the classes have that it makes itself, because the other process has defined them.
    """

    def __init__(self, methods: dict[str, Any]) -> None:
        self.methods = methods
        self.known: dict[str, type[BaseException]] = {}

    @staticmethod
    def describe(kind: type) -> list[Any]:
        bases = [base for base in kind.__bases__ if issubclass(base, BaseException)]
        return [kind.__module__, kind.__qualname__, [Exceptions.describe(base) for base in bases]]

    def find(self, description: list[Any]) -> type[BaseException]:
        module, name, bases = description
        if name in self.known:
            return self.known[name]
        source: Any = builtins
        if not hasattr(builtins, name) and module.partition(".")[0] in sys.stdlib_module_names:
            source = importlib.import_module(module)
        kind = getattr(source, name, None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            found = tuple(self.find(base) for base in bases) or (Exception,)
            kind = type(name.rpartition(".")[2], found, dict(self.methods))
            self.known[name] = kind
        return kind

    def make(self, description: list[Any], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
        """Make an exception without its class's `__init__`, which is the other process's; Python's own have fields."""
        kind = self.find(description)
        error = kind(*args) if kind.__module__ == "builtins" else kind.__new__(kind, *args)
        vars(error).update(attributes)
        return error
