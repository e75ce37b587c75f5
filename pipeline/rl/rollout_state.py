"""The part of checkpoints with the rest of a rollout, which is used for several steps: a file for each process.

rollout_0.safetensors    tensors   "<number of the micro-batch>.<name>", none if the next step samples again
                         metadata  the place in the rollout, metrics that are not logged yet, and, for PPO, the
                                   moments of all scores so far; how the rollout was split; the entropy bonus
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from accelerate.logging import get_logger
from torch import Tensor

logger = get_logger(__name__)

# File of a checkpoint, by the number of the process.
ROLLOUT = "rollout_{}.safetensors"

# Attributes of the trainer that `use_adaptive_entropy` changes at each step.
ENTROPY_BONUS = ("entropy_coef", "_last_world_entropy")


class Rollout:
    """The rollout of a `GRPOTrainer`, as a part of its checkpoints (see `Reliable`).

    Guarded by `tests/rl/test_ppo_resume.py` and `tests/rl/test_grpo.py`.
    """

    belongs_to_model = False
    # Evaluations normalise scores by the moments of the rollouts so far, and their losses have the entropy bonus.
    evaluated_with = True

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        # The sizes that determine how a rollout is split; a resumed run must use the same ones.
        args = trainer.args
        self.layout = {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "steps_per_generation": args.steps_per_generation,
            "num_iterations": args.num_iterations,
            "processes": trainer.accelerator.num_processes,
        }

    def save(self, folder: Path) -> None:
        """Write the rest of the rollout or, if only the model is saved, what evaluations need."""
        trainer = self.trainer
        # After the last step of a rollout, the next step samples again. A checkpoint of only the model is not resumed.
        steps_of_rollout = trainer.args.steps_per_generation * trainer.num_iterations
        in_use = not trainer.args.save_only_model and trainer._step % steps_of_rollout != 0
        batches = []
        if in_use and trainer._buffered_inputs:
            batches = trainer._buffered_inputs
        tensors = {}
        for number, batch in enumerate(batches):
            for name, tensor in batch.items():
                if tensor is not None:
                    # Micro-batches are slices of the same storage, which safetensors rejects.
                    tensors[f"{number}.{name}"] = tensor.clone().contiguous()
        state = {"layout": self.layout, "step": trainer._step, "metrics": trainer._metrics["train"]}
        if hasattr(trainer, "score_moments"):
            state["moments"] = vars(trainer.score_moments)
        if trainer.use_adaptive_entropy:
            # TRL saves them as well, but only loads them together with the optimizer.
            state["entropy_bonus"] = {name: getattr(trainer, name) for name in ENTROPY_BONUS}
        file = folder / ROLLOUT.format(trainer.accelerator.process_index)
        safetensors.torch.save_file(tensors, file, metadata={"state": json.dumps(state)})

    def load(self, folder: Path) -> None:
        """Continue with the rollout of a checkpoint if this run would split it in the same way."""
        trainer = self.trainer
        first = folder / ROLLOUT.format(0)
        if not first.is_file():
            return
        # The file of the first process decides for all processes, which have to sample again together or not at all:
        # otherwise they would wait for each other forever.
        state = read_state(first)
        batches: dict[str, dict[str, Tensor]] = {}
        if state["layout"] == self.layout:
            file = folder / ROLLOUT.format(trainer.accelerator.process_index)
            state = read_state(file)
            for key, tensor in safetensors.torch.load_file(file).items():
                number, _, name = key.partition(".")
                batches.setdefault(number, {})[name] = tensor.to(trainer.accelerator.device)
        else:
            logger.warning("%s: its rollout is sampled again, because it was split by %s", folder, state["layout"])
            # TRL counts micro-batches.
            state["step"] = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        micro_batches = [batches[number] for number in sorted(batches, key=int)]
        # None lets TRL sample at the next step.
        vars(trainer).update(_buffered_inputs=micro_batches or None, _step=state["step"])
        trainer._metrics["train"].update(state["metrics"])
        if "moments" in state:
            vars(trainer.score_moments).update(state["moments"])
        vars(trainer).update(state.get("entropy_bonus", {}))


def read_state(file: Path) -> dict[str, Any]:
    """Return the state that the metadata of a file contain: see the picture at the top of this module."""
    with safetensors.safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["state"])
