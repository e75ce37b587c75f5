"""Checks of a model and its tokenizer before any weights are loaded."""

import inspect
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pipeline.errors import Problem
from pipeline.models.loading import validate_chat, validate_kind, validate_vocabulary

TEMPLATE_ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
"""Arguments that chat templates always get."""


def check_template_arguments(given: Any) -> list[Problem]:
    """Check that the `chat_template_kwargs` (a mapping or None) do not set reserved arguments."""
    if not (taken := TEMPLATE_ARGUMENTS.intersection(given or {})):
        return []
    remedy = f"{', '.join(sorted(taken))} cannot be given, because they are already set; omit them"
    return [Problem("chat_template_kwargs", given, remedy)]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, field: str, name: str, chat: bool) -> list[Problem]:
    """Check that a tokenizer, which `field` named, can encode conversations (`chat`) or documents."""
    if chat:
        fault = validate_chat(tokenizer)
        return [Problem(field, name, fault)] if fault else []
    return [
        Problem(field, name, f"has no {token} token, with which documents {place}; add one to the tokenizer")
        for token, place in (("bos", "begin"), ("eos", "end"))
        if getattr(tokenizer, f"{token}_token_id") is None
    ]


def check_model(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    *,
    reward: bool = False,
    **lengths: int | None,
) -> list[Problem]:
    """Check by its configuration that the model `name` fits the stage, the tokenizer (if any) and the lengths."""
    faults, architectures = [], config.architectures or []
    if getattr(config, "quantization_config", None):
        faults.append("is quantised, and training quantised models is not supported; give the original weights")
    if getattr(config, "is_encoder_decoder", False):
        faults.append("is an encoder-decoder model; give a decoder-only language model")
    if fault := validate_kind(config, reward=reward):
        faults.append(fault)
    elif architectures and not reward:
        # TRL loads the class that config.json names.
        if (model_class := getattr(transformers, architectures[0], None)) is None:
            faults.append(f"its config.json names an unknown architecture, {architectures[0]}; correct it")
        elif not model_class.can_generate():
            faults.append(f"is a {architectures[0]}, which cannot generate text; give a decoder-only language model")
    if tokenizer is not None and (fault := validate_vocabulary(config, tokenizer)):
        faults.append(fault)
    problems = [Problem("model_name_or_path", name, fault) for fault in faults]
    return problems + check_lengths(getattr(config.get_text_config(), "max_position_embeddings", None), **lengths)


def check_lengths(positions: int | None, **lengths: int | None) -> list[Problem]:
    """Check that the lengths in tokens, by field, fit into a context of `positions` tokens (None: unlimited)."""
    remedy = f"the model's context is {positions} tokens (max_position_embeddings); lower it"
    return [
        Problem(field, length, remedy)
        for field, length in lengths.items()
        if length is not None and positions is not None and length > positions
    ]
