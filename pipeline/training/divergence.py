"""Losses and rewards that are not numbers, and reward functions that fail, end a run before they reach the weights."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from pipeline.errors import RunStopped, UserError
from pipeline.training.callbacks import call_on_train_begin
from pipeline.training.checkpoints import newest_complete

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


def stop_on_divergence(trainer: Trainer) -> None:
    """Stop a trainer at the first loss that is NaN or infinite, before its gradient is applied.

    transformers replaces such losses in its logs by an average (`logging_nan_inf_filter`), and continues to train.
    """
    fetched: deque[list[int]] = deque()
    step = trainer.training_step

    def record_rows(train_dataloader: Any = None, **_: Any) -> None:
        """Record which rows of the data set each batch is made of, in the order of the batches."""
        dataset = getattr(train_dataloader, "dataset", None)
        fetch = getattr(dataset, "__getitems__", None)
        if dataset is None or fetch is None or trainer.args.dataloader_num_workers > 0:
            return

        def fetch_and_record(indices: Sequence[int]) -> Any:
            fetched.append([int(index) for index in indices])
            return fetch(indices)

        dataset.__getitems__ = fetch_and_record

    def checked_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = fetched.popleft() if fetched else None  # unknown with streams and with worker processes
        loss = step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss).all():
            where = "of unknown rows (streamed data)" if rows is None else f"of rows {rows} of the training data"
            raise RunStopped(
                f"The loss became {float(loss.detach().float().mean())} in step {trainer.state.global_step + 1} "
                f"(process {trainer.args.process_index}), on the batch {where}; {last_good(trainer)}. Nothing was "
                "learned from that batch. Lower learning_rate or max_grad_norm, or correct those rows, and start again "
                "with another output_dir."
            )
        return loss

    call_on_train_begin(trainer, record_rows)
    trainer.training_step = checked_step


def stop_on_broken_rewards(trainer: GRPOTrainer, rewards: torch.Tensor) -> None:
    """Stop at a reward that is infinite, or that is NaN and comes from a reward model.

    TRL turns a reward function's None into NaN and reads NaN as "not scored". Completions whose reward model broke
    would be left out silently.

    Args:
        trainer: TRL's `GRPOTrainer` or a subclass.
        rewards: Rewards of all processes, of shape (completions, rewards).

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
                f"step {trainer.state.global_step + 1}; {last_good(trainer)}. Nothing was learned from them. Correct "
                "the reward, and start again."
            )


@contextmanager
def stop_on_failing_rewards(trainer: GRPOTrainer) -> Iterator[None]:
    """Stop with a short message if a reward function called in the block fails or returns something unusable."""
    try:
        yield
    except UserError as error:  # of one process, perhaps, and only the first process reports a `UserError`
        where = f"in step {trainer.state.global_step + 1}; {last_good(trainer)}"
        raise RunStopped(f"{error} ({where}. Correct the reward, and start again.)") from error
    except (Exception, SystemExit) as error:
        functions = [inspect.unwrap(getattr(function, "func", function)) for function in trainer.reward_funcs]
        codes = [getattr(function, "__code__", getattr(function.__call__, "__code__", None)) for function in functions]
        names = dict(zip(codes, trainer.reward_func_names, strict=True))
        frames = list(traceback.walk_tb(error.__traceback__))
        called = next((frame.f_code for frame, _ in frames if frame.f_code in names), None)
        if called is None or isinstance(error, RunStopped):
            raise
        logger.debug("The reward %s failed.", names[called], exc_info=True)
        line = [line for frame, line in frames if frame.f_code.co_filename == called.co_filename][-1]
        raise RunStopped(
            f"The reward {names[called]} raised {type(error).__name__}: {' '.join(str(error).split())} "
            f"({called.co_filename}:{line}) in step {trainer.state.global_step + 1}; {last_good(trainer)}. Correct the "
            "reward, and start again."
        ) from error


def last_good(trainer: Trainer) -> str:
    """Name the checkpoint to resume from, as part of a message."""
    last = newest_complete(trainer.args.output_dir)
    return f"the last good checkpoint is {last}" if last else "the run has saved no checkpoint yet"
