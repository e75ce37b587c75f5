"""Log-probabilities and entropies of completions from a model's plain logits, which are computed for them only."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.kernels.sampler import accepts_argument, unwrap
from pipeline.models.kernels.token_trees import ForwardPass, compute_in_passes

MAX_LOGITS = 1 << 28
"""Logits that a batch keeps on a CPU until its backward pass (1 GiB in float32). With more, each pass is computed
twice, and only one pass is in memory. For SmolLM2-135M, 64 completions of 40 tokens then take 3.7 instead of 6.6 GB,
and 1.1 times (all weights, float32) to 1.5 times (all weights or LoRA, bfloat16) as long."""


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
    """Compute the log-probabilities of the last tokens of each text.

    Args:
        model: A causal language model, wrapped or not. Other arguments are as for `compute_in_passes`.
        temperature: Divisor of the logits.
        entropy: Whether to compute entropies.
        entropy_gradient: Whether gradients flow through entropies, if those are requested.

    Returns:
        Log-probabilities, and the entropies of the tokens' distributions, or None; each (B, `length`), in nats.
    """
    bare = unwrap(model)
    head = bare.get_output_embeddings()
    # Number of logits that the backward pass needs.
    logits_in_memory = int(attention_mask[:, -length:].sum()) * bare.config.get_text_config().vocab_size

    def score_pass(model: nn.Module, batch: ForwardPass) -> tuple[Tensor, ...]:
        def select_states(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            """Keep the hidden states (B, L, channels) that predict the tokens of completions: (1, N, channels)."""
            return (inputs[0].flatten(0, 1).index_select(0, batch.predecessors)[None],)

        # The head is the largest matrix of a small model, and most tokens belong to prompts.
        with head.register_forward_pre_hook(select_states):
            logits = model(**batch.inputs).logits[0].float()
        if temperature != 1:
            logits = logits / temperature
        log_probs = logits.log_softmax(-1)
        # With a large vocabulary, each of these tensors takes more memory than the rest of the model.
        del logits
        scored = log_probs.gather(-1, batch.tokens.unsqueeze(-1)).squeeze(-1)
        if not entropy:
            return (scored,)
        if torch.is_grad_enabled() and entropy_gradient:
            return scored, -(log_probs.exp() * log_probs).sum(-1)
        with torch.no_grad():
            return scored, -log_probs.exp().mul_(log_probs).sum(-1)

    twice = ids.device.type == "cpu" and logits_in_memory > MAX_LOGITS
    results = compute_in_passes(score_pass, model, ids, attention_mask, length, batch_size, autocast, twice)
    if not entropy:
        return results[0], None
    scored, entropies = results
    return scored, entropies


def with_positions(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a model, wrapped or not, with the positions of its inputs if it accepts them."""
    if not accepts_argument(model, "position_ids"):
        return model

    def call(**inputs: Any) -> Any:
        return model(position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0), **inputs)

    return call
