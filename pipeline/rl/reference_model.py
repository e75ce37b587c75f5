"""What the policy is held to: itself, as it was before training."""

from __future__ import annotations

import copy

from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head


def frozen_copy(policy: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool) -> PreTrainedModel:
    """A copy of a policy that is not trained, and computes log-probabilities only.

    TRL makes its reference by loading the policy's path again, which a model built in memory has not.

    Args:
        policy: A causal language model.
        temperature: That the logits are divided by.
        cast_lm_head_to_fp32: Compute the logits in float32.
    """
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    # The forwards that TRL gave the policy and its head hold on to them. Of this one, nobody asks for entropies.
    reference.__dict__.pop("forward", None)
    if cast_lm_head_to_fp32:
        head = reference.get_output_embeddings()
        head.__dict__.pop("forward", None)
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    add_fused_lm_head(reference, temperature, cast_lm_head_to_fp32)
    return reference


def copy_adapter(model: PeftModel, target: str) -> None:
    """Add to a model a frozen copy of its active adapter.

    Args:
        model: Has one active adapter, which stays so.
        target: The copy's name.
    """
    source = model.active_adapter
    model.add_adapter(target, model.peft_config[source])
    for name, parameter in model.named_parameters():
        if f".{source}." in name:
            copied = model.get_parameter(name.replace(f".{source}.", f".{target}."))
            copied.data.copy_(parameter.data)
            copied.requires_grad_(False)
