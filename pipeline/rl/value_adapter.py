"""A critic that is an adapter with a value head, on frozen weights that other models of the run have in memory anyway.

Policy, reference, reward model and critic stay modules of their own, each with its active adapter, its hooks and its
wrapper for several processes. What they share is the storage of frozen weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from pipeline.errors import Problem, UserError
from pipeline.models.adapters import MERGED
from pipeline.models.classifiers import classifier
from pipeline.models.patches import bind_forward
from pipeline.rl.ppo_config import PPOConfig

HEAD_NAMES = ("score", "classifier")
"""Names of the linear head in transformers' classifiers."""


def untrained_critic(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a critic with random weights, and leave the random numbers of training alone.

    Args:
        config: The configuration of the model that the critic starts from; it is not changed.

    Raises:
        ValueError: If transformers does not know the architecture, as that of a model with code of its own.
    """
    kind = type(config)
    # Of a model whose code lies on the Hub, transformers would ask on the terminal whether to run it.
    if kind not in MODEL_MAPPING:
        raise ValueError(f"transformers cannot make a critic from a {kind.__name__}: pass your own `value_model`")
    config = copy.deepcopy(config)
    config.num_labels, config.classifier_dropout = 1, 0.0
    with torch.random.fork_rng(devices=[]):
        return classifier(kind, "TokenClassification")(config)


def adapter_value_model(source: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Build a critic that trains an adapter and a value head, on the frozen weights of `source`.

    An adapter of `source` is copied with its configuration. So is the head of a classifier; that of a language model's
    critic is zero.

    Args:
        source: A causal language model or a classifier with one label, on its device, maybe with an adapter. It is not
            changed.
        peft_config: The adapter, if `source` has none.
    """
    with torch.random.fork_rng(devices=[]):  # a critic must not change any other random number
        with init_empty_weights(include_buffers=False):
            critic = untrained_critic(source.config)
        head = next(name for name in HEAD_NAMES if isinstance(getattr(critic, name, None), nn.Linear))
        weights = {_renamed(_plain(name), head): weight for name, weight in source.state_dict().items()}
        for name, empty in getattr(critic, head).named_parameters(prefix=head):
            weights[name] = weights.get(name, torch.zeros(empty.shape, device=source.device)).float().clone()
        critic.load_state_dict({name: weights[name] for name in critic.state_dict()}, assign=True)
        critic.to(source.device)  # the buffers
        adapters = getattr(source, "peft_config", {})
        name, adapter = next(iter(adapters.items()), ("default", peft_config))
        base = adapter.base_model_name_or_path if adapters else source.name_or_path
        adapter = _for_tokens(adapter, critic, base)
        critic.name_or_path = adapter.base_model_name_or_path  # PEFT takes it from there
        adapted = get_peft_model(critic, adapter, adapter_name=name)
    own = {name: weight for name, weight in critic.named_parameters() if weight.requires_grad}
    for name, weight in source.named_parameters():
        if (copied := own.get(_renamed(name, head))) is not None:
            copied.data.copy_(weight)
    if hasattr(source, MERGED):
        setattr(critic, MERGED, getattr(source, MERGED))
    compute_in_float32(getattr(critic, head))
    return adapted


def _for_tokens(adapter: PeftConfig, critic: nn.Module, base: str) -> PeftConfig:
    """Return the configuration of a critic's adapter, which PEFT loads by itself: it names its base model, `base`."""
    adapter = copy.deepcopy(adapter)
    adapter.task_type, adapter.inference_mode = TaskType.TOKEN_CLS, False
    if saved := getattr(adapter, "modules_to_save", None):
        modules = [name for name, _ in critic.named_modules()]
        found = [end for end in saved if any(f".{name}".endswith(f".{end}") for name in modules)]
        adapter.modules_to_save = [end for end in found if end not in HEAD_NAMES]  # PEFT adds the head
    adapter.base_model_name_or_path = base
    return adapter


def _renamed(name: str, head: str) -> str:
    """Return the name that a weight of a classifier has in one whose head has the name `head`."""
    owner, _, rest = name.partition(".")
    return f"{head}.{rest}" if owner in HEAD_NAMES else name


def _plain(name: str) -> str:
    """Return the name that a weight had before adapters were added to its model."""
    return name.replace(".base_layer", "").replace(".original_module", "").replace(".token_adapter", "")


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that are not trained by their plain names, without heads and adapters."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = getattr(model, "peft_config", {})
    return {
        _plain(name): weight
        for name, weight in model.named_parameters()
        if not weight.requires_grad
        and name.partition(".")[0] not in HEAD_NAMES
        and not any(f".{adapter}." in f"{name}." for adapter in adapters)
    }


def compute_in_float32(head: nn.Module) -> None:
    """Multiply in a head in float32 whatever the dtype of the model is, also under autocast.

    In bfloat16, scores and logits have 8 bits.

    Args:
        head: A linear layer, or a module with such layers, which is changed in place.
    """
    head.float()
    # TRL's forward method casts the inputs, which autocast undoes.
    head.__dict__.pop("forward", None)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            bind_forward(layer, _linear_in_float32)


def _linear_in_float32(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    with torch.autocast(hidden.device.type, enabled=False):
        # FSDP may have cast the weights.
        return nn.functional.linear(hidden.float(), layer.weight.float(), bias)


def convert_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights that are not trained from float32, except for heads and adapters."""
    for weight in _frozen(model).values():
        if weight.dtype == torch.float32:
            weight.data = weight.data.to(dtype)


def share_frozen_weights(policy: nn.Module, others: Sequence[nn.Module]) -> None:
    """Let models use the frozen weights of the policy in place of equal ones of their own.

    Which models are adapters of one base is thus seen by the weights, wherever those were loaded from.

    Args:
        policy: The policy.
        others: Reward models and critic. Those of their weights that are not trained are shared.
    """
    known = _frozen(policy)
    for model in others:
        for name, weight in _frozen(model).items():
            shared = known.get(name)
            if shared is not None and shared.dtype == weight.dtype and torch.equal(shared, weight):
                weight.data = shared.data


def prepare_frozen(policy: PreTrainedModel | PeftModel, others: Sequence[Any], args: PPOConfig) -> None:
    """Convert what is not trained to `frozen_dtype`, except for heads and adapters, and keep equal weights once.

    Args:
        policy: The policy.
        others: Among other things, the reference and the reward models.
        args: The configuration.

    Raises:
        UserError: If modules that an adapter contains whole, in float32, would get bfloat16 outside of autocast.
    """
    adapted = isinstance(policy, PeftModel)
    models = [model for model in others if isinstance(model, nn.Module)]
    if args.frozen_dtype == "bfloat16" and not (args.bf16 or args.fp16):
        named = (item for model in (policy, *models) for item in model.named_modules())
        whole = {name.rpartition(".")[2] for name, module in named if isinstance(module, ModulesToSaveWrapper)}
        if found := ", ".join(sorted(whole.difference(HEAD_NAMES))):
            remedy = f"does not fit {found}, which the adapter contains in float32; set bf16 to true, or omit this"
            raise UserError(Problem("frozen_dtype", "bfloat16", remedy))
    if adapted or args.frozen_dtype == "bfloat16":
        for model in models:
            model.requires_grad_(False)
    if args.frozen_dtype == "bfloat16" or (args.frozen_dtype == "auto" and adapted and args.bf16):
        for model in (policy, *models):
            convert_frozen(model, torch.bfloat16)
        for model in models:
            if (head := next((getattr(model, name) for name in HEAD_NAMES if hasattr(model, name)), None)) is not None:
                compute_in_float32(head)
    share_frozen_weights(policy, models)
