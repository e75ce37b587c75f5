"""The linear heads of models: their names in classifiers, and how they compute in float32."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.models.patches import bind_forward

HEAD_NAMES = ("score", "classifier")
"""Names of the linear head in transformers' classifiers."""


def find_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the head of a classifier and its name, ("", an empty module) if the model does not have one."""
    name = next((name for name in HEAD_NAMES if hasattr(model, name)), "")
    return name, getattr(model, name) if name else nn.Module()


def compute_in_float32(head: nn.Module) -> None:
    """Make a head multiply in float32, in a model of any dtype and under autocast.

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
