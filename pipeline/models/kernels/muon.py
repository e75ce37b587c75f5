"""Muon that orthogonalises matrices of the same shape together, because single small ones do not keep the cores busy.

The gradients of a step are sorted into stacks by shape, and each stack is orthogonalised by a few Newton-Schulz
iterations. For a block of width 64 with an inner width of 192 and 4 experts:

    q, k, v, o        (64, 64)   x 4    one stack of 4
    gate, up          (192, 64)  x 2    transposed, since products of the short side are cheaper
    down              (64, 192)         one stack of 3 with the two above
    experts' weights  (4, 64, 192)      a stack already, added to the last one
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import hardware

NUMBERS_AT_ONCE = 2**22
"""Maximum size of a stack. Larger ones use all cores anyway, and take memory."""


class Muon(torch.optim.Muon):
    """torch's `Muon`, with its state and its updates, also for stacks of matrices (the experts of a layer)."""

    def __init__(self, params: Sequence[Tensor], **options: Any) -> None:
        super().__init__([param for param in params if param.ndim == 2], **options)
        self.param_groups[0]["params"] += [param for param in params if param.ndim == 3]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step. `closure` is not called, since trainers compute the gradients themselves."""
        for group in self.param_groups:
            for (shape, is_tall, _), pairs in self._sort_into_stacks(group).items():
                lr = group["lr"]
                if is_tall:
                    lr = lr * math.sqrt(shape[1] / shape[0])
                size = max(1, NUMBERS_AT_ONCE // shape.numel())
                for begin in range(0, len(pairs), size):
                    matrices, updates = zip(*pairs[begin : begin + size], strict=True)
                    stack = torch.stack(updates)
                    steps = orthogonalize(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
                    for matrix, step in zip(matrices, steps, strict=True):
                        matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-lr)

    def _sort_into_stacks(self, group: dict[str, Any]) -> dict[Any, list[tuple[Tensor, Tensor]]]:
        """Update the momentum of all weights of a group, and return what to orthogonalise together.

        Returns:
            Pairs of a matrix of weights and its update, views with at least as many columns as rows; by the shape of
            the update, whether the matrix was transposed for that, and its device.
        """
        stacks: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param.grad)
            momentum = state["momentum_buffer"].lerp_(param.grad, 1 - group["momentum"])
            update = param.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            # Experts are stored as (experts, in, out), the weights of linear layers as (out, in).
            matrices = [(param, update)] if param.ndim == 2 else list(zip(param.mT, update.mT, strict=True))
            for matrix, change in matrices:
                is_tall = change.shape[0] > change.shape[1]
                pair = (matrix.mT, change.mT) if is_tall else (matrix, change)
                stacks[pair[1].shape, is_tall, param.device].append(pair)
        return stacks


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Replace the singular values of matrices by numbers near 1, with Newton-Schulz iterations.

    The shape is (matrices, rows, columns), with columns >= rows; everything else is as for `torch.optim.Muon`.
    """
    a, b, c = coefficients
    # Few digits are enough, but emulated bfloat16, which torch's `Muon` would use, is 25 times slower than float32.
    x = matrices.to(hardware.fast_dtype())
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
