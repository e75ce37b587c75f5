"""Rewards that are not numbers, and reward functions that fail, end a run before they reach the weights."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.errors import RunStopped, UserError

logger = logging.getLogger(__name__)


def stop_on_broken_rewards(trainer: Any, rewards: torch.Tensor) -> None:
    """Stop at a reward that is infinite, or that is NaN and comes from a reward model.

    TRL turns a reward function's None into NaN and reads NaN as "not scored". Completions whose reward model broke
    would silently not count.

    Args:
        trainer: A `pipeline.rl.grpo.GRPOTrainer`.
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
                f"step {trainer.state.global_step + 1}; {trainer.last_good()}. Nothing was learned from them. Correct "
                "the reward, and start again."
            )


@contextmanager
def stop_on_failing_rewards(trainer: Any) -> Iterator[None]:
    """Stop with a short message if a reward function called in the block fails or returns something unusable."""
    try:
        yield
    except UserError as error:
        # Only the first process reports a `UserError`, and this one may have been raised by another.
        where = f"in step {trainer.state.global_step + 1}; {trainer.last_good()}"
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
            f"({called.co_filename}:{line}) in step {trainer.state.global_step + 1}; {trainer.last_good()}. "
            "Correct the reward, and start again."
        ) from error
