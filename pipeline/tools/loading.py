"""Load tools and environments by name: built-in ones, or functions and classes that the user wrote."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl import chat_template_utils

from pipeline.config.named_code import find_named, user_code
from pipeline.data.arguments import option
from pipeline.errors import Problem, UserError, collect, refuse
from pipeline.models.patches import refuse_deep_json
from pipeline.rewards.sandbox import run as sandbox
from pipeline.tools.environments import ENVIRONMENTS
from pipeline.tools.functions import TOOLS, python


@dataclass(kw_only=True)
class ToolArguments:
    """Tools that the model may call while it answers, by TRL's interface."""

    tools: list[str] | None = option(  # noqa: RUF009
        None, "Tools: names of `pipeline.tools.functions`, or package.module:function."
    )
    environment: str | None = option(
        None, "Environment, whose methods are tools: a name of `pipeline.tools.environments`, or package.module:class."
    )
    allow_unconfined_code: bool = option(
        False, "Let code_tests and the tool python run code even where the kernel cannot confine it."
    )

    def preflight(self, training_args: Any, tokenizer: Any, train: Any, early: bool = False) -> list[Problem]:
        """Check, on behalf of `load_inputs`, that the tools load, and that the tokenizer can write and read calls.

        `tokenizer` is None if it could not be loaded. The other arguments are for subclasses.
        """
        # Everything that runs code reads this, from now on and in this whole process.
        sandbox.allow_unconfined = self.allow_unconfined_code
        problems: list[Problem] = []
        with collect(problems):
            load_tools(self.tools)
        with collect(problems):
            load_environment(self.environment)
        names = self.tools or self.environment
        if names and tokenizer is not None:
            fault = _validate_template(tokenizer)
            if fault:
                problems.append(Problem("tools" if self.tools else "environment", names, fault))
        return problems


@dataclass(frozen=True)
class Toolbox:
    """What a model may call: functions, and the methods of an environment, with a new instance for each dialogue."""

    tools: Sequence[Callable[..., Any]] = ()
    environment: type | None = None

    def open(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Callable[..., Any]]]:
        """Return the prompt of a row, with its environment's observation, and the tools by name."""
        prompt = list(row["prompt"])
        tools = {tool.__name__: tool for tool in self.tools}
        if self.environment is not None:
            environment = self.environment()
            observation = environment.reset(**row)
            if observation:
                last = prompt[-1]
                prompt[-1] = {**last, "content": f"{last['content']}{observation}"}
            tools |= tools_of(environment)
        return prompt, tools

    def environment_of(self, tools: Mapping[str, Callable[..., Any]]) -> Any:
        """Return the environment whose methods are among the tools that `open` has returned, or None."""
        owners = (getattr(tool, "__self__", None) for tool in tools.values())
        return next((owner for owner in owners if type(owner) is self.environment), None)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the chat template arguments that TRL uses for prompts: tools, and perhaps another template."""
        tools = list(self.tools)
        if self.environment is not None:
            tools += tools_of(self.environment()).values()
        arguments: dict[str, Any] = {"tools": tools}
        if not chat_template_utils.is_chat_template_prefix_preserving(tokenizer):
            arguments["chat_template"] = chat_template_utils.get_training_chat_template(tokenizer)
        return arguments


def load_toolbox(names: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> Toolbox | None:
    """Load the `tools` and the `environment` of a mapping.

    Return None if it has neither, or if the tokenizer's chat template cannot write calls.
    """
    if not names or not (names.get("tools") or names.get("environment")) or _validate_template(tokenizer):
        return None
    return Toolbox(load_tools(names.get("tools")), load_environment(names.get("environment")))


def load_tools(names: Sequence[str] | None) -> list[Callable[..., Any]]:
    """Load the functions that `tools` names. A `UserError` lists those that cannot be loaded or called by a model."""
    tools: list[Callable[..., Any]] = []
    problems: list[Problem] = []
    for name in names or ():
        with collect(problems):
            tool = find_named(name, "tools", TOOLS)
            tools.append(tool)
            fault = _validate_tool(tool)
            if fault:
                problems.append(Problem("tools", name, fault))
    refuse(*problems)
    return tools


def load_environment(name: str | None) -> type | None:
    """Load the class that `environment` names; None for None. A `UserError` says why TRL or a model cannot use it."""
    if name is None:
        return None
    environment: Any = find_named(name, "environment", ENVIRONMENTS)
    if not _has_reset(environment):
        remedy = "must be a class with a method reset(self, **columns), which takes every column, as TRL passes them"
        raise UserError(Problem("environment", name, remedy))
    # The trainer makes one for each completion, without arguments.
    with user_code(name, "environment"):
        methods = tools_of(environment())
    faults = {}
    for method, tool in methods.items():
        fault = _validate_tool(tool)
        if fault:
            faults[method] = fault
    # A static method does not say which environment it belongs to.
    if not any(hasattr(method, "__self__") for method in methods.values()):
        faults["it"] = "does not have a method that a model could call; write one, which takes `self`"
    refuse(*(Problem("environment", name, f"{method} {fault}") for method, fault in faults.items()))
    return environment


def _has_reset(environment: Any) -> bool:
    """Return whether something is a class with a method `reset` that accepts every column by name."""
    reset = getattr(environment, "reset", None)
    if not inspect.isclass(environment) or not callable(reset):
        return False
    parameters = inspect.signature(reset).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def tools_of(environment: object) -> dict[str, Callable[..., Any]]:
    """Return the methods of an environment that are tools, by name."""
    methods = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    # The trainer calls these two.
    names = [name for name, _ in methods if name not in ("reset", "get_reward") and not name.startswith("_")]
    return {name: getattr(environment, name) for name in names}


def _validate_tool(tool: Callable[..., Any]) -> str | None:
    """Return why a model cannot call a function, or None."""
    if inspect.iscoroutinefunction(tool):
        return "is asynchronous; write a plain function"
    if tool is python:
        fault = sandbox.validate_sandbox()
        if fault:
            return fault
    try:
        get_json_schema(tool)
    # transformers raises several kinds of errors, which all say what is missing.
    except Exception as error:  # noqa: BLE001
        return f"cannot be described to a model ({error}); give it type hints and a docstring in Google style"
    return None


def _validate_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return why a model with this tokenizer cannot call tools, or None; TRL may add how calls are read."""
    refuse_deep_json()
    if not chat_template_utils.supports_tool_calling(tokenizer):
        return "the model's chat template does not support tool calls; give a model whose template does"
    if getattr(tokenizer, "response_template", None) is None:
        try:
            chat_template_utils.add_response_schema(tokenizer)
        except ValueError:
            return "nothing says how to read the model's calls; set `response_template` in its tokenizer_config.json"
    return None
