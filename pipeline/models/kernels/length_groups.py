"""Batches of a sequence classifier in groups of similar length: on a CPU, padding costs as much as text.

one batch of 6             two groups of 3 (here: of 32)
a a a a a a a a            b b .        a a a a a a a a
b b . . . . . .            d d d        c c c c c . . .
c c c c c . . .            e . .        f f f f f f . .
d d d . . . . .
e . . . . . . .            48 positions become 9 + 24
f f f f f f . .
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.patches import replace_method

TOGETHER = 32
"""Number of texts that are computed together."""


def group_by_length(model: nn.Module) -> None:
    """Make a sequence classifier on a CPU compute texts of similar length together, without most of their padding.

    It only returns logits, the same apart from rounding. On an accelerator, a separate pass costs more than padding.
    """
    if next(model.parameters()).device.type == "cpu":
        # Keep the signature of the model, which trainers inspect.
        grouped = functools.update_wrapper(functools.partial(call_by_length, model.forward), model.forward)
        replace_method(model, "forward", grouped)


def call_by_length(classify: Callable[..., Any], *, attention_mask: Tensor, **others: Any) -> Any:
    """Call a sequence classifier with texts of similar length together; tensors are (B, L), logits (B, labels)."""
    inputs = {"attention_mask": attention_mask, **others}
    # The position after the last token of each text. Padding on the left stays.
    ends = attention_mask.shape[1] - attention_mask.flip(1).argmax(1)
    order, outputs = ends.argsort(stable=True), []
    for rows in order.split(TOGETHER):
        stop = int(ends[rows].max())
        group = {name: x[rows, :stop] if isinstance(x, Tensor) else x for name, x in inputs.items()}
        outputs.append(classify(**group))
    return type(outputs[0])(logits=torch.cat([output.logits for output in outputs])[order.argsort()])
