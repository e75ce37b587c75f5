"""What can be told to be wrong with a configuration before anything is trained; every function lists all it
finds."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import Problem


def check_together(arguments: Iterable[Any], told: Collection[str]) -> list[Problem]:
    """Fields that make no sense with each other, or with what is on the disk.

    Args:
        arguments: Argument dataclasses.
        told: Fields whose values are wrong already, and have been left out.
    """
    values = {name: getattr(item, name) for item in arguments for name in vars(item)}
    problems = []
    steps = values.get("max_steps", 0)
    if values.get("dataset_streaming") and steps <= 0 and "max_steps" not in told:
        problems.append(Problem("max_steps", steps, "must be given: a stream has no length"))
    layers = f"{values.get('lora_target_modules')} {values.get('lora_modules_to_save')}"
    if values.get("use_peft") and "embed" not in layers and "lm_head" not in layers:
        for field, unset in (("use_muon", "false"), ("embedding_learning_rate", "null")):
            if values.get(field):
                remedy = f"LoRA trains no embeddings; leave it out, or set it to {unset}"
                problems.append(Problem(field, values[field], remedy))
    if values.get("output_dir") == "":
        problems.append(Problem("output_dir", "nothing", "give a directory"))
    if name := values.get("resume_from_checkpoint"):
        otherwise = "leave it out to go on from the newest complete checkpoint"
        if not Path(str(name)).is_dir():
            problems.append(Problem("resume_from_checkpoint", name, f"is no directory; {otherwise}"))
        elif not (Path(str(name)) / "trainer_state.json").is_file():
            problems.append(Problem("resume_from_checkpoint", name, f"is no checkpoint; {otherwise}"))
        elif not _holds_state(Path(str(name)) / "trainer_state.json"):
            problems.append(Problem("resume_from_checkpoint", name, f"is damaged; {otherwise}"))
    if values.get("dataloader_persistent_workers") and not values.get("dataloader_num_workers"):
        problems.append(Problem("dataloader_persistent_workers", True, "needs dataloader_num_workers; leave it out"))
    return problems


def _holds_state(file: Path) -> bool:
    """Whether a checkpoint's record of the training can be read."""
    try:
        return "global_step" in dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return False


def check_tokenizer(tokenizer: Any, field: str, name: str, chat: bool, assistant_only_loss: bool) -> list[Problem]:
    """A tokenizer that would teach the wrong thing.

    Args:
        tokenizer: `PreTrainedTokenizerBase`.
        field: Argument that named it.
        name: Its value.
        chat: Whether conversations are to be formatted.
        assistant_only_loss: Whether the template must mark what the assistant says.
    """
    problems = []
    if tokenizer.pad_token_id is None:
        problems.append(Problem(field, name, "has no pad token; add one to the tokenizer"))
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        remedy = "uses its eos token as pad token, and padding is never learned: the model would not learn to stop"
        problems.append(Problem(field, name, f"{remedy}; give the tokenizer a pad token of its own"))
    if tokenizer.eos_token_id is None:
        problems.append(Problem(field, name, "has no eos token; add one to the tokenizer"))
    if chat and not tokenizer.chat_template:
        problems.append(Problem(field, name, "has no chat template; use the tokenizer of a chat model or add one"))
    elif chat and assistant_only_loss and "generation" not in str(tokenizer.chat_template):
        remedy = "its chat template has no {% generation %} mark, which assistant_only_loss needs; add it"
        problems.append(Problem(field, name, remedy))
    return problems


def check_model(config: Any, tokenizer: Any, args: Any, name: str) -> list[Problem]:
    """A model that doesn't go with the tokenizer, with the stage or with the lengths.

    Args:
        config: The model's `PretrainedConfig`.
        tokenizer: `PreTrainedTokenizerBase`, or `None` if it could not be loaded.
        args: Training arguments.
        name: What named the model.
    """
    import transformers  # whose classes take their time, which `--help` has not

    problems = []
    field = "model_name_or_path"
    text = config.get_text_config()
    reward = hasattr(args, "center_rewards_coefficient")
    architectures = config.architectures or []
    if getattr(config, "is_encoder_decoder", False):
        problems.append(Problem(field, name, "is an encoder and decoder; give a decoder-only language model"))
    classifier = any("SequenceClassification" in kind for kind in architectures)
    if classifier and not reward:
        problems.append(Problem(field, name, "is a reward model; give a language model"))
    elif architectures and not reward:
        kind = getattr(transformers, architectures[0], None)  # TRL loads this one
        if kind is not None and not kind.can_generate():
            remedy = f"is a {architectures[0]}, which cannot write; give a decoder-only language model"
            problems.append(Problem(field, name, remedy))
    if classifier and reward and config.num_labels != 1:
        remedy = f"has {config.num_labels} labels; give a reward model, which has one, or a language model"
        problems.append(Problem(field, name, remedy))
    vocabulary = getattr(text, "vocab_size", None)
    if tokenizer is not None and vocabulary is not None and len(tokenizer) > vocabulary:
        remedy = f"knows {vocabulary} tokens and its tokenizer {len(tokenizer)}; give the tokenizer it was trained with"
        problems.append(Problem(field, name, remedy))
    return problems + check_lengths(getattr(text, "max_position_embeddings", None), args)


def check_lengths(positions: int | None, args: Any) -> list[Problem]:
    """Sequences longer than the model can see.

    Args:
        positions: `max_position_embeddings` of the model.
        args: Training arguments.
    """
    problems = []
    for field in ("block_size", "max_length", "max_completion_length", "max_new_tokens"):
        value = getattr(args, field, None)
        if value is not None and positions is not None and value > positions:
            remedy = f"the model sees {positions} tokens (max_position_embeddings); lower it"
            problems.append(Problem(field, value, remedy))
    return problems


def check_room(field: str, value: int, longest: int, positions: int | None) -> list[Problem]:
    """Prompts that leave no room for an answer.

    Args:
        field: The longest answer, in tokens.
        value: Its value.
        longest: Tokens of the longest prompt.
        positions: `max_position_embeddings` of the model.
    """
    if positions is None or longest + value <= positions:
        return []
    remedy = (
        f"the longest prompt takes {longest} of the {positions} tokens that the model sees (max_position_embeddings), "
        f"which leaves {max(0, positions - longest)}; lower it or shorten prompts"
    )
    return [Problem(field, value, remedy)]


def check_lora(
    model_args: Any, modules: Iterable[str], layers: Iterable[str], parameters: Iterable[str] = ()
) -> list[Problem]:
    """LoRA on modules that the model doesn't have, or that have no matrix.

    Args:
        model_args: `trl.ModelConfig`.
        modules: Names of all modules of the model.
        layers: Names of those that an adapter can be put on.
        parameters: Names of all its parameters.
    """
    if not getattr(model_args, "use_peft", False):
        return []
    modules, layers = list(modules), list(layers)
    linear = sorted({end for name in modules if (end := name.rpartition(".")[2]).endswith("_proj")})
    problems = []
    for field, names in (
        ("lora_target_modules", layers),
        ("lora_modules_to_save", modules),
        ("lora_target_parameters", list(parameters)),
    ):
        targets = getattr(model_args, field, None) or []
        if targets in ("all-linear", ["all-linear"]):
            continue
        if isinstance(targets, str):  # for PEFT a pattern of whole names
            try:
                missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
            except re.error as error:
                problems.append(Problem(field, targets, f"is not a regular expression ({error})"))
                continue
        else:
            missing = [
                target for target in targets if not any(name == target or name.endswith("." + target) for name in names)
            ]
        if missing:
            remedy = f"the model has no such modules; choose from: {', '.join(linear)}, or all-linear"
            problems.append(Problem(field, ", ".join(missing), remedy))
    return problems


def check_batches(rows: int | None, args: Any, what: str = "rows") -> list[Problem]:
    """Batches that leave nothing to train on.

    Args:
        rows: Rows of the training data; `None` if unknown (streamed).
        args: Training arguments.
        what: What the rows are called.
    """
    if rows is None:
        return []
    field, needed = "per_device_train_batch_size", 1
    if getattr(args, "dataloader_drop_last", False):
        needed = args.per_device_train_batch_size * args.world_size
    if hasattr(args, "num_generations") and getattr(args, "generation_batch_size", None):
        # A generation batch holds every prompt `num_generations` times, and an incomplete one is dropped.
        field, needed = (
            "generation_batch_size",
            max(1, args.generation_batch_size // (args.num_generations or 1)),
        )
    if rows >= needed:
        return []
    remedy = f"takes {needed} {what} and the data set has {rows}, so that nothing would be trained on; lower it"
    return [Problem(field, getattr(args, field), remedy)]


def check_disk(parameters: int, trainable: int, args: Any) -> list[Problem]:
    """Less room than the checkpoints and the model will take.

    Args:
        parameters: Weights that are saved with each checkpoint.
        trainable: Weights that the optimizer keeps two numbers for.
        args: Training arguments.
    """
    if str(args.save_strategy.value) == "no":
        kept = 0
    elif args.save_total_limit:
        kept = args.save_total_limit + 1  # the next one is written before the oldest is deleted
    else:
        # Without a limit all stay; how many that will be is known if the number of steps is.
        kept = math.ceil(args.max_steps / args.save_steps) if args.max_steps > 0 and args.save_steps >= 1 else 2
    optimizer = 0 if args.save_only_model else 8 * trainable
    needed = kept * (4 * parameters + optimizer) + 4 * parameters
    path = Path(args.output_dir)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    if needed <= free:
        return []
    remedy = (
        f"{kept} checkpoints and the model take about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} "
        "MiB are free; "
        "make room, lower save_total_limit or choose another disk"
    )
    return [Problem("output_dir", args.output_dir, remedy)]
