"""The start and end of a training run, shared by all recipes."""

import contextlib
import copy
import gc
import logging
import os
import pickle
import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pipeline import files, launch
from pipeline.config import output_directory
from pipeline.config.machine import describe_machine
from pipeline.errors import Problem, RunStopped, UserError
from pipeline.hub.callback import PushCallback
from pipeline.hub.cards import Trained, model_card
from pipeline.hub.download import fetch_checkpoints
from pipeline.models.adapters import MERGED
from pipeline.training import checkpoint_folders as folders
from pipeline.training.callbacks import FiguresCallback, InterruptCallback, ReportCallback
from pipeline.training.checks import total_steps
from pipeline.training.reliable import WRITE_ERRORS, Reliable, cache_enabled

logger = logging.getLogger(__name__)


def run_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """Return the callbacks of every recipe's trainer, and change `args` to count tokens and leave pushing to them."""
    # The trainers here use all trained parameters in each pass, even of experts, which are one tensor, so DDP need not
    # search for unused ones. Any other trainer needs `ddp_find_unused_parameters: true`.
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    length = getattr(args, "block_size", None) or getattr(args, "max_length", None) or 0
    if length:
        args.include_num_input_tokens_seen = "all"
    return [FiguresCallback(length), PushCallback(args)]


def train_and_save(trainer: Reliable) -> None:
    """Train from the latest checkpoint, save the model with tokenizer and card, and push it if requested.

    The run logs the hardware and settings in use, writes only complete checkpoints, and saves and stops after a signal.
    Other runs cannot write to the output directory meanwhile.

    Raises:
        RunStopped: After a signal, a loss that is not a number, a failing reward function, a failed save or push.
        UserError: If another run writes to the output directory, or the checkpoint to resume from does not fit.
    """
    launch.check_active(trainer)
    args = trainer.args
    name = args.resume_from_checkpoint
    # The checkpoints that the user has named: the one to train from, and possibly the best one so far.
    named: list[Path] = []
    downloaded: list[Path] = []
    if name and os.path.isdir(name):
        named = [Path(name)]
    elif name:
        # A name that is not a folder is a checkpoint on the Hub, which is downloaded with the best one so far.
        downloaded = fetch_checkpoints(name, "resume_from_checkpoint")
        named = downloaded
    if named:
        _check_named(trainer, named)
    is_first = trainer.is_world_process_zero()
    with files.lock(Path(args.output_dir) / ".lock") if is_first else contextlib.nullcontext():
        if is_first:
            output_directory.record_arguments(args)
        copies = [_copy_checkpoint(folder, trainer) for folder in downloaded]
        trainer.accelerator.wait_for_everyone()
        # The first checkpoint is the one to train from.
        start = next(iter(copies or named), None)
        _train_and_save(trainer, start)


def _check_named(trainer: Reliable, named: Sequence[Path]) -> None:
    """Raise a `UserError` if the checkpoints of `resume_from_checkpoint` are damaged, or do not fit the run.

    The first one is trained from. A second one is the best one so far.
    """
    for folder in named:
        # A checkpoint written by another program has no manifest.
        damage = None
        if (folder / files.MANIFEST).exists():
            damage = _on_first(trainer, partial(folders.validate_checkpoint, folder))
        if damage:
            name = trainer.args.resume_from_checkpoint
            raise UserError(Problem("resume_from_checkpoint", name, f"is damaged: {damage}"))
    check_architecture(named[0], trainer.model.config)
    steps = _step_of(named[0])
    total = total_steps(trainer)
    if steps > total:
        remedy = f"the checkpoint already has {steps} steps; raise it, or resume from an earlier checkpoint"
        raise UserError(Problem("max_steps", total, remedy))


def _copy_checkpoint(checkpoint: Path, trainer: Reliable) -> Path:
    """Copy a checkpoint into the trainer's output directory, on the first process. Return where it is there.

    Raises:
        RunStopped: If it cannot be written.
    """
    target = folders.checkpoint_folder(trainer.args.output_dir, _step_of(checkpoint))
    if trainer.is_world_process_zero():
        try:
            with files.write_folder(target) as folder:
                shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        except OSError as error:
            fault = f"The checkpoint could not be copied to {target}: {shorten(str(error), 200)}"
            raise RunStopped(f"{fault}. Free some space.") from error
    return target


def _step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint was trained for."""
    return TrainerState.load_from_json(str(checkpoint / files.STATE)).global_step


def _on_first(trainer: Reliable, compute: Callable[[], Any]) -> Any:
    """Compute something on the first process, and return it on all: reading a large checkpoint takes minutes."""
    results = [compute() if trainer.is_world_process_zero() else None]
    broadcast_object_list(results)
    return results[0]


def check_architecture(checkpoint: Path, config: Any) -> None:
    """Raise a `UserError` for a checkpoint of a different model, which would only be loaded partially."""
    sizes = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "num_labels",
    )  # fmt: skip
    # {} for an adapter, whose checkpoints do not contain a configuration of the model.
    saved_config = files.read_json(checkpoint / "config.json")
    present_config = config.to_dict()
    changes = []
    for name in sizes:
        if name in saved_config and name in present_config and saved_config[name] != present_config[name]:
            changes.append(f"{name} {saved_config[name]} instead of {present_config[name]}")
    if changes:
        remedy = f"has a different architecture ({', '.join(changes)}); choose another checkpoint or output_dir"
        raise UserError(Problem("resume_from_checkpoint", checkpoint, remedy))


def _train_and_save(trainer: Reliable, checkpoint: Path | None) -> None:
    """Train from a checkpoint, by default the newest complete one of the output directory, save, and push."""
    launch.log_active(trainer)
    _name_base(trainer)
    interrupts = InterruptCallback()
    trainer.add_callback(interrupts)
    pushes = _push_callback(trainer)
    _replace_loggers(trainer)
    if checkpoint is None:
        checkpoint = _on_first(trainer, partial(folders.newest_complete, trainer.args.output_dir))
    if checkpoint is not None:
        check_architecture(checkpoint, trainer.model.config)
        logger.info("%-11s from %s", "resuming", checkpoint)
    if checkpoint is not None and trainer.restore_finished(checkpoint):
        # Callbacks may still have something to say about the whole run, such as the alarms of `pipeline.rl`.
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    else:
        # FSDP's and DeepSpeed's states of the optimizer have other names.
        if checkpoint and not [*checkpoint.glob("*optimizer*"), *checkpoint.glob("global_step*")]:
            remedy = "cannot be resumed without the optimizer's state (save_only_model); choose another output_dir"
            raise UserError(Problem("resume_from_checkpoint", checkpoint, remedy))
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


def _push_callback(trainer: Reliable) -> PushCallback:
    """Return the trainer's callback that pushes, or a new one that is not called while it trains."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PushCallback):
            return callback
    return PushCallback(trainer.args)


def _replace_loggers(trainer: Reliable) -> None:
    """Log lines instead of transformers' dictionaries and progress bars, and let trackers see what callbacks add."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ReportCallback())
    # Trackers come last, so that they see what other callbacks add to a log, or remove from it.
    for tracker in trainer.args.report_to:
        trainer.add_callback(trainer.pop_callback(INTEGRATION_TO_CALLBACK[tracker]))


def _end(trainer: Reliable) -> None:
    """Finish the trackers and the process group.

    If the group is still alive at exit, it may abort ("terminate called without an active exception"). Models wrapped
    for several processes refer to it, so they are released first.
    """
    for name, value in list(vars(trainer).items()):
        if isinstance(value, DistributedDataParallel):
            setattr(trainer, name, value.module)
    trainer.accelerator.free_memory()
    trainer.end()
    gc.collect()


def _train(trainer: Reliable, checkpoint: Path | None) -> None:
    """Train, and turn errors that only show during training into messages that say what to do."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        # Metric names are only known after the first evaluation.
        metric = trainer.args.metric_for_best_model
        raise UserError(Problem("metric_for_best_model", metric, str(error.args[0]))) from error
    except pickle.UnpicklingError as error:
        remedy = "has a file that is damaged or would run code; delete the checkpoint, or resume from another one"
        raise UserError(Problem("resume_from_checkpoint", checkpoint, remedy)) from error
    except SystemExit as error:
        message = f"sys.exit({error.code!r}) was called during training, after step {trainer.state.global_step}"
        raise RunStopped(f"{message}; {trainer.last_good()}.") from error


def _name_base(trainer: Reliable) -> None:
    """Make an adapter name its base model so that it can be loaded from any current directory.

    A base model that was itself merged from an adapter only exists in memory, so it is saved next to the new adapter.
    """
    model = trainer.model
    base = Path(trainer.args.output_dir).absolute() / files.BASE
    if isinstance(model, PeftModel) and hasattr(model.get_base_model(), MERGED) and trainer.args.should_save:
        with files.write_folder(base) as folder, cache_enabled(model):
            # Its frozen weights may have been converted for training.
            copy.deepcopy(model).unload().to(model.config.dtype).save_pretrained(folder)
            # TRL looks for the tokenizer of a reward model with an adapter in the folder of its base model.
            trainer.processing_class.save_pretrained(folder)
    models: list[Any] = [model]
    if hasattr(trainer, "value_model"):
        models.append(trainer.accelerator.unwrap_model(trainer.value_model))
    for adapted in models:
        for config in getattr(adapted, "peft_config", {}).values():
            if hasattr(adapted.get_base_model(), MERGED):
                config.base_model_name_or_path = str(base)
            elif config.base_model_name_or_path and Path(config.base_model_name_or_path).is_dir():
                config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)


def save_final(trainer: Reliable) -> None:
    """Save the trained model, its tokenizer and its card in the output directory, next to the checkpoints."""
    args = trainer.args
    output_dir = Path(args.output_dir)
    tmp_dir = output_dir / folders.UNFINISHED
    try:
        # A kill may have left parts of an old checkpoint.
        if args.should_save:
            shutil.rmtree(tmp_dir, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(tmp_dir), _internal_call=True)
        if args.should_save:
            # Files are moved one by one, so that a kill leaves only complete ones.
            for path in sorted(tmp_dir.iterdir()):
                if path.is_dir():
                    shutil.rmtree(output_dir / path.name, ignore_errors=True)
                # This file is a pickle, which may contain a token.
                if path.name != "training_args.bin":
                    os.replace(path, output_dir / path.name)
            folders.save_state(trainer.state, output_dir / files.STATE)
            files.write_text(output_dir / "README.md", model_card(_trained(trainer)))
    except WRITE_ERRORS as error:
        remedy = "Free some space or correct the cause; the same command then resumes from the last checkpoint."
        raise RunStopped(f"The model could not be written to {output_dir}: {error}. {remedy}") from error
    finally:
        if args.should_save:
            shutil.rmtree(tmp_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _trained(trainer: Reliable) -> Trained:
    """Return what the recipe can say in the model's card. `fourstage push` writes a more detailed card."""
    args = trainer.args
    settings: dict[str, Any] = {}
    options: list[str] = []
    if hasattr(args, output_directory.REQUESTED):
        requested = getattr(args, output_directory.REQUESTED)
        settings, options = requested["settings"], requested["command"]
    kind = type(args).__name__.removesuffix("Config").lower()
    runtimes = [log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log]
    step = {
        "command": shlex.join(["accelerate", "launch", "-m", f"recipes.{kind}", *options]),
        "seconds": runtimes[-1] if runtimes else None,
        **describe_machine(),
    }
    return Trained(Path(args.output_dir), kind, args.hub_model_id or args.output_dir, settings, step)
