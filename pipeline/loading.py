"""Tokenizers and models of the stages that begin with a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from pipeline.arguments import DataArguments
from pipeline.errors import Problem, UserError


@contextmanager
def told_as(field: str, name: object, what: str = "model") -> Iterator[None]:
    """Tell a model or a tokenizer (`what`) that cannot be loaded as a problem of `field`, which named it.

    Raises:
        UserError: If it isn't there, is damaged or doesn't fit its own configuration.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(Problem(field, name, f"no {what} can be loaded from there ({reason})")) from None


def load_tokenizer(data_args: DataArguments, model_args: ModelConfig | None = None) -> PreTrainedTokenizerBase:
    """Load `tokenizer_name_or_path`, or else the model's own tokenizer.

    Raises:
        UserError: If neither holds a tokenizer.
    """
    field, name = "tokenizer_name_or_path", data_args.tokenizer_name_or_path
    revision = None
    if name is None and model_args is not None:
        field, name, revision = "model_name_or_path", model_args.model_name_or_path, model_args.model_revision
    if name is None:
        raise UserError(Problem(field, "nothing", "give a Hub id or a folder"))
    with told_as(field, name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")


def model_init_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """What TRL's trainers pass to `from_pretrained`, as TRL's own scripts do, without code from the Hub."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
