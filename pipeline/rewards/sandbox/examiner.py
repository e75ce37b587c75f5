"""The process of the sandbox that runs a test against stand-ins, see `pipeline.rewards.sandbox.child`."""

from __future__ import annotations

import builtins
import collections.abc
import functools
import importlib
import operator
import re
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType

from pipeline.rewards.sandbox import confinement
from pipeline.rewards.sandbox.messages import (
    BASES,
    CHANGEABLE,
    LOCAL,
    OPERATIONS,
    VIEWS,
    Channel,
    Endless,
    Exceptions,
    Gone,
    base_of,
    decode,
    encode,
)
from pipeline.rewards.sandbox.remote import CLASS, USED, Awaitable, Kept, Remote, _refusal, is_plain, show

# Importing `typing` would take a tenth of the time in which the process starts.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_MESSAGES = 100_000
MANY_MESSAGES = 1_000
INPUT = builtins.input
KINDS = {"function": FunctionType, "generator": GeneratorType}


class Type(type):
    """What a test has in place of `type`, so that the class of a stand-in is that of its object."""

    def __new__(cls, *args: Any) -> Any:
        if len(args) > 1:
            return super().__new__(cls, *args)
        found = args[0]._Remote__ask("type") if isinstance(args[0], Remote) else None
        return found if isinstance(found, Remote) else type(args[0])


class Examiner:
    """Runs the test against stand-ins for what the code defines.

    Args:
        channel: To the candidate.
        talking: What to do once they have exchanged many messages.
    """

    def __init__(self, channel: Channel, talking: Callable[[], object]) -> None:
        self.channel, self.status, self.talking = channel, "failed", talking
        self.messages = 0
        self.stdin = sys.stdin
        self.functions: list[Any] = []
        self.raised: list[BaseException] = []
        self.remotes: dict[int, Any] = {}
        self.classes: dict[tuple[str, type | None, bool], Any] = {}
        self.exceptions = Exceptions(
            {"__bool__": _was_raised, "__str__": _message, "__getattr__": lambda *args: self.attribute(*args)}
        )
        self.attributes: list[str] = []
        self.test = ""

    def other(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return {"kept": object.__getattribute__(value, "_Remote__number")}
        if isinstance(value, Kept):
            return {"kept": value._number}
        if base := base_of(type(value)):
            return encode(BASES[base](value), self.other)
        if type(value) in VIEWS:
            return encode(list(value), self.other)
        if callable(value) or isinstance(value, collections.abc.Iterator):
            kind, value = ("function", value) if callable(value) else ("iterator", value.__next__)
            name, doc = getattr(value, "__name__", "function"), getattr(value, "__doc__", None)
            return {kind: [self.number(value), str(name), doc if isinstance(doc, str) else None]}
        if type(value).__module__ == "test":
            return {"local": [self.number(value), type(value).__name__, None]}
        raise TypeError(f"a test cannot pass a {type(value).__name__} to the code")

    def number(self, value: object) -> int:
        """Return the number of a function or an object of the test; a method is another object each time, but equal."""
        is_method = isinstance(value, MethodType | BuiltinFunctionType)
        for number, known in enumerate(self.functions):
            if known is value or (is_method and type(known) is type(value) and known == value):
                return number
        self.functions.append(value)
        return len(self.functions) - 1

    def incoming(self, kind: str, content: Any) -> Any:
        if kind == "function":
            return self.functions[content]
        if kind == "view":
            entries = decode(content[1], self.incoming)
            return {"keys": entries.keys, "values": entries.values, "items": entries.items}[content[0]]()
        if kind != "kept":
            raise ValueError(f"not a value: {kind}")
        number, name, extends, plain, awaitable = content
        if number not in self.remotes:
            base = next((base for base in CHANGEABLE if base.__name__ == extends), None)
            if plain is None:
                self.remotes[int(number)] = remote = self.kind(str(name), base, bool(awaitable))(self, number)
                object.__setattr__(remote, "class__", extends == "type")
            else:
                value = decode(plain, self.incoming)
                self.remotes[int(number)] = kept = self.kind(str(name), type(value), False)(value)
                kept._examiner, kept._number = self, number
        return self.remotes[number]

    def kind(self, name: str, base: type | None, awaitable: bool) -> Any:
        """Return a class of stand-ins, which has the name of the code's class."""
        key = name, base, awaitable
        if key not in self.classes:
            if base is None or base in CHANGEABLE:
                members: dict[str, Any] = {"__slots__": (), "__doc__": vars(Remote)["__doc__"], "extends__": bool(base)}
                # `isinstance` looks at `__class__`, too.
                if seen := base or KINDS.get(name):
                    members["__class__"] = property(lambda self: seen)
                self.classes[key] = type(name, (Awaitable if awaitable else Remote,), members)
            else:
                self.classes[key] = type(name, (Kept, base), {})
        return self.classes[key]

    def named(self, kind: str, content: Any) -> object:
        """Decode what a name of the code refers to, which may also be a module or a class of exceptions."""
        if kind == "module" and content.partition(".")[0] in sys.stdlib_module_names:
            return importlib.import_module(content)
        return self.exceptions.find(content) if kind == "exception" else self.incoming(kind, content)

    def attribute(self, error: BaseException, name: str) -> Any:
        """Return an attribute of an exception of the code's."""
        number = vars(error).get("__kept__")
        if number is None or name.startswith("__"):
            raise AttributeError(name)
        return self.ask(number, "get", name)

    def is_object(self, number: int) -> bool:
        """Return whether an object has an attribute that the test uses, and plain values lack."""
        return bool(self.attributes) and self.ask(number, "has", *self.attributes) is True

    def receive(self) -> dict[str, Any]:
        self.messages += 1
        if self.messages == MANY_MESSAGES:
            self.talking()
        if self.messages > MAX_MESSAGES:
            raise Endless
        return self.channel.receive()

    def request(self, operation: str, message: dict[str, Any]) -> dict[str, Any]:
        captured = sys.stdout is not sys.__stdout__
        self.channel.send({"operation": operation, "captured": captured, **self.input(), **message})
        while "call" in (reply := self.receive()):
            self.print(reply)
            self.channel.send(self.call(reply))
        self.print(reply)
        if "error" in reply:
            raise self.error(reply, operation)
        return reply

    def input(self) -> dict[str, Any]:
        """Return what the test has put in place of the standard input."""
        put: dict[str, Any] = {}
        if sys.stdin is not self.stdin and (text := sys.stdin.read()):
            put["stdin"] = text
        if builtins.input is not INPUT:
            put["input"] = self.other(builtins.input)
        return put

    @staticmethod
    def print(reply: dict[str, Any]) -> None:
        if text := reply.get("printed"):
            print(text, end="")

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Call a function of the test for the code."""
        try:
            args, named = decode(request["args"], self.incoming), decode(request["named"], self.incoming)
            value = self.operate(self.functions[request["call"]], request["how"], args, named)
            return {"value": encode(value, self.other)}
        except Exception as error:  # noqa: BLE001 - a test may raise anything
            self.raised.append(error)
            described = {"error": Exceptions.describe(type(error)), "raised": len(self.raised) - 1}
            return {**described, "args": encode(tuple(map(str, error.args)), self.other)}

    def operate(self, target: Any, operation: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function of the test, or do with an object of the test what its class is for."""
        if operation == "call":
            return target(*args, **named)
        if type(target).__module__ != "test" or operation not in ("get", "set", *LOCAL):
            raise TypeError(operation)
        if operation in ("set", "__setitem__") and not compares_with_literals(self.test):
            raise TypeError("the code may not change what the test may compare with")
        # Neither what leads to the test's own variables nor its methods.
        is_method = operation == "set" and callable(getattr(type(target), args[0], None))
        if operation in ("get", "set") and (args[0].startswith("_") or is_method):
            raise AttributeError(args[0])
        return (OPERATIONS.get(operation) or getattr(operator, operation))(target, *args)

    def error(self, reply: dict[str, Any], operation: str) -> BaseException:
        attributes = decode(reply["attributes"], self.incoming)
        if reply["status"] in ("memory", "refused"):
            self.status = reply["status"]
        error = self.raised[attributes["__raised__"]] if "__raised__" in attributes else None
        if error is None:
            args = decode(reply["args"], self.incoming)
            error = self.exceptions.make(reply["error"], args, attributes)
            vars(error).update(__message__=reply["message"], __kept__=int(reply["kept"]))
        if isinstance(error, StopIteration) and operation != "__next__":
            return RuntimeError(reply["message"])  # as in a generator: it would end a loop of the test
        if "cause" in reply:
            error.__cause__ = self.error(reply["cause"], operation)
        return error

    def ask(self, target: int, operation: str, *args: object, **named: object) -> Any:
        sent = {"target": target, "args": encode(args, self.other), "named": encode(named, self.other)}
        reply = self.request(operation, sent)
        if any(isinstance(arg, CHANGEABLE) for arg in args):
            self.change(args, reply)
        return decode(reply["value"], self.named if operation == "get" else self.incoming)

    def change(self, args: tuple[object, ...], reply: dict[str, Any]) -> None:
        """Change the arguments that the code changed in place."""
        before: Any
        for before, after in zip(args, decode(reply["args"], self.incoming), strict=True):
            changed = isinstance(before, CHANGEABLE) and type(before) is type(after) and before != after
            # What the code has changed must not be what its result is compared with.
            safe = reply["value"] is None or (compares_with_literals(self.test) and not combines_variables(self.test))
            if changed and safe:
                before.clear()
                before.extend(after) if isinstance(before, list) else before.update(after)

    @staticmethod
    def may_define(name: str, item: Any) -> bool:
        """Return whether the code may give the test this name: not a builtin's, nor a name for another exception."""
        renamed = isinstance(item, dict) and item.get("exception", [None, name])[1] != name
        return not (renamed or name.startswith("__") or hasattr(builtins, name))

    def seed(self, original: Callable[..., None]) -> Callable[..., None]:
        def seed(*args: object) -> None:
            original(*args)
            self.request("seed", {"content": encode(args, self.other)})

        return seed

    def examine(self, code: str, test: str) -> None:
        """Run the code and its test, and raise whatever stops the test."""
        self.test = test
        self.attributes = attributes_of_objects(test)
        defined = set(self.request("define", {"content": code})["names"])
        # Only what the test names, because the code's names may hold anything.
        wanted = sorted(defined.intersection(re.findall(r"\w+", test)))
        names = self.request("names", {"content": wanted})["names"].items()
        namespace = {name: decode(item, self.named) for name, item in names if self.may_define(name, item)}
        for name, value in namespace.items():
            if isinstance(value, Remote) and value.class__ and name[0].isupper():
                show(value, CLASS)
            elif isinstance(value, Remote) and value.extends__:
                show(value, USED)
        if "type(" in test:
            namespace["type"] = Type
        for name in sys.stdlib_module_names & namespace.keys():  # so that `math.isclose` is Python's
            used = re.findall(rf"\b{name}\.(\w+)", test)
            if used and all(hasattr(importlib.import_module(name), attribute) for attribute in used):
                namespace[name] = importlib.import_module(name)
        if "asyncio" in test:
            confinement.prepare_asyncio()
        if re.search(r"\bseed\b", test):
            import random

            random.seed = self.seed(random.seed)
        exec(compile(test, "test", "exec"), namespace | {"__name__": "test"})  # noqa: S102 - this process is confined, too
        if self.channel.gone:  # even if the test has caught it
            raise Gone
        for error in self.raised:  # even if the code has caught it
            if isinstance(error, AssertionError):
                raise error


def attributes_of_objects(test: str) -> list[str]:
    """List the attributes in a test that plain values lack, but for those of modules."""
    found = re.findall(r"(\w*)\s*\.\s*([A-Za-z_]\w*)", test)
    return sorted({name for owner, name in found if owner not in sys.stdlib_module_names and not is_plain(name)})


@functools.cache
def compares_with_literals(test: str) -> bool:
    """Return whether a test compares with nothing but literals, so that no changed argument can mislead it."""
    import ast  # takes long, and few tests need it

    def is_comparison(node: ast.expr) -> bool:
        return all(map(is_comparison, node.values)) if isinstance(node, ast.BoolOp) else isinstance(node, ast.Compare)

    def is_literal(node: ast.expr) -> bool:
        try:
            return not isinstance(ast.literal_eval(node), bool)
        except (ValueError, TypeError):
            return False

    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Attribute) and node.attr.startswith("assert")):
            return False
        if isinstance(node, ast.Assert) and not is_comparison(node.test):
            return False
        if isinstance(node, ast.Compare) and not any(map(is_literal, (node.left, *node.comparators))):
            return False
    return True


@functools.cache
def combines_variables(test: str) -> bool:
    """Return whether an expression of a test combines two variables: `abs(f(xs) - sum(xs))`, but not `xs[:k]`."""
    import ast

    def variables(node: ast.AST) -> int:
        parts: list[ast.AST] = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Name):
            return int(isinstance(node.ctx, ast.Load))
        if isinstance(node, ast.Subscript):
            parts = [node.value]
        if isinstance(node, ast.Call):
            method = isinstance(node.func, ast.Attribute) and is_plain(node.func.attr)
            parts = [*node.args, *node.keywords, *([node.func] if method else [])]
        return sum(map(variables, parts))

    kinds = (ast.BinOp, ast.Call, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.JoinedStr)
    nodes = list(ast.walk(ast.parse(test)))
    return any(isinstance(node, ast.AugAssign) or (isinstance(node, kinds) and variables(node) > 1) for node in nodes)


def _was_raised(error: BaseException) -> bool:
    if error.__traceback__ is None:  # an object like any other, if the test has only called its class
        raise _refusal("__bool__")
    return True


def _message(error: BaseException) -> str:
    return str(vars(error).get("__message__", Exception.__str__(error)))
