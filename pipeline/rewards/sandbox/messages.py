"""Messages between the two processes of `pipeline.rewards.sandbox.child`: plain values as JSON, over pipes."""

import json
import os
from collections.abc import Callable
from typing import Any

MESSAGE_BYTES = 8 << 20


class Gone(BaseException):
    """The other process has ended. It is a `BaseException`, which an `except Exception` in a test does not catch."""


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


def encode(value: object, other: Callable[[object], Any]) -> Any:
    """Encode plain data as JSON: scalars as they are, containers and big integers tagged, the rest by `other`."""
    if value is None or type(value) in (bool, float, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        number = int.__index__(value)
        return number if abs(number) < 1 << 62 else {"int": hex(number)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if type(value) is complex:
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, other), encode(item, other)] for key, item in dict.items(value)]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            plain: Any = kind  # its own __iter__, not a subclass's
            return {kind.__name__: [encode(item, other) for item in plain.__iter__(value)]}
    return other(value)


def decode(data: Any, other: Callable[[str, Any], object]) -> Any:
    """Decode what `encode` returned; every value has exactly a builtin type."""
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise ValueError("not an encoded value")
        return NaN("nan") if data != data else data
    ((kind, content),) = data.items()
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {decode(key, other): decode(item, other) for key, item in content}
    plain = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return plain[kind](decode(item, other) for item in content) if kind in plain else other(kind, content)
