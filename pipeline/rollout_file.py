"""A rollout on disk: what one process was training on when a checkpoint was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor


def save_rollout(path: str, batches: Sequence[dict[str, Tensor | None]], state: dict[str, Any]) -> None:
    """Write the micro-batches of a rollout, and what else belongs to them.

    Args:
        path: A `.safetensors` file to write.
        batches: One dictionary of tensors a micro-batch; may be empty.
        state: Anything that JSON can hold.
    """
    # The micro-batches are slices of the same storage, which safetensors refuses.
    tensors = {
        f"{i}.{name}": tensor.clone().contiguous()
        for i, batch in enumerate(batches)
        for name, tensor in batch.items()
        if tensor is not None
    }
    safetensors.torch.save_file(tensors, path, metadata={"state": json.dumps(state)})


def load_state(path: str) -> dict[str, Any]:
    """Read the state that `save_rollout` wrote, without the micro-batches."""
    with safetensors.safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    return state


def load_rollout(path: str, device: torch.device) -> list[dict[str, Tensor]]:
    """Read the micro-batches that `save_rollout` wrote.

    Args:
        path: The file.
        device: Where to put the tensors.
    """
    batches: dict[int, dict[str, Tensor]] = {}
    with safetensors.safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            i, _, name = key.partition(".")
            batches.setdefault(int(i), {})[name] = file.get_tensor(key).to(device)
    return [batches[i] for i in sorted(batches)]
