"""The reference that the KL penalty compares the policy with: the policy as it was before training."""

from __future__ import annotations

import copy

from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

REFERENCE_ADAPTER = "ref"
"""Name of the frozen copy of an adapter that training started from."""


def frozen_copy(policy: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool) -> PreTrainedModel:
    """Copy a policy as a model that is not trained and only computes log-probabilities.

    Its logits are divided by `temperature`, and in float32 with `cast_lm_head_to_fp32`. TRL makes its reference by
    loading the policy's path again, which a model built in memory does not have.
    """
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    # The forward method that TRL gave the policy still refers to the original.
    reference.__dict__.pop("forward", None)
    add_fused_lm_head(reference, temperature, cast_lm_head_to_fp32)
    return reference


def copy_adapter(model: PeftModel) -> None:
    """Add a frozen copy of a model's active adapter, which stays active, under the name `REFERENCE_ADAPTER`."""
    # TRL does the same, under the same name, if `beta` asks for a reference.
    source = model.active_adapter
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config[source])
    for name, parameter in model.named_parameters():
        if f".{source}." in name:
            copied = model.get_parameter(name.replace(f".{source}.", f".{REFERENCE_ADAPTER}."))
            copied.data.copy_(parameter.data)
            copied.requires_grad_(False)
