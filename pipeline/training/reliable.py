"""The mixin for all trainers of transformers and TRL: `class SFT(Reliable, SFTTrainer)`.

A run may be killed at any moment and loses at most the steps since its latest checkpoint. transformers' `Trainer`
writes into `checkpoint-N` itself, deletes older checkpoints before the new one is known to be valid, and evaluates
before saving. Here, the end of a step with a checkpoint and an evaluation is:

    training     step N | write | checksums, manifest, fsync | rename | evaluate | replace the state | step N + 1
    output_dir          | .unfinished/checkpoint-N           | checkpoint-N, without surplus ones
"""

import logging
import random
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import SaveStrategy, SchedulerType

from pipeline import hardware
from pipeline.errors import RunStopped
from pipeline.files import MANIFEST, STATE, read_json, replace_folder
from pipeline.models.kernels.quantized import prepare_for_training
from pipeline.models.patches import record_rows
from pipeline.models.weights import RenamedWeights
from pipeline.training import checkpoint_folders as folders
from pipeline.training.checkpoint_folders import checkpoint_folder, newest_complete
from pipeline.training.checks import total_steps
from pipeline.training.frozen_weights import convert_frozen

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""Errors if a checkpoint cannot be written. torch raises `RuntimeError` when the disk is full."""

DISK_IS_FULL = 2**23
"""Free bytes below which a failed write is attributed to a full disk. Less than a piece of a file may remain free."""


class Reliable(Trainer):
    """A trainer with atomic checkpoints, exact resumption, evaluations without side effects, and no NaN weights.

    - Checkpoints are complete or absent, and are saved before the evaluation of the same step (`_save_checkpoint`).
    - A resumed run follows its current arguments, and catches up on an evaluation that a kill prevented.
    - Evaluations do not change the random state: when and how often they happen has no effect on the weights.
    - Epochs only have whole batches, so that two processes train as one does.
    - A loss that is not a number ends the run before its gradient is applied.

    Guarded by `tests/training/test_checkpoints.py` and `tests/rl/test_ppo_resume.py` (a resumed run has the same bits),
    `tests/training/test_full_disk.py`, `tests/training/test_lost_rows.py` (whole batches), the tests of each recipe
    (two processes train as one does), and `python -m tests.benchmarks.kills`.

    Attributes:
        parts: What checkpoints contain besides the files of transformers: objects with `save(folder)` and
            `load(folder)`, which is called after transformers has loaded its own files. A part that `belongs_to_model`
            is saved and loaded together with the model, including the final and the best one, by the process that saves
            it. Other parts are saved in checkpoints and loaded to resume, by every process. One that is
            `evaluated_with`, such as the moments that normalise rewards, is also loaded for the evaluation that a kill
            prevented.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.parts: list[Any] = []
        # While a checkpoint is written, the folder used instead of `output_dir`.
        self._written_to: Path | None = None
        self._evaluation_due = False
        self._resumed_from: Path | None = None
        # When training began in this process, and the seconds that the run had trained in earlier ones.
        self._began = time.monotonic()
        self._earlier_seconds = 0.0
        self._uncounted_tokens = 0
        # The rows of each batch that was fetched and not yet trained on.
        self._fetched: deque[list[int]] = deque()
        super().__init__(*args, **kwargs)
        prepare_for_training(self.model)
        # Autocast would cast the weights that are frozen under an adapter again and again. PPO has `frozen_dtype`.
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        is_automatic = getattr(self.args, "frozen_dtype", "auto") == "auto"
        if isinstance(self.model, PeftModel) and not is_sharded and self.args.bf16 and is_automatic:
            convert_frozen(self.model, torch.bfloat16)
        self.parts.append(RenamedWeights(self))
        # This must run after the callbacks that the trainer was made with.
        self.add_callback(_TrainingBegins(self))

    # ---- Writing checkpoints

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do what is due after a step. A checkpoint is saved before the evaluation, which may take long."""
        control = self.control
        is_due = control.should_log or control.should_save or control.should_evaluate or control.should_training_stop
        if is_due and self.args.include_num_input_tokens_seen == "all":
            counted = torch.tensor(self._uncounted_tokens, dtype=torch.int64)
            self.state.num_input_tokens_seen += int(reduce(counted.to(self.args.device), "sum"))
            self._uncounted_tokens = 0
        both_due = control.should_save and control.should_evaluate
        # Evaluations change the state of these schedules, and the checkpoint must contain the changed state.
        follows_evaluations = self.args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        if not both_due or follows_evaluations or self.args.save_strategy == SaveStrategy.BEST:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        # First only log and save, then only evaluate.
        control.should_evaluate = False
        self._evaluation_due = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._evaluation_due = False
        # A run stopped by a signal evaluates when it is resumed.
        if not self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_evaluate = True
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self._record_evaluation()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Skip the draft of a card that TRL would write with every checkpoint."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint below `.unfinished`, and rename it once it is complete; stop the run if that fails."""
        args = self.args
        state = self.state
        unfinished = Path(args.output_dir) / folders.UNFINISHED
        written = checkpoint_folder(unfinished, state.global_step)
        self._written_to = unfinished
        try:
            if args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            written.mkdir(parents=True, exist_ok=True)
            for part in self.parts:
                if not part.belongs_to_model:
                    part.save(written)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            # transformers has set a path below `.unfinished` as the best checkpoint's.
            self._find_best()
            if args.should_save:
                # A pickle, which may contain a token, and PEFT's draft of a card, with paths of this machine.
                (written / "training_args.bin").unlink(missing_ok=True)
                (written / "README.md").unlink(missing_ok=True)
                folders.save_state(state, written / STATE)
                seconds = self._earlier_seconds + time.monotonic() - self._began
                folders.write_manifest(written, state.global_step, self._evaluation_due, seconds)
                # An existing checkpoint of this step is damaged, or the run would have resumed from it.
                target = checkpoint_folder(args.output_dir, state.global_step)
                replace_folder(target, written)
                shutil.rmtree(unfinished, ignore_errors=True)
                self._delete_surplus(target)
            self.accelerator.wait_for_everyone()
        except WRITE_ERRORS as error:
            reason = " ".join(str(error).split())
            # torch reports a full disk as an unexpected file position.
            free = shutil.disk_usage(args.output_dir).free
            if free < DISK_IS_FULL:
                reason = f"the disk is full, {free / 2**20:.1f} MiB are free ({reason})"
            shutil.rmtree(unfinished, ignore_errors=True)
            last = newest_complete(args.output_dir)
            start = f"resumes from {last}" if last else "starts again"
            raise RunStopped(
                f"The checkpoint of step {state.global_step} could not be written to {args.output_dir}: {reason}. Free "
                f"some space or correct the cause; the same command then {start}."
            ) from error
        finally:
            self._written_to = None

    def _delete_surplus(self, newest: Path) -> None:
        """Delete the oldest checkpoints beyond `save_total_limit`, but neither the newest nor the best one."""
        output_dir = self.args.output_dir
        limit = self.args.save_total_limit
        if not limit:
            return
        unfinished = Path(output_dir) / folders.UNFINISHED
        protected = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
        checkpoints = folders.checkpoints(output_dir)
        # The protected ones stay even if there are more of them than `limit`.
        surplus = len(checkpoints) - max(limit, len(protected))
        deletable = [path for path in checkpoints if path.name not in protected]
        for oldest in deletable[: max(0, surplus)]:
            # Renamed first, so that a kill does not leave a partial checkpoint.
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(oldest.rename(unfinished), ignore_errors=True)

    def _get_output_dir(self, trial: Any = None) -> str:
        """Return where transformers writes checkpoints: below `.unfinished`, while one is written."""
        return super()._get_output_dir(trial) if self._written_to is None else str(self._written_to)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model, also the final one, with the parts that belong to it."""
        folder = output_dir or self.args.output_dir
        with cache_enabled(self.model):
            super()._save(folder, state_dict)
        # transformers calls this on every process, and returns early on those that do not save.
        for part in self.parts:
            if part.belongs_to_model and self.args.should_save:
                part.save(Path(folder))

    # ---- Resuming

    def last_good(self) -> str:
        """Name the checkpoint to resume from, as part of a message."""
        last = newest_complete(self.args.output_dir)
        return f"the last good checkpoint is {last}" if last else "the run has saved no checkpoint yet"

    def restore_finished(self, checkpoint: Path) -> bool:
        """If a complete checkpoint is from the last step, load its model and state. Return whether it is.

        transformers would take one more step, so that a run killed after its last checkpoint would differ from an
        undisturbed one. With FSDP and DeepSpeed, which load models after sharding, return False.
        """
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if state.global_step < total_steps(self) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        # The first process wrote the state, so these fields are true of that process.
        ranks = {
            "is_local_process_zero": self.is_local_process_zero(),
            "is_world_process_zero": self.is_world_process_zero(),
        }
        vars(state).update(ranks)
        for part in self.parts:
            if getattr(part, "evaluated_with", False):
                part.load(checkpoint)
        self._find_best()
        if self.args.should_save and checkpoint.parent == Path(self.args.output_dir):
            self._delete_surplus(checkpoint)
        # transformers only prepares it for mixed precision if no other model, such as a reference, was prepared.
        self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self._evaluate_if_missed()
        # The summary of the training, which no checkpoint contains.
        seconds = read_json(checkpoint / MANIFEST).get("seconds")
        if seconds is not None:
            state.log_history.append({"train_runtime": seconds, "epoch": state.epoch, "step": state.global_step})
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_parts(resume_from_checkpoint, belongs_to_model=True)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_parts(self.state.best_model_checkpoint, belongs_to_model=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_parts(checkpoint, belongs_to_model=False)
            self._resumed_from = Path(checkpoint)
            self._earlier_seconds = read_json(Path(checkpoint) / MANIFEST).get("seconds", 0.0)

    def _load_parts(self, checkpoint: str, belongs_to_model: bool) -> None:
        for part in self.parts:
            if part.belongs_to_model == belongs_to_model:
                part.load(Path(checkpoint))

    def _find_best(self) -> None:
        """Set the path of the best checkpoint. A state on disk only contains its name."""
        state = self.state
        if not state.best_global_step:
            return
        best = checkpoint_folder(self.args.output_dir, state.best_global_step)
        is_saving = self._written_to is not None
        # The checkpoint that is being saved has another path until it is complete.
        if best.is_dir() or (is_saving and state.best_global_step == state.global_step):
            state.best_model_checkpoint = str(best)
        elif self.args.load_best_model_at_end and not is_saving:
            logger.warning("%s, the best checkpoint so far, is missing; later ones are compared with its metric.", best)

    def _evaluate_if_missed(self) -> None:
        """Run the evaluation after the checkpoint that the run resumed from, if a kill prevented it."""
        step = self.state.global_step
        manifest = read_json(checkpoint_folder(self.args.output_dir, step) / MANIFEST)
        if step == 0 or not manifest.get("evaluation_due"):
            return
        entries = [entry for entry in self.state.log_history if entry.get("step") == step]
        if any("eval_loss" in entry for entry in entries):
            return
        self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
        self._record_evaluation()

    def _record_evaluation(self) -> None:
        """Write an evaluation's results into the checkpoint of the same step."""
        checkpoint = checkpoint_folder(self.args.output_dir, self.state.global_step)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
        if self.args.should_save:
            folders.replace_state(checkpoint, self.state)

    def _adopt_present_length(self) -> None:
        """Follow the current arguments where they may have changed since the checkpoint.

        transformers restores how often to log, save and evaluate, and the learning rate for the earlier total.
        """
        checkpoint = self._resumed_from
        if checkpoint is None:
            return
        self._resumed_from = None
        state = self.state
        schedule = self.lr_scheduler
        groups = self.optimizer.param_groups
        earlier_total = TrainerState.load_from_json(str(checkpoint / STATE)).max_steps
        state.compute_steps(self.args, state.max_steps)
        if state.max_steps == earlier_total:
            return
        earlier_rate = groups[0]["lr"]
        # All schedules are of this class, except those that follow evaluations.
        if isinstance(schedule, LambdaLR):
            for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = base * factor(schedule.last_epoch)
        logger.info(
            "%-11s at step %d, to %d steps instead of %d: the learning rate follows the schedule of the new total, "
            "%.2e instead of %.2e here",
            "continuing",
            state.global_step,
            state.max_steps,
            earlier_total,
            groups[0]["lr"],
            earlier_rate,
        )

    # ---- Steps, batches, tokens and evaluations

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take a step, and raise a `RunStopped` for a loss that is NaN or infinite before its gradient is applied.

        transformers would replace such losses in logs by an average (`logging_nan_inf_filter`), and continue.
        """
        rows = self._fetched.popleft() if self._fetched else "unknown"
        # Autocast undoes the casts of LoRA's inputs, so they are skipped. Other methods, such as IA3, cannot skip them.
        is_lora = getattr(self.model, "peft_type", None) == "LORA"
        with disable_input_dtype_casting(model, self.args.bf16 and is_lora):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if torch.isfinite(loss).all():
            return loss
        raise RunStopped(
            f"The loss became {float(loss.detach().float().mean())} in step {self.state.global_step + 1} "
            f"(process {self.args.process_index}), on rows {rows}; {self.last_good()}. Nothing was learned from that "
            "batch. Lower learning_rate or max_grad_norm, or correct the data, and start again with another output_dir."
        )

    def get_train_dataloader(self) -> Any:
        """Drop the rows of each epoch that do not fill a whole batch, unless that would leave none."""
        # Accelerate would repeat rows to give every process a batch, and two processes would not train as one does.
        args = self.args
        dataset = self.train_dataset
        if not isinstance(dataset, Sized) or len(dataset) < args.train_batch_size * args.world_size:
            return super().get_train_dataloader()
        # If it were set permanently, it would also drop rows from evaluations.
        drop_last = args.dataloader_drop_last
        args.dataloader_drop_last = True
        try:
            return super().get_train_dataloader()
        finally:
            args.dataloader_drop_last = drop_last

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """With accumulation, also drop the rows of each epoch that do not fill all batches of an optimizer step."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        # Rows of a batch of all processes, and of an optimizer step.
        batch = self.args.train_batch_size * self.args.world_size
        step = batch * self.args.gradient_accumulation_steps
        if type(sampler) is RandomSampler and batch < step <= len(sampler):
            # This sampler draws the same order of all rows, but ends earlier.
            sampler = RandomSampler(sampler.data_source, num_samples=len(sampler) // step * step)
        return sampler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; the time in the summary of a resumed training includes what was trained before."""
        # Only an evaluation without training prepares the model.
        logs.pop("eval_model_preparation_time", None)
        if "train_runtime" in logs:
            logs["train_runtime"] += self._earlier_seconds
        super().log(logs, *args, **kwargs)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # transformers gathers the count of each micro-batch, which makes fast processes wait for slow ones, and the
        # host for its GPU. Here, counts are only added up when a step logs or saves.
        if self.args.include_num_input_tokens_seen != "all":
            super()._track_num_input_tokens(inputs)
            return
        ids = inputs.get(self.model.main_input_name)
        if ids is not None:
            self._uncounted_tokens += ids.numel()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as transformers does while it trains, without an effect on training."""
        with unchanged_random_state():
            return super()._evaluate(*args, **kwargs)


@dataclass(eq=False)
class _TrainingBegins(TrainerCallback):
    """What `Reliable` does when the first step is about to begin, after a checkpoint was loaded."""

    trainer: Reliable

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._began = time.monotonic()
        # These depend on the state that training begins with.
        self.trainer._find_best()
        self.trainer._evaluate_if_missed()
        self.trainer._adopt_present_length()
        # Worker processes would record the rows in copies of the data set.
        dataset = self.trainer.callback_handler.train_dataloader.dataset
        if hasattr(dataset, "__getitems__") and self.trainer.args.dataloader_num_workers == 0:
            self.trainer._fetched = record_rows(dataset)


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch at the end of the block."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with hardware.unchanged_rng():
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


@contextmanager
def cache_enabled(model: Any) -> Iterator[None]:
    """Enable `use_cache` in a model's configuration while it is saved; transformers only disables it for training."""
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    if use_cache is None:
        yield
        return
    config.use_cache = True
    yield
    config.use_cache = use_cache


# transformers warns about a missing best checkpoint before `_find_best` has set its path.
logging.getLogger("transformers.trainer").addFilter(lambda record: "in the resumed state" not in str(record.msg))
