"""Dialogues of a model with tools: an answer of several turns, with tool calls in between.

    prompt               tokens, all of which `max_completion_length` covers
    <|user|>1234+5678?   <|call|>calculator ... <|end|>   <|tool|>6912<|end|><|assistant|>   6912<|end|>
                         sampled: 1 1 1 1 1 1 1 1         0 0 0 0 0 0 0 0                    1 1 1

Trainers and evaluation share this loop. Unlike TRL's own, it answers all calls of a batch of dialogues together if a
tool can do that. If a result does not fit into the limit, it is omitted, and the dialogue ends with its call.
"""

import json
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl.chat_template_utils import get_training_chat_template, parse_response

from pipeline.models.tokenizer import escape_tokens, special_tokens
from pipeline.tools.functions import MANY

# transformers would parse a tool's docstring again for each turn.
_schema = lru_cache(get_json_schema)

Message = dict[str, Any]
Tools = Mapping[str, Callable[..., Any]]
Complete = Callable[[Sequence[list[int]], int], tuple[Sequence[list[int]], Sequence[list[float]] | None]]
"""Token ids of texts, and the longest turn -> the token ids of a next turn for each, and log-probabilities if known."""
Call = tuple["Dialogue", dict[str, Any]]
"""A call, with `name` and `arguments`, and the dialogue that it belongs to."""
CALL_SECONDS = 10.0
"""How long a call of a tool may take, because training waits for it."""


class Overtime(BaseException):
    """Raised inside a tool that takes too long. It is not an `Exception`, which many tools catch."""


@dataclass
class Dialogue:
    """A prompt and what followed it, as token ids and as messages."""

    prompt: list[int]
    tools: Tools
    # Turns of the model, results of tools, and what the template writes between them.
    tokens: list[int] = field(default_factory=list)
    # For each token, 1 if the model sampled it, otherwise 0.
    sampled: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    # For each token, its log-probability if the model sampled it, otherwise 0; None if unknown.
    logps: list[float] | None = None
    calls: int = 0
    failures: int = 0

    def add_turn(self, tokens: list[int], logps: list[float] | None, message: Message | None) -> None:
        """Add a turn of the model; None for a message that the limit cut off entirely."""
        self.tokens += tokens
        self.sampled += [1] * len(tokens)
        if self.logps is not None and logps is not None:
            self.logps += logps
        if message:
            self.messages.append(_encodable(message))

    def pending(self, ends: Collection[int]) -> list[dict[str, Any]]:
        """Return the calls of the last turn unless it was cut off; `ends` are the ids that end a turn."""
        is_complete = self.sampled and self.sampled[-1] and self.tokens[-1] in ends
        if not is_complete or not self.messages:
            return []
        return self.messages[-1].get("tool_calls") or []


def converse(
    dialogues: Sequence[Dialogue],
    complete: Complete,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Collection[int],
    limit: int,
    context: int,
    turns: int | None = None,
    template: Mapping[str, Any] | None = None,
    goes_on: Callable[[bool], bool] = bool,
) -> None:
    """Answer the calls of each dialogue's first turn, and let the model continue until no dialogue calls a tool.

    Args:
        dialogues: Each with the first turn of the model; what follows is added to them.
        complete: Samples the next turns of all dialogues that continue.
        tokenizer: A tokenizer with a response template.
        ends: Ids that end a turn.
        limit, context: Maximum number of tokens in all turns and results of a dialogue, and in the model's context.
        turns: How often results may be returned to the model. Default: as often as they fit into `limit`.
        template: Further arguments of the chat template.
        goes_on: Given whether this process has dialogues that continue, returns whether any process has, because all
            have to call `complete` equally often. Default: other processes do not matter.
    """
    active = [dialogue for dialogue in dialogues if dialogue.pending(ends)]
    while turns != 0 and goes_on(bool(active)):
        active = answer_calls(active, tokenizer, ends=ends, limit=limit, context=context, template=template)
        if not goes_on(bool(active)):
            break
        texts = [dialogue.prompt + dialogue.tokens for dialogue in active]
        # A turn is no longer than the part of it that fits into the limit, which may be empty.
        shortest = min((len(dialogue.tokens) for dialogue in active), default=limit)
        sampled, logps = complete(texts, max(1, limit - shortest))
        for index, (dialogue, text, tokens) in enumerate(zip(active, texts, sampled, strict=True)):
            turn = tokens[: limit - len(dialogue.tokens)]
            message = read_turn(tokenizer, turn, text, dialogue.tools)
            turn_logps = None
            if logps is not None:
                turn_logps = logps[index][: len(turn)]
            dialogue.add_turn(turn, turn_logps, message)
        active = [dialogue for dialogue in active if dialogue.pending(ends)]
        if turns is not None:
            turns -= 1


def answer_calls(
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Collection[int],
    limit: int,
    context: int,
    template: Mapping[str, Any] | None = None,
) -> list[Dialogue]:
    """Add the results of each dialogue's last calls if they fit, and return the dialogues that continue.

    Each dialogue has pending calls. The other arguments are as for `converse`.
    """
    calls: list[Call] = []
    for dialogue in dialogues:
        calls += [(dialogue, call.get("function") or call) for call in dialogue.pending(ends)]
    values = _call_together(calls)

    # The results of each dialogue, by its id.
    results: dict[int, list[Message]] = {id(dialogue): [] for dialogue in dialogues}
    for index, (dialogue, call) in enumerate(calls):
        name = call["name"]
        dialogue.calls += 1
        try:
            if index in values:
                value = values[index]
            elif name in dialogue.tools:
                value = call_tool(dialogue.tools[name], **call["arguments"])
            else:
                raise ValueError(f"Tool {name} not found.")
            content = call_tool(partial(str, value))
        # A tool may raise anything, exit, or return something without a text; wrong arguments raise, too.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            dialogue.failures += 1
            content = str({"error": str(error)})
        results[id(dialogue)].append({"role": "tool", "name": name, "content": _encodable(content)})

    # Tools often return the same few results.
    @lru_cache
    def encode(*messages: tuple[tuple[str, str], ...]) -> list[int]:
        return result_tokens(tokenizer, [dict(message) for message in messages], template or {})

    continuing = []
    for dialogue in dialogues:
        messages = results[id(dialogue)]
        tokens = encode(*(tuple(message.items()) for message in messages))
        length = len(dialogue.tokens) + len(tokens)
        if length <= limit and len(dialogue.prompt) + length < context:
            dialogue.tokens += tokens
            dialogue.sampled += [0] * len(tokens)
            if dialogue.logps is not None:
                dialogue.logps += [0.0] * len(tokens)
            dialogue.messages += messages
            continuing.append(dialogue)
    return continuing


def _call_together(calls: Sequence[Call]) -> dict[int, Any]:
    """Call the tools in `MANY`, each for all of its calls at once. Return the values, by the number of the call."""
    indices: dict[Callable[..., Any], list[int]] = {}
    texts: dict[Callable[..., Any], list[str]] = {}
    for index, (dialogue, call) in enumerate(calls):
        tool = dialogue.tools.get(call["name"])
        arguments = call["arguments"]
        if tool not in MANY or not isinstance(arguments, dict) or list(arguments) != list(signature(tool).parameters):
            continue
        (text,) = arguments.values()
        if isinstance(text, str):
            indices.setdefault(tool, []).append(index)
            texts.setdefault(tool, []).append(text)
    values: dict[int, Any] = {}
    for tool, calls_of_tool in indices.items():
        values |= dict(zip(calls_of_tool, MANY[tool](texts[tool]), strict=True))
    return values


def call_tool(tool: Callable[..., Any], /, **arguments: Any) -> Any:
    """Call a tool, and raise a `TimeoutError` after `CALL_SECONDS`.

    Only the main thread can be interrupted: there is no limit in others, such as the page's, nor on Windows.
    Code in C is interrupted once it checks for signals, as Python's own functions that wait do.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return tool(**arguments)
    running = True

    def interrupt(*_: Any) -> None:
        if running:
            raise Overtime

    handler = signal.signal(signal.SIGALRM, interrupt)
    # From then on it is interrupted every second, in case it catches everything and continues.
    timer = signal.setitimer(signal.ITIMER_REAL, CALL_SECONDS, 1.0)
    try:
        return tool(**arguments)
    except Overtime:
        raise TimeoutError(f"stopped after {CALL_SECONDS:g} seconds") from None
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        # It is None if it was not set by Python.
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def read_turn(tokenizer: PreTrainedTokenizerBase, tokens: list[int], prefix: list[int], tools: Tools) -> Message | None:
    """Return a turn of the model as a message, with its calls; None if it has no tokens. `prefix` precedes the turn."""
    if not tokens:
        return None
    # The functions behind an environment's methods; each environment has methods of its own.
    schemas = [_schema(getattr(tool, "__func__", tool)) for tool in tools.values()]
    return parse_response(tokenizer, tokens, prefix=prefix, tools=schemas)


def readable(messages: Iterable[Message]) -> str:
    """Format messages for people: the model's text, its calls and their results, each on separate lines.

    -> calculator(expression=1234+5678)
    <- 6912
    The answer is 6912.
    """
    lines: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            lines.append(_indented(f"<- {message['content']}"))
        elif message.get("content"):
            lines.append(message["content"])
        for call in message.get("tool_calls") or ():
            function = call.get("function") or call
            arguments = function["arguments"]
            # A model may write anything as arguments.
            text = str(arguments)
            if isinstance(arguments, dict):
                text = ", ".join(f"{name}={value}" for name, value in arguments.items())
            lines.append(_indented(f"-> {function['name']}({text})"))
    return "\n".join(lines)


def _indented(text: str) -> str:
    """Indent all lines but the first, so that they cannot be mistaken for another message."""
    return "\n   ".join(text.splitlines())


def result_tokens(
    tokenizer: PreTrainedTokenizerBase, results: Sequence[Message], template: Mapping[str, Any]
) -> list[int]:
    """Return the ids of results as the chat template writes them between two turns of the model.

    Special tokens in a result are broken up, so that a tool cannot end its turn and write the model's.
    """
    call = {"type": "function", "function": {"name": results[0]["name"], "arguments": {}}}
    calling = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    answered = [*calling, *escape_tokens(results, special_tokens(tokenizer))]
    prefix = tokenizer.apply_chat_template(calling, return_dict=False, **template)
    whole = tokenizer.apply_chat_template(answered, add_generation_prompt=True, return_dict=False, **template)
    # Some templates write a line feed after the end of a turn, which the model has not sampled.
    ends = [position for position, token in enumerate(prefix) if token == tokenizer.eos_token_id]
    end = ends[-1] if ends else len(prefix) - 1
    if whole[: end + 1] == prefix[: end + 1]:
        return whole[end + 1 :]
    # Some templates, such as Qwen3's, rewrite a turn once a result follows it. TRL has variants for training.
    if template.get("chat_template"):
        raise ValueError("the chat template changes a turn once a result follows it")
    return result_tokens(tokenizer, results, {**template, "chat_template": get_training_chat_template(tokenizer)})


def _encodable(value: Any) -> Any:
    """Replace lone surrogates, which JSON escapes can contain and tokenizers reject, by question marks."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
