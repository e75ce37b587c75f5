"""The process of the sandbox that runs a test against stand-ins for the code's objects.

`pipeline.rewards.sandbox.child` explains its part, and `messages` draws what it exchanges with the candidate.
"""

from __future__ import annotations

import builtins
import importlib
import operator
import re
import sys

from pipeline.rewards.sandbox.messages import BASES, CHANGEABLE, COMPARISONS, TYPE_CHECKING, Gone, Peer, base_of
from pipeline.rewards.sandbox.remote import CLASS, PLAIN_NAMES, USED, Remote

if TYPE_CHECKING:
    from typing import Any


def compares_with_literals(test: str, among_others: bool = False) -> bool:
    """Return whether all comparisons of a test are of single values with literals.

    Example:
        `k = f(xs)`, `assert k == 2 and xs[:k] == [1, 2]`

    Args:
        test: Python source.
        among_others: Whether the test may also contain any other statements. Otherwise it may only call functions,
            assign, and combine comparisons.
    """
    # Few tests need this import, which takes long.
    import ast

    plain: list[type] = [ast.Module, ast.Assign, ast.Expr, ast.Assert, ast.BoolOp, ast.And, ast.Eq, ast.expr_context]
    plain += [ast.Name, ast.Attribute, ast.Constant, ast.Slice, ast.UnaryOp, ast.USub]

    def is_allowed(node: ast.AST) -> bool:
        match node:
            case ast.Compare(left, [ast.Eq() | ast.Is() | ast.IsNot()], [literal]):
                calculates = any(isinstance(part, ast.BinOp) for part in ast.walk(left))
                has_names = any(isinstance(part, ast.Name) for part in ast.walk(literal))
                return not calculates and not has_names
            # `assert isclose(f(n), n.next)` compares with something that is not a literal.
            case ast.Assert(test) if among_others:
                return isinstance(test, ast.Compare)
            # The called function or class, and at most one variable.
            case ast.Call(func=ast.Name() | ast.Attribute(value=ast.Call())):
                return sum(isinstance(part, ast.Name) for part in ast.walk(node)) <= 2
            case ast.List() | ast.Tuple() | ast.Set() | ast.Dict():
                return not any(isinstance(part, ast.Name) for part in ast.walk(node))
            case ast.Subscript(slice=ast.Slice()):
                return True
        return isinstance(node, tuple(plain))

    checked = (ast.Compare, ast.Assert) if among_others else ast.AST
    return all(is_allowed(node) for node in ast.walk(ast.parse(test)) if isinstance(node, checked))


class Type(type):
    """Replacement of `type` in tests. For a stand-in, it returns the stand-in of the object's class."""

    def __new__(cls, value: Any, *more: Any) -> Any:
        if more:
            return super().__new__(cls, value, *more)
        if isinstance(value, Remote):
            kind = value.ask__("type")
            if isinstance(kind, Remote):
                return kind
        return type(value)


class Examiner(Peer):
    """Run the test against stand-ins for what the code has defined.

    Attributes:
        status: The verdict if the test raises an exception: "failed", or "memory" or "refused" if the code ran out of
            memory or was refused something.
    """

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__(incoming, outgoing)
        self.members = {
            # An exception that was not raised is an object like any other: neither true nor false.
            "__bool__": lambda error: True if error.__traceback__ else None,
            "__str__": lambda error: str(vars(error).get("__message__", Exception.__str__(error))),
        }
        self.status = "failed"
        # The test, and the attributes that it uses although plain values lack them.
        self.test = ""
        self.attributes: list[str] = []
        # Functions, iterators and objects of the test that were passed to the candidate. Their numbers are the indices.
        self.functions: list[Any] = []
        # Assertions that failed while the code called these functions. The code may have caught the exceptions.
        self.failures: list[AssertionError] = []
        # Stand-ins for objects of the candidate, by its numbers.
        self.remotes: dict[int, Remote] = {}

    def examine(self, code: str, test: str) -> None:
        """Run the code and its test, and raise whatever the test raises."""
        self.test = test
        # `stack.push` shows that the test expects an object: plain values and modules have no `push`.
        accesses = re.findall(r"(\w*)\s*\.\s*([A-Za-z_]\w*)", test)
        modules = sys.stdlib_module_names
        self.attributes = [name for owner, name in accesses if owner not in modules and name not in PLAIN_NAMES]

        definitions = self.request({"code": code})["names"]
        namespace = self.namespace(definitions)
        # The test runs in a confined process, too.
        exec(compile(test, "test", "exec"), namespace)  # noqa: S102
        # The test or the code may have swallowed these.
        if self.gone:
            raise Gone
        if self.failures:
            raise self.failures[0]

    def namespace(self, definitions: dict[str, Any]) -> dict[str, Any]:
        """Return the globals of the test: what the code has defined, as values and stand-ins.

        Args:
            definitions: The encoded values by name, as the candidate sent them.
        """
        namespace: dict[str, Any] = {"__name__": "test"}
        if "type(" in self.test:
            namespace["type"] = Type
        # Only copy the names that the test uses, because the code's names may hold anything.
        for name in definitions.keys() & set(re.findall(r"\w+", self.test)):
            item = definitions[name]
            # The code must not replace a builtin in the test, or give it an exception under another name.
            is_renamed = isinstance(item, dict) and "exception" in item and item["exception"][0][1] != name
            if is_renamed or name.startswith("__") or hasattr(builtins, name):
                continue
            value = self.decode(item, named=True)
            namespace[name] = value
            if not isinstance(value, Remote):
                continue
            if value.state__.is_class and name[0].isupper():
                value.state__.expectation = CLASS
            elif value.state__.base:
                value.state__.expectation = USED

        # A standard library module in the test is Python's own: `math.isclose`, but not `random.f`.
        for name in sys.stdlib_module_names & namespace.keys():
            attributes = re.findall(rf"\b{name}\.(\w+)", self.test)
            if attributes and all(hasattr(importlib.import_module(name), attribute) for attribute in attributes):
                namespace[name] = importlib.import_module(name)
        return namespace

    def ask(self, target: int, operation: str, *args: object, **named: object) -> Any:
        """Do an operation with an object of the candidate and return the result.

        Args:
            target: The object's number.
            operation: A key of `candidate.OPERATIONS`, or the name of a method.
            *args: Arguments of the operation. Lists, dicts and sets may be changed in place.
            **named: Keyword arguments of the operation.
        """
        message = {"operation": operation, "target": target, "args": self.encode(args), "named": self.encode(named)}
        reply = self.request(message)
        # Normally, a test compares the result with the arguments as they were: wrong code could change both to be
        # equal. The code's changes count if the call returns None, or if the test compares only with literals.
        if reply["value"] is None or (reply["args"] != message["args"] and compares_with_literals(self.test)):
            argument: Any
            for argument, changed in zip(args, self.decode(reply["args"]), strict=True):
                if not isinstance(argument, CHANGEABLE) or type(argument) is not type(changed) or argument == changed:
                    continue
                argument.clear()
                if isinstance(argument, list):
                    argument.extend(changed)
                else:
                    argument.update(changed)
        return self.decode(reply["value"], named=operation == "get")

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request, serve the code's own requests meanwhile, and return the reply or raise the code's error."""
        self.send(message)
        while "call" in (reply := self.receive()):
            try:
                args = self.decode(reply["args"])
                named = self.decode(reply["named"])
                result = self.use(self.functions[reply["call"]], reply["how"], args, named)
                answer = {"value": self.encode(result)}
            # A function of the test may raise anything.
            except Exception as exception:  # noqa: BLE001
                if isinstance(exception, AssertionError):
                    self.failures.append(exception)
                texts = self.encode(tuple(map(str, exception.args)))
                answer = {"error": self.describe_exception(type(exception)), "args": texts}
            self.send(answer)
        if "error" not in reply:
            return reply
        if reply["status"] in ("memory", "refused"):
            self.status = reply["status"]
        kind = self.find_exception(reply["error"])
        args = self.decode(reply["args"])
        # Python's own exceptions have fields, and the `__init__` of others belongs to the code.
        error: Any = kind(*args) if kind.__module__ == "builtins" else kind.__new__(kind, *args)
        vars(error).update(self.decode(reply["attributes"]), __message__=reply["message"])
        # The candidate has printed errors of the code itself, and refusals.
        vars(error)["__printed__"] = "code" in message or reply["status"] != "failed"
        # A StopIteration would end a loop of the test, so it becomes a RuntimeError, as in a generator.
        if isinstance(error, StopIteration) and message.get("operation") != "__next__":
            error = RuntimeError(reply["message"])
        raise error

    def use(self, target: Any, how: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Do for the code what it requests with a function, iterator or object of the test, if that is allowed.

        Args:
            target: The function, iterator or object.
            how: "call", "get", "__setattr__", or one of `COMPARISONS`.
            args: For a call, its arguments. For an attribute, its name, and the new value if it is set.
            named: Keyword arguments of a call.
        """
        if how == "call":
            # An iterator is called for its next item.
            function = target if callable(target) else target.__next__
            return function(*args, **named)
        if how in COMPARISONS:
            return getattr(operator, how)(target, *args)
        name, *value = args
        # Private names lead to the test's own variables.
        if type(target).__module__ != "test" or name.startswith("_"):
            raise AttributeError(name)
        if how == "get":
            return getattr(target, name)
        # The code may set attributes that link objects, such as `node.next`. It may change neither methods nor what its
        # result is compared with.
        is_link = name in vars(target) and (value[0] is None or type(value[0]).__module__ == "test")
        if how != "__setattr__" or not is_link or not compares_with_literals(self.test, among_others=True):
            raise TypeError(f"the code may not change {name}")
        return setattr(target, name, *value)

    def describe(self, value: Any) -> Any:
        """Describe a value that is not plain: an object of the code, or a function, iterator or object of the test."""
        if isinstance(value, Remote):
            return {"kept": value.state__.number}
        base = base_of(type(value))
        if base:
            return self.encode(BASES[base](value))
        if callable(value):
            kind = "function"
        elif hasattr(value, "__next__"):
            kind = "iterator"
        elif type(value).__module__ == "test":
            kind = "object"
        else:
            raise TypeError(f"a test cannot pass a {type(value).__name__} to the code")
        for number, function in enumerate(self.functions):
            if function is value:
                return {kind: number}
        self.functions.append(value)
        return {kind: len(self.functions) - 1}

    def resolve(self, kind: str, content: Any, named: bool) -> Any:
        """Return a function, iterator or object of the test, or a stand-in for an object of the code.

        Args:
            kind: "function", "module", "exception" or "kept".
            content: The number of a function; the name of a module or exception; number and plain class of an object.
            named: Whether a module or an exception is allowed.

        Raises:
            ValueError: If `kind` is none of them, because the candidate may send anything.
        """
        if named and kind == "module" and content.partition(".")[0] in sys.stdlib_module_names:
            return importlib.import_module(content)
        if named and kind == "exception":
            return self.find_exception(content)
        if kind == "function":
            return self.functions[content]
        if kind != "kept":
            raise ValueError(f"not a value: {kind}")
        number, base_name = content
        base = next((base for base in BASES if base.__name__ == base_name), None)
        stand_in = Remote(self, int(number), base, is_class=base_name == "type")
        return self.remotes.setdefault(int(number), stand_in)
