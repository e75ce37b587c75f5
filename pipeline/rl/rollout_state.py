"""The part of checkpoints with what is left of a rollout: a file for each process.

A rollout serves several steps, and TRL keeps it in memory only. With it, a resumed run goes on in the middle of one:

    rollout_0.safetensors    tensors   "<number of the micro-batch>.<name>", none if the next step samples anew
                             metadata  the place in the rollout, metrics that are not logged yet, and, for PPO, the
                                       moments of all scores so far; and how the rollout was split
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from accelerate.logging import get_logger
from torch import Tensor

logger = get_logger(__name__)


class Rollout:
    """The rollout of a trainer, as a part of its checkpoints (`pipeline.training.reliable`).

    Args:
        trainer: A `GRPOTrainer`; its `rollout_state` returns what else the next step depends on.
    """

    belongs_to_model = False

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @property
    def layout(self) -> dict[str, int]:
        """The sizes that determine how a rollout is split; a resumed run must use the same ones."""
        args = self.trainer.args
        return {
            "processes": self.trainer.accelerator.num_processes,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "steps_per_generation": args.steps_per_generation,
            "num_iterations": args.num_iterations,
        }

    def save(self, folder: Path) -> None:
        """Write what is left of the rollout, unless only the model is saved."""
        trainer = self.trainer
        if trainer.args.save_only_model:
            return
        # After the last step of a rollout, the next one samples anew.
        in_use = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
        tensors = {}
        for number, batch in enumerate(trainer._buffered_inputs or [] if in_use else []):
            for name, tensor in batch.items():
                if tensor is not None:
                    # The micro-batches are slices of the same storage, which safetensors refuses.
                    tensors[f"{number}.{name}"] = tensor.clone().contiguous()
        state = json.dumps({"layout": self.layout} | trainer.rollout_state())
        file = rollout_file(folder, trainer.accelerator.process_index)
        safetensors.torch.save_file(tensors, file, metadata={"state": state})

    def load(self, folder: Path) -> None:
        """Go on with the rollout of a checkpoint if it was split as this run would split it."""
        trainer = self.trainer
        if not rollout_file(folder, 0).is_file():
            return
        # The first process's file decides for all: if some sampled anew and others did not, they would wait forever.
        state = read_state(rollout_file(folder, 0))
        if state.get("layout") == self.layout:
            own = rollout_file(folder, trainer.accelerator.process_index)
            trainer._buffered_inputs = self._read_batches(own) or None
            state = read_state(own)
        else:
            logger.warning("%s: its rollout is sampled anew: it was split by %s", folder, state.get("layout"))
            state["step"] = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        trainer.restore_rollout_state(state)

    def _read_batches(self, file: Path) -> list[dict[str, Tensor]]:
        batches: dict[int, dict[str, Tensor]] = {}
        for key, tensor in safetensors.torch.load_file(file).items():
            number, _, name = key.partition(".")
            batches.setdefault(int(number), {})[name] = tensor.to(self.trainer.accelerator.device)
        return [batches[number] for number in sorted(batches)]


def rollout_file(folder: Path, process: int) -> Path:
    """Return the file of a process in a checkpoint."""
    return folder / f"rollout_{process}.safetensors"


def read_state(file: Path) -> dict[str, Any]:
    """Return the metadata of a file."""
    with safetensors.safe_open(file, framework="pt") as opened:
        state: dict[str, Any] = json.loads(opened.metadata()["state"])
    return state
