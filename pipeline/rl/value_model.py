"""The critic of PPO: a language model with one scalar output at each token.

It is transformers' token classification model with one label, which `AutoModelForTokenClassification` loads. If the
policy is an adapter, so is the critic, on frozen weights that are in memory anyway;
`AutoPeftModelForTokenClassification` loads it, with `num_labels=1`.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.utils import disable_dropout_in_model

from pipeline.models.adapters import MERGED
from pipeline.models.classifiers import HEAD_NAMES, classifier, find_head
from pipeline.models.kernels.quantized import quantized_layers, share_quantized_layers
from pipeline.models.loading import load_config, local_copy, without_adapters
from pipeline.rl.critic import VALUE_MODEL_FOLDER
from pipeline.rl.ppo_config import PPOConfig
from pipeline.training.frozen_weights import compute_in_float32, convert_frozen, plain_name, share_frozen_weights

Reward = tuple[Any, PreTrainedTokenizerBase | None, float]
"""A reward model, or a function of any kind; the tokenizer of a model; and the weight in the score."""


def build_value_model(
    value_model: str | PreTrainedModel | None,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Sequence[Reward],
    args: PPOConfig,
    use_peft: bool = True,
) -> PreTrainedModel | PeftModel:
    """Return the given critic, or make one, ready for training.

        value_model          is trained itself, if it is a critic; a reward model or a language model is copied
        a reward model       is copied, with its head, if `value_model` is None and its vocabulary is the policy's
        the policy           is copied otherwise, with a head of zeros

    Args:
        value_model: As for `PPOTrainer`.
        policy: The policy, with or without an adapter.
        tokenizer: The policy's tokenizer.
        rewards: All rewards, models and functions.
        args: The configuration, which decides on dropout, activation checkpointing and normalised scores.
        use_peft: Train only an adapter and the head if the policy has an adapter, unless `value_model` is itself
            trained.

    Returns:
        The critic. Trained weights have the policy's dtype, unless they were given as a critic.

    Raises:
        ValueError: If `value_model` has several labels, or transformers cannot make a critic of its kind.
    """
    # The critic's adapter is configured like the policy's. It has none if it is trained in full.
    adapter: PeftConfig | None = None
    if isinstance(policy, PeftModel):
        if use_peft and not policy.active_peft_config.is_prompt_learning:
            adapter = policy.active_peft_config
        policy = policy.get_base_model()
    # The dtype of weights that are trained, such as an adapter's, may differ from the dtype of the base model.
    dtype = next((weight.dtype for weight in policy.parameters() if weight.requires_grad), policy.dtype)
    # A reward that is only measured says nothing about the score.
    rewards = [(reward, reward_tokenizer, weight) for reward, reward_tokenizer, weight in rewards if weight]
    source: Any = value_model
    if isinstance(value_model, str):
        source = _load(value_model, policy, dtype)
    elif source is None:
        source = _readable_reward_model(rewards, policy, tokenizer) or policy

    if type(source.config) is not type(policy.config) and not hasattr(source, "peft_config"):
        # A model of another kind lacks the modules that the policy's adapter targets, so it is trained in full.
        adapter = None
    is_reward_model = type(source).__name__.endswith("ForSequenceClassification")
    is_critic = not is_reward_model and source.get_output_embeddings() is None
    if (is_reward_model or is_critic) and source.config.num_labels != 1:
        raise ValueError(f"value_model has {source.config.num_labels} labels; a critic or a reward model has one")
    critic: PreTrainedModel | PeftModel
    if adapter is not None and source is not value_model:
        critic = adapter_value_model(source.to(policy.device), adapter)
        convert_frozen(critic, policy.dtype)
        share_frozen_weights(policy, [critic])
    elif is_critic and (source is value_model or not hasattr(source, "peft_config")):
        # A critic is trained itself, whether it was passed or loaded. Only an adapter that was loaded is copied.
        critic = source
    else:
        critic = value_model_from(source).to(dtype)
    if is_reward_model:
        # The head only fits if the score is the reward that it predicts, times its weight.
        predicts_score = len(rewards) == 1 and args.reward_normalization == "none" and _is_copy(source, rewards[0][0])
        _scale_head(critic, rewards[0][2] if predicts_score else 0.0)
    critic.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if args.disable_dropout:
        disable_dropout_in_model(critic)
    if args.activation_checkpointing:
        critic.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        if isinstance(critic, PeftModel):
            # TRL does the same for the policy.
            critic.enable_input_require_grads()
    return critic


def _load(name: str, policy: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Load a critic, a reward model or a language model from a path or the Hub, in the class that it was saved with."""
    name = local_copy(name, VALUE_MODEL_FOLDER)
    config = load_config(name)
    model_class = auto_class(config)
    if model_class is AutoModelForTokenClassification and type(config) is type(policy.config):
        # transformers may have no critic of this architecture.
        model_class = classifier(type(config), "TokenClassification")
    return model_class.from_pretrained(name, config=config, dtype=dtype, trust_remote_code=False)


def _readable_reward_model(
    rewards: Sequence[Reward], policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> nn.Module | None:
    """Return the first reward model that can read whatever the policy samples, or None.

    It needs the same vocabulary and, as a policy may sample unused ids, at least as many embeddings: models differ in
    how they pad these.
    """
    vocabulary = tokenizer.get_vocab()
    size = len(policy.get_input_embeddings().weight)
    for model, reward_tokenizer, _ in rewards:
        if not isinstance(model, nn.Module) or reward_tokenizer is None:
            continue
        if reward_tokenizer.get_vocab() != vocabulary:
            continue
        if len(model.get_input_embeddings().weight) >= size:
            return model
    return None


def _scale_head(critic: PreTrainedModel | PeftModel, factor: float) -> None:
    """Multiply the estimates of a critic by a factor, in place."""
    _, head = find_head(critic.get_base_model() if isinstance(critic, PeftModel) else critic)
    with torch.no_grad():
        for weight in head.parameters():
            weight.mul_(factor)


def _is_copy(source: PreTrainedModel, reward: Any) -> bool:
    """Return whether a reward is a model with the weights of `source`, whatever folder and dtype they come in."""
    if source is reward:
        return True
    if not isinstance(reward, nn.Module):
        return False
    source_weights = _used_weights(source)
    reward_weights = _used_weights(reward)
    if source_weights.keys() != reward_weights.keys():
        return False
    for name, weight in source_weights.items():
        if not torch.equal(weight.bfloat16(), reward_weights[name].to(weight.device).bfloat16()):
            return False
    return True


def _used_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name, without the random ones of an original head that an adapter replaces."""
    return {name: weight for name, weight in model.state_dict().items() if ".original_module." not in name}


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class of a critic (also if `config` names no architecture), reward model or language model."""
    saved_as = (config.architectures or ["ForTokenClassification"])[0]
    if saved_as.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if saved_as.endswith("ForTokenClassification"):
        return AutoModelForTokenClassification
    return AutoModelForCausalLM


def value_model_from(source: PreTrainedModel) -> PreTrainedModel:
    """Build a critic from a copy of a reward model or a policy, with PEFT adapters merged in, in its dtype.

    With the head of a reward model, the critic starts with the reward that the text so far would get. From a policy, it
    starts with a head of zeros, so it estimates 0.

    Raises:
        ValueError: If transformers cannot make a critic from a model of this kind.
    """
    source = without_adapters(source)
    critic = _untrained_critic(source.config).to(device=source.device, dtype=source.dtype)
    critic.load_state_dict(_weights_for(critic, source))
    return critic


def _untrained_critic(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a critic with random weights from the configuration of another model."""
    kind = type(config)
    # If a model's code is on the Hub, transformers would ask on the terminal whether to run it.
    if kind not in MODEL_MAPPING:
        raise ValueError(f"transformers cannot make a critic from a {kind.__name__}: pass your own `value_model`")
    config = copy.deepcopy(config)
    config.num_labels = 1
    config.classifier_dropout = 0.0
    # This must not affect the random numbers of training.
    with torch.random.fork_rng(devices=[]):
        return classifier(kind, "TokenClassification")(config)


def _weights_for(critic: PreTrainedModel, source: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of `source` under a critic's names, with zeros for a head that `source` lacks."""
    head, _ = find_head(critic)
    critic_weights = critic.state_dict()
    weights = {}
    for name, weight in source.state_dict().items():
        weights[_renamed(plain_name(name), head)] = weight
    for name in critic_weights.keys() - weights.keys():
        if name.startswith(f"{head}."):
            weights[name] = torch.zeros(critic_weights[name].shape, device=source.device)
    return {name: weight for name, weight in weights.items() if name in critic_weights}


def adapter_value_model(source: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Build a critic that trains an adapter and a value head, on the frozen weights of `source`.

    An adapter of `source` is copied with its configuration, and so is the head of a classifier; otherwise,
    `peft_config` defines the adapter, and the head is zero. Layers of `source` with 4 bits are used as they are.
    """
    # Making a critic must not affect other random numbers.
    with torch.random.fork_rng(devices=[]):
        with init_empty_weights(include_buffers=False):
            critic = _untrained_critic(source.config)
        head, module = find_head(critic)
        weights = _weights_for(critic, source)
        for name, _ in module.named_parameters(prefix=head):
            # The head is trained, in float32. All other weights are shared with `source`.
            weights[name] = weights[name].float().clone()
        # Packed into 4 bits, weights do not have the shape that the critic expects.
        shared = tuple(f"{plain_name(layer)}." for layer in quantized_layers(source))
        weights = {name: weight for name, weight in weights.items() if not name.startswith(shared)}
        critic.load_state_dict(weights, assign=True, strict=not shared)
        share_quantized_layers(source, critic)
        # Only buffers are left to move.
        critic.to(source.device)
        adapters = getattr(source, "peft_config", {})
        if adapters:
            name = next(iter(adapters))
            adapter = copy.deepcopy(adapters[name])
            base = adapter.base_model_name_or_path
        else:
            name = "default"
            adapter = copy.deepcopy(peft_config)
            base = source.name_or_path
        # PEFT loads a critic from just its adapter, which names the base model.
        adapter.task_type = TaskType.TOKEN_CLS
        adapter.inference_mode = False
        adapter.base_model_name_or_path = base
        if getattr(adapter, "modules_to_save", None):
            # PEFT adds the head to these modules itself.
            adapter.modules_to_save = [
                end for end in adapter.modules_to_save if end not in HEAD_NAMES and _has_module(critic, end)
            ]
        # PEFT takes the name of the base model from this attribute.
        critic.name_or_path = base
        adapted = get_peft_model(critic, adapter, adapter_name=name)
    trained = {name: weight for name, weight in critic.named_parameters() if weight.requires_grad}
    for name, weight in source.named_parameters():
        # If `source` has an adapter, the critic starts with its weights.
        trained_weight = trained.get(_renamed(name, head))
        if trained_weight is not None:
            trained_weight.data.copy_(weight)
    if hasattr(source, MERGED):
        setattr(critic, MERGED, getattr(source, MERGED))
    compute_in_float32(find_head(critic)[1])
    return adapted


def _has_module(model: nn.Module, end: str) -> bool:
    """Return whether the name of a module ends with `end`, as a whole word."""
    return any(f".{name}".endswith(f".{end}") for name, _ in model.named_modules())


def _renamed(name: str, head: str) -> str:
    """Return the name of a classifier's weight in a classifier whose head is named `head`."""
    # score.weight -> classifier.weight
    module, _, rest = name.partition(".")
    return f"{head}.{rest}" if module in HEAD_NAMES else name
