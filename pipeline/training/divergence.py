"""A loss or a reward that is not a number ends the run before it reaches the weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import RunStopped
from pipeline.training.checkpoints import newest_complete

if TYPE_CHECKING:
    from trl import GRPOTrainer


def stop_on_divergence(trainer: Trainer) -> None:
    """Stop a trainer at the first loss that is NaN or infinite, before its gradient is applied.

    transformers replaces such losses in its logs by an average (`logging_nan_inf_filter`), and trains on.

    Args:
        trainer: Changed in place, before `train`.
    """
    rows = _FetchedRows()
    trainer.add_callback(rows)
    step = trainer.training_step

    def checked_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = rows.take()
        loss = step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss).all():
            raise RunStopped(_tell(trainer, float(loss.detach().float().mean()), batch))
        return loss

    trainer.training_step = checked_step


def stop_on_broken_rewards(trainer: GRPOTrainer, rewards: torch.Tensor) -> None:
    """Stop at a reward that is infinite, or NaN where it comes from a reward model.

    TRL reads NaN as "not scored", which is what it makes of a reward function's None: completions whose reward
    model broke would be left out without a word.

    Args:
        trainer: TRL's `GRPOTrainer` or one made from it.
        rewards: (completions, rewards), of all processes.

    Raises:
        RunStopped: On every process.
    """
    broken = rewards.isinf()
    models = [isinstance(function, nn.Module) for function in trainer.reward_funcs]
    broken[:, models] |= rewards[:, models].isnan()
    for name, column, wrong in zip(trainer.reward_func_names, rewards.T, broken.T, strict=True):
        if wrong.any():
            raise RunStopped(
                f"The reward {name} was {column[wrong][0]:g} for {int(wrong.sum())} of {len(column)} completions in "
                f"step {trainer.state.global_step + 1}; {_last_good(trainer)}. Nothing was learned from them. Mend "
                "the reward, and start again."
            )


class _FetchedRows(TrainerCallback):
    """Remembers which rows of the training data set each batch was made of, in the order of the batches."""

    def __init__(self) -> None:
        self.fetched: deque[list[int]] = deque()

    def take(self) -> list[int] | None:
        """Rows of the next batch to be trained on; `None` if unknown (a stream, or loader processes)."""
        return self.fetched.popleft() if self.fetched else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen to the data set of the training loader."""
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        fetch = getattr(dataset, "__getitems__", None)
        if dataset is None or fetch is None or args.dataloader_num_workers > 0:
            return

        def remember(indices: Sequence[int]) -> Any:
            self.fetched.append([int(index) for index in indices])
            return fetch(indices)

        dataset.__getitems__ = remember


def _tell(trainer: Trainer, loss: float, rows: list[int] | None) -> str:
    where = "of rows that are not known (streamed data)" if rows is None else f"of rows {rows} of the training data"
    return (
        f"The loss became {loss} in step {trainer.state.global_step + 1} (process {trainer.args.process_index}), "
        f"on the batch {where}; {_last_good(trainer)}. Nothing was learned from that batch. Lower learning_rate or "
        "max_grad_norm, or correct those rows, and start again with another output_dir."
    )


def _last_good(trainer: Trainer) -> str:
    last = newest_complete(trainer.args.output_dir)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
