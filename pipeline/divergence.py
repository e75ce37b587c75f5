"""A loss that is not a number ends the run before it reaches the weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.checkpoints import newest_complete
from pipeline.errors import RunStopped


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
    args = trainer.args
    where = "of rows that are not known (streamed data)" if rows is None else f"of rows {rows} of the training data"
    last = newest_complete(args.output_dir)
    saved = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    return (
        f"The loss became {loss} in step {trainer.state.global_step + 1} (process {args.process_index}), "
        "on the batch "
        f"{where}; {saved}. Nothing was learned from that batch. Lower learning_rate or max_grad_norm, "
        "or correct "
        "those rows, and start again with another output_dir."
    )
