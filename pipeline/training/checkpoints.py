"""Checkpoints that are either complete or not there, whatever kills the run, and resuming from the newest
good one.

transformers' `Trainer` writes into `checkpoint-N` itself, deletes older checkpoints before anybody knows that
the new one is good, and evaluates before it saves: a kill in between costs the run. Here a checkpoint is
written aside, listed in a manifest with sizes and checksums, brought to the disk, and only then given its
name; then older ones are deleted, and then evaluation runs.
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
import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from pipeline.errors import Problem, RunStopped, UserError
from pipeline.training.manifest import MANIFEST, STATE, bring_to_disk, find_damage, replace_state, write_manifest

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"

DISK_IS_FULL = 2**23
"""Free bytes below which a failed write is put down to the disk: files are written in pieces, of which the
last one
that did not fit is what was left free."""


def protect(trainer: Trainer) -> None:
    """Make a trainer's checkpoints complete or absent, and save before it evaluates.

    Two methods of this one trainer are wrapped, so that a recipe can use any trainer class of transformers or
    TRL as it is. Overrides of `_save_checkpoint` in subclasses work, provided that they write below
    `_get_output_dir`.

    Args:
        trainer: Changed in place, before `train`.
    """
    save = trainer._save_checkpoint
    log_save_evaluate = trainer._maybe_log_save_evaluate

    evaluation_due = False

    def save_checkpoint(model: Any, trial: Any) -> None:
        _save_aside(trainer, lambda: save(model, trial), evaluation_due)

    def save_before_evaluating(*args: Any, **kwargs: Any) -> None:
        nonlocal evaluation_due
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
            with unchanged_random_state():  # which the checkpoint holds already
                log_save_evaluate(*args, **kwargs)
            _update_state(trainer)

    trainer._save_checkpoint = save_checkpoint
    trainer._maybe_log_save_evaluate = save_before_evaluating
    trainer.add_callback(_MissedEvaluation(trainer))


def newest_complete(output_dir: str | Path) -> Path | None:
    """Find the checkpoint to resume from; damaged ones are passed over with a warning.

    Args:
        output_dir: Output directory of a run; it need not exist.

    Returns:
        The complete checkpoint with the highest step, or `None`.
    """
    for checkpoint in reversed(checkpoints(output_dir)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is passed over, because it is damaged: %s", checkpoint, damage)
    return None


def check_architecture(checkpoint: Path, config: Any) -> None:
    """Refuse a checkpoint of another model, before its weights are loaded in part.

    Args:
        checkpoint: A checkpoint's directory; adapters, which hold no configuration, pass.
        config: The model's `PretrainedConfig`.

    Raises:
        UserError: If a size or the kind of model is another.
    """
    path = checkpoint / "config.json"
    if not path.exists():
        return
    saved, present = json.loads(path.read_text()), config.to_dict()
    names = ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "vocab_size", "num_labels"]
    changed = [
        f"{name} {saved[name]} instead of {present[name]}"
        for name in names
        if name in saved and name in present and saved[name] != present[name]
    ]
    if changed:
        remedy = f"is of another architecture ({', '.join(changed)}); choose another checkpoint or output_dir"
        raise UserError(Problem("resume_from_checkpoint", checkpoint, remedy))


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoints in an output directory, damaged or not, by step."""
    found = [
        (int(match.group(1)), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Give Python, NumPy and torch back the random state that they had."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _save_aside(trainer: Trainer, save: Callable[[], None], evaluation_due: bool) -> None:
    """Run `save` with another output directory, and move its checkpoint into place when it is complete."""
    args, state = trainer.args, trainer.state
    target = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    aside = Path(args.output_dir) / UNFINISHED
    push, args.push_to_hub = args.push_to_hub, False  # it would push a directory that is about to move
    trainer._get_output_dir = lambda trial=None: str(aside)
    try:
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        save()
        trainer.accelerator.wait_for_everyone()
        if state.best_global_step:
            best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if best.exists() or best == target:
                state.best_model_checkpoint = str(best)
        if args.should_save:
            finished = aside / target.name
            (finished / "training_args.bin").unlink(missing_ok=True)  # a pickle, which may hold a token
            state.save_to_json(str(finished / STATE))
            write_manifest(finished, state.global_step, evaluation_due)
            _move_into_place(finished, target)
            _delete_surplus(trainer, target)
        trainer.accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:
        message = _tell_failed_save(trainer, error)
        shutil.rmtree(aside, ignore_errors=True)
        raise RunStopped(message) from error
    finally:
        del trainer._get_output_dir
        args.push_to_hub = push
    if push:
        trainer._push_from_checkpoint(str(target))


def _move_into_place(finished: Path, target: Path) -> None:
    if target.exists():  # damaged, passed over when the run resumed
        shutil.rmtree(finished.parent / "replaced", ignore_errors=True)
        os.replace(target, finished.parent / "replaced")
    os.replace(finished, target)
    bring_to_disk(target.parent)
    shutil.rmtree(finished.parent, ignore_errors=True)


def _delete_surplus(trainer: Trainer, newest: Path) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, but neither the newest nor the best."""
    limit = trainer.args.save_total_limit
    if limit is None or limit <= 0:
        return
    kept = {newest.name}
    if trainer.state.best_model_checkpoint is not None:
        kept.add(Path(trainer.state.best_model_checkpoint).name)
    there = checkpoints(trainer.args.output_dir)
    surplus = len(there) - max(limit, len(kept))
    for checkpoint in [path for path in there if path.name not in kept][: max(surplus, 0)]:
        # Renamed first, so that a kill in the middle of it leaves no half of a checkpoint behind.
        doomed = Path(trainer.args.output_dir) / UNFINISHED
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _update_state(trainer: Trainer) -> None:
    """Write the results of an evaluation into the checkpoint of the same step."""
    args, state = trainer.args, trainer.state
    checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(checkpoint)
    if args.should_save:
        aside = checkpoint / f".{STATE}"
        state.save_to_json(str(aside))
        replace_state(checkpoint, aside)


def evaluate_if_missed(trainer: Trainer) -> None:
    """Run the evaluation that a kill prevented, after the checkpoint that a run resumes from.

    Args:
        trainer: Its state is that of the checkpoint; nothing is done if that holds the evaluation's result,
            or was not due for one.
    """
    state = trainer.state
    manifest = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / MANIFEST
    if state.global_step == 0 or not manifest.exists():
        return
    logged = [entry for entry in state.log_history if entry.get("step") == state.global_step]
    if json.loads(manifest.read_text()).get("evaluation_due") and not any("eval_loss" in e for e in logged):
        with unchanged_random_state():
            metrics = trainer._evaluate(None, None)
            trainer._determine_best_metric(metrics=metrics, trial=None)
        _update_state(trainer)


def restore_finished(trainer: Trainer, checkpoint: Path) -> bool:
    """Load a checkpoint of the last step, after which nothing is left to train.

    transformers would resume from it with one more step, so that a run killed between its last checkpoint and
    its end would not end as if undisturbed.

    Args:
        trainer: Its model and state are changed, if the checkpoint is of the last step.
        checkpoint: A complete checkpoint.

    Returns:
        Whether it was. Never for models that are loaded after sharding (FSDP, DeepSpeed).
    """
    state = TrainerState.load_from_json(str(checkpoint / STATE))
    if state.global_step < state.max_steps or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    evaluate_if_missed(trainer)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    return True


class _MissedEvaluation(TrainerCallback):
    """`evaluate_if_missed` at the start of a training that resumes."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate if that is due."""
        evaluate_if_missed(self.trainer)


def _tell_failed_save(trainer: Trainer, error: Exception) -> str:
    args = trainer.args
    free = shutil.disk_usage(args.output_dir).free
    reason = " ".join(str(error).split())
    if free < DISK_IS_FULL:  # which torch reports as a file position that it did not expect
        reason = f"the disk is full, {free / 2**20:.1f} MiB are free ({reason})"
    last = newest_complete(args.output_dir)
    goes_on = f"goes on from {last}" if last else "starts again"
    return (
        f"The checkpoint of step {trainer.state.global_step} could not be written to {args.output_dir}: "
        f"{reason}. "
        f"Make room or correct that; the same command then {goes_on}."
    )
