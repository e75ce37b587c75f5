"""Log-probabilities of a text's tokens from the model's plain logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def token_log_probs(
    model: nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    length: int,
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Score the last tokens of each text.

    Args:
        model: A causal language model, in whatever wrapper.
        ids: (B, L).
        attention_mask: (B, L).
        length: How many tokens are scored.
        temperature: That the logits are divided by.
        entropy: Compute entropies too.
        entropy_gradient: Let gradients through them.

    Returns:
        Log-probabilities (B, `length`), and the entropies (B, `length`) of the distributions that the tokens
        were drawn from, or None; in nats.
    """
    logits = model(
        input_ids=ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=length + 1
    ).logits
    log_probs = (logits[:, :-1].float() / temperature).log_softmax(-1)
    scored = log_probs.gather(-1, ids[:, -length:].unsqueeze(-1)).squeeze(-1)
    if not entropy:
        return scored, None
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
        return scored, -(log_probs.exp() * log_probs).sum(-1)
