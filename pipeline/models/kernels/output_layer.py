"""The output layer of instruction tuning on a CPU: applied only to positions with a label.

    tokens    <user> What is 2 ? <assistant> 4 . <end> <pad> <pad>
    labels                                   4 . <end>
    projected                        x       x x               3 of 11 positions: each predicts the next token

The output matrix is the largest one of a small model. With Triton, TRL's fused head only projects these positions. On a
CPU, it projects all of them, in tiles that the backward pass computes again: three times as long.
"""

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from pipeline import hardware
from pipeline.models.patches import replace_method

LOGITS = 2**27
"""Number of logits in a batch above which TRL's head is used, which needs less memory."""


def project_labelled_positions(model: PreTrainedModel | PeftModel) -> None:
    """Make a model in TRL's `SFTTrainer` on a CPU project only labelled positions, unless it transforms its logits."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    config = model.config.get_text_config()
    forward = model.forward
    transformations = (
        "final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier",
        "output_router_logits",
    )  # fmt: skip
    if hardware.accelerator() is not None or any(getattr(config, name, None) for name in transformations):
        return

    @functools.wraps(forward)
    def forward_labelled(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or labels.numel() * config.vocab_size > LOGITS:
            return forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        hidden = model.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        # A position predicts the token after it, and -100 stands for tokens without a loss.
        hidden = hidden[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100
        places = mask.flatten().nonzero().squeeze(1)
        logits = model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, places)).float()
        targets = labels.flatten()[places].unsqueeze(1)
        all_log_probs = logits.log_softmax(-1)
        # TRL only logs entropy and accuracy, without gradients.
        with torch.no_grad():
            entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
            is_top1 = logits.argmax(-1, keepdim=True) == targets
        scores = {"log_probs": all_log_probs.gather(-1, targets), "entropy": entropy, "is_top1": is_top1}
        # TRL expects a score of each position, (B, L - 1).
        placed = {name: values.new_zeros(mask.shape).masked_scatter(mask, values) for name, values in scores.items()}
        return FusedCausalLMOutput(**placed, label_mask=mask)

    replace_method(model, "forward", forward_labelled)
