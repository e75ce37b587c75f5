"""The start and end of a training run, shared by all recipes."""

import contextlib
import copy
import gc
import logging
import os
import pickle
import shlex
import shutil
from collections.abc import Callable
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
from pipeline.hub.repositories import BASE
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
    if length := getattr(args, "block_size", None) or getattr(args, "max_length", None):
        args.include_num_input_tokens_seen = "all"
    return [FiguresCallback(length or 0), PushCallback(args)]


def train_and_save(trainer: Reliable) -> None:
    """Train from the latest checkpoint, save the model with tokenizer and card, and push it if requested.

    Raises:
        RunStopped: After a signal, a loss that is not a number, a failing reward function, a failed save or push.
        UserError: If another run writes to the output directory, or the checkpoint to resume from does not fit.
    """
    launch.check_active(trainer)
    args, name = trainer.args, trainer.args.resume_from_checkpoint
    # A name that is not a folder is a checkpoint on the Hub, which is downloaded with the best one so far.
    fetched = fetch_checkpoints(name, "resume_from_checkpoint") if name and not os.path.isdir(name) else []
    named = fetched or ([Path(name)] if name else [])
    for folder in named:
        # A checkpoint written by another program has no manifest.
        has_manifest = (folder / files.MANIFEST).exists()
        damage = _on_first(trainer, partial(folders.validate_checkpoint, folder)) if has_manifest else None
        if damage:
            raise UserError(Problem("resume_from_checkpoint", name, f"is damaged: {damage}"))
    if named:
        check_architecture(named[0], trainer.model.config)
        done, total = TrainerState.load_from_json(str(named[0] / files.STATE)).global_step, total_steps(trainer)
        if done > total:
            remedy = f"the checkpoint already has {done} steps; raise it, or resume from an earlier checkpoint"
            raise UserError(Problem("max_steps", total, remedy))
    first = trainer.is_world_process_zero()
    with files.lock(Path(args.output_dir) / ".lock") if first else contextlib.nullcontext():
        if first:
            output_directory.record_arguments(args)
        own = []
        for folder in fetched:
            step = TrainerState.load_from_json(str(folder / files.STATE)).global_step
            own.append(folders.checkpoint_folder(args.output_dir, step))
            try:
                if first:
                    with files.write_folder(own[-1]) as copied:
                        shutil.copytree(folder, copied, dirs_exist_ok=True)
            except OSError as error:
                fault = f"The checkpoint could not be copied to {own[-1]}: {shorten(str(error), 200)}"
                raise RunStopped(f"{fault}. Free some space.") from error
        trainer.accelerator.wait_for_everyone()
        _train_and_save(trainer, next(iter(own or named), None))


def _on_first(trainer: Reliable, compute: Callable[[], Any]) -> Any:
    """Compute something on the first process, and return it on all: reading a large checkpoint takes minutes."""
    found = [compute() if trainer.is_world_process_zero() else None]
    broadcast_object_list(found)
    return found[0]


def check_architecture(checkpoint: Path, config: Any) -> None:
    """Raise a `UserError` for a checkpoint of a different model, which would only be loaded partially."""
    sizes = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "num_labels",
    )  # fmt: skip
    # The checkpoints of adapters do not contain a model configuration.
    saved, present = files.read_json(checkpoint / "config.json"), config.to_dict()
    both = [name for name in sizes if name in saved and name in present]
    if changed := [f"{name} {saved[name]} instead of {present[name]}" for name in both if saved[name] != present[name]]:
        remedy = f"has a different architecture ({', '.join(changed)}); choose another checkpoint or output_dir"
        raise UserError(Problem("resume_from_checkpoint", checkpoint, remedy))


def _train_and_save(trainer: Reliable, checkpoint: Path | None) -> None:
    launch.log_active(trainer)
    _name_base(trainer)
    interrupts = InterruptCallback()
    trainer.add_callback(interrupts)
    found = (one for one in trainer.callback_handler.callbacks if isinstance(one, PushCallback))
    pushes = next(found, None) or PushCallback(trainer.args)
    # Log lines replace transformers' dictionaries and progress bars.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ReportCallback())
    # Trackers come last, so that they see what other callbacks add to a log, or remove from it.
    for tracker in trainer.args.report_to:
        trainer.add_callback(trainer.pop_callback(INTEGRATION_TO_CALLBACK[tracker]))
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
    # Finish the trackers and the process group. If that is still alive at exit, it may abort ("terminate called without
    # an active exception"). Models wrapped for several processes refer to it, so they are released first.
    for name, value in list(vars(trainer).items()):
        if isinstance(value, DistributedDataParallel):
            setattr(trainer, name, value.module)
    trainer.accelerator.free_memory()
    trainer.end()
    gc.collect()
    if stop is not None:
        raise stop
    pushes.push_model()


def _train(trainer: Reliable, checkpoint: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        # Metric names are only known after the first evaluation.
        named = trainer.args.metric_for_best_model
        raise UserError(Problem("metric_for_best_model", named, str(error.args[0]))) from error
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
    model, base = trainer.model, Path(trainer.args.output_dir).absolute() / BASE
    if isinstance(model, PeftModel) and hasattr(model.get_base_model(), MERGED) and trainer.args.should_save:
        with files.write_folder(base) as folder, cache_enabled(model):
            # Its frozen weights may have been converted for training.
            copy.deepcopy(model).unload().to(model.config.dtype).save_pretrained(folder)
            # TRL looks for the tokenizer of a reward model with an adapter in the folder of its base model.
            trainer.processing_class.save_pretrained(folder)
    critic = [trainer.accelerator.unwrap_model(trainer.value_model)] if hasattr(trainer, "value_model") else []
    for adapted in (model, *critic):
        for config in getattr(adapted, "peft_config", {}).values():
            if hasattr(adapted.get_base_model(), MERGED):
                config.base_model_name_or_path = str(base)
            elif config.base_model_name_or_path and Path(config.base_model_name_or_path).is_dir():
                config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)


def save_final(trainer: Reliable) -> None:
    """Save the trained model, its tokenizer and its card in the output directory, next to the checkpoints."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
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
            # This card says what the recipe knows. `fourstage push` writes a more detailed one.
            asked = getattr(args, output_directory.REQUESTED, {"settings": {}, "command": []})
            kind = type(args).__name__.removesuffix("Config").lower()
            command = shlex.join(["accelerate", "launch", "-m", f"recipes.{kind}", *asked["command"]])
            runtimes = [log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log]
            step = {"command": command, "seconds": runtimes[-1] if runtimes else None, **describe_machine()}
            trained = Trained(output_dir, kind, args.hub_model_id or args.output_dir, asked["settings"], step)
            files.write_text(output_dir / "README.md", model_card(trained))
    except WRITE_ERRORS as error:
        remedy = "Free some space or correct the cause; the same command then resumes from the last checkpoint."
        raise RunStopped(f"The model could not be written to {output_dir}: {error}. {remedy}") from error
    finally:
        if args.should_save:
            shutil.rmtree(tmp_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
