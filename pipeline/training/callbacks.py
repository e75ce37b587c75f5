"""Callbacks of every trainer: an interrupt finishes the step and saves; logs are lines with speed and time left."""

import logging
import os
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline import hardware
from pipeline.errors import RunStopped, leave_closed_terminal, stop_signals
from pipeline.models.experts import RouteCounter, training_flops_per_token
from pipeline.progress import report_progress, time_in_words

logger = logging.getLogger(__name__)

SAME_SIGNAL_SECONDS = 1.0
"""Seconds in which another signal counts as the same one."""


class InterruptCallback(TrainerCallback):
    """Save and stop at the end of the step in which a signal arrived, at the same step in all processes.

    A second signal has its usual effect immediately, with two exceptions. A terminal that closes may send several. And
    Ctrl-C under a launcher gives two at once: SIGINT from the terminal and, from accelerate 1.16 on, its SIGTERM.
    """

    def __init__(self) -> None:
        # The signal that any process has received; the same on every process.
        self.received: signal.Signals | None = None
        # The first signal that this process has received, or 0, and when.
        self._own, self._time = 0, 0.0
        self._earlier = {number: signal.signal(number, self._receive) for number in stop_signals()}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        leave_closed_terminal()
        if self._own:
            is_repeated = number == self._own or time.monotonic() > self._time + SAME_SIGNAL_SECONDS
            if is_repeated and number != getattr(signal, "SIGHUP", None):
                self.restore()
                signal.raise_signal(number)
            return
        # Only note the signal: this handler may interrupt anything, and the step has to finish first.
        self._own, self._time, name = number, time.monotonic(), signal.Signals(number).name
        # `print` is not safe in a signal handler that may interrupt another `print`.
        os.write(2, f"\n{name}: saving after this step; repeat to stop without saving.\n".encode())
        report_progress(stopping=name)

    def restore(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and stop if any process has received a signal."""
        # A later signal counts for the next step: a process that stopped alone would leave the others waiting.
        agreed = self._own
        if args.world_size > 1 and torch.distributed.is_initialized():
            number = torch.tensor(agreed, device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            agreed = int(number)
        if agreed and not control.should_training_stop:
            self.received = signal.Signals(agreed)
            control.should_save = True
            control.should_training_stop = True

    def reason_to_stop(self, state: TrainerState, output_dir: str) -> RunStopped | None:
        """Return an error with exit code 128 + the signal's number if a signal has stopped training early."""
        if self.received is None or state.global_step >= state.max_steps:
            return None
        return RunStopped(
            f"Stopped by {self.received.name} after step {state.global_step} of {state.max_steps}, saved in "
            f"{output_dir}. The same command resumes from there.",
            exit_code=128 + int(self.received),
        )


@dataclass(eq=False)
class FiguresCallback(TrainerCallback):
    """Add figures to every log of training, where trackers see them and in the trainer's state.

    - `tokens_per_second` (of all processes), `mfu` and `eta_seconds`. `mfu` is the speed of the model's arithmetic
      relative to large matrix products (`hardware.matmul_peak`), with evaluations and checkpoints as lost time. Without
      `include_num_input_tokens_seen`, only the time left is logged.
    - If the model has experts: `router/layer_<n>/expert_<m>`, an expert's tokens since the last log, relative to a fair
      share, and `router/layer_<n>/entropy`, the mean entropy of the router's distribution in nats. Layers are
      counted from 0 among those that have experts.
    """

    # Tokens per training sequence, which determine the cost of attention.
    length: int

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start the clock and the counter."""
        self.flops_per_token = training_flops_per_token(model, self.length)
        # Time in seconds, step and tokens at the last log.
        self.last = (time.perf_counter(), state.global_step, float(state.num_input_tokens_seen))
        self.counter = RouteCounter(model, training=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the figures."""
        # The trainer has already copied the log into its history.
        history = [entry for entry in state.log_history[-1:] if entry.get("step") == state.global_step]
        for entry in (logs or {}, *history):
            # TRL counts a batch of packed rows as a single row, and begins anew in a resumed run.
            # `num_input_tokens_seen` is right.
            entry.pop("num_tokens", None)
            entry.pop("eval_num_tokens", None)
        if logs is None or "loss" not in logs:
            return
        figures: dict[str, float] = {}
        now = (time.perf_counter(), state.global_step, float(state.num_input_tokens_seen))
        seconds, steps, tokens = (a - b for a, b in zip(now, self.last, strict=True))
        if steps > 0 and seconds > 0:
            self.last = now
            figures["eta_seconds"] = round(seconds / steps * (state.max_steps - state.global_step))
            if tokens > 0:
                dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
                peak = hardware.matmul_peak(dtype) * args.world_size
                figures["tokens_per_second"] = round(tokens / seconds)
                figures["mfu"] = round(tokens / seconds * self.flops_per_token / peak, 3)
        if (counter := self.counter).routers:
            counter.counts = reduce(counter.counts.to(args.device), "sum").cpu()
            entropy = reduce(counter.entropy.to(args.device), "sum").cpu()
            # A token is counted once for each expert that it goes to.
            means = entropy / (counter.counts.sum(1) / counter.routers[0].top_k)
            for layer, (shares, mean) in enumerate(zip(counter.shares, means.tolist(), strict=True)):
                figures |= {f"router/layer_{layer}/expert_{i}": round(share, 3) for i, share in enumerate(shares)}
                figures[f"router/layer_{layer}/entropy"] = round(mean, 4)
            counter.clear()
        for entry in (logs, *history):
            entry.update(figures)


class ReportCallback(TrainerCallback):
    """Log each of the trainer's logs as a line instead of a dictionary, and report every step to the runner."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the step."""
        report_progress(done=state.global_step, total=state.max_steps)

    # Resumed training does not begin at step 0.
    on_train_begin = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log the main figures in `logs`, including the ones that `FiguresCallback` adds."""
        logs = logs or {}
        # All metrics are in `trainer_state.json`.
        main = ("loss", "reward", "bits_per_byte", "accuracy", "mean_token_accuracy")
        figures = [f"{n.replace('_', ' ')} {logs[n]:.4g}" for n in logs if n.removeprefix("eval_") in main]
        if figures and state.is_world_process_zero:
            if "learning_rate" in logs:
                figures.append(f"learning rate {logs['learning_rate']:.2e}")
            if "tokens_per_second" in logs:
                figures.append(f"{logs['tokens_per_second']:,} tokens/s")
            if logs.get("eta_seconds"):
                figures.append(f"{time_in_words(logs['eta_seconds'])} left")
            step = str(state.global_step).rjust(len(str(state.max_steps)))
            logger.info("step %s/%d: %s", step, state.max_steps, ", ".join(figures))
        report_progress(**{name: logs[name] for name in ("loss", "reward", "tokens_per_second") if name in logs})
