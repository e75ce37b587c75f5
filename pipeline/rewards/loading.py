"""Load rewards by name: from `pipeline.rewards.functions`, or functions that the user wrote.

To load `package.module:function` is to run code. A name in a recipe, or on the command line, was chosen by the person
who started the command. A name in a file of a run may have come with a download: `arguments.json` and `run.json` of a
folder are written by whoever made it. Commands that read names from such files do so within `only_trusted`.
"""

import contextlib
import copy
import difflib
import functools
import importlib
import inspect
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from textwrap import shorten
from typing import Any, SupportsFloat

from trl.trainer.utils import get_callable_name, is_async_callable

from pipeline.errors import Problem, RunStopped, UserError, collect, refuse
from pipeline.rewards.sandbox.run import validate_sandbox
from pipeline.rewards.table import REWARDS

MOVED = {"pipeline.rewards.functions:hidden_taste": "recipes.worlds.pocket.annotators:hidden_taste"}
"""Built-in functions that have moved: the former path, which YAML files and runs may still name -> the present one."""
TRAINER_OBJECTS = ("trainer_state", "environments", "log_extra", "log_metric")
"""Arguments that trainers pass to rewards in addition to data."""

_trusted: frozenset[str] | None = None
"""The user's functions that files of a run may name; None while all names come from the user."""


@contextlib.contextmanager
def only_trusted(names: Collection[str]) -> Iterator[None]:
    """Within this context, load no function, class or task file that a user wrote, except for `names`.

    The names in our own tables, such as `REWARDS` and `TOOLS`, are always loaded. All threads are affected.
    """
    global _trusted
    previous = _trusted
    _trusted = frozenset(names)
    try:
        yield
    finally:
        _trusted = previous


def check_trust(name: str, field: str) -> None:
    """Raise a `UserError` within `only_trusted` if `name` is not among its names.

    Args:
        name: A function `package.module:function`, or the path of a file, that a file of a run names.
        field: The field that has the name, for the message.
    """
    if _trusted is not None and name not in _trusted:
        remedy = "is named by a file of this folder, not by you; to use it, add"
        raise UserError(Problem(field, name, f"{remedy} --trust {shlex.quote(name)}"))


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


def find_named(name: str, field: str, table: Mapping[str, str]) -> Callable[..., Any]:
    """Import the function or class that a name refers to.

    Args:
        name: A key of `table`, or `package.module:name`.
        field: The field that has the name, for error messages.
        table: Our own functions or classes: short name -> `package.module:name`. They are always trusted.

    Raises:
        UserError: If nothing has this name, its module cannot be imported, or `check_trust` rejects it.
    """
    if name in table:
        return resolve_name(table[name])
    if ":" not in name:
        nearest = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "is not known."
        remedy = f"{hint} Known: {', '.join(table)}; or write package.module:name"
        raise UserError(Problem(field, name, remedy))

    check_trust(name, field)
    module_name, _, key = MOVED.get(name, name).rpartition(":")
    try:
        module = importlib.import_module(module_name)
    # A user's module may raise anything.
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(Problem(field, name, f"cannot import {module_name} ({reason})")) from error
    members = {member: value for member, value in vars(module).items() if callable(value)}
    if key in members:
        return members[key]
    remedy = f"{module_name} does not have a function {key}"
    nearest = difflib.get_close_matches(key, members, n=1)
    if nearest:
        remedy = f"{remedy}; did you mean {module_name}:{nearest[0]}?"
    raise UserError(Problem(field, name, remedy))


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


@contextlib.contextmanager
def user_code(name: str, field: str) -> Iterator[None]:
    """Turn an error in a user's function, class or method into a `UserError` that names the function and the line.

    Args:
        name: The name of the function or class, as the user wrote it.
        field: The field that has the name.
    """
    try:
        yield
    except (UserError, RunStopped):
        raise
    except (Exception, SystemExit) as error:
        package = Path(__file__).parents[1]
        frames = traceback.extract_tb(error.__traceback__)
        frames_outside = [frame for frame in frames if package not in Path(frame.filename).parents]
        place = ""
        if frames_outside:
            # The first frame outside of this package is in the user's file. Name the last line in that file, rather
            # than a line of a library that it called.
            file = frames_outside[0].filename
            lines = [frame.lineno for frame in frames_outside if frame.filename == file]
            place = f" ({file}:{lines[-1]})"
        raised = f"raised {type(error).__name__}: {shorten(str(error), 200)}{place}"
        raise UserError(Problem(field, name, f"{raised}; correct it")) from error


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
