"""Checks of a model and its tokenizer before anything is loaded."""

from __future__ import annotations

from typing import Any

from pipeline.errors import Problem


def check_tokenizer(tokenizer: Any, field: str, name: str, chat: bool, assistant_only_loss: bool) -> list[Problem]:
    """A tokenizer that would teach the wrong thing.

    Args:
        tokenizer: `PreTrainedTokenizerBase`.
        field: Argument that named it.
        name: Its value.
        chat: Whether conversations are to be formatted.
        assistant_only_loss: Whether the template must mark what the assistant says.
    """
    problems = []
    if tokenizer.pad_token_id is None:
        problems.append(Problem(field, name, "has no pad token; add one to the tokenizer"))
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        remedy = "uses its eos token as pad token, and padding is never learned: the model would not learn to stop"
        problems.append(Problem(field, name, f"{remedy}; give the tokenizer a pad token of its own"))
    if tokenizer.eos_token_id is None:
        problems.append(Problem(field, name, "has no eos token; add one to the tokenizer"))
    if chat and not tokenizer.chat_template:
        problems.append(Problem(field, name, "has no chat template; use the tokenizer of a chat model or add one"))
    elif chat and assistant_only_loss and "generation" not in str(tokenizer.chat_template):
        remedy = "its chat template has no {% generation %} mark, which assistant_only_loss needs; add it"
        problems.append(Problem(field, name, remedy))
    return problems


def check_model(config: Any, tokenizer: Any, args: Any, name: str) -> list[Problem]:
    """A model that doesn't go with the tokenizer, with the stage or with the lengths.

    Args:
        config: The model's `PretrainedConfig`.
        tokenizer: `PreTrainedTokenizerBase`, or `None` if it could not be loaded.
        args: Training arguments.
        name: What named the model.
    """
    import transformers  # whose classes take their time, which `--help` has not

    problems = []
    field = "model_name_or_path"
    text = config.get_text_config()
    reward = hasattr(args, "center_rewards_coefficient")
    architectures = config.architectures or []
    if getattr(config, "is_encoder_decoder", False):
        problems.append(Problem(field, name, "is an encoder and decoder; give a decoder-only language model"))
    classifier = any("SequenceClassification" in kind for kind in architectures)
    if classifier and not reward:
        problems.append(Problem(field, name, "is a reward model; give a language model"))
    elif architectures and not reward:
        kind = getattr(transformers, architectures[0], None)  # TRL loads this one
        if kind is not None and not kind.can_generate():
            remedy = f"is a {architectures[0]}, which cannot write; give a decoder-only language model"
            problems.append(Problem(field, name, remedy))
    if classifier and reward and config.num_labels != 1:
        remedy = f"has {config.num_labels} labels; give a reward model, which has one, or a language model"
        problems.append(Problem(field, name, remedy))
    vocabulary = getattr(text, "vocab_size", None)
    if tokenizer is not None and vocabulary is not None and len(tokenizer) > vocabulary:
        remedy = f"knows {vocabulary} tokens and its tokenizer {len(tokenizer)}; give the tokenizer it was trained with"
        problems.append(Problem(field, name, remedy))
    return problems + check_lengths(getattr(text, "max_position_embeddings", None), args)


def check_lengths(positions: int | None, args: Any) -> list[Problem]:
    """Sequences longer than the model can see.

    Args:
        positions: `max_position_embeddings` of the model.
        args: Training arguments.
    """
    problems = []
    for field in ("block_size", "max_length", "max_completion_length", "max_new_tokens"):
        value = getattr(args, field, None)
        if value is not None and positions is not None and value > positions:
            remedy = f"the model sees {positions} tokens (max_position_embeddings); lower it"
            problems.append(Problem(field, value, remedy))
    return problems


def check_room(field: str, value: int, longest: int, positions: int | None) -> list[Problem]:
    """Prompts that leave no room for an answer.

    Args:
        field: The longest answer, in tokens.
        value: Its value.
        longest: Tokens of the longest prompt.
        positions: `max_position_embeddings` of the model.
    """
    if positions is None or longest + value <= positions:
        return []
    remedy = (
        f"the longest prompt takes {longest} of the {positions} tokens that the model sees (max_position_embeddings), "
        f"which leaves {max(0, positions - longest)}; lower it or shorten prompts"
    )
    return [Problem(field, value, remedy)]
