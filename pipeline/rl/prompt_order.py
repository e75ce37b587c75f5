"""The order of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """TRL's `RepeatSampler`, with an order that depends only on the number of the epoch.

    TRL draws each epoch's order from one generator, so that a run resumed in the second epoch would see the prompts in
    the order of the first.

    Args:
        sampler: A `trl.trainer.utils.RepeatSampler`.
        epoch: Returns how many epochs have been trained so far; None before training.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], float | None]) -> None:
        self.sampler, self.epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + int(self.epoch() or 0))
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
