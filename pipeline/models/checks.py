"""Checks of a model and its tokenizer before any weights are loaded."""

import inspect
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pipeline.errors import Problem
from pipeline.models.loading import validate_chat, validate_kind, validate_vocabulary

TEMPLATE_ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
"""Arguments that chat templates always get."""


def check_template_arguments(template: Any) -> list[Problem]:
    """Check that the `chat_template_kwargs` (a mapping or None) do not set arguments that templates always get."""
    reserved = sorted(TEMPLATE_ARGUMENTS.intersection(template or {}))
    if not reserved:
        return []
    remedy = f"{', '.join(reserved)} cannot be given, because they are already set; omit them"
    return [Problem("chat_template_kwargs", template, remedy)]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, field: str, name: str, chat: bool) -> list[Problem]:
    """Check that a tokenizer, which `field` named, can encode conversations (`chat`) or documents."""
    problems = []
    if chat:
        if fault := validate_chat(tokenizer):
            problems.append(Problem(field, name, fault))
        return problems
    for token, place in (("bos", "begin"), ("eos", "end")):
        if getattr(tokenizer, f"{token}_token_id") is None:
            remedy = f"has no {token} token, with which documents {place}; add one to the tokenizer"
            problems.append(Problem(field, name, remedy))
    return problems


def check_model(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    *,
    reward: bool = False,
    **lengths: int | None,
) -> list[Problem]:
    """Check by its configuration that a model fits the stage, the tokenizer and the lengths.

    Args:
        config: From `loading.load_config`.
        tokenizer: None if it could not be loaded.
        name: Value of `model_name_or_path`, for messages.
        reward: Whether the stage trains a reward model.
        **lengths: As for `check_lengths`.
    """
    faults = []
    if getattr(config, "quantization_config", None):
        faults.append("is quantised, and training quantised models is not supported; give the original weights")
    if getattr(config, "is_encoder_decoder", False):
        faults.append("is an encoder-decoder model; give a decoder-only language model")
    if fault := validate_kind(config, reward=reward):
        faults.append(fault)
    elif config.architectures and not reward:
        # TRL loads the class that config.json names.
        architecture = config.architectures[0]
        model_class = getattr(transformers, architecture, None)
        if model_class is None:
            faults.append(f"its config.json names an unknown architecture, {architecture}; correct it")
        elif not model_class.can_generate():
            faults.append(f"is a {architecture}, which cannot generate text; give a decoder-only language model")
    if tokenizer is not None and (fault := validate_vocabulary(config, tokenizer)):
        faults.append(fault)
    problems = [Problem("model_name_or_path", name, fault) for fault in faults]
    return problems + check_lengths(getattr(config.get_text_config(), "max_position_embeddings", None), **lengths)


def check_lengths(positions: int | None, **lengths: int | None) -> list[Problem]:
    """Check that sequences fit into the context of a model.

    Args:
        positions: The context in tokens, None if it is unlimited.
        **lengths: Number of tokens by the name of the field that asks for them; None if the field is not set.
    """
    if positions is None:
        return []
    remedy = f"the model's context is {positions} tokens (max_position_embeddings); lower it"
    problems = []
    for field, length in lengths.items():
        if length is not None and length > positions:
            problems.append(Problem(field, length, remedy))
    return problems
