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
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any, SupportsFloat

from trl.trainer.utils import get_callable_name, is_async_callable

from pipeline.errors import Problem, RunStopped, UserError, collect, refuse
from pipeline.rewards.functions import REWARDS
from pipeline.rewards.sandbox.run import validate_sandbox

_trusted: frozenset[str] | None = None
"""What files of a run may name although it is not ours; None while all names come from the user."""


@contextlib.contextmanager
def only_trusted(names: Collection[str]) -> Iterator[None]:
    """Within this context, load no function, class or task file that a user wrote, except for `names`.

    The names in our own tables, such as `REWARDS` and `TOOLS`, are always loaded. All threads are affected.
    """
    global _trusted
    previous, _trusted = _trusted, frozenset(names)
    try:
        yield
    finally:
        _trusted = previous


def check_trust(name: str, field: str) -> None:
    """Raise a `UserError` if a file of a folder, and not the user, names this code, or this path outside of it."""
    if _trusted is not None and name not in _trusted:
        remedy = "is named by a file of this folder, not by you; to use it, add"
        raise UserError(Problem(field, name, f"{remedy} --trust {shlex.quote(name)}"))


def load_rewards(names: Sequence[str], field: str = "reward_funcs") -> list[Callable[..., Any]]:
    """Load rewards by name: at least one of `REWARDS`, or of any importable `package.module:function`."""
    functions: list[Callable[..., Any]] = []
    problems: list[Problem] = []
    for name in names:
        with collect(problems):
            functions.append(load_function(name, field))
    if not names:
        problems.append(Problem(field, "[]", f"name at least one of {', '.join(REWARDS)}"))
    refuse(*problems)
    return functions


def load_function(name: str, field: str) -> Callable[..., Any]:
    """Load one reward as `load_rewards` does; functions of the user are guarded by `guard_reward`."""
    function, fault = find_named(name, field, REWARDS), None
    if ":" in name:
        # Some functions written in C do not have a signature.
        with contextlib.suppress(ValueError, TypeError):
            parameters = inspect.signature(function).parameters.values()
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                return guard_reward(function, name, field)
        fault = "TRL passes every column by name; accept them all: f(completions, **columns)"
    # Check this now rather than after hours of training.
    elif name == "code_tests":
        fault = validate_sandbox()
    elif name == "reasoning_gym" and find_spec("reasoning_gym") is None:
        fault = "needs reasoning-gym, which is not installed; pip install 'fourstage[reasoning]'"
    if fault:
        raise UserError(Problem(field, name, fault))
    return function


def find_named(name: str, field: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the function or class for a name in `known`, or for `package.module:name`."""
    module_name, colon, key = name.rpartition(":")
    if colon:
        check_trust(name, field)
        try:
            module = importlib.import_module(module_name)
        # A user's module may raise anything.
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(Problem(field, name, f"cannot import {module_name} ({reason})")) from error
        known = {key: value for key, value in vars(module).items() if callable(value)}
    if key in known:
        return known[key]
    nearest = [f"did you mean {module_name}{colon}{one}?" for one in difflib.get_close_matches(key, known, n=1)]
    if colon:
        remedy = "; ".join([f"{module_name} does not have a function {key}", *nearest])
    else:
        remedy = f"{(nearest or ['is not known.'])[0]} Known: {', '.join(known)}; or write package.module:name"
    raise UserError(Problem(field, name, remedy))


def call_reward(
    function: Callable[..., Any], answers: Sequence[Any], rows: Sequence[Mapping[str, Any]], **more: Any
) -> Sequence[float | None]:
    """Call a reward function as trainers do, with answers as messages, and columns and `more` by name."""
    names = {name for row in rows for name in row} - {"prompt", "prompts", "completions", *more}
    columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
    completions = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in answers]
    return function(completions=completions, prompts=[row["prompt"] for row in rows], **columns, **more)


def guard_reward(function: Callable[..., Any], name: str, field: str = "reward_funcs") -> Callable[..., Any]:
    """Give a reward function its own copy of all data, and raise a `UserError` if it fails or returns no rewards.

    TRL passes the same lists to every function, so a function that edits them would change what the next one judges.
    The function may be asynchronous, or a callable object. Those in `REWARDS` are returned unchanged.
    """
    if function in REWARDS.values() or hasattr(function, "is_guarded"):
        return function

    def copied(completions: Any, columns: dict[str, Any]) -> dict[str, Any]:
        columns |= {} if completions is None else {"completions": completions}
        # These are trainer objects, not data.
        own = ("trainer_state", "environments", "log_extra", "log_metric")
        return {key: value if key in own else copy.deepcopy(value) for key, value in columns.items()}

    def checked(rewards: Any, completions: Any, columns: dict[str, Any]) -> Any:
        # The reward of an environment does not need completions.
        if fault := _find_fault(rewards, len(columns["environments"] if completions is None else completions)):
            expected = "return a list with a number, or None for no opinion, for each completion"
            raise UserError(Problem(field, name, f"returned {fault}; {expected}"))
        return rewards

    @functools.wraps(function)
    def guarded(completions: Any = None, **columns: Any) -> Any:
        with user_code(name, field):
            return checked(function(**copied(completions, columns)), completions, columns)

    @functools.wraps(function)
    async def awaited(completions: Any = None, **columns: Any) -> Any:
        with user_code(name, field):
            return checked(await function(**copied(completions, columns)), completions, columns)

    # TRL checks beforehand whether a function is asynchronous, and logs the reward under its name.
    guard: Any = awaited if is_async_callable(function) else guarded
    guard.__name__ = get_callable_name(function)
    guard.is_guarded = True
    return guard


@contextlib.contextmanager
def user_code(name: str, field: str) -> Iterator[None]:
    """Turn an error in a user's function, class or method into a `UserError` that names the function and the line."""
    try:
        yield
    except (UserError, RunStopped):
        raise
    except (Exception, SystemExit) as error:
        # Name a line in the function's own file rather than in a library that it called.
        package = Path(__file__).parents[1]
        frames = [one for one in traceback.extract_tb(error.__traceback__) if package not in Path(one.filename).parents]
        lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
        place = f" ({frames[0].filename}:{lines[-1]})" if frames else ""
        raised = f"raised {type(error).__name__}: {shorten(str(error), 200)}{place}"
        raise UserError(Problem(field, name, f"{raised}; correct it")) from error


def _find_fault(rewards: Any, count: int) -> str | None:
    """Return the fault of `rewards`, which should be a number or None for each of `count` completions, or None."""
    if isinstance(rewards, str | Mapping) or not isinstance(rewards, Collection):
        return f"{type(rewards).__name__} {str(rewards)[:40]!r}"
    if len(rewards) != count:
        return f"{len(rewards)} rewards for {count} completions"
    for row, reward in enumerate(rewards):
        # NumPy's strings support conversion to float, and so do arrays of several numbers.
        is_number = isinstance(reward, SupportsFloat) and not isinstance(reward, str) and not getattr(reward, "ndim", 0)
        # The sum of squares of larger numbers would be infinite in float32.
        if reward is not None and not (is_number and abs(float(reward)) < 1e30):
            shown = reward if is_number else f"{type(reward).__name__} {str(reward)[:40]!r}"
            return f"{shown} for completion {row} of {count}, counted from 0"
    return None
