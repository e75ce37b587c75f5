"""Rollouts in checkpoints, the order of the prompts that follow, and weights that sampling leaves as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.data import Sampler
from trl.generation.vllm_generation import VLLMGeneration

from pipeline.models.patches import replace_sync_weights


def save_rollout(path: str, batches: Sequence[dict[str, Tensor | None]], state: dict[str, Any]) -> None:
    """Write the micro-batches of a rollout and the state that belongs to them.

    Args:
        path: The `.safetensors` file to write.
        batches: The tensors of each micro-batch by name; may be empty.
        state: Anything that JSON can represent.
    """
    # The micro-batches are slices of the same storage, which safetensors refuses.
    tensors = {
        f"{i}.{name}": tensor.clone().contiguous()
        for i, batch in enumerate(batches)
        for name, tensor in batch.items()
        if tensor is not None
    }
    safetensors.torch.save_file(tensors, path, metadata={"state": json.dumps(state)})


def load_rollout_state(path: str) -> dict[str, Any]:
    """Read the state that `save_rollout` wrote, without the micro-batches."""
    with safetensors.safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    return state


def load_rollout(path: str, device: torch.device) -> list[dict[str, Tensor]]:
    """Read the micro-batches that `save_rollout` wrote, with their tensors on `device`."""
    batches: dict[int, dict[str, Tensor]] = {}
    with safetensors.safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - it is not a mapping
            i, _, name = key.partition(".")
            batches.setdefault(int(i), {})[name] = file.get_tensor(key).to(device)
    return [batches[i] for i in sorted(batches)]


def keep_frozen_weights(vllm: VLLMGeneration) -> None:
    """Restore the frozen weights after each time that an adapter was merged into them, to be loaded by vLLM.

    Unmerging rounds them, in 16 bits by up to 0.4% each time, and other models may share them. Only layers with an
    adapter are merged, so only their weights are kept, in the memory of the CPU.

    Args:
        vllm: That of a trainer whose policy has an adapter and is not sharded; changed in place.
    """
    sync_weights = vllm.sync_weights
    kept: list[tuple[Tensor, Tensor]] = []

    def sync_and_restore() -> None:
        if not kept:
            adapted = (m.get_base_layer() for m in vllm.model.modules() if isinstance(m, BaseTunerLayer))
            # Several adapters of one layer, one for each parameter, wrap each other.
            frozen = {weight: None for layer in adapted for weight in layer.parameters() if not weight.requires_grad}
            kept.extend((weight, weight.detach().to("cpu", copy=True)) for weight in frozen)
        sync_weights()
        for weight, copy in kept:
            weight.data.copy_(copy)

    replace_sync_weights(vllm, sync_and_restore)


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
