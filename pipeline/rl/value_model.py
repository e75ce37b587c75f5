"""The critic of PPO: a language model with one scalar output at each token.

It is transformers' token classification model with one label, so that it trains, is saved and loads like any
other: `AutoModelForTokenClassification.from_pretrained("<run>/value_model")`, if transformers has such a classifier of
its architecture. A critic of any architecture loads as `PPOTrainer(value_model="<run>/value_model")`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForTokenClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from pipeline.models.loading import load_config, without_adapters
from pipeline.rl.log_probs import over_length_groups

VALUE_MODEL_FOLDER = "value_model"
"""Where in a checkpoint or an output directory the critic is."""

HEAD_NAMES = ("score", "classifier")
"""What transformers calls the linear head of its classifiers."""


def token_scalar_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The token classification class of a model's architecture.

    Transformers has one for most architectures; for one that it lacks (Llama 4, say), one is put together
    from its own mixin.

    Args:
        model: Any text model.

    Returns:
        A class whose constructor takes a configuration.
    """
    if type(model.config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(model.config)]
    base: type[PreTrainedModel] = next(
        cls
        for cls in type(model).__mro__
        if cls.__module__.startswith("transformers.") and cls.__name__.endswith("PreTrainedModel")
    )
    name = base.__name__.removesuffix("PreTrainedModel") + "ForTokenClassification"
    own = {"config_class": type(model.config), "base_model_prefix": base.base_model_prefix}
    return type(name, (GenericForTokenClassification, base), own)


def value_model_from(source: PreTrainedModel) -> PreTrainedModel:
    """Build a critic from a reward model or from a policy.

    The body is copied. From a reward model (a sequence classifier with one label) the head is too: at each
    token the critic begins with the reward that the text so far would get. From a policy the head is zero: it
    begins by expecting nothing. Adapters of PEFT are merged into the copy.

    Args:
        source: A causal language model, or a sequence classifier with one label. It is not changed.

    Returns:
        The critic, in `float32` or the dtype of `source`, on the device of `source`.

    Raises:
        ValueError: If the weights of `source` do not fit.
    """
    source = without_adapters(source)
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    config.classifier_dropout = 0.0
    with torch.random.fork_rng(devices=[]):  # so that adding a critic changes no other random number
        critic = token_scalar_class(source)(config)
    critic.to(device=source.device, dtype=source.dtype)

    head_name, head = _head(critic)
    wanted = critic.state_dict().keys()
    state = {}
    for name, weight in source.state_dict().items():
        owner, _, rest = name.partition(".")
        own = f"{head_name if owner in HEAD_NAMES else owner}.{rest}"
        if own in wanted:  # not so the output head
            state[own] = weight
    missing, _ = critic.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith(f"{head_name}.")]
    if missing:
        raise ValueError(
            f"{type(source).__name__} cannot become a critic (weights missing: {missing}): pass your own `value_model`"
        )
    with torch.no_grad():
        if f"{head_name}.weight" not in state:
            head.weight.zero_()
        if head.bias is not None and f"{head_name}.bias" not in state:
            head.bias.zero_()
    return critic


def build_value_model(
    value_model: str | PreTrainedModel | None,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Sequence[tuple[Any, PreTrainedTokenizerBase | None]],
) -> PreTrainedModel:
    """The critic that is asked for, or the one that suits.

    Args:
        value_model: A critic; or a reward model or a causal language model to copy; or a path or Hub id of any of
            these; or None for a copy of the first reward model that has the policy's vocabulary, or else of
            `policy`.
        policy: The policy.
        tokenizer: The policy's.
        rewards: The reward functions, of whatever kind, each with its tokenizer if it is a model.

    Returns:
        The critic, which pads as the policy does; in the policy's dtype, unless it is the critic that was given.

    Raises:
        ValueError: The critic has several labels.
    """
    source = _load(value_model, policy) if isinstance(value_model, str) else value_model
    if source is None:
        vocabulary = tokenizer.get_vocab()
        source = next(
            (
                model
                for model, own in rewards
                if isinstance(model, nn.Module) and own is not None and own.get_vocab() == vocabulary
            ),
            policy,
        )
    scores_texts = type(source).__name__.endswith("ForSequenceClassification")
    if scores_texts or source.get_output_embeddings() is not None:
        if scores_texts and source.config.num_labels != 1:
            raise ValueError(f"value_model has {source.config.num_labels} labels; a reward model has one")
        critic = value_model_from(source).to(policy.dtype)
    elif source.config.num_labels != 1:
        raise ValueError(f"value_model has {source.config.num_labels} labels; a critic has one")
    else:
        critic = source
    critic.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return critic


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers' that loads what was saved with a configuration: a critic, or what one is made from.

    Args:
        config: Its `architectures` say what it is. Without any, it is a critic.
    """
    saved_as = (config.architectures or [""])[0]
    if saved_as.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if saved_as and not saved_as.endswith("ForTokenClassification"):
        return AutoModelForCausalLM
    return AutoModelForTokenClassification


def _load(name: str, policy: PreTrainedModel) -> PreTrainedModel:
    """A model from a path or the Hub, of the class that it was saved as, in the policy's dtype."""
    config = load_config(name)
    kind = auto_class(config)
    if kind is AutoModelForTokenClassification and type(config) is type(policy.config):
        kind = token_scalar_class(policy)
    return kind.from_pretrained(name, config=config, dtype=policy.dtype)


def token_values(
    critic: nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    length: int,
    batch_size: int | None,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """What the critic expects before each of the last tokens of a text is chosen.

    Args:
        critic: The critic, in whatever wrapper.
        ids: (B, L).
        attention_mask: (B, L).
        length: How many tokens; less than L.
        batch_size: Texts in a forward pass; None for all of them.
        autocast: Makes the context of the forward passes.

    Returns:
        (B, `length`), in float32.
    """

    def of_group(inputs: dict[str, Any], kept: int) -> tuple[Tensor]:
        return (critic(**inputs).logits[:, -kept - 1 : -1, 0].float(),)

    with autocast():  # once, so that the weights are cast once
        (values,) = over_length_groups(of_group, critic, ids, attention_mask, length, batch_size)
    return values


def save_value_model(critic: PreTrainedModel, folder: str) -> None:
    """Save the critic in its place in a checkpoint or an output directory."""
    critic.save_pretrained(os.path.join(folder, VALUE_MODEL_FOLDER))


def load_value_model(critic: PreTrainedModel, folder: str) -> None:
    """Give the critic the weights that `save_value_model` saved.

    Raises:
        ValueError: If there are none.
    """
    saved_in = os.path.join(folder, VALUE_MODEL_FOLDER)
    if not os.path.isdir(saved_in):
        raise ValueError(f"{folder} has no {VALUE_MODEL_FOLDER}/: no checkpoint of PPOTrainer")
    saved = type(critic).from_pretrained(saved_in, config=critic.config, dtype=critic.dtype)
    critic.load_state_dict(saved.state_dict())


def add_to_optimizer(
    optimizer: torch.optim.Optimizer,
    critic: nn.Module,
    decayed: list[str],
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Let an optimizer step the critic's trainable parameters too, unless it does so already.

    Args:
        optimizer: Of the policy.
        critic: The critic.
        decayed: Names of the parameters that weight decay applies to.
        learning_rate: Peak learning rate.
        weight_decay: Of those parameters.
    """
    known = _parameter_ids(optimizer)
    for decays in (True, False):
        parameters = [
            parameter
            for name, parameter in critic.named_parameters()
            if parameter.requires_grad and (name in decayed) == decays and id(parameter) not in known
        ]
        if parameters:
            decay = weight_decay if decays else 0.0
            optimizer.add_param_group({"params": parameters, "lr": learning_rate, "weight_decay": decay})


def in_optimizer(optimizer: torch.optim.Optimizer, critic: nn.Module) -> bool:
    """Whether an optimizer has all of the critic's trainable parameters."""
    return {id(parameter) for parameter in critic.parameters() if parameter.requires_grad} <= _parameter_ids(optimizer)


def _parameter_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _head(critic: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The scalar head, by name: the only linear layer that the body does not hold."""
    for name in HEAD_NAMES:
        head = getattr(critic, name, None)
        if isinstance(head, nn.Linear):
            return name, head
    raise ValueError(f"{type(critic).__name__} has no linear head named any of {HEAD_NAMES}")
