"""The start and the end of a training run, which all recipes share."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import pickle
import shlex
import shutil
from collections.abc import Callable, Sized
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar, cast

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pipeline import files, launch
from pipeline.config import output_directory
from pipeline.config.machine import describe_machine
from pipeline.errors import Problem, RunStopped, UserError
from pipeline.hub.cards import Trained, model_card
from pipeline.hub.checkpoints import fetch_checkpoints
from pipeline.hub.outputs import BASE
from pipeline.models.adapters import MERGED
from pipeline.models.weights import resume_renamed_weights
from pipeline.training import checkpoints
from pipeline.training.callbacks import (
    InterruptCallback,
    ReportCallback,
    RouterCallback,
    ThroughputCallback,
    count_tokens_locally,
)
from pipeline.training.checkpoint_manifest import (
    MANIFEST,
    STATE,
    check_architecture,
    save_state,
    validate_checkpoint,
    wait_for_completion,
)
from pipeline.training.checks import check_length
from pipeline.training.divergence import last_good, stop_on_divergence
from pipeline.training.push import PushCallback

logger = logging.getLogger(__name__)

T = TypeVar("T")


def run_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """Return the callbacks of every recipe's trainer, and let them count tokens and push as `args` say.

    The arguments are changed: a trainer that is made with them does not push by itself, and does not look for unused
    parameters after every forward pass of several processes. All trainers here use all parameters that they train, also
    of experts, which are one tensor; a model that does not needs `ddp_find_unused_parameters: true`.
    """
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    length = getattr(args, "block_size", None) or getattr(args, "max_length", None)
    if length:
        args.include_num_input_tokens_seen = "all"
    return [ThroughputCallback(length or 0), RouterCallback(), PushCallback(args)]


def train_and_save(trainer: Trainer) -> None:
    """Train from the latest checkpoint, save the model with tokenizer and card, and push it if requested.

    The run logs the hardware and settings in use, writes only complete checkpoints, saves and stops on SIGINT,
    SIGTERM and SIGHUP, and stops at a loss that is not a number. Other runs cannot write to the output directory
    meanwhile.

    Args:
        trainer: Any trainer of transformers or TRL.

    Raises:
        RunStopped: After a signal, a loss that is not a number, a failing reward function, a failed save or push.
        UserError: If another run writes to the output directory, or the checkpoint to resume from does not fit.
    """
    launch.check_active(trainer)
    args, name = trainer.args, trainer.args.resume_from_checkpoint
    fetched = fetch_checkpoints(name, "resume_from_checkpoint") if name and not os.path.isdir(name) else []
    checkpoint = fetched[0] if fetched else Path(name) if name else None
    # A checkpoint that another program wrote does not have a manifest.
    known = [folder for folder in fetched or filter(None, [checkpoint]) if (folder / MANIFEST).exists()]
    if damage := _on_first(trainer, lambda: next(filter(None, map(validate_checkpoint, known)), None)):
        raise UserError(Problem("resume_from_checkpoint", name, f"is damaged: {damage}"))
    if checkpoint is not None:
        check_architecture(checkpoint, trainer.model.config)
        check_length(checkpoint, trainer)
    first = trainer.is_world_process_zero()
    with files.lock(Path(args.output_dir) / ".lock") if first else contextlib.nullcontext():
        if first:
            output_directory.claim(args)
        own = [_copy_checkpoint(folder, trainer) for folder in fetched]
        trainer.accelerator.wait_for_everyone()
        _train_and_save(trainer, own[0] if own else checkpoint)


def _on_first(trainer: Trainer, compute: Callable[[], T]) -> T:
    """Return what the first process computes, on every process: reading all of a large checkpoint takes minutes."""
    found = [compute() if trainer.is_world_process_zero() else None]
    broadcast_object_list(found)
    return cast(T, found[0])


def _copy_checkpoint(checkpoint: Path, trainer: Trainer) -> Path:
    """Copy a checkpoint into a trainer's output directory, on the first process. Return where it lies there."""
    step = TrainerState.load_from_json(str(checkpoint / STATE)).global_step
    target = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if trainer.is_world_process_zero():
        try:
            with files.write_folder(target) as folder:
                shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        except OSError as error:
            reason = shorten(str(error), 200)
            raise RunStopped(f"The checkpoint could not be copied to {target}: {reason}. Free some space.") from error
    return target


def _train_and_save(trainer: Trainer, checkpoint: Path | None) -> None:
    launch.log_active(trainer)
    drop_incomplete_batches(trainer)
    checkpoints.make_checkpoints_atomic(trainer)
    count_tokens_locally(trainer)
    _name_base(trainer)
    resume_renamed_weights(trainer)
    stop_on_divergence(trainer)
    interrupts = InterruptCallback()
    trainer.add_callback(interrupts)
    own = (item for item in trainer.callback_handler.callbacks if isinstance(item, PushCallback))
    pushes = next(own, None) or PushCallback(trainer.args)
    for callback in (PrinterCallback, ProgressCallback):  # dictionaries and bars
        trainer.remove_callback(callback)
    trainer.add_callback(ReportCallback())
    for tracker in map(INTEGRATION_TO_CALLBACK.get, trainer.args.report_to):
        # Last, so that it shows what other callbacks add to a log, or take from it.
        trainer.add_callback(trainer.pop_callback(tracker))
    if checkpoint is None:
        checkpoint = _on_first(trainer, lambda: checkpoints.newest_complete(trainer.args.output_dir))
    if checkpoint is not None:
        check_architecture(checkpoint, trainer.model.config)
        logger.info("%-11s from %s", "resuming", checkpoint)
    if checkpoint is None or not checkpoints.restore_finished(trainer, checkpoint):
        if checkpoint is not None:
            checkpoints.adopt_present_length(trainer, checkpoint)
        _train(trainer, checkpoint)
    interrupts.restore()
    stop = interrupts.reason_to_stop(trainer.state, str(trainer.args.output_dir))
    if stop is None:
        save_final(trainer)
        logger.info("%-11s in %s", "saved", trainer.args.output_dir)
    pushes.finish(is_complete=stop is None)
    _end(trainer)
    if stop is not None:
        raise stop
    pushes.push_model()


def _train(trainer: Trainer, checkpoint: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        checkpoints.finish_checkpoint(trainer)
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        # The names of the metrics are known only after the first evaluation.
        problem = Problem("metric_for_best_model", trainer.args.metric_for_best_model, str(error.args[0]))
        raise UserError(problem) from error
    except pickle.UnpicklingError as error:
        remedy = (
            "has a file that is damaged or would run code, and is not loaded; delete it, or resume from another one"
        )
        raise UserError(Problem("resume_from_checkpoint", checkpoint, remedy)) from error
    except SystemExit as error:
        message = f"sys.exit({error.code!r}) was called during training, after step {trainer.state.global_step}"
        raise RunStopped(f"{message}; {last_good(trainer)}.") from error
    finally:
        if (failure := wait_for_completion(trainer.args.output_dir)) is not None:  # which did not end the run
            step = getattr(failure, "__notes__", ["?"])[0]
            logger.warning("The checkpoint of step %s could not be written: %s", step, failure)


def _end(trainer: Trainer) -> None:
    """Finish the trackers and the process group.

    Models wrapped for several processes refer to the group and are released first: a group that lives until the
    interpreter ends sometimes aborts the process ("terminate called without an active exception").
    """
    for name, value in list(vars(trainer).items()):
        if isinstance(value, DistributedDataParallel):
            setattr(trainer, name, value.module)
    trainer.accelerator.free_memory()
    trainer.end()
    gc.collect()


def _name_base(trainer: Trainer) -> None:
    """Make an adapter name its base model so that it loads whatever the current directory is.

    A model that was itself merged from an adapter lies in no folder: it is saved beside the new adapter.
    """
    model, base = trainer.model, Path(trainer.args.output_dir).absolute() / BASE
    if isinstance(model, PeftModel) and hasattr(model.get_base_model(), MERGED) and trainer.args.should_save:
        with files.write_folder(base) as folder, checkpoints.cache_enabled(model):
            # Its frozen weights may have been converted for training.
            copy.deepcopy(model).unload().to(model.config.dtype).save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)  # by which TRL loads an adapted reward model
    critic = getattr(trainer, "value_model", None)
    for adapted in (model, *([trainer.accelerator.unwrap_model(critic)] if critic is not None else [])):
        for config in getattr(adapted, "peft_config", {}).values():
            if hasattr(adapted.get_base_model(), MERGED):
                config.base_model_name_or_path = str(base)
            elif config.base_model_name_or_path and Path(config.base_model_name_or_path).is_dir():
                config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)


def drop_incomplete_batches(trainer: Trainer) -> None:
    """Leave out the rows of each epoch that do not fill a whole batch, unless that would leave none.

    Accelerate would repeat rows to give every process a batch, so that training on two processes would differ from
    training on one. `dataloader_drop_last` does the same, but also drops rows from evaluations.
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


def save_final(trainer: Trainer) -> None:
    """Save the trained model, its tokenizer and its card beside the checkpoints."""
    args = trainer.args
    output_dir = Path(args.output_dir)
    tmp_dir = output_dir / checkpoints.UNFINISHED
    try:
        with checkpoints.cache_enabled(trainer.model):
            trainer.save_model(str(tmp_dir), _internal_call=True)
        if args.should_save:
            # Files are moved one by one, so that a kill leaves only whole files.
            for path in sorted(tmp_dir.iterdir()):
                if path.name == "training_args.bin":  # a pickle, which may contain a token
                    continue
                if path.is_dir():
                    shutil.rmtree(output_dir / path.name, ignore_errors=True)
                os.replace(path, output_dir / path.name)
            save_state(trainer.state, output_dir / STATE)
            files.write_text(output_dir / "README.md", _model_card(trainer))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunStopped(
            f"The model could not be written to {output_dir}: {error}. Free some space or correct the cause; the "
            "same command then resumes from the last checkpoint."
        ) from error
    finally:
        if args.should_save:
            shutil.rmtree(tmp_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _model_card(trainer: Trainer) -> str:
    """Return the card of a trained model, as far as its own recipe knows it. A run knows more when it is pushed."""
    args = trainer.args
    asked = getattr(args, output_directory.ASKED, {"settings": {}, "command": []})
    kind = type(args).__name__.removesuffix("Config").lower()
    runtimes = [log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log]
    trained = Trained(
        folder=Path(args.output_dir),
        kind=kind,
        name=args.hub_model_id or str(args.output_dir),
        settings=asked["settings"],
        command=shlex.join(["accelerate", "launch", "-m", f"recipes.{kind}", *asked["command"]]),
        seconds=runtimes[-1] if runtimes else None,
        machine=describe_machine(),
    )
    return model_card(trained)
