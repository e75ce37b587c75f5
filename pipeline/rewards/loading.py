"""Load rewards by name: those of `pipeline.rewards.functions`, and functions that the user wrote."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, SupportsFloat

from trl.trainer.utils import get_callable_name, is_async_callable

from pipeline.errors import Problem, UserError
from pipeline.rewards.functions import REWARDS, code_tests
from pipeline.rewards.sandbox.run import validate_sandbox


def load_rewards(names: Sequence[str], field: str = "reward_funcs") -> list[Callable[..., Any]]:
    """Load rewards by name.

    Args:
        names: At least one; names of `REWARDS`, or any importable `package.module:function`.
        field: The YAML key, for messages.

    Raises:
        UserError: With every name that cannot be loaded and the nearest one that can.
    """
    functions: list[Callable[..., Any]] = []
    problems: list[Problem] = []
    for name in names:
        try:
            functions.append(load_function(name, field) if ":" in name else _load_own(name, field))
        except UserError as error:
            problems.extend(error.problems)
    if not names:
        problems.append(Problem(field, "[]", f"name at least one of {', '.join(REWARDS)}"))
    if problems:
        raise UserError(*problems)
    return functions


def _load_own(name: str, field: str) -> Callable[..., Any]:
    if name not in REWARDS:
        nearest = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "is not a known reward."
        raise UserError(Problem(field, name, f"{hint} Known: {', '.join(REWARDS)}; or write package.module:function"))
    if REWARDS[name] is code_tests and (fault := validate_sandbox()):
        raise UserError(Problem(field, name, fault))
    return REWARDS[name]


def load_function(name: str, field: str) -> Callable[..., Any]:
    """Load `package.module:function` and wrap it so that invalid rewards raise a `UserError`.

    Args:
        name: The module and the function.
        field: The YAML key, for messages.

    Raises:
        UserError: If the function does not exist or cannot be called as a reward.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(Problem(field, name, f"cannot import {module_name or '(nothing)'} ({reason})")) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        nearest = difflib.get_close_matches(function_name, callables, n=1)
        hint = f"; did you mean {module_name}:{nearest[0]}?" if nearest else ""
        remedy = f"{module_name} does not have a function {function_name or '(nothing)'}{hint}"
        raise UserError(Problem(field, name, remedy))
    if not _takes_columns(function):
        remedy = "TRL passes every column by name; accept them all: f(completions, **columns)"
        raise UserError(Problem(field, name, remedy))
    return function if is_async_callable(function) else _validated(name, field, function)


def _takes_columns(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # some functions written in C do not have a signature
        return False
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _validated(name: str, field: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it raises a `UserError` unless it returns a number or None per completion."""

    @functools.wraps(function)
    def validated(completions: Sequence[Any], **columns: Any) -> Any:
        rewards = function(completions=completions, **columns)
        expected = f"return a list with a number, or None, for each of the {len(completions)} completions"
        if isinstance(rewards, str | Mapping) or not isinstance(rewards, Collection):
            raise UserError(Problem(field, name, f"returned {_shorten(rewards)}; {expected}"))
        if len(rewards) != len(completions):
            raise UserError(Problem(field, name, f"returned {len(rewards)} rewards; {expected}"))
        for reward in rewards:
            number = isinstance(reward, SupportsFloat) and not isinstance(reward, str)  # NumPy's strings support it too
            if not (reward is None or (number and getattr(reward, "ndim", 0) == 0)):
                raise UserError(Problem(field, name, f"returned {_shorten(reward)} among the rewards; {expected}"))
        return rewards

    validated.__name__ = get_callable_name(function)  # TRL logs the reward under it
    return validated


def _shorten(value: object) -> str:
    """Return the type of a value and its first 40 characters."""
    return f"{type(value).__name__} {str(value)[:40]!r}"
