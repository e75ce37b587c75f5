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
    """Make a model, a layer or a class compute with another function. With `bind`, copies get their own.

    A subclass of a model would need the weights to be loaded again, a hook cannot keep the original from running, and a
    wrapper would change the names of its weights. DDP, PEFT and `torch.compile` call whatever `forward` is. llama.cpp's
    converter chooses its classes itself, so a subclass of them would not be used.
    """
    setattr(owner, name, MethodType(function, owner) if bind else function)


def record_rows(dataset: Any) -> deque[list[int]]:
    """Record the rows of each batch that is fetched from a data set. A collator does not get their numbers.

    Return the queue of their numbers, one list for each batch that is fetched from now on.
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
