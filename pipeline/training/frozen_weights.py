"""Weights that are not trained: the frozen reference, heads in float32, and storage shared between models."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from pipeline.models.classifiers import HEAD_NAMES
from pipeline.models.patches import replace_method


def compute_in_float32(head: nn.Module) -> None:
    """Make a head multiply in float32, even under autocast, because bfloat16 leaves scores and logits only 8 bits."""
    head.float()
    # TRL's forward method casts the inputs, which autocast undoes.
    head.__dict__.pop("forward", None)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            replace_method(layer, "forward", _linear_in_float32, bind=True)


def _linear_in_float32(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    with torch.autocast(hidden.device.type, enabled=False):
        # FSDP may have cast the weights.
        return nn.functional.linear(hidden.float(), layer.weight.float(), bias)


def frozen_copy(policy: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool) -> PreTrainedModel:
    """Copy a policy, which may have no path for TRL to load, as a reference.

    Args:
        policy: The policy, as a trainer of TRL has prepared it.
        temperature: What the logits are divided by.
        cast_lm_head_to_fp32: Whether the logits are computed in float32.
    """
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    # The forward method that TRL gave the policy would still refer to the original.
    reference.__dict__.pop("forward", None)
    add_fused_lm_head(reference, temperature, cast_lm_head_to_fp32)
    return reference


def convert_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights that are not trained from float32, except for heads and adapters."""
    for weight in _frozen(model).values():
        if weight.dtype == torch.float32:
            weight.data = weight.data.to(dtype)


def share_frozen_weights(policy: nn.Module, models: Sequence[nn.Module]) -> None:
    """Make frozen weights of other models share storage with frozen weights of the policy that have equal values.

    It does not matter how the models were loaded: weights are compared by name, dtype and value.
    """
    policy_weights = _frozen(policy)
    for model in models:
        for name, weight in _frozen(model).items():
            shared = policy_weights.get(name)
            if shared is not None and shared.dtype == weight.dtype and torch.equal(shared, weight):
                weight.data = shared.data


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen weights, except heads and adapters, by plain name."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = getattr(model, "peft_config", {})
    weights = {}
    for name, weight in model.named_parameters():
        is_head = name.partition(".")[0] in HEAD_NAMES
        is_adapter = any(f".{adapter}." in f"{name}." for adapter in adapters)
        if not weight.requires_grad and not is_head and not is_adapter:
            weights[plain_name(name)] = weight
    return weights


def plain_name(name: str) -> str:
    """Return the name that a weight had before adapters were added to its model."""
    # layers.0.q_proj.base_layer.weight -> layers.0.q_proj.weight
    return name.replace(".base_layer", "").replace(".original_module", "").replace(".token_adapter", "")


@contextmanager
def restore_frozen_weights(model: PeftModel, merge: bool = False) -> Iterator[None]:
    """Restore the frozen weights to the bit after a block in which the adapter is merged into them.

    Unmerging alone would round them, by up to 0.4% each time in 16 bits, and other models may share them. Only layers
    with an adapter are merged, so only these are copied, to CPU memory.

    Args:
        model: The model with the adapter.
        merge: Whether to merge and unmerge the adapter here. Otherwise, TRL does both within the block, for vLLM.
    """
    # Adapters of several parameters of one layer wrap each other, so a weight may be seen several times.
    copies: dict[nn.Parameter, torch.Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for weight in layer.get_base_layer().parameters():
                if not weight.requires_grad and weight not in copies:
                    copies[weight] = weight.detach().to("cpu", copy=True)
    try:
        if merge:
            model.merge_adapter()
        yield
    finally:
        if merge:
            model.unmerge_adapter()
        for weight, copied in copies.items():
            weight.data.copy_(copied)
