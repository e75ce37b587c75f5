"""The critic of PPO: a language model with one scalar output at each token.

It is transformers' token classification model with one label, so that it trains, is saved and loads like any other:
`AutoModelForTokenClassification.from_pretrained("<run>/value_model")`, if transformers has such a classifier of its
architecture, or `pipeline.models.classifiers` (Llama 4). A critic of any architecture loads as
`PPOTrainer(value_model="<run>/value_model")`. Beside a policy that is an adapter, the critic is one as well
(`pipeline.rl.value_adapter`), and PEFT loads it: `AutoPeftModelForTokenClassification`, with `num_labels=1`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.utils import disable_dropout_in_model

from pipeline.errors import Problem, UserError
from pipeline.models.adapters import without_adapters
from pipeline.models.classifiers import classifier
from pipeline.models.loading import load_config, local_copy
from pipeline.rl.layout import ForwardPass
from pipeline.rl.log_probs import at, over_passes
from pipeline.rl.ppo_config import PPOConfig
from pipeline.rl.value_adapter import (
    HEAD_NAMES,
    adapter_value_model,
    convert_frozen,
    share_frozen_weights,
    untrained_critic,
)

VALUE_MODEL_FOLDER = "value_model"
"""Subfolder of a checkpoint or an output directory that contains the critic."""

# ---- Making a critic


def value_model_from(source: PreTrainedModel) -> PreTrainedModel:
    """Build a critic from a reward model or a policy, whose body is copied with PEFT adapters merged in.

    The head of a reward model (a sequence classifier with one label) is copied, too: at each token, the critic starts
    with the reward that the text so far would get. From a policy, the head is zero: the critic starts by expecting
    nothing.

    Args:
        source: A causal language model, or a sequence classifier with one label. It is not changed.

    Returns:
        The critic, in the dtype and on the device of `source`.

    Raises:
        ValueError: If the weights of `source` do not fit, or transformers does not know its architecture.
    """
    source = without_adapters(source)
    critic = untrained_critic(source.config)
    critic.to(device=source.device, dtype=source.dtype)

    head_name, head = _head(critic)
    wanted = critic.state_dict().keys()
    state = {}
    for name, weight in source.state_dict().items():
        owner, _, rest = name.partition(".")
        own = f"{head_name if owner in HEAD_NAMES else owner}.{rest}"
        if own in wanted:  # a language model's output head is not
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


def _head(critic: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Return the scalar head and its name."""
    for name in HEAD_NAMES:
        head = getattr(critic, name, None)
        if isinstance(head, nn.Linear):
            return name, head
    raise ValueError(f"{type(critic).__name__} does not have a linear head named any of {HEAD_NAMES}")


def build_value_model(
    value_model: str | PreTrainedModel | None,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Sequence[tuple[Any, PreTrainedTokenizerBase | None, float]],
    args: PPOConfig,
    use_peft: bool = True,
) -> PreTrainedModel | PeftModel:
    """Return the given critic, or make one, ready to be trained.

    Args:
        value_model: As for `PPOTrainer`.
        policy: The policy.
        tokenizer: The policy's tokenizer.
        rewards: The reward functions of any kind, each with its tokenizer, if it is a model, and its weight.
        args: The configuration, which decides on dropout, activation checkpointing and the units of the score.
        use_peft: Train an adapter and the head if the policy has an adapter, unless `value_model` is itself trained.

    Returns:
        The critic, which pads as the policy does, and whose estimates have the units of the score; what is trained has
        the policy's dtype, unless it was given as a critic.

    Raises:
        ValueError: If the critic has several labels.
    """
    adapter = None
    if isinstance(policy, PeftModel):
        adapter = policy.active_peft_config if use_peft and not policy.active_peft_config.is_prompt_learning else None
        policy = policy.get_base_model()
    dtype = next((weight.dtype for weight in policy.parameters() if weight.requires_grad), policy.dtype)
    source = _load(value_model, policy, dtype) if isinstance(value_model, str) else value_model
    rewards = [reward for reward in rewards if reward[2]]
    if source is None:
        source = next((model for model, own, _ in rewards if _reads(model, own, policy, tokenizer)), policy)
    if type(source.config) is not type(policy.config) and not hasattr(source, "peft_config"):
        adapter = None  # it has no modules of the names that the policy's adapter is put on: it is trained in full
    is_reward_model = type(source).__name__.endswith("ForSequenceClassification")
    is_critic = not is_reward_model and source.get_output_embeddings() is None
    if (is_reward_model or is_critic) and source.config.num_labels != 1:
        raise ValueError(f"value_model has {source.config.num_labels} labels; a critic or a reward model has one")
    is_given = is_critic and (source is value_model or not hasattr(source, "peft_config"))
    critic: PreTrainedModel | PeftModel
    if adapter is not None and source is not value_model:
        critic = adapter_value_model(source.to(policy.device), adapter)
        convert_frozen(critic, policy.dtype)
        share_frozen_weights(policy, [critic])
    else:
        critic = source if is_given else value_model_from(source).to(dtype)
    if is_reward_model:
        # The score is the reward that the head predicts, times its weight, or something else.
        in_units = len(rewards) == 1 and args.reward_normalization == "none" and _equal(source, rewards[0][0])
        _scale_head(critic, rewards[0][2] if in_units else 0.0)
    critic.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if args.disable_dropout:
        disable_dropout_in_model(critic)
    if args.activation_checkpointing:
        critic.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        if isinstance(critic, PeftModel):
            critic.enable_input_require_grads()  # as TRL does for the policy
    return critic


def _reads(
    model: Any, own: PreTrainedTokenizerBase | None, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Return whether a reward is a model that can read every token that the policy can sample."""
    if not isinstance(model, nn.Module) or own is None or own.get_vocab() != tokenizer.get_vocab():
        return False
    # Models pad their embeddings differently, and a policy may sample an id that no token has.
    rows, wanted = (len(one.get_input_embeddings().weight) for one in (model, policy))
    return bool(rows >= wanted)


def _equal(source: PreTrainedModel, reward: Any) -> bool:
    """Return whether a reward is a model with the weights of `source`, wherever and in whatever dtype it was loaded."""
    if source is reward or not isinstance(reward, nn.Module):
        return source is reward
    # What a module of an adapter replaces is not used, and random if it is a head.
    own, others = (
        {name: weight for name, weight in model.state_dict().items() if ".original_module." not in name}
        for model in (source, reward)
    )
    if own.keys() != others.keys():
        return False
    for name, weight in own.items():
        other = others[name]
        # Weights that were rounded to fewer bits are compared in these.
        dtype = min(weight.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(weight.to(dtype), other.to(weight.device, dtype)):
            return False
    return True


@torch.no_grad()
def _scale_head(critic: PreTrainedModel | PeftModel, factor: float) -> None:
    base = critic.get_base_model() if isinstance(critic, PeftModel) else critic
    head = next(getattr(base, name) for name in HEAD_NAMES if hasattr(base, name))
    for weight in head.parameters():
        weight.mul_(factor)


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that loads what `config` was saved with: a critic (also if it names no architecture), a
    reward model or a language model."""
    saved_as = (config.architectures or [""])[0]
    if saved_as.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if saved_as and not saved_as.endswith("ForTokenClassification"):
        return AutoModelForCausalLM
    return AutoModelForTokenClassification


def _load(name: str, policy: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model from a path or the Hub, in the class that it was saved with."""
    name = local_copy(name, VALUE_MODEL_FOLDER)
    config = load_config(name)
    cls = auto_class(config)
    if cls is AutoModelForTokenClassification and type(config) is type(policy.config):
        cls = classifier(type(config), "TokenClassification")
    return cls.from_pretrained(name, config=config, dtype=dtype, trust_remote_code=False)


# ---- Using it


def token_values(
    critic: nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    length: int,
    batch_size: int | None,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Compute what the critic expects before each of the last tokens of each text is chosen.

    Args:
        critic: The critic, wrapped or not.
        ids: As for `over_passes`, like the other arguments.

    Returns:
        (B, `length`), in float32.
    """

    def of_pass(critic: nn.Module, batch: ForwardPass) -> tuple[Tensor]:
        return (at(critic(**batch.inputs).logits, batch.before)[:, 0].float(),)

    (values,) = over_passes(of_pass, critic, ids, attention_mask, length, batch_size, autocast)
    return values


def save_value_model(critic: PreTrainedModel | PeftModel, folder: str) -> None:
    """Save the critic in `folder`, without the card that PEFT drafts, which has paths of this machine."""
    path = Path(folder) / VALUE_MODEL_FOLDER
    critic.save_pretrained(str(path))
    (path / "README.md").unlink(missing_ok=True)


def load_value_model(critic: PreTrainedModel | PeftModel, policy: nn.Module, checkpoint: str) -> None:
    """Load the critic's weights from a checkpoint.

    transformers, which has loaded the policy, takes a critic that is an adapter for another adapter of the policy.

    Raises:
        ValueError: If it does not contain a critic.
        UserError: If it contains an adapter and the critic is trained in full, or the other way round.
    """
    folder = os.path.join(checkpoint, VALUE_MODEL_FOLDER)
    if not os.path.isdir(folder):
        raise ValueError(f"{checkpoint} does not contain {VALUE_MODEL_FOLDER}/: PPOTrainer did not save it")
    saved_adapter = os.path.isfile(os.path.join(folder, "adapter_config.json"))
    if saved_adapter != isinstance(critic, PeftModel):
        was = str(saved_adapter).lower()
        raise UserError(Problem("value_use_peft", not saved_adapter, f"{checkpoint} was trained with {was}; set it so"))
    if isinstance(critic, PeftModel):
        if isinstance(policy, PeftModel) and VALUE_MODEL_FOLDER in policy.peft_config:
            policy.delete_adapter(VALUE_MODEL_FOLDER)
        set_peft_model_state_dict(critic, load_peft_weights(folder), adapter_name=critic.active_adapter)
        return
    saved = type(critic).from_pretrained(folder, config=critic.config, dtype=critic.dtype)
    critic.load_state_dict(saved.state_dict())


def add_to_optimizer(optimizer: torch.optim.Optimizer, critic: nn.Module, decayed: list[str], args: PPOConfig) -> None:
    """Add the critic's trainable parameters to the policy's optimizer, except those that it already has.

    Args:
        optimizer: The policy's optimizer.
        critic: The critic.
        decayed: Names of the parameters that `args.weight_decay` applies to.
        args: The configuration.
    """
    rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
    known = _parameter_ids(optimizer)
    for decays in (True, False):
        parameters = [
            parameter
            for name, parameter in critic.named_parameters()
            if parameter.requires_grad and (name in decayed) == decays and id(parameter) not in known
        ]
        if parameters:
            decay = args.weight_decay if decays else 0.0
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": decay})
    if type(optimizer).__module__.startswith("bitsandbytes"):
        from bitsandbytes.optim import GlobalOptimManager  # optional

        for module in critic.modules():  # as transformers does for the policy: 8 bits are too few for embeddings
            if isinstance(module, nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


def check_in_optimizer(optimizer: torch.optim.Optimizer, critic: nn.Module) -> None:
    """Raise `ValueError` unless an optimizer that has a scheduler has all of the critic's trainable parameters."""
    trainable = {id(parameter) for parameter in critic.parameters() if parameter.requires_grad}
    if not trainable <= _parameter_ids(optimizer):
        raise ValueError(
            "the learning rate scheduler does not know the critic: add the parameters of `value_model` to the "
            "optimizer before making the scheduler, or pass the optimizer alone"
        )


def _parameter_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
