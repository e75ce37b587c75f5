"""The process of the sandbox that runs a test against stand-ins, see `pipeline.rewards.sandbox.child`."""

import builtins
import collections.abc
import functools
import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

from pipeline.rewards.sandbox import confinement
from pipeline.rewards.sandbox.messages import BASES, Channel, Endless, Exceptions, Gone, base_of, decode, encode
from pipeline.rewards.sandbox.remote import CLASS, Awaitable, Kept, Remote, _refusal, is_plain, show

MAX_MESSAGES = 100_000
MANY_MESSAGES = 1_000
CHANGEABLE = (list, dict, set)
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


class Examiner:
    """Runs the test against stand-ins for what the code defines.

    Args:
        channel: To the candidate.
        talking: What to do once they have exchanged many messages.
    """

    def __init__(self, channel: Channel, talking: Callable[[], object]) -> None:
        self.channel, self.status, self.talking = channel, "failed", talking
        self.messages = 0
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
        if isinstance(value, VIEWS):
            return encode(list(value), self.other)
        if callable(value) or isinstance(value, collections.abc.Iterator):
            kind, value = ("function", value) if callable(value) else ("iterator", value.__next__)
            if value not in self.functions:
                self.functions.append(value)
            name, doc = getattr(value, "__name__", "function"), getattr(value, "__doc__", None)
            return {kind: [self.functions.index(value), str(name), doc if isinstance(doc, str) else None]}
        raise TypeError(f"a test cannot pass a {type(value).__name__} to the code")

    def incoming(self, kind: str, content: Any) -> Any:
        if kind == "function":
            return self.functions[content]
        if kind != "kept":
            raise ValueError(f"not a value: {kind}")
        number, name, plain, awaitable = content
        if number not in self.remotes:
            value = decode(plain, self.incoming)
            immutable = value is not None and not isinstance(value, CHANGEABLE)
            kind_of = self.kind(str(name), type(value) if value is not None else None, bool(awaitable))
            self.remotes[int(number)] = remote = kind_of(value) if immutable else kind_of(self, number)
            if immutable:
                remote._examiner, remote._number = self, number
        return self.remotes[number]

    def kind(self, name: str, base: type | None, awaitable: bool) -> Any:
        """Return a class of stand-ins, which has the name of the code's class."""
        key = name, base, awaitable
        if key not in self.classes:
            if base is None or base in CHANGEABLE:
                # `isinstance` looks at `__class__`, too.
                members: dict[str, Any] = {"__slots__": ()}
                if base:
                    members |= {"extends__": True, "__class__": property(lambda self: base)}
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
        self.channel.send({"operation": operation, "captured": captured, **message})
        while "call" in (reply := self.receive()):
            self.print(reply)
            self.channel.send(self.call(reply))
        self.print(reply)
        if "error" in reply:
            raise self.error(reply, operation)
        return reply

    @staticmethod
    def print(reply: dict[str, Any]) -> None:
        if text := reply.get("printed"):
            print(text, end="")

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Call a function of the test for the code."""
        try:
            args, named = decode(request["args"], self.incoming), decode(request["named"], self.incoming)
            return {"value": encode(self.functions[request["call"]](*args, **named), self.other)}
        except Exception as error:  # noqa: BLE001 - a test may raise anything
            self.raised.append(error)
            described = {"error": Exceptions.describe(type(error)), "raised": len(self.raised) - 1}
            return {**described, "args": encode(tuple(map(str, error.args)), self.other)}

    def error(self, reply: dict[str, Any], operation: str) -> BaseException:
        attributes = decode(reply["attributes"], self.incoming)
        if "__raised__" in attributes:
            return self.raised[attributes["__raised__"]]
        if reply["status"] in ("memory", "refused"):
            self.status = reply["status"]
        args = decode(reply["args"], self.incoming)
        error = self.exceptions.make(reply["error"], args, attributes)
        if isinstance(error, StopIteration) and operation != "__next__":
            return RuntimeError(reply["message"])  # as in a generator: it would end a loop of the test
        vars(error).update(__message__=reply["message"], __kept__=int(reply["kept"]))
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
            if changed and (reply["value"] is None or compares_with_literals(self.test)):
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
            if isinstance(value, Remote) and name[0].isupper():
                show(value, CLASS)
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
            ast.literal_eval(node)
        except (ValueError, TypeError):
            return False
        return True

    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Attribute) and node.attr.startswith("assert")):
            return False
        if isinstance(node, ast.Assert) and not is_comparison(node.test):
            return False
        if isinstance(node, ast.Compare) and not any(map(is_literal, (node.left, *node.comparators))):
            return False
    return True


def _was_raised(error: BaseException) -> bool:
    if error.__traceback__ is None:  # an object like any other, if the test has only called its class
        raise _refusal("__bool__")
    return True


def _message(error: BaseException) -> str:
    return str(vars(error).get("__message__", Exception.__str__(error)))
