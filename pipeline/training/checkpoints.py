"""Checkpoints that are either complete or absent, whatever kills the run, and resuming from the latest valid one.

transformers' `Trainer` writes into `checkpoint-N` itself, deletes older checkpoints before the new one is known to be
valid, and evaluates before it saves: a kill in between costs the run. Here a checkpoint is written under another name,
listed in a manifest with sizes and checksums, flushed to the disk, and only then renamed; older ones are deleted next,
and the evaluation runs last. The steps that follow a save do not wait for the checksums.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from pipeline import hardware
from pipeline.errors import RunStopped
from pipeline.files import replace_folder
from pipeline.training.callbacks import call_on_train_begin
from pipeline.training.checkpoint_manifest import (
    MANIFEST,
    STATE,
    complete_in_background,
    completion_has_failed,
    end_completion,
    replace_state,
    save_state,
    validate_checkpoint,
    wait_for_completion,
    write_manifest,
)
from pipeline.training.checks import total_steps

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"

DISK_IS_FULL = 2**23
"""Free bytes below which a failed write is attributed to a full disk. Files are written in pieces, and the last piece,
which did not fit, is what remained free."""


def make_checkpoints_atomic(trainer: Trainer) -> None:
    """Make a trainer's checkpoints complete or absent, and make it save before it evaluates.

    Three methods of this one trainer are wrapped, so that a recipe can use any trainer class of transformers or TRL.
    Subclasses may override `_save_checkpoint`, provided that they write below `_get_output_dir`. Evaluations leave the
    random state as it was: when and how often they happen has no effect on the weights.

    Args:
        trainer: Changed in place, before `train`.
    """
    save = trainer._save_checkpoint
    log_save_evaluate = trainer._maybe_log_save_evaluate
    evaluate = trainer._evaluate
    evaluation_due = False

    def save_checkpoint(model: Any, trial: Any) -> None:
        _save_atomically(trainer, lambda: save(model, trial), evaluation_due)

    def save_before_evaluating(*args: Any, **kwargs: Any) -> None:
        nonlocal evaluation_due
        if completion_has_failed(trainer.args.output_dir):
            finish_checkpoint(trainer)
        control = trainer.control
        both = control.should_save and control.should_evaluate and trainer.args.save_strategy != SaveStrategy.BEST
        if not both:
            log_save_evaluate(*args, **kwargs)
            return
        control.should_evaluate, evaluation_due = False, True
        log_save_evaluate(*args, **kwargs)
        evaluation_due = False
        if not trainer.control.should_training_stop or trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_evaluate = True
            log_save_evaluate(*args, **kwargs)
            _update_state(trainer)

    def evaluate_unnoticed(*args: Any, **kwargs: Any) -> dict[str, float]:
        with unchanged_random_state():
            return evaluate(*args, **kwargs)

    # transformers looks for the best checkpoint before `_find_best` does, which also reports that it is missing.
    logging.getLogger("transformers.trainer").addFilter(lambda record: "in the resumed state" not in str(record.msg))
    trainer._save_checkpoint = save_checkpoint
    trainer._evaluate = evaluate_unnoticed
    trainer._maybe_log_save_evaluate = save_before_evaluating
    call_on_train_begin(trainer, lambda **_: _find_best(trainer))
    call_on_train_begin(trainer, lambda **_: evaluate_if_missed(trainer))


def newest_complete(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step, or None; damaged ones are skipped with a warning."""
    wait_for_completion(output_dir)
    for checkpoint in reversed(checkpoints(output_dir)):
        damage = validate_checkpoint(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is skipped because it is damaged: %s", checkpoint, damage)
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return all checkpoints in an output directory, damaged or not, ordered by step."""
    found = [
        (int(match.group(1)), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    with hardware.unchanged_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextmanager
def cache_enabled(model: Any) -> Iterator[None]:
    """Save a model's configuration with `use_cache`, which transformers disables for training only."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = True
    try:
        yield
    finally:
        config.use_cache = before


def _checkpoint_of(trainer: Trainer, step: int) -> Path:
    return Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _save_atomically(trainer: Trainer, save: Callable[[], None], evaluation_due: bool) -> None:
    """Run `save` with another output directory, and rename its checkpoint when it is complete.

    Checksums of a large model take long: they are computed while training goes on, unless it ends, is evaluated, or has
    callbacks that read the checkpoint. A run that is killed meanwhile resumes from the checkpoint before.
    """
    args, state = trainer.args, trainer.state
    target = _checkpoint_of(trainer, state.global_step)
    tmp_dir = Path(args.output_dir) / UNFINISHED
    trainer._get_output_dir = lambda trial=None: str(tmp_dir)
    try:
        if args.should_save:
            end_completion(args.output_dir)
            shutil.rmtree(tmp_dir, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        with cache_enabled(trainer.model):
            save()
        trainer.accelerator.wait_for_everyone()
        if state.best_global_step:
            best = _checkpoint_of(trainer, state.best_global_step)
            if best.exists() or best == target:
                state.best_model_checkpoint = str(best)
        if args.should_save:
            finished = tmp_dir / target.name
            (finished / "training_args.bin").unlink(missing_ok=True)  # a pickle, which may contain a token
            (finished / "README.md").unlink(missing_ok=True)  # PEFT's draft of a card, with paths of this machine
            save_state(state, finished / STATE)
            step, best_name = state.global_step, state.best_model_checkpoint

            def complete() -> None:
                try:
                    write_manifest(finished, step, evaluation_due)
                    replace_folder(target, finished)  # one that exists is damaged: the run did not resume from it
                    shutil.rmtree(tmp_dir, ignore_errors=True)
                    _delete_surplus(args, target, best_name)
                except (OSError, RuntimeError, SafetensorError) as error:
                    shutil.rmtree(tmp_dir, ignore_errors=True)
                    error.add_note(str(step))  # by the time that it is reported, training has gone on
                    raise

            complete_in_background(args.output_dir, complete)
            best_only = args.save_strategy == SaveStrategy.BEST  # which is loaded at the end, without another save
            if best_only or evaluation_due or trainer.control.should_training_stop or _is_read(trainer):
                end_completion(args.output_dir)
        trainer.accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:
        message = _describe_failed_save(trainer, error)
        shutil.rmtree(tmp_dir, ignore_errors=True)
        raise RunStopped(message) from error
    finally:
        del trainer._get_output_dir


def finish_checkpoint(trainer: Trainer) -> None:
    """Wait until the latest checkpoint is complete.

    Raises:
        RunStopped: If it could not be written.
    """
    try:
        end_completion(trainer.args.output_dir)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunStopped(_describe_failed_save(trainer, error)) from error


def _find_best(trainer: Trainer) -> None:
    """Set the path of the best checkpoint, of which a state that was read knows the name only."""
    state = trainer.state
    if not state.best_global_step:
        return
    best = _checkpoint_of(trainer, state.best_global_step)
    if best.is_dir():
        state.best_model_checkpoint = str(best)
    elif trainer.args.load_best_model_at_end:
        logger.warning("%s, the best checkpoint so far, is missing; later ones are compared with its figure.", best)


def _is_read(trainer: Trainer) -> bool:
    """Return whether a callback, such as that of pushes or of a tracker, reads checkpoints when they are saved."""
    return any(
        getattr(callback.on_save, "__func__", None) is not TrainerCallback.on_save
        for callback in trainer.callback_handler.callbacks
    )


def _delete_surplus(args: TrainingArguments, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, but neither the newest nor the best."""
    limit = args.save_total_limit
    if limit is None or limit <= 0:
        return
    kept = {newest.name}
    if best is not None:
        kept.add(Path(best).name)
    found = checkpoints(args.output_dir)
    surplus = len(found) - max(limit, len(kept))
    for checkpoint in [path for path in found if path.name not in kept][: max(surplus, 0)]:
        # Renamed first, so that a kill in between does not leave half of a checkpoint.
        trash_dir = checkpoint.parent / UNFINISHED
        os.replace(checkpoint, trash_dir)
        shutil.rmtree(trash_dir, ignore_errors=True)


def _update_state(trainer: Trainer) -> None:
    """Write the results of an evaluation into the checkpoint of the same step."""
    state = trainer.state
    checkpoint = _checkpoint_of(trainer, state.global_step)
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(checkpoint)
    if trainer.args.should_save:
        new = checkpoint / f".{STATE}"
        save_state(state, new)
        replace_state(checkpoint, new)


def evaluate_if_missed(trainer: Trainer) -> None:
    """Run the evaluation that a kill prevented after the checkpoint that a trainer has resumed from."""
    state = trainer.state
    manifest = _checkpoint_of(trainer, state.global_step) / MANIFEST
    if state.global_step == 0 or not manifest.exists():
        return
    logged = [entry for entry in state.log_history if entry.get("step") == state.global_step]
    due = json.loads(manifest.read_text(encoding="utf-8")).get("evaluation_due")
    if due and not any("eval_loss" in entry for entry in logged):
        metrics = trainer._evaluate(None, None)
        trainer._determine_best_metric(metrics=metrics, trial=None)
        _update_state(trainer)


def restore_finished(trainer: Trainer, checkpoint: Path) -> bool:
    """Load the model and the state of a complete checkpoint if it is of the last step.

    transformers would resume from it with one more step, so that a run killed between its last checkpoint and its end
    would differ from an undisturbed one.

    Returns:
        Whether the checkpoint was of the last step. Always False for models that are loaded after sharding (FSDP,
        DeepSpeed).
    """
    state = TrainerState.load_from_json(str(checkpoint / STATE))
    if state.global_step < total_steps(trainer) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    _find_best(trainer)
    evaluate_if_missed(trainer)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    return True


def adopt_present_length(trainer: Trainer, checkpoint: Path) -> None:
    """Make a run that resumes from `checkpoint` follow its present arguments where they may have changed.

    transformers takes from the checkpoint how often to log, save and evaluate, and the learning rate of the next step,
    which belongs to the schedule of the total that the checkpoint knows.

    Args:
        trainer: Changed when its training begins.
        checkpoint: Where it resumes from.
    """
    before = TrainerState.load_from_json(str(checkpoint / STATE)).max_steps

    def adopt(**_: Any) -> None:
        state, schedule = trainer.state, trainer.lr_scheduler
        state.compute_steps(trainer.args, state.max_steps)
        if state.max_steps == before:
            return
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        if isinstance(schedule, LambdaLR):  # all that do not follow evaluations
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            for group, base, factor in zip(trainer.optimizer.param_groups, schedule.base_lrs, factors, strict=True):
                group["lr"] = base * factor
        now = trainer.optimizer.param_groups[0]["lr"]
        logger.info(
            "%-11s at step %d, to %d steps instead of %d: the learning-rate schedule is that of the new total, %.2e "
            "instead of %.2e here",
            *("continuing", state.global_step, state.max_steps, before, now, rates[0]),
        )

    call_on_train_begin(trainer, adopt)


def _describe_failed_save(trainer: Trainer, error: Exception) -> str:
    args = trainer.args
    free = shutil.disk_usage(args.output_dir).free
    reason = " ".join(str(error).split())
    if free < DISK_IS_FULL:  # torch reports this as an unexpected position in the file
        reason = f"the disk is full, {free / 2**20:.1f} MiB are free ({reason})"
    last = newest_complete(args.output_dir)
    restart = f"resumes from {last}" if last else "starts again"
    step = getattr(error, "__notes__", [trainer.state.global_step])[0]
    return (
        f"The checkpoint of step {step} could not be written to {args.output_dir}: {reason}. "
        f"Free some space or correct the cause; the same command then {restart}."
    )
