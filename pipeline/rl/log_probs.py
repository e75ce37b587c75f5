"""Log-probabilities from a model's plain logits, computed in groups of texts of similar length."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.models.generation import accepts_argument

CPU_ROWS = 16
"""Texts in a group on a CPU, enough to keep it busy. An accelerator takes all of them at once."""


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
        ids: As for `over_length_groups`, like `attention_mask`, `length`, `batch_size` and `autocast`.
        temperature: What the logits are divided by.
        entropy: Whether to compute entropies, too.
        entropy_gradient: Whether gradients flow through them.

    Returns:
        Log-probabilities, and the entropies of the distributions that the tokens were drawn from, or None; each
        (B, `length`), in nats.
    """

    def of_group(inputs: dict[str, Any], kept: int) -> tuple[Tensor, ...]:
        logits = model(**inputs, logits_to_keep=kept + 1).logits[:, :-1].float()
        log_probs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        scored = log_probs.gather(-1, inputs["input_ids"][:, -kept:].unsqueeze(-1)).squeeze(-1)
        if not entropy:
            return (scored,)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
            return scored, -(log_probs.exp() * log_probs).sum(-1)

    scored, *entropies = over_length_groups(of_group, model, ids, attention_mask, length, batch_size, autocast)
    return scored, entropies[0] if entropy else None


@dataclass(frozen=True)
class LengthGroup:
    """Some of the texts of a batch.

    Attributes:
        rows: (R,), which texts.
        columns: From the first to the last token that any of them has.
        length: How many of these columns belong to the completions; at least 1.
    """

    rows: Tensor
    columns: slice
    length: int

    def of(self, batch: Tensor) -> Tensor:
        """Return this group's part (R, `columns`) of a batch (B, L)."""
        return batch[self.rows, self.columns]


def over_length_groups(
    compute: Callable[[dict[str, Any], int], tuple[Tensor, ...]],
    model: nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    length: int,
    batch_size: int | None,
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[Tensor, ...]:
    """Compute something for each token of the completions, group by group.

    Positions are counted from each text's first token, as they are during sampling, so that they do not depend on the
    group either.

    Args:
        compute: Takes the arguments of the model's forward pass and the length of the group's completions; returns any
            number of tensors (R, that length).
        model: The model, wrapped or not.
        ids: (B, L), prompts padded on the left followed by completions padded on the right.
        attention_mask: (B, L).
        length: Columns of the completions, which come last; less than L.
        batch_size: Texts in a group, at most; None for all of them.
        autocast: Makes the context of the forward passes, as `Accelerator.autocast` does.

    Returns:
        As many tensors (B, `length`), 0 at padding: what a model outputs there depends on the group, and two such
        outputs may be far apart.
    """
    groups = length_groups(attention_mask, length, batch_size)
    positions = text_positions(attention_mask) if accepts_argument(model, "position_ids") else None
    parts = []
    with autocast():  # once, so that the weights are cast once
        for group in groups:
            inputs = {"input_ids": group.of(ids), "attention_mask": group.of(attention_mask), "use_cache": False}
            if positions is not None:
                inputs["position_ids"] = group.of(positions)
            absent = inputs["attention_mask"][:, -group.length :] == 0
            computed = (part.masked_fill(absent, 0.0) for part in compute(inputs, group.length))
            parts.append([pad(part, (0, length - group.length)) for part in computed])
    place = torch.cat([group.rows for group in groups]).argsort()
    return tuple(torch.cat(several)[place] for several in zip(*parts, strict=True))


def text_positions(attention_mask: Tensor) -> Tensor:
    """Return the positions (B, L) of tokens in their texts, of which `attention_mask` (B, L) leaves out the padding."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def with_positions(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a model, wrapped or not, with the positions of its inputs if it accepts them."""
    if not accepts_argument(model, "position_ids"):
        return model
    return lambda **inputs: model(position_ids=text_positions(inputs["attention_mask"]), **inputs)


def length_groups(attention_mask: Tensor, length: int, batch_size: int | None) -> list[LengthGroup]:
    """Split a batch into groups, each text in one of them. The arguments are those of `over_length_groups`."""
    size = batch_size or len(attention_mask)
    if attention_mask.device.type == "cpu":
        size = min(size, CPU_ROWS)
    width = attention_mask.shape[1]
    first = attention_mask.argmax(1)
    last = width - attention_mask.flip(1).argmax(1)
    groups = []
    for rows in (last - first).argsort(stable=True).split(size):
        stop = max(int(last[rows].max()), width - length + 1)
        groups.append(LengthGroup(rows, slice(int(first[rows].min()), stop), stop - (width - length)))
    return groups
