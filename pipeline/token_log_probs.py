"""Log-probabilities of a text's tokens from the model's plain logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.length_groups import over_length_groups


def token_log_probs(
    model: nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    length: int,
    *,
    batch_size: int | None,
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[Tensor, Tensor | None]:
    """Score the last tokens of each text.

    Args:
        model: A causal language model, in whatever wrapper.
        ids: (B, L).
        attention_mask: (B, L).
        length: How many tokens are scored.
        batch_size: Texts in a forward pass; None for all of them.
        temperature: That the logits are divided by.
        entropy: Compute entropies too.
        entropy_gradient: Let gradients through them.
        autocast: Makes the context of the forward passes.

    Returns:
        Log-probabilities (B, `length`), and the entropies (B, `length`) of the distributions that the tokens
        were drawn from, or None; in nats.
    """

    def of_group(inputs: dict[str, Any], kept: int) -> tuple[Tensor, ...]:
        logits = model(**inputs, logits_to_keep=kept + 1).logits[:, :-1].float()
        log_probs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        scored = log_probs.gather(-1, inputs["input_ids"][:, -kept:].unsqueeze(-1)).squeeze(-1)
        if not entropy:
            return (scored,)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
            return scored, -(log_probs.exp() * log_probs).sum(-1)

    with autocast():  # once, so that the weights are cast once
        scored, *entropies = over_length_groups(of_group, model, ids, attention_mask, length, batch_size)
    return scored, entropies[0] if entropy else None
