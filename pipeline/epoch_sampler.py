"""The order of prompts, drawn from the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """TRL's `RepeatSampler`, with an order that a resumed run finds again.

    TRL's draws each epoch's order from a generator that goes on from the epoch before, so that a run resumed
    in the second epoch would see the prompts in the order of the first.

    Args:
        sampler: A `trl.trainer.utils.RepeatSampler`.
        epoch: Tells the epochs trained so far; None before training.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], float | None]) -> None:
        self.sampler, self.epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + int(self.epoch() or 0))
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
