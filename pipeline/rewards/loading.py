"""Reward functions that the user wrote: found by name, and held to what TRL's trainers expect of one."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, SupportsFloat

from trl.trainer.utils import get_callable_name, is_async_callable

from pipeline.errors import Problem, UserError
from pipeline.rewards.functions import REWARDS


def load_function(name: str, field: str) -> Callable[..., Any]:
    """The function `package.module:function`, which from now on tells what is wrong with its rewards.

    Args:
        name: of the function.
        field: what the YAML key is called, for messages.

    Raises:
        UserError: there is no such function, or none that can be called as a reward.
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
        raise UserError(Problem(field, name, f"{module_name} has no function {function_name or '(nothing)'}{hint}"))
    if not _takes_columns(function):
        remedy = "TRL hands it every column by name; let it take them: f(completions, **columns)"
        raise UserError(Problem(field, name, remedy))
    return function if is_async_callable(function) else _checked(name, field, function)


def _takes_columns(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # some functions written in C have none
        return False
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _checked(name: str, field: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, but for a `UserError` where it returns anything but a number or None a completion."""

    @functools.wraps(function)
    def checked(completions: Sequence[Any], **columns: Any) -> Any:
        rewards = function(completions=completions, **columns)
        expected = f"return a list with a number, or None, for each of the {len(completions)} completions"
        if isinstance(rewards, str | Mapping) or not isinstance(rewards, Collection):
            raise UserError(Problem(field, name, f"returned {_shown(rewards)}; {expected}"))
        if len(rewards) != len(completions):
            raise UserError(Problem(field, name, f"returned {len(rewards)} rewards; {expected}"))
        for reward in rewards:
            number = isinstance(reward, SupportsFloat) and not isinstance(reward, str)  # NumPy's text supports it, too
            if not (reward is None or (number and getattr(reward, "ndim", 0) == 0)):
                raise UserError(Problem(field, name, f"returned {_shown(reward)} among the rewards; {expected}"))
        return rewards

    checked.__name__ = get_callable_name(function)  # which TRL logs the reward under
    return checked


def _shown(value: object) -> str:
    """What a value is, and the beginning of it."""
    return f"{type(value).__name__} {str(value)[:40]!r}"


def load_rewards(names: Sequence[str], field: str = "reward_funcs") -> list[Callable[..., Any]]:
    """The reward functions of these names: of `REWARDS`, or any importable `package.module:function`.

    Args:
        names: at least one.
        field: what the YAML key is called, for messages.

    Raises:
        UserError: with every name that can't be resolved and the nearest that can.
    """
    functions: list[Callable[..., Any]] = []
    problems: list[Problem] = []
    for name in names:
        try:
            functions.append(_load(name, field))
        except UserError as error:
            problems.extend(error.problems)
    if not names:
        problems.append(Problem(field, "[]", f"name at least one of {', '.join(REWARDS)}"))
    if problems:
        raise UserError(*problems)
    return functions


def _load(name: str, field: str) -> Callable[..., Any]:
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        nearest = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "no such reward."
        known = ", ".join(REWARDS)
        raise UserError(Problem(field, name, f"{hint} Known: {known}; or write package.module:function"))
    return load_function(name, field)
