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

    Attributes:
        received: The signal that any process has received, or None; the same on every process.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        # The first signal that this process has received, or 0.
        self._first_signal = 0
        # When it was received, on the monotonic clock.
        self._time = 0.0
        self._earlier_handlers = {number: signal.signal(number, self._receive) for number in stop_signals()}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        leave_closed_terminal()
        if self._first_signal:
            # A different signal that comes at once is the launcher's, for the same Ctrl-C.
            is_repeated = number == self._first_signal or time.monotonic() > self._time + SAME_SIGNAL_SECONDS
            if is_repeated and number != getattr(signal, "SIGHUP", None):
                self.restore()
                signal.raise_signal(number)
            return
        # Only note the signal: this handler may interrupt anything, and the step has to finish first.
        self._first_signal = number
        self._time = time.monotonic()
        name = signal.Signals(number).name
        # `print` is not safe in a signal handler that may interrupt another `print`.
        os.write(2, f"\n{name}: saving after this step; repeat to stop without saving.\n".encode())
        report_progress(stopping=name)

    def restore(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and stop if any process has received a signal."""
        # A later signal counts for the next step: a process that stopped alone would leave the others waiting.
        agreed = self._first_signal
        if args.world_size > 1 and torch.distributed.is_initialized():
            number = torch.tensor(agreed, device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            agreed = int(number)
        if agreed and not control.should_training_stop:
            self.received = signal.Signals(agreed)
            control.should_save = True
            control.should_training_stop = True

    def reason_to_stop(self, state: TrainerState, output_dir: str) -> RunStopped | None:
        """Return an error with exit code 128 + the signal's number, or None if no signal has stopped training early."""
        if self.received is None or state.global_step >= state.max_steps:
            return None
        return RunStopped(
            f"Stopped by {self.received.name} after step {state.global_step} of {state.max_steps}, saved in "
            f"{output_dir}. The same command resumes from there.",
            exit_code=128 + int(self.received),
        )


@dataclass(eq=False)
class FiguresCallback(TrainerCallback):
    """Add metrics to every log of training, where trackers see them and in the trainer's state.

    - `tokens_per_second` (of all processes), `mfu` and `eta_seconds`. `mfu` is the speed of the model's arithmetic
      relative to large matrix products (`hardware.matmul_peak`), with evaluations and checkpoints as lost time. Without
      `include_num_input_tokens_seen`, only the time left is logged.
    - If the model has experts: `router/layer_<n>/expert_<m>`, an expert's tokens since the last log, relative to a fair
      share, and `router/layer_<n>/entropy`, the mean entropy of the router's distribution in nats. Layers are
      counted from 0 among those that have experts.

    Args:
        length: Tokens per training sequence, which determine the cost of attention; 0 if unknown.
    """

    length: int

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start the clock and the counter."""
        self.flops_per_token = training_flops_per_token(model, self.length)
        # Time in seconds, step and tokens at the last log.
        self.last = (time.perf_counter(), state.global_step, float(state.num_input_tokens_seen))
        self.counter = RouteCounter(model, training=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the metrics of the steps since the last log."""
        # The trainer has already copied the log into its history.
        history = [entry for entry in state.log_history[-1:] if entry.get("step") == state.global_step]
        for entry in (logs or {}, *history):
            # TRL counts a batch of packed rows as a single row, and begins anew in a resumed run.
            # `num_input_tokens_seen` is right.
            entry.pop("num_tokens", None)
            entry.pop("eval_num_tokens", None)
        if logs is None or "loss" not in logs:
            return
        metrics = self._speed(args, state) | self._routes(args)
        for entry in (logs, *history):
            entry.update(metrics)

    def _speed(self, args: Any, state: Any) -> dict[str, float]:
        """Return speed and time left, measured since the last log; {} if there was no step since then."""
        now = (time.perf_counter(), state.global_step, float(state.num_input_tokens_seen))
        seconds, steps, tokens = (present - last for present, last in zip(now, self.last, strict=True))
        if steps <= 0 or seconds <= 0:
            return {}
        self.last = now
        metrics: dict[str, float] = {"eta_seconds": round(seconds / steps * (state.max_steps - state.global_step))}
        if tokens > 0:
            dtype = "fp32"
            if args.bf16:
                dtype = "bf16"
            elif args.fp16:
                dtype = "fp16"
            peak = hardware.matmul_peak(dtype) * args.world_size
            metrics["tokens_per_second"] = round(tokens / seconds)
            metrics["mfu"] = round(tokens / seconds * self.flops_per_token / peak, 3)
        return metrics

    def _routes(self, args: Any) -> dict[str, float]:
        """Return the load of each expert and the entropy of each router since the last log; {} without experts."""
        counter = self.counter
        if not counter.routers:
            return {}
        counter.counts = reduce(counter.counts.to(args.device), "sum").cpu()
        entropy = reduce(counter.entropy.to(args.device), "sum").cpu()
        # A token is counted once for each expert that it goes to.
        means = entropy / (counter.counts.sum(1) / counter.routers[0].top_k)
        metrics: dict[str, float] = {}
        for layer, (shares, mean) in enumerate(zip(counter.shares, means.tolist(), strict=True)):
            for expert, share in enumerate(shares):
                metrics[f"router/layer_{layer}/expert_{expert}"] = round(share, 3)
            metrics[f"router/layer_{layer}/entropy"] = round(mean, 4)
        counter.clear()
        return metrics


class ReportCallback(TrainerCallback):
    """Log each of the trainer's logs as a line instead of a dictionary, and report every step to the runner."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the step."""
        report_progress(done=state.global_step, total=state.max_steps)

    # Resumed training does not begin at step 0.
    on_train_begin = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log the main metrics in `logs`, including the ones that `FiguresCallback` adds."""
        logs = logs or {}
        # All metrics are in `trainer_state.json`.
        main = ("loss", "reward", "bits_per_byte", "accuracy", "mean_token_accuracy")
        texts = []
        for name, value in logs.items():
            if name.removeprefix("eval_") in main:
                texts.append(f"{name.replace('_', ' ')} {value:.4g}")
        if texts and state.is_world_process_zero:
            if "learning_rate" in logs:
                texts.append(f"learning rate {logs['learning_rate']:.2e}")
            if "tokens_per_second" in logs:
                texts.append(f"{logs['tokens_per_second']:,} tokens/s")
            if logs.get("eta_seconds"):
                texts.append(f"{time_in_words(logs['eta_seconds'])} left")
            step = str(state.global_step).rjust(len(str(state.max_steps)))
            logger.info("step %s/%d: %s", step, state.max_steps, ", ".join(texts))
        report_progress(**{name: logs[name] for name in ("loss", "reward", "tokens_per_second") if name in logs})
