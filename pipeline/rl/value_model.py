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
from pipeline.models.loading import load_config, local_copy, without_adapters
from pipeline.rl.critic import VALUE_MODEL_FOLDER
from pipeline.rl.ppo_config import PPOConfig
from pipeline.training.frozen_weights import compute_in_float32, convert_frozen, plain_name, share_frozen_weights


def build_value_model(
    value_model: str | PreTrainedModel | None,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Sequence[tuple[Any, PreTrainedTokenizerBase | None, float]],
    args: PPOConfig,
    use_peft: bool = True,
) -> PreTrainedModel | PeftModel:
    """Return the given critic or make one, ready for training. `value_model` is as for `PPOTrainer`.

    `rewards` are reward functions of any kind, each with its tokenizer, if it is a model, and its weight. With
    `use_peft`, only an adapter and the head are trained if the policy has an adapter, unless `value_model` is itself
    trained. Trained weights have the policy's dtype, unless they were given as a critic.
    """
    # The critic's adapter is configured like the policy's, unless the critic is trained in full.
    adapter = None
    if isinstance(policy, PeftModel):
        adapter = policy.active_peft_config if use_peft and not policy.active_peft_config.is_prompt_learning else None
        policy = policy.get_base_model()
    dtype = next((weight.dtype for weight in policy.parameters() if weight.requires_grad), policy.dtype)
    source: Any = value_model
    if isinstance(value_model, str):
        name = local_copy(value_model, VALUE_MODEL_FOLDER)
        config = load_config(name)
        cls = auto_class(config)
        if cls is AutoModelForTokenClassification and type(config) is type(policy.config):
            cls = classifier(type(config), "TokenClassification")
        source = cls.from_pretrained(name, config=config, dtype=dtype, trust_remote_code=False)
    # A reward that is only measured says nothing about the score.
    rewards = [reward for reward in rewards if reward[2]]
    if source is None:
        # The critic has to read all that a policy may sample: unused ids, too, and models pad embeddings differently.
        vocabulary, rows = tokenizer.get_vocab(), len(policy.get_input_embeddings().weight)
        judges = ((model, own) for model, own, _ in rewards if isinstance(model, nn.Module) and own is not None)
        readers = (model for model, own in judges if own.get_vocab() == vocabulary)
        source = next((model for model in readers if len(model.get_input_embeddings().weight) >= rows), policy)
    if type(source.config) is not type(policy.config) and not hasattr(source, "peft_config"):
        # It lacks the modules that the policy's adapter targets, so it is trained in full.
        adapter = None
    is_reward_model = type(source).__name__.endswith("ForSequenceClassification")
    is_critic = not is_reward_model and source.get_output_embeddings() is None
    if (is_reward_model or is_critic) and source.config.num_labels != 1:
        raise ValueError(f"value_model has {source.config.num_labels} labels; a critic or a reward model has one")
    # A critic from a path is itself trained, like one that was passed, unless it is an adapter, which is copied.
    is_given = is_critic and (source is value_model or not hasattr(source, "peft_config"))
    critic: PreTrainedModel | PeftModel
    if adapter is not None and source is not value_model:
        critic = adapter_value_model(source.to(policy.device), adapter)
        convert_frozen(critic, policy.dtype)
        share_frozen_weights(policy, [critic])
    else:
        critic = source if is_given else value_model_from(source).to(dtype)
    if is_reward_model:
        # The head only fits if the score is the reward that it predicts, times its weight.
        is_score = len(rewards) == 1 and args.reward_normalization == "none" and _is_copy(source, rewards[0][0])
        _, head = find_head(critic.get_base_model() if isinstance(critic, PeftModel) else critic)
        with torch.no_grad():
            for weight in head.parameters():
                weight.mul_(rewards[0][2] if is_score else 0.0)
    critic.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if args.disable_dropout:
        disable_dropout_in_model(critic)
    if args.activation_checkpointing:
        critic.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        if isinstance(critic, PeftModel):
            # TRL does the same for the policy.
            critic.enable_input_require_grads()
    return critic


def _is_copy(source: PreTrainedModel, reward: Any) -> bool:
    """Return whether a reward is a model with the weights of `source`, from any folder and in any dtype."""
    if source is reward or not isinstance(reward, nn.Module):
        return source is reward
    # The original head that an adapter replaces is not used, and its weights are random.
    own, others = (
        {name: weight for name, weight in model.state_dict().items() if ".original_module." not in name}
        for model in (source, reward)
    )
    return own.keys() == others.keys() and all(
        torch.equal(weight.bfloat16(), others[name].to(weight.device).bfloat16()) for name, weight in own.items()
    )


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class of a critic (also if `config` names no architecture), reward model or language model."""
    saved_as = (config.architectures or ["ForTokenClassification"])[0]
    if saved_as.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    return AutoModelForTokenClassification if saved_as.endswith("ForTokenClassification") else AutoModelForCausalLM


def value_model_from(source: PreTrainedModel) -> PreTrainedModel:
    """Build a critic from a copy of a reward model or a policy, with PEFT adapters merged in, in its dtype.

    With the head of a reward model, the critic starts with the reward that the text so far would get. From a policy, it
    starts with a head of zeros, so it estimates 0.
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
    config.num_labels, config.classifier_dropout = 1, 0.0
    # This must not affect the random numbers of training.
    with torch.random.fork_rng(devices=[]):
        return classifier(kind, "TokenClassification")(config)


def _weights_for(critic: PreTrainedModel, source: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of `source` under a critic's names, with zeros for a head that `source` lacks."""
    head, _ = find_head(critic)
    wanted = critic.state_dict()
    weights = {_renamed(plain_name(name), head): weight for name, weight in source.state_dict().items()}
    for name in wanted.keys() - weights.keys():
        if name.startswith(f"{head}."):
            weights[name] = torch.zeros(wanted[name].shape, device=source.device)
    return {name: weight for name, weight in weights.items() if name in wanted}


def adapter_value_model(source: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Build a critic that trains an adapter and a value head, on the frozen weights of `source`.

    An adapter of `source` is copied with its configuration, and so is the head of a classifier; otherwise,
    `peft_config` defines the adapter, and the head is zero.
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
        critic.load_state_dict(weights, assign=True)
        # Only buffers are left to move.
        critic.to(source.device)
        adapters = getattr(source, "peft_config", {})
        name, adapter = next(iter(adapters.items()), ("default", peft_config))
        base = adapter.base_model_name_or_path if adapters else source.name_or_path
        adapter = copy.deepcopy(adapter)
        # PEFT loads a critic from just its adapter, which names the base model.
        adapter.task_type, adapter.inference_mode, adapter.base_model_name_or_path = TaskType.TOKEN_CLS, False, base
        if saved := getattr(adapter, "modules_to_save", None):
            modules = [f".{module}" for module, _ in critic.named_modules()]
            found = [end for end in saved if any(module.endswith(f".{end}") for module in modules)]
            # PEFT adds the head to these modules itself.
            adapter.modules_to_save = [end for end in found if end not in HEAD_NAMES]
        # PEFT takes the name of the base model from this attribute.
        critic.name_or_path = base
        adapted = get_peft_model(critic, adapter, adapter_name=name)
    own = {name: weight for name, weight in critic.named_parameters() if weight.requires_grad}
    for name, weight in source.named_parameters():
        if (copied := own.get(_renamed(name, head))) is not None:
            copied.data.copy_(weight)
    if hasattr(source, MERGED):
        setattr(critic, MERGED, getattr(source, MERGED))
    compute_in_float32(find_head(critic)[1])
    return adapted


def _renamed(name: str, head: str) -> str:
    """Return the name of a classifier's weight in a classifier whose head is named `head`."""
    owner, _, rest = name.partition(".")
    return f"{head}.{rest}" if owner in HEAD_NAMES else name
