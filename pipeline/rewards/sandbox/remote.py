"""Stand-ins for objects of the code, which the examiner's test works with, see `pipeline.rewards.sandbox.child`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

# Importing `typing` would take a tenth of the time in which the process starts.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PLAIN_TYPES = (int, float, complex, str, bytes, list, tuple, dict, set)
OPERATORS = (
    "getitem", "setitem", "delitem", "enter", "exit", "str", "repr", "hash", "format",
    "aiter", "anext", "aenter", "aexit",
)  # fmt: skip
CONVERSIONS = ("iter", "next", "reversed", "len", "neg", "pos", "abs", "invert", "int", "float", "index", "round")
COMPARISONS = ("lt", "le", "gt", "ge")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul", "lshift", "rshift")
ARITHMETIC = (*_BINARY, *(f"r{name}" for name in _BINARY), *(f"i{name}" for name in _BINARY), "divmod")

UNKNOWN, USED, OBJECT, CLASS = range(4)
"""What the test has shown that it takes a stand-in for:

UNKNOWN: perhaps for a plain value, such as what a function has returned.
USED: for what an object has returned, so that its truth may be its own.
OBJECT: for an object, of which the test has used an attribute that plain values lack, or which it made of a class.
CLASS: for a class, whose name begins with a capital.
"""


class Remote:
    # An object that stays with the candidate, which must not decide what the test asks about plain values.
    #
    # It never equals a plain value and is not ordered with one, unless its class extends list, dict or set: then its
    # items are compared. Until the test has shown that it takes it for an object (UNKNOWN, …), `in` compares its items,
    # it is neither true nor false, and arithmetic with a plain value must result in an object (`mixed`), which no
    # operator turns into a plain value. Methods and attributes are the code's own, and its class compares two objects.
    # (It has no docstring, because `__doc__` is the code's own.)

    __slots__ = ("__examiner", "__number", "class__", "mixed__", "shown__")
    extends__ = False  # whether the class extends list, dict or set

    def __init__(self, examiner: Any, number: int) -> None:
        fields = {
            "_Remote__examiner": examiner,
            "_Remote__number": number,
            "mixed__": False,
            "shown__": UNKNOWN,
            "class__": False,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __copy__(self) -> Any:
        return self.__ask("copy")

    def __deepcopy__(self, memo: object) -> Any:
        return self.__ask("deepcopy")

    def _Remote__ask(self, operation: str, *args: object, **named: object) -> Any:
        result = self.__examiner.ask(self.__number, operation, *args, **named)
        if isinstance(result, Remote) and result.shown__ < USED <= shown(self, *args):
            show(result, USED)
        return result

    def __call__(self, *args: object, **named: object) -> Any:
        result = self.__ask("call", *args, **named)
        if self.shown__ == CLASS and isinstance(result, Remote) and result.shown__ < OBJECT:
            show(result, OBJECT)
        return result

    def __getattr__(self, name: str) -> Any:
        plain = is_plain(name)
        guarded = self.shown__ < OBJECT and name.startswith(("is", "starts", "ends"))
        if plain and self.extends__ and (guarded or self.shown__ < USED):
            return getattr(self.__ask("plain"), name)
        if plain and (self.mixed__ or guarded):
            raise _refusal(name)
        if not plain and self.shown__ < OBJECT and not name.startswith("__"):
            show(self, OBJECT)
        return self.__ask("get", name)

    def __setattr__(self, name: str, value: object) -> None:
        self.__ask("set", name, value)

    def __contains__(self, value: object) -> bool:
        if self.shown__ >= OBJECT:
            return self.__ask("__contains__", value) is True
        return value in (self.__ask("plain") if self.extends__ else list(self))  # type: ignore[call-overload]

    def __bool__(self) -> bool:
        if self.extends__ and self.shown__ < USED:
            return bool(self.__ask("plain"))
        if self.shown__ < USED and not self.__examiner.is_object(self.__number):
            raise _refusal("__bool__")
        return self.__ask("__bool__") is True

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote):
            return self is other or self.__ask("__eq__", other) is True
        return self.extends__ and bool(self.__ask("plain") == other)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote | Kept) and self.__ask("isinstance", instance) is True

    def __subclasscheck__(self, kind: object) -> bool:
        return isinstance(kind, Remote) and self.__ask("issubclass", kind) is True

    @property
    def __doc__(self) -> Any:  # type: ignore[override]
        return self.__ask("get", "__doc__")


class Kept:
    # A plain value of a class of the code's that extends int, float, str, bytes or tuple. What those can do, it does
    # as they do, and what they lack, the code does.
    _examiner: Any
    _number: int

    def __getattr__(self, name: str) -> Any:
        if is_plain(name):
            raise _refusal(name)
        return self._examiner.ask(self._number, "get", name)

    def __repr__(self) -> str:
        return str(self._examiner.ask(self._number, "__repr__"))

    def __str__(self) -> str:
        return str(self._examiner.ask(self._number, "__str__"))


class Awaitable(Remote):
    __slots__ = ()

    def __await__(self) -> Iterator[Any]:
        return self._Remote__ask("await")
        yield

    def send(self, value: object) -> Any:
        raise StopIteration(self._Remote__ask("await"))

    def __next__(self) -> Any:  # what the loop calls in place of `send`, where there is one
        return self.send(None)

    def throw(self, *error: Any) -> Any:
        raise error[0]

    def close(self) -> None:
        pass


def is_plain(name: str) -> bool:
    """Return whether a plain value has an attribute of this name."""
    return any(hasattr(kind, name) for kind in PLAIN_TYPES)


def shown(*values: object) -> int:
    return max(value.shown__ if isinstance(value, Remote) else UNKNOWN for value in values)


def show(remote: Remote, what: int) -> None:
    object.__setattr__(remote, "shown__", what)


def _refusal(name: str) -> TypeError:
    return TypeError(f"an object must not decide {name} for a plain value; return a plain value")


def _operator(name: str, kind: tuple[str, ...]) -> Callable[..., Any]:
    def operate(self: Remote, *args: Any) -> Any:
        plain = not all(isinstance(operand, Remote) for operand in args)
        among_plain = name == "__iter__" or (kind in (COMPARISONS, ARITHMETIC) and plain)
        if self.extends__ and among_plain and self.shown__ < OBJECT:
            return getattr(self._Remote__ask("plain"), name)(*args)
        if (kind is COMPARISONS and plain) or (kind is CONVERSIONS and self.mixed__):
            raise _refusal(name)
        result = self._Remote__ask(name, *args)
        if kind is not ARITHMETIC:
            return result
        mixed = any(operand.mixed__ for operand in (self, *args) if isinstance(operand, Remote))
        if mixed or (plain and self.shown__ < OBJECT):
            if not isinstance(result, Remote):
                raise _refusal(name)
            object.__setattr__(result, "mixed__", True)
        elif isinstance(result, Remote) and result.shown__ < self.shown__ == OBJECT:
            show(result, OBJECT)
        return result

    return operate


def _sum_of_two(name: str) -> Callable[..., Any]:
    def operate(self: Kept, *args: Any) -> Any:
        if args and isinstance(args[0], Kept):
            return self._examiner.ask(self._number, name, *args)
        plain = getattr(super(Kept, self), name, None)
        return plain(*args) if plain else NotImplemented

    return operate


for _name in _BINARY:
    setattr(Kept, f"__{_name}__", _sum_of_two(f"__{_name}__"))
for _kind in (OPERATORS, CONVERSIONS, COMPARISONS, ARITHMETIC):
    for _name in _kind:
        setattr(Remote, f"__{_name}__", _operator(f"__{_name}__", _kind))
