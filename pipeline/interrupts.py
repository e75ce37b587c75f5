"""Ctrl-C and SIGTERM: finish the step, save, say how to go on."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import RunStopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptCallback(TrainerCallback):
    """Saves and stops at the end of the step during which a signal came.

    The second signal has its usual effect at once. All processes of a run stop at the same step.

    Attributes:
        received: The signal, or `None`; in the processes that got none too, once they agreed to stop.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._earlier = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.restore()
        # `print` is not safe in a signal handler: it may be in the middle of another one.
        os.write(
            sys.stderr.fileno() if not sys.stderr.closed else 2,
            f"\n{self.received.name}: saving after this step; once more to stop without.\n".encode(),
        )

    def restore(self) -> None:
        """Give the signals back their earlier handlers."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and stop, if a signal came to any process."""
        if args.world_size > 1 and torch.distributed.is_initialized():
            number = torch.tensor(int(self.received or 0), device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            if int(number):
                self.received = signal.Signals(int(number))
        if self.received is not None and not control.should_training_stop:
            control.should_save = True
            control.should_training_stop = True

    def reason_to_stop(self, state: TrainerState, output_dir: str) -> RunStopped | None:
        """How to end a run whose training a signal stopped early.

        Returns:
            An error with exit code 128 + the signal's number; `None` if no signal came, or only after the
            last step.
        """
        if self.received is None or state.global_step >= state.max_steps:
            return None
        return RunStopped(
            f"Stopped by {self.received.name} after step {state.global_step} of {state.max_steps}, saved in "
            f"{output_dir}. The same command goes on from there.",
            exit_code=128 + int(self.received),
        )
