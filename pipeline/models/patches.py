"""The only place where methods of other libraries' objects are replaced, with the reasons.

Trainers are changed by subclasses (`pipeline.training.reliable`). The functions here change objects that a library
creates itself, or passes to wrappers that look up the method by name.
"""

from collections import deque
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from transformers import Llama4ForCausalLM, PreTrainedTokenizerBase


def replace_method(owner: Any, name: str, function: Callable[..., Any], *, bind: bool = False) -> None:
    """Replace a method of a model, a layer or a class by another function.

    The alternatives do not work:

    - With a subclass of a model, the weights would have to be loaded again.
    - A hook cannot keep the original method from running.
    - A wrapper would change the names of the weights.
    - llama.cpp's converter chooses its classes itself, so it would not use a subclass.

    DDP, PEFT and `torch.compile` call the attribute `forward`, whatever it is.

    Args:
        owner: The model, layer or class.
        name: Name of the method.
        function: What is called instead.
        bind: Whether `function` gets `owner` as its first argument. A deep copy of `owner` then passes itself.
    """
    setattr(owner, name, MethodType(function, owner) if bind else function)


def record_rows(dataset: Any) -> deque[list[int]]:
    """Record the numbers of the rows of each batch that is fetched from a data set; a collator does not get them.

    Return the queue to which each batch appends a list of numbers from now on.
    """
    fetch = dataset.__getitems__
    batches = deque[list[int]]()

    def fetch_and_record(rows: list[int]) -> Any:
        batches.append([int(row) for row in rows])
        return fetch(rows)

    dataset.__getitems__ = fetch_and_record
    return batches


def name_body_of_llama4() -> None:
    """Correct the name of the body of Llama 4's language model, where the Auto classes find it.

    `Llama4ForCausalLM.base_model_prefix` is "language_model", but the body is the attribute `model`: `base_model` is
    then the model itself, whose output TRL's fused head takes for hidden states (`tests/upstream`).
    """
    Llama4ForCausalLM.base_model_prefix = "model"


def refuse_deep_json() -> None:
    """Treat a call whose JSON is nested too deeply for Python as text, like any malformed call: raise a ValueError."""
    parse = PreTrainedTokenizerBase.parse_response

    @wraps(parse)
    def parse_response(*args: Any, **kwargs: Any) -> Any:
        try:
            return parse(*args, **kwargs)
        except RecursionError as error:
            raise ValueError("JSON is nested too deeply") from error

    if not hasattr(parse, "__wrapped__"):
        PreTrainedTokenizerBase.parse_response = parse_response
