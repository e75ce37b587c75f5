"""Forward passes over texts of like length, without the columns that hold nothing but padding.

In a batch of sampled texts one long completion makes padding of most of the others. Taken in order of their length and
a few at a time, the texts need about half the computation, and have the same values but for rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import Tensor, nn
from torch.nn.functional import pad

CPU_ROWS = 16
"""Texts in a group on a CPU, which such a number keeps busy. An accelerator takes all at once."""


@dataclass(frozen=True)
class LengthGroup:
    """Some of the texts of a batch.

    Args:
        rows: (R,), which texts.
        columns: From the first to the last token that any of them has.
        length: How many of the completion's columns are among those; at least 1.
    """

    rows: Tensor
    columns: slice
    length: int

    def inputs(self, model: nn.Module, ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Arguments of a forward pass. Positions are counted from each text's first token, as they are when it is
        sampled, so that they do not depend on the group either.

        Args:
            model: In whatever wrapper.
            ids: (B, L), of the whole batch.
            attention_mask: (B, L).
        """
        mask = attention_mask[self.rows, self.columns]
        given = {"input_ids": ids[self.rows, self.columns], "attention_mask": mask, "use_cache": False}
        if accepts(model, "position_ids"):
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return given


def over_length_groups(
    compute: Callable[[LengthGroup], tuple[Tensor, ...]], attention_mask: Tensor, length: int, batch_size: int | None
) -> tuple[Tensor, ...]:
    """Compute something for each token of the completions, group by group.

    Args:
        compute: Gives for a group any number of tensors (R, `group.length`).
        attention_mask: (B, L), of prompts padded on the left with completions padded on the right.
        length: Columns of the completions, which are the last.
        batch_size: Texts in a group, at most; None for all of them.

    Returns:
        As many tensors (B, `length`), 0 where no text of the group has a token.
    """
    groups = length_groups(attention_mask, length, batch_size)
    parts = zip(*map(compute, groups), strict=True)
    place = torch.cat([group.rows for group in groups]).argsort()
    return tuple(torch.cat([pad(part, (0, length - part.shape[1])) for part in several])[place] for several in parts)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward pass has an argument of that name.

    Args:
        model: In whatever wrapper.
        argument: The name.
    """
    model = extract_model_from_parallel(model)
    model = model.get_base_model() if is_peft_model(model) else model
    return argument in inspect.signature(model.forward).parameters


def length_groups(attention_mask: Tensor, length: int, batch_size: int | None) -> list[LengthGroup]:
    """Every text of a batch in one group. Arguments as of `over_length_groups`."""
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
