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
from pipeline.rewards.sandbox.messages import BASES, CHANGEABLE, LOCAL, OPERATIONS, VIEWS, Endless, Gone, Peer, base_of
from pipeline.rewards.sandbox.remote import CLASS, PLAIN_NAMES, USED, Awaitable, Kept, Remote, refusal

# Importing `typing` would take a tenth of the time in which the process starts.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_MESSAGES = 100_000
MANY_MESSAGES = 1_000
INPUT = builtins.input
KINDS = {"function": FunctionType, "generator": GeneratorType}


class Type(type):
    """Replacement for `type` in a test, which returns the class of an object instead of the class of its stand-in."""

    def __new__(cls, *args: Any) -> Any:
        if len(args) > 1:
            return super().__new__(cls, *args)
        found = args[0].ask__("type") if isinstance(args[0], Remote) else None
        return found if isinstance(found, Remote) else type(args[0])


class Examiner(Peer):
    """Runs the test against stand-ins for what the code defines.

    `talking` is called once they have exchanged many messages.
    """

    def __init__(self, incoming: int, outgoing: int, talking: Callable[[], object]) -> None:
        members = {
            "__bool__": _was_raised,
            "__str__": lambda error: str(vars(error).get("__message__", Exception.__str__(error))),
            "__getattr__": lambda error, name: self.attribute(error, name),
        }
        super().__init__(incoming, outgoing, members)
        self.status = "failed"
        self.talking = talking
        self.messages = 0
        self.stdin = sys.stdin
        self.test = ""
        self.attributes: list[str] = []
        # What the candidate knows by number: functions and objects of the test, and what they raised.
        self.functions: list[Any] = []
        self.raised: list[BaseException] = []
        # Stand-ins by the candidate's numbers, and their classes.
        self.remotes: dict[int, Any] = {}
        self.classes: dict[tuple[str, type | None, bool], Any] = {}

    def examine(self, code: str, test: str) -> None:
        """Run the code and its test, and raise whatever stops the test."""
        self.test = test
        # `stack.push` shows that the test takes a value for an object: plain values and modules have no `push`.
        used = re.findall(r"(\w*)\s*\.\s*([A-Za-z_]\w*)", test)
        objects = {name for owner, name in used if owner not in sys.stdlib_module_names and name not in PLAIN_NAMES}
        self.attributes = sorted(objects)

        # Only what the test names, because the code's names may hold anything.
        defined = set(self.request("define", {"content": code})["names"])
        wanted = sorted(defined.intersection(re.findall(r"\w+", test)))
        namespace: dict[str, Any] = {}
        for name, item in self.request("names", {"content": wanted})["names"].items():
            # The code may not give the test another builtin, nor an exception under another's name.
            renamed = isinstance(item, dict) and item.get("exception", [None, name])[1] != name
            if renamed or name.startswith("__") or hasattr(builtins, name):
                continue
            namespace[name] = value = self.decode(item, named=True)
        for name, value in namespace.items():
            if isinstance(value, Remote) and value.state__.is_class and name[0].isupper():
                value.state__.shown = CLASS
            elif isinstance(value, Remote) and value.extends__:
                value.state__.shown = USED

        # What the test uses as a module of the standard library is Python's own: `math.isclose`, but not `random.f`.
        for name in sys.stdlib_module_names & namespace.keys():
            found = re.findall(rf"\b{name}\.(\w+)", test)
            if found and all(hasattr(importlib.import_module(name), attribute) for attribute in found):
                namespace[name] = importlib.import_module(name)
        if "type(" in test:
            namespace["type"] = Type
        if "asyncio" in test:
            confinement.prepare_asyncio()
        if re.search(r"\bseed\b", test):
            import random

            original = random.seed

            def seed(*args: Any) -> None:
                original(*args)
                self.request("seed", {"content": self.encode(args)})

            vars(random)["seed"] = seed

        # The test runs in a process that is confined as well.
        exec(compile(test, "test", "exec"), namespace | {"__name__": "test"})  # noqa: S102
        # The test or the code may have caught these two.
        if self.gone:
            raise Gone
        for error in self.raised:
            if isinstance(error, AssertionError):
                raise error

    def ask(self, target: int, operation: str, *args: object, **named: object) -> Any:
        """Do an operation on an object of the candidate and return the result."""
        reply = self.request(operation, {"target": target, "args": self.encode(args), "named": self.encode(named)})
        if any(isinstance(arg, CHANGEABLE) for arg in args):
            # What the code has changed must not be what its result is compared with.
            safe = reply["value"] is None or (compares_with_literals(self.test) and not combines_variables(self.test))
            before: Any
            for before, after in zip(args, self.decode(reply["args"]), strict=True):
                changed = isinstance(before, CHANGEABLE) and type(before) is type(after) and before != after
                if changed and safe:
                    before.clear()
                    before.extend(after) if isinstance(before, list) else before.update(after)
        return self.decode(reply["value"], named=operation == "get")

    def request(self, operation: str, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the reply to it, or raise what the code raised; meanwhile, do what the code asks.

        Output of the code goes where the test lets its own go, and the code reads what the test has put in place of
        the standard input.
        """
        captured = sys.stdout is not sys.__stdout__
        message = {"operation": operation, "captured": captured, **message}
        if sys.stdin is not self.stdin and (text := sys.stdin.read()):
            message["stdin"] = text
        if builtins.input is not INPUT:
            message["input"] = self.describe(builtins.input)
        self.send(message)
        while True:
            self.messages += 1
            if self.messages == MANY_MESSAGES:
                self.talking()
            if self.messages > MAX_MESSAGES:
                raise Endless
            reply = self.receive()
            if reply.get("printed"):
                print(reply["printed"], end="")
            if "call" not in reply:
                break
            self.send(self.call(reply))
        if "error" in reply:
            raise self.error(reply, operation)
        return reply

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Call a function of the test for the code, or do with an object of the test what its class is for."""
        try:
            args, named = self.decode(request["args"]), self.decode(request["named"])
            target, operation = self.functions[request["call"]], request["how"]
            if operation == "call":
                return {"value": self.encode(target(*args, **named))}
            if type(target).__module__ != "test" or operation not in ("get", "set", *LOCAL):
                raise TypeError(operation)
            if operation in ("set", "__setitem__") and not compares_with_literals(self.test):
                raise TypeError("the code may not change what the test may compare with")
            # Neither what leads to the test's own variables nor its methods.
            is_method = operation == "set" and callable(getattr(type(target), args[0], None))
            if operation in ("get", "set") and (args[0].startswith("_") or is_method):
                raise AttributeError(args[0])
            function = OPERATIONS.get(operation) or getattr(operator, operation)
            return {"value": self.encode(function(target, *args))}
        # A test may raise anything.
        except Exception as error:  # noqa: BLE001
            self.raised.append(error)
            described = {"error": self.describe_exception(type(error)), "raised": len(self.raised) - 1}
            return {**described, "args": self.encode(tuple(map(str, error.args)))}

    def error(self, reply: dict[str, Any], operation: str) -> BaseException:
        """Return the exception that the code raised: the test's own if the code let it through, or one like it."""
        attributes = self.decode(reply["attributes"])
        if reply["status"] in ("memory", "refused"):
            self.status = reply["status"]
        error = self.raised[attributes["__raised__"]] if "__raised__" in attributes else None
        if error is None:
            error = self.make_exception(reply["error"], self.decode(reply["args"]), attributes)
            vars(error).update(__message__=reply["message"], __kept__=int(reply["kept"]))
        # As in a generator: it would end a loop of the test.
        if isinstance(error, StopIteration) and operation != "__next__":
            return RuntimeError(reply["message"])
        if "cause" in reply:
            error.__cause__ = self.error(reply["cause"], operation)
        return error

    def attribute(self, error: BaseException, name: str) -> Any:
        """Return an attribute of an exception that the code has raised."""
        number = vars(error).get("__kept__")
        if number is None or name.startswith("__"):
            raise AttributeError(name)
        return self.ask(number, "get", name)

    def describe(self, value: Any) -> Any:
        """Describe a value that is not plain: an object of the code, or a function, iterator or object of the test."""
        if isinstance(value, Remote):
            return {"kept": value.state__.number}
        if isinstance(value, Kept):
            return {"kept": value._number}
        if base := base_of(type(value)):
            return self.encode(BASES[base](value))
        if type(value) in VIEWS:
            return self.encode(list(value))
        if callable(value):
            kind = "function"
        elif isinstance(value, collections.abc.Iterator):
            kind, value = "iterator", value.__next__
        elif type(value).__module__ == "test":
            kind = "local"
        else:
            raise TypeError(f"a test cannot pass a {type(value).__name__} to the code")

        # A method is another object each time, but equal.
        is_method = isinstance(value, MethodType | BuiltinFunctionType)
        same = (
            number
            for number, known in enumerate(self.functions)
            if known is value or (is_method and type(known) is type(value) and known == value)
        )
        number = next(same, len(self.functions))
        if number == len(self.functions):
            self.functions.append(value)
        if kind == "local":
            return {kind: [number, type(value).__name__, None]}
        doc = getattr(value, "__doc__", None)
        return {kind: [number, str(getattr(value, "__name__", "function")), doc if isinstance(doc, str) else None]}

    def resolve(self, kind: str, content: Any, named: bool) -> Any:
        """Return a function of the test, or a stand-in for an object of the code."""
        if named and kind == "module" and content.partition(".")[0] in sys.stdlib_module_names:
            return importlib.import_module(content)
        if named and kind == "exception":
            return self.find_exception(content)
        if kind == "function":
            return self.functions[content]
        if kind == "view":
            entries = self.decode(content[1])
            return {"keys": entries.keys, "values": entries.values, "items": entries.items}[content[0]]()
        if kind != "kept":
            raise ValueError(f"not a value: {kind}")
        number, name, extends, plain, awaitable = content
        if number in self.remotes:
            return self.remotes[number]

        # What extends int, float, str, bytes or tuple comes with its value. For the others, a `Remote` asks.
        value = self.decode(plain)
        base = next((base for base in CHANGEABLE if base.__name__ == extends), None) if plain is None else type(value)
        # Each class of the code gets its own class of stand-ins, with the same name.
        key = str(name), base, plain is None and bool(awaitable)
        if key not in self.classes:
            if base is None or base in CHANGEABLE:
                members: dict[str, Any] = {"__slots__": (), "__doc__": vars(Remote)["__doc__"], "extends__": bool(base)}
                # `isinstance` looks at `__class__`, too.
                if seen := base or KINDS.get(key[0]):
                    members["__class__"] = property(lambda self: seen)
                self.classes[key] = type(key[0], (Awaitable if awaitable else Remote,), members)
            else:
                self.classes[key] = type(key[0], (Kept, base), {})
        stand_in: Any = (
            self.classes[key](self, number, extends == "type") if plain is None else self.classes[key](value)
        )
        if plain is not None:
            stand_in._examiner, stand_in._number = self, number
        self.remotes[int(number)] = stand_in
        return stand_in


@functools.cache
def compares_with_literals(test: str) -> bool:
    """Return whether a test compares with nothing but literals, so that no changed argument can mislead it."""
    # This takes long to import, and few tests need it.
    import ast

    def is_literal(node: ast.expr) -> bool:
        try:
            return not isinstance(ast.literal_eval(node), bool)
        except (ValueError, TypeError):
            return False

    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Attribute) and node.attr.startswith("assert")):
            return False
        if isinstance(node, ast.Compare) and not any(map(is_literal, (node.left, *node.comparators))):
            return False
        if isinstance(node, ast.Assert):
            # Comparisons, perhaps joined by `and` and `or`.
            parts = [node.test]
            for part in parts:
                if isinstance(part, ast.BoolOp):
                    parts.extend(part.values)
                elif not isinstance(part, ast.Compare):
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
            method = isinstance(node.func, ast.Attribute) and node.func.attr in PLAIN_NAMES
            parts = [*node.args, *node.keywords, *([node.func] if method else [])]
        return sum(map(variables, parts))

    kinds = (ast.BinOp, ast.Call, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.JoinedStr)
    nodes = list(ast.walk(ast.parse(test)))
    return any(isinstance(node, ast.AugAssign) or (isinstance(node, kinds) and variables(node) > 1) for node in nodes)


def _was_raised(error: BaseException) -> bool:
    # An object like any other, if the test has only called its class.
    if error.__traceback__ is None:
        raise refusal("__bool__")
    return True
