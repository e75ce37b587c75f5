"""Log-probabilities from a model's plain logits, in forward passes without the padding of the batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.models.kernels.rollout_layout import ForwardPass, forward_passes
from pipeline.models.kernels.sampler import accepts_argument


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
        model: A causal language model, wrapped or not.
        ids: As for `over_passes`, like `attention_mask`, `length`, `batch_size` and `autocast`.
        temperature: What the logits are divided by.
        entropy: Whether to compute entropies, too.
        entropy_gradient: Whether gradients flow through them.

    Returns:
        Log-probabilities, and the entropies of the distributions that the tokens were drawn from, or None; each
        (B, `length`), in nats.
    """
    head = extract_model_from_parallel(model).get_output_embeddings()

    def of_pass(model: nn.Module, batch: ForwardPass) -> tuple[Tensor, ...]:
        # The head is the largest matrix of a small model, and most tokens are the prompts'.
        chosen = head.register_forward_pre_hook(lambda _, inputs: (at(inputs[0], batch.before).unsqueeze(0),))
        try:
            logits = model(**batch.inputs).logits[0].float()
        finally:
            chosen.remove()
        log_probs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        # With a large vocabulary, each of these takes more memory than the rest of the model.
        del logits
        scored = log_probs.gather(-1, batch.tokens.unsqueeze(-1)).squeeze(-1)
        if not entropy:
            return (scored,)
        if torch.is_grad_enabled() and entropy_gradient:
            return scored, -(log_probs.exp() * log_probs).sum(-1)
        with torch.no_grad():
            return scored, -log_probs.exp().mul_(log_probs).sum(-1)

    scored, *entropies = over_passes(of_pass, model, ids, attention_mask, length, batch_size, autocast)
    return scored, entropies[0] if entropy else None


def over_passes(
    compute: Callable[[nn.Module, ForwardPass], tuple[Tensor, ...]],
    model: nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    length: int,
    batch_size: int | None,
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[Tensor, ...]:
    """Compute something for each token of the completions.

    Positions are counted from each text's first token, as they are during sampling.

    Args:
        compute: Takes a model and the layout of a forward pass; returns any number of tensors (N,), for the N tokens of
            the completions in it.
        model: The model, bare or wrapped for DDP.
        ids: As for `rollout_layout.forward_passes`, like `attention_mask`, `length` and `batch_size`.
        autocast: Makes the context of the forward passes, as `Accelerator.autocast` does.

    Returns:
        As many tensors (B, `length`), 0 at padding.
    """
    passes = forward_passes(model, ids, attention_mask, length, batch_size)
    # Processes may differ in their number of passes, and DDP communicates in each that goes through it.
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    # One context for all passes casts the weights only once.
    with autocast():
        parts = [compute(inside if number else model, batch) for number, batch in enumerate(passes)]
    places = torch.cat([batch.places for batch in passes])
    whole = (torch.cat(several) for several in zip(*parts, strict=True))
    return tuple(part.new_zeros(ids.shape[0] * length).scatter(0, places, part).view(-1, length) for part in whole)


def at(batch: Tensor, places: Tensor) -> Tensor:
    """Return the vectors (N, D) of a batch (R, L, D) at places in its flattened first two dimensions."""
    return batch.flatten(0, 1).index_select(0, places)


def with_positions(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a model, wrapped or not, with the positions of its inputs if it accepts them."""
    if not accepts_argument(model, "position_ids"):
        return model

    def call(**inputs: Any) -> Any:
        return model(position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0), **inputs)

    return call
