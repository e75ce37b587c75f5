"""The start and the end that every recipe shares."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import shutil
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline import files, launch
from pipeline.config import output_directory
from pipeline.errors import Problem, RunStopped, UserError, end_preparation
from pipeline.models.weights import resume_renamed_weights
from pipeline.training import checkpoints, manifest
from pipeline.training.callbacks import InterruptCallback, ThroughputCallback
from pipeline.training.divergence import stop_on_divergence

logger = logging.getLogger(__name__)


def run_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """Callbacks of every recipe's trainer: speed and time left in the logs.

    Args:
        args: The recipe's training arguments; the trainer is made to count tokens if they have a sequence
            length.
    """
    length = getattr(args, "block_size", None) or getattr(args, "max_length", None)
    if length:
        args.include_num_input_tokens_seen = "all"
    return [ThroughputCallback(length or 0)]


def train_and_save(trainer: Trainer, *arguments: Any) -> None:
    """Train from where the output directory stands, save the model with tokenizer and card, and push it if
    asked.

    Logs what is really active, resumes from the newest complete checkpoint, writes only complete checkpoints,
    saves and stops on SIGINT and SIGTERM, and stops at a loss that is no number.

    Args:
        trainer: Any trainer of transformers or TRL.
        *arguments: The recipe's other argument dataclasses; `DataArguments` names the data set on the model
            card.

    Raises:
        RunStopped: After a signal, a loss that is no number, or a checkpoint that cannot be written.
        UserError: If another run writes to the output directory.
    """
    args = trainer.args
    named = Path(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if named is not None:
        # One that another program wrote has no manifest.
        if (named / manifest.MANIFEST).exists() and (damage := manifest.find_damage(named)):
            raise UserError(Problem("resume_from_checkpoint", named, f"is damaged: {damage}"))
        checkpoints.check_architecture(named, trainer.model.config)
    held = None
    if trainer.is_world_process_zero():
        held = files.lock(args.output_dir)
        output_directory.claim(args)
    trainer.accelerator.wait_for_everyone()
    launch.log_active(trainer)
    drop_incomplete_batches(trainer)
    checkpoints.protect(trainer)
    resume_renamed_weights(trainer)
    stop_on_divergence(trainer)
    interrupts = InterruptCallback()
    trainer.add_callback(interrupts)

    checkpoint = named
    if checkpoint is None and (checkpoint := checkpoints.newest_complete(args.output_dir)) is not None:
        checkpoints.check_architecture(checkpoint, trainer.model.config)
    if checkpoint is not None:
        logger.info("%-11s from %s", "resuming", checkpoint)
    if checkpoint is None or not checkpoints.restore_finished(trainer, checkpoint):
        _train(trainer, checkpoint)
    interrupts.restore()
    stop = interrupts.reason_to_stop(trainer.state, str(args.output_dir))
    if stop is None:
        save_final(trainer, *arguments)
    _end(trainer)
    if stop is not None:
        raise stop
    if held is not None:
        held.close()


def _end(trainer: Trainer) -> None:
    """Finish the trackers and the process group.

    Models wrapped for several processes refer to the group. They go first: a group that lives until the interpreter's
    end now and then aborts the process ("terminate called without an active exception"), and a finished run fails.
    """
    for name, value in list(vars(trainer).items()):
        if isinstance(value, DistributedDataParallel):
            setattr(trainer, name, value.module)
    trainer.accelerator.free_memory()
    trainer.end()
    gc.collect()


def _train(trainer: Trainer, checkpoint: Path | None) -> None:
    trainer.add_callback(_EndOfPreparation())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        # Which metrics there are only an evaluation tells.
        problem = Problem("metric_for_best_model", trainer.args.metric_for_best_model, str(error.args[0]))
        raise UserError(problem) from error


class _EndOfPreparation(TrainerCallback):
    """From the first step on, errors are not the input's."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        end_preparation()


def drop_incomplete_batches(trainer: Trainer) -> None:
    """Leave the rows that fill no whole batch out of each epoch (others each time, where rows are shuffled).

    Accelerate would repeat rows to give every process a batch, so that two processes would not learn what one
    does. `dataloader_drop_last` does the same, but also drops rows from evaluations.

    Args:
        trainer: Changed in place, before `train`. Data that fill no batch at all are left as they are.
    """
    args, dataset = trainer.args, trainer.train_dataset
    get_train_dataloader = trainer.get_train_dataloader
    if not isinstance(dataset, Sized) or len(dataset) < args.train_batch_size * args.world_size:
        return

    def with_whole_batches() -> Any:
        asked, args.dataloader_drop_last = args.dataloader_drop_last, True
        try:
            return get_train_dataloader()
        finally:
            args.dataloader_drop_last = asked

    trainer.get_train_dataloader = with_whole_batches


def save_final(trainer: Trainer, *arguments: Any) -> None:
    """Save the trained model, its tokenizer and its card beside the checkpoints, and push them if asked.

    Args:
        trainer: A trainer that has finished.
        *arguments: As for `train_and_save`.
    """
    args = trainer.args
    output_dir = Path(args.output_dir)
    aside = output_dir / checkpoints.UNFINISHED
    try:
        trainer.save_model(str(aside), _internal_call=True)
        if args.should_save:
            # File by file into place, so that a kill leaves whole files only.
            for path in sorted(aside.iterdir()):
                if path.name == "training_args.bin":  # a pickle, which may hold a token
                    continue
                if path.is_dir():
                    shutil.rmtree(output_dir / path.name, ignore_errors=True)
                os.replace(path, output_dir / path.name)
            trainer.state.save_to_json(str(output_dir / manifest.STATE))
            trainer.create_model_card(tags=["fourstage"], **_card_dataset(trainer, arguments))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunStopped(
            f"The model could not be written to {output_dir}: {error}. Make room or correct that; the "
            "same command "
            "then goes on from the last checkpoint."
        ) from error
    finally:
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub()


def _card_dataset(trainer: Trainer, arguments: Sequence[Any]) -> dict[str, str]:
    """The data set, if it is on the Hub, under the name that this trainer's `create_model_card` gives the
    argument."""
    names = [name for item in arguments if (name := getattr(item, "dataset_name", None))]
    if not names or Path(names[0]).exists():
        return {}
    parameters = inspect.signature(trainer.create_model_card).parameters
    return {"dataset_name" if "dataset_name" in parameters else "dataset": names[0]}
