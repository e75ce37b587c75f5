"""Stand-ins for objects of the code that the examiner's test works with, see `pipeline.rewards.sandbox.child`."""

# Wrong code may return an object that says yes to everything:
#
#     class A:                                              assert f(2) == 3
#         def __eq__(self, other): return True              assert abs(f(2) - 3) < 1e-6
#         def __sub__(self, other): return 0                assert not f(2) > 3
#
# So an object of the code must not decide what a test asks about plain values. But honest tests of classes ask for
# just that, `Vector(1, 2) + Vector(3, 4) == Vector(4, 6)`. The difference is whether the test has shown that it expects
# an object. A stand-in remembers that in its state, as `expectation`.

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from types import SimpleNamespace

from pipeline.rewards.sandbox.messages import CHANGEABLE, TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

# `expectation`: what the test has shown that it expects a stand-in to be, in increasing order.
# UNKNOWN: perhaps a plain value. It is, for example, the result of a function.
# USED: the result of an operation with an object. The code may decide whether it is true.
# OBJECT: an object, because the test has used an attribute that plain values lack, or has called a class.
# CLASS: a class, because its name begins with a capital.
UNKNOWN, USED, OBJECT, CLASS = range(4)

# Names of attributes that plain values have.
_PLAIN_TYPES = (int, float, complex, str, bytes, list, tuple, dict, set)
PLAIN_NAMES = {name for kind in _PLAIN_TYPES for name in {*dir(kind), *dir(type)} if hasattr(kind, name)}

_OPERATORS = ("getitem", "setitem", "delitem", "enter", "exit", "str", "repr", "hash", "format")
_CONVERSIONS = ("iter", "next", "reversed", "len", "neg", "pos", "abs", "invert", "int", "float", "index", "round")
_COMPARISONS = ("lt", "le", "gt", "ge")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul", "lshift", "rshift")
_ARITHMETIC = (*_BINARY, *(f"r{name}" for name in _BINARY), *(f"i{name}" for name in _BINARY), "divmod")


def refusal(name: str) -> TypeError:
    """Return the exception for a decision that an object may not make."""
    return TypeError(f"an object must not decide {name} for a plain value; return a plain value")


class Remote:
    # Stand-in for an object that stays with the candidate.
    #
    # It never equals a plain value, unless its class extends int, list, … (`base`): then its plain value is compared.
    # Until the test has shown that it expects an object, `in` compares the items, and the stand-in is neither true nor
    # false. Methods, and comparisons of two stand-ins, are left to the code.
    #
    # This is a comment because a test may read the `__doc__` of the object. Attributes of the stand-in itself end with
    # two underscores, so that they are not confused with the object's.

    __slots__ = ("state__",)

    def __init__(self, examiner: Any, number: int, base: type | None, is_class: bool) -> None:
        state = SimpleNamespace(
            examiner=examiner,
            # The object's number in the candidate.
            number=number,
            # The plain class that the object's class extends, or None.
            base=base,
            is_class=is_class,
            # The plain value, once it has been requested.
            value=None,
            expectation=UNKNOWN,
            # Whether it results from a calculation with a plain value. Then further results must be objects, too.
            mixed=False,
        )
        # `__setattr__` sets attributes of the object.
        object.__setattr__(self, "state__", state)

    def ask__(self, operation: str, *args: object, **named: object) -> Any:
        state = self.state__
        result = state.examiner.ask(state.number, operation, *args, **named)
        expectation = max(value.state__.expectation for value in (self, *args) if isinstance(value, Remote))
        if isinstance(result, Remote) and result.state__.expectation < USED <= expectation:
            result.state__.expectation = USED
        return result

    def plain__(self) -> Any:
        # An immutable value is requested once: otherwise, the code could give each comparison a different one.
        state = self.state__
        if state.value is None or state.base in CHANGEABLE:
            state.value = self.ask__("plain")
        if type(state.value) is not state.base:
            raise refusal("its value")
        return state.value

    def __call__(self, *args: object, **named: object) -> Any:
        result = self.ask__("call", *args, **named)
        if self.state__.expectation == CLASS and isinstance(result, Remote):
            result.state__.expectation = max(result.state__.expectation, OBJECT)
        return result

    def __getattr__(self, name: str) -> Any:
        state = self.state__
        if name not in PLAIN_NAMES:
            if not name.startswith("__"):
                state.expectation = max(state.expectation, OBJECT)
            return self.ask__("get", name)
        # `isdigit`, `startswith`, … decide something about the value.
        decides = state.expectation < OBJECT and name.startswith(("is", "starts", "ends"))
        if state.base and (decides or state.expectation < USED):
            return getattr(self.plain__(), name)
        if state.mixed or decides:
            raise refusal(name)
        return self.ask__("get", name)

    __setattr__ = partialmethod(ask__, "set")  # type: ignore[misc]

    def __copy__(self, how: str = "copy") -> Any:
        # The copy of an object must not be a value that the code would like to return instead.
        state = self.state__
        if state.base and state.base not in CHANGEABLE:
            return self
        result = self.ask__("copy", how)
        if isinstance(result, Remote) and result.state__.base is state.base:
            result.state__.expectation = max(result.state__.expectation, state.expectation)
            result.state__.mixed |= state.mixed
        elif type(result) is not state.base:
            raise refusal(how)
        return result

    def __deepcopy__(self, memo: object) -> Any:
        return self.__copy__("deepcopy")

    def __contains__(self, value: object) -> bool:
        if self.state__.expectation >= OBJECT:
            return self.ask__("__contains__", value) is True
        items = self.plain__() if self.state__.base else list(self)  # type: ignore[call-overload]
        return value in items

    def __bool__(self) -> bool:
        state = self.state__
        if state.expectation >= USED:
            return self.ask__("__bool__") is True
        if state.base:
            return bool(self.plain__())
        # If the object has an attribute that the test uses and plain values lack, the test expects an object.
        attributes = state.examiner.attributes
        if attributes and self.ask__("has", *attributes) is True:
            return self.ask__("__bool__") is True
        raise refusal("__bool__")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote):
            return self is other or self.ask__("__eq__", other) is True
        return bool(self.state__.base and self.plain__() == other)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and self.ask__("isinstance", instance) is True

    def __subclasscheck__(self, kind: object) -> bool:
        return isinstance(kind, Remote) and self.ask__("issubclass", kind) is True

    # Without this, Python would find the docstring of this class.
    __doc__ = property(lambda self: self.__getattr__("__doc__"))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # `isinstance(stand_in, int)` looks here, too.
        return self.state__.base or Remote


# What an operator of a stand-in does depends on the other operand:
#
#                     with a plain value                                   with another stand-in
#     <, <=, >, >=    is refused                                           the code compares
#     +, -, *, ...    the code calculates. Unless the test expects an      the code calculates. If one of them is
#                     OBJECT, the result must be one (`mixed`)             `mixed`, the result must be an object
#     len, int, ...   the code converts; refused if `mixed`                -
#
# An object whose class extends int, list, … compares, calculates and converts like its plain value, until the test has
# shown that it expects an object.


def _operator(name: str, kind: tuple[str, ...]) -> Callable[..., Any]:
    """Return the method of `Remote` for an operator, such as `__add__`; `kind` is the tuple above that has its name."""

    def operate(self: Remote, *args: Any) -> Any:
        state = self.state__
        with_plain = not any(isinstance(operand, Remote) for operand in args)
        # The items of a str or a tuple cannot change, so its plain value has them.
        is_fixed_item = name == "__getitem__" and state.base not in CHANGEABLE
        as_plain = kind is _COMPARISONS
        if state.expectation < OBJECT and (kind is not _OPERATORS or is_fixed_item):
            as_plain = True
        if state.base and with_plain and as_plain:
            plain = self.plain__()
            if kind is _ARITHMETIC and not hasattr(plain, name):
                # Python then tries the operator of the other operand.
                return NotImplemented
            return getattr(plain, name)(*args)
        if kind is _COMPARISONS and with_plain:
            raise refusal(name)
        if kind is _CONVERSIONS and state.mixed:
            raise refusal(name)
        result = self.ask__(name, *args)
        if kind is not _ARITHMETIC:
            return result
        is_mixed = any(operand.state__.mixed for operand in (self, *args) if isinstance(operand, Remote))
        if is_mixed or (with_plain and state.expectation < OBJECT):
            if not isinstance(result, Remote):
                raise refusal(name)
            result.state__.mixed = True
        elif isinstance(result, Remote) and state.expectation == OBJECT:
            result.state__.expectation = max(result.state__.expectation, OBJECT)
        return result

    return operate


for _kind in (_OPERATORS, _CONVERSIONS, _COMPARISONS, _ARITHMETIC):
    for _name in _kind:
        setattr(Remote, f"__{_name}__", _operator(f"__{_name}__", _kind))
