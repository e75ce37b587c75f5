"""Load rewards by name: from `pipeline.rewards.functions`, or functions that the user wrote."""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, SupportsFloat

from trl.trainer.utils import get_callable_name, is_async_callable

from pipeline.config.named_code import find_named, user_code
from pipeline.errors import Problem, UserError, collect, refuse
from pipeline.rewards.sandbox.run import validate_sandbox
from pipeline.rewards.table import REWARDS

TRAINER_OBJECTS = ("trainer_state", "environments", "log_extra", "log_metric")
"""Arguments that trainers pass to rewards in addition to data."""


def load_rewards(names: Sequence[str], field: str = "reward_funcs") -> list[Callable[..., Any]]:
    """Load rewards by name.

    Args:
        names: At least one: keys of `REWARDS`, or importable functions `package.module:function`.
        field: The field that has them, for error messages.

    Raises:
        UserError: With every name that cannot be loaded, and the nearest one that can.
    """
    functions: list[Callable[..., Any]] = []
    problems: list[Problem] = []
    for name in names:
        with collect(problems):
            functions.append(load_reward(name, field))
    if not names:
        problems.append(Problem(field, "[]", f"name at least one of {', '.join(REWARDS)}"))
    refuse(*problems)
    return functions


def load_reward(name: str, field: str) -> Callable[..., Any]:
    """Load one reward as `load_rewards` does.

    A user's function is guarded by `guard_reward`. For built-in rewards, check that what they need is installed.

    Raises:
        UserError: If the reward cannot be loaded, or cannot work on this machine.
    """
    function = find_named(name, field, REWARDS)
    if ":" in name:
        if not _accepts_every_column(function):
            remedy = "TRL passes every column by name; accept them all: f(completions, **columns)"
            raise UserError(Problem(field, name, remedy))
        return guard_reward(function, name, field)

    # Check this now rather than after hours of training.
    fault = None
    if name == "code_tests":
        fault = validate_sandbox()
    elif name == "reasoning_gym" and find_spec("reasoning_gym") is None:
        fault = "needs reasoning-gym, which is not installed; pip install 'fourstage[reasoning]'"
    if fault:
        raise UserError(Problem(field, name, fault))
    return function


def _accepts_every_column(function: Callable[..., Any]) -> bool:
    """Return whether a function has `**columns`. Functions in C without a signature count as having none."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return False
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def built_in_name(function: object) -> str | None:
    """Return the name in `REWARDS` of a function, or None if it is not one of them."""
    for name, path in REWARDS.items():
        # A function whose module has not been imported yet cannot be this one.
        module_name, _, key = path.partition(":")
        if getattr(sys.modules.get(module_name), key, None) is function:
            return name
    return None


def call_reward(
    function: Callable[..., Any], answers: Sequence[Any], rows: Sequence[Mapping[str, Any]], **more: Any
) -> Sequence[float | None]:
    """Call a reward function as trainers do, with answers as messages, and columns by name. Return its rewards.

    Args:
        function: The reward.
        answers: The answer to each row: a text, or messages.
        rows: Rows with a `prompt`. Every other column of any row becomes an argument, None where a row lacks it.
        **more: Further arguments; they replace columns of the same name.
    """
    names = {name for row in rows for name in row} - {"prompt", "prompts", "completions", *more}
    columns = {}
    for name in sorted(names):
        columns[name] = [row.get(name) for row in rows]
    completions = []
    for answer in answers:
        completions.append([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)
    return function(completions=completions, prompts=[row["prompt"] for row in rows], **columns, **more)


def guard_reward(function: Callable[..., Any], name: str, field: str = "reward_funcs") -> Callable[..., Any]:
    """Give a reward function its own copy of all data, and raise a `UserError` if it fails or returns no rewards.

    TRL passes the same lists to every function, so a function that edits them would change what the next one judges.
    The function may be asynchronous, or a callable object. Functions in `REWARDS` are returned unchanged.
    """
    if built_in_name(function) or hasattr(function, "is_guarded"):
        return function

    def copy_data(completions: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {key: value if key in TRAINER_OBJECTS else copy.deepcopy(value) for key, value in columns.items()}
        # The reward of an environment does not get completions.
        if completions is not None:
            arguments["completions"] = copy.deepcopy(completions)
        return arguments

    def check_returned(rewards: Any, completions: Any, columns: Mapping[str, Any]) -> Any:
        judged = columns["environments"] if completions is None else completions
        fault = _fault_of_rewards(rewards, len(judged))
        if fault:
            expected = "return a list with a number, or None for no opinion, for each completion"
            raise UserError(Problem(field, name, f"returned {fault}; {expected}"))
        return rewards

    @functools.wraps(function)
    def guarded(completions: Any = None, **columns: Any) -> Any:
        with user_code(name, field):
            rewards = function(**copy_data(completions, columns))
            return check_returned(rewards, completions, columns)

    @functools.wraps(function)
    async def guarded_async(completions: Any = None, **columns: Any) -> Any:
        with user_code(name, field):
            rewards = await function(**copy_data(completions, columns))
            return check_returned(rewards, completions, columns)

    # TRL checks beforehand whether a function is asynchronous, and logs the reward under its name.
    guard: Any = guarded_async if is_async_callable(function) else guarded
    guard.__name__ = get_callable_name(function)
    guard.is_guarded = True
    return guard


def _fault_of_rewards(rewards: Any, count: int) -> str | None:
    """Return what is wrong with `rewards`, or None if they are a number or None for each of `count` completions."""
    if isinstance(rewards, str | Mapping) or not isinstance(rewards, Collection):
        return f"{type(rewards).__name__} {str(rewards)[:40]!r}"
    if len(rewards) != count:
        return f"{len(rewards)} rewards for {count} completions"
    for row, reward in enumerate(rewards):
        if reward is None:
            continue
        # NumPy's strings and its arrays of several numbers are instances of SupportsFloat, too.
        is_number = isinstance(reward, SupportsFloat) and not isinstance(reward, str) and not getattr(reward, "ndim", 0)
        # The sum of squares of larger numbers would be infinite in float32. NaN is not below any number.
        if not is_number or not abs(float(reward)) < 1e30:
            text = f"{reward}" if is_number else f"{type(reward).__name__} {str(reward)[:40]!r}"
            return f"{text} for completion {row} of {count}, counted from 0"
    return None
