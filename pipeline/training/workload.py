"""What a stage computes, read from its settings: the model, its batches, and what else it keeps in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, load_dataset_builder
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config

from pipeline.data.arguments import DataArguments
from pipeline.data.splits import load_splits
from pipeline.errors import Problem, UserError
from pipeline.models.llama4 import ScratchArguments, build_model
from pipeline.models.loading import load_config, load_tokenizer, user_error_for
from pipeline.training.estimate import Rollouts, Work
from pipeline.training.optimizer import OptimizerArguments, build_optimizer, optimizer_cls_and_kwargs

MEASURED = 200
"""Rows of local data whose tokens are counted."""
BYTES_PER_TOKEN = 4
"""Most bytes of a packed token in the cache of data sets."""
ANSWER = 1 / 3
"""Length of an answer that is sampled, and of its prompt, as a share of the longest answer, where nothing is known."""
LABELLED = 0.5
"""Share of the tokens of a conversation that the assistant says, for whose positions alone logits are computed."""

PADDING = 1.4
"""Length of padded rows in groups of similar length, as a multiple of their mean, measured on recipes/pocket."""
KEPT_PAIRS = 2 / 3
"""Share of the pairs of recipes/pocket that differ and are not a tie."""


class Settings(Mapping[str, Any]):
    """The settings of a step, with the defaults of its dataclasses.

    Args:
        kind: Kind of the step.
        values: The settings that are given.
        types: Dataclasses of its recipe.
    """

    def __init__(self, kind: str, values: Mapping[str, Any], types: Iterable[type]) -> None:
        self.kind, self.types = kind, list(types)
        fields = [item for own in self.types for item in dataclasses.fields(own)]
        defaults = {item.name: None if item.default is dataclasses.MISSING else item.default for item in fields}
        self.values_ = {**defaults, **values}

    def __getitem__(self, name: str) -> Any:
        return self.values_[name]

    def __iter__(self) -> Any:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def build(self, kind: type) -> Any:
        """Return the dataclass `kind` with these settings."""
        return kind(
            **{item.name: self[item.name] for item in dataclasses.fields(kind) if self.get(item.name) is not None}
        )


class _Vocabulary(SimpleNamespace):
    """As much of a tokenizer as a model is built with."""

    def __len__(self) -> int:
        return int(self.size)


def starting_model(settings: Settings, made: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model of a stage on the meta device, which takes no memory.

    Args:
        settings: Of the stage.
        made: Models, and sizes of vocabularies, that earlier steps make, by their folders.

    Raises:
        UserError: If a model or a tokenizer that no step makes cannot be loaded.
    """
    if settings.kind == "pretrain":
        name = settings["tokenizer_name_or_path"]
        size = made[name] if name in made else len(load_tokenizer(name, "tokenizer_name_or_path"))
        tokenizer: Any = _Vocabulary(size=size, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        with torch.device("meta"):
            return build_model(settings.build(ScratchArguments), tokenizer, 0)
    return _load(settings["model_name_or_path"], "model_name_or_path", made, settings.get("model_revision"))


def _load(name: str, field: str, made: Mapping[str, Any], revision: str | None = None) -> PreTrainedModel:
    if name in made:
        return made[name]
    with user_error_for(field, name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(name, revision), trust_remote_code=False)


def optimizer(settings: Settings, model: PreTrainedModel) -> torch.optim.Optimizer:
    """Return the optimizer of a stage for a real model."""
    args = SimpleNamespace(**{name: settings.get(name) for name in ("learning_rate", "weight_decay", "adam_epsilon")})
    args.adam_beta1, args.adam_beta2 = settings["adam_beta1"], settings["adam_beta2"]
    if OptimizerArguments in settings.types:
        chosen = optimizer_cls_and_kwargs(args, settings.build(OptimizerArguments))  # type: ignore[arg-type]
        if chosen is not None:
            return build_optimizer(model, **chosen[1])
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def workload(
    settings: Settings, model: PreTrainedModel, made: Mapping[str, Any], processes: int, sharded: bool
) -> Work:
    """Return what a stage computes.

    Args:
        settings: Of the stage.
        model: Its model, on the meta device.
        made: As for `starting_model`.
        processes: Number of processes.
        sharded: Whether the launch file shards the model.

    Raises:
        UserError: If the number of rows is needed and not known.
    """
    if settings.kind == "preferences":
        return _sampling(settings, model, made, processes)
    parameters = model.num_parameters()
    trainable = parameters
    if settings.get("use_peft"):
        with torch.device("meta"):
            copied = type(model)(model.config)  # PEFT changes the one that it adapts
            adapted = get_peft_model(copied, get_peft_config(settings.build(ModelConfig)))
        trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    recompute = settings["activation_checkpointing"]
    common: dict[str, Any] = {
        "model": model,
        "trainable": trainable,
        "frozen": parameters - trainable if trainable != parameters else 0,
        "moments": _moments(settings, model),
        "recompute": bool(settings["gradient_checkpointing"] if recompute is None else recompute),
        "saved": parameters if trainable == parameters else trainable,
        "checkpoints": _checkpoints(settings),
        "processes": processes,
        "sharded": sharded,
    }
    rows, accumulated = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    batch = rows * accumulated * processes
    if settings.kind in ("ppo", "grpo"):
        return _rollouts(settings, model, made, batch, common)
    length = settings["block_size"] if settings.kind == "pretrain" else settings["max_length"]
    packed = settings.kind == "pretrain" or bool(settings.get("packing"))
    measured, longest = _tokens(settings, made, length / 4)
    mean = length if packed else min(length, measured)
    per_row = 2 if settings.kind == "reward" else 1
    if settings["max_steps"] > 0:
        steps = settings["max_steps"]
    else:
        units = _rows(settings, made)
        if packed:
            units = math.ceil(units * measured / length)
        steps = math.ceil(math.ceil(units / batch) * settings["num_train_epochs"])
    tokens = steps * batch * per_row * mean
    streamed = settings["dataset_streaming"] or settings.kind == "reward"
    return Work(
        tokens=tokens,
        rows=rows * per_row,
        length=length,
        mean=mean,
        padding=1.0 if packed else PADDING,
        longest=min(length, longest) if settings.kind == "reward" else 0.0,
        steps=steps,
        head={"pretrain": 1.0, "sft": LABELLED, "reward": 0.0}[settings.kind],
        data=0.0 if streamed else BYTES_PER_TOKEN * tokens / max(1.0, settings["num_train_epochs"]),
        **common,
    )


def _rollouts(
    settings: Settings, model: PreTrainedModel, made: Mapping[str, Any], batch: int, common: dict[str, Any]
) -> Work:
    """Return what PPO or GRPO computes; `batch` are the completions of an optimizer step."""
    processes, rows = common["processes"], settings["per_device_train_batch_size"]
    accumulated = settings["gradient_accumulation_steps"]
    at_once = settings["steps_per_generation"] or accumulated
    if settings["generation_batch_size"]:
        at_once = settings["generation_batch_size"] // (rows * processes)
    uses, longest = settings["num_iterations"], settings["max_completion_length"]
    prompt, completion = _tokens(settings, made, longest * ANSWER)[0], longest * ANSWER
    if settings["max_steps"] > 0:
        steps = settings["max_steps"]
    else:
        episodes = _rows(settings, made) * settings["num_generations"] * settings["num_train_epochs"]
        steps = math.ceil(episodes * uses / batch)
    tokens = steps * batch / uses * (prompt + completion)
    parameters, critics = model.num_parameters(), int(settings.kind == "ppo")
    paths = settings.get("reward_model_path") or []
    judges = [_load(name, "reward_model_path", made) for name in ([paths] if isinstance(paths, str) else paths)]
    penalty = settings["kl_coef"] if critics else settings["beta"]
    referred = penalty > 0 and not settings["use_peft"]  # with LoRA, the model without its adapter is the reference
    common["frozen"] += sum(judge.num_parameters() for judge in judges) + parameters * referred
    if critics:
        source = _load(own, "value_model_path", made) if (own := settings["value_model_path"]) else [*judges, model][0]
        adapted = settings["use_peft"] and settings["value_use_peft"] and type(source.config) is type(model.config)
        common["trainable"] += (critic := common["trainable"] if adapted else source.num_parameters())
        common["saved"] += critic
    common["converted"] = bool(critics and settings["use_peft"] and settings["frozen_dtype"] != "float32")
    old = 1 if critics or uses > 1 or accumulated % at_once else 0
    return Work(
        tokens=tokens,
        rows=rows,
        length=round(prompt + longest),
        mean=prompt + completion,
        steps=steps,
        networks=1 + critics,
        head=completion / (prompt + completion),
        rollouts=Rollouts(
            rows=rows * at_once,
            group=settings["num_generations"],
            prompt=prompt,
            completion=completion,
            longest=longest,
            uses=uses,
            passes=old + critics + len(judges) + (penalty > 0),
            vllm=bool(settings["use_vllm"]),
        ),
        **common,
    )


def _sampling(settings: Settings, model: PreTrainedModel, made: Mapping[str, Any], processes: int) -> Work:
    """Return what the sampling of preferences computes."""
    longest, most = settings["max_new_tokens"], settings["max_prompts"]
    prompt, _ = _tokens(settings, made, longest * ANSWER)
    answers = (most or _rows(settings, made)) * settings["samples_per_prompt"]
    group = settings["samples_per_prompt"]
    rollouts = Rollouts(settings["batch_size"], group, prompt, longest * ANSWER, longest, uses=0, passes=0.0)
    return Work(
        model=model,
        tokens=answers * (prompt + longest * ANSWER),
        rows=0,
        length=round(prompt + longest),
        mean=prompt + longest * ANSWER,
        steps=0,
        trainable=0,
        frozen=model.num_parameters(),
        head=0.0,
        checkpoints=0,
        rollouts=rollouts,
        processes=processes,
    )


def _moments(settings: Settings, model: PreTrainedModel) -> float:
    """Return the bytes of the optimizer's state for a parameter: two numbers, or one for the matrices of Muon."""
    share = model.get_input_embeddings().weight.numel() / model.num_parameters()
    if settings.get("use_muon"):
        return 4.0 + 4.0 * share * (1 if model.config.tie_word_embeddings else 2)
    eight = "8bit" in str(getattr(settings["optim"], "value", settings["optim"]))
    return 8.0 if not eight else 2.0 if settings.get("use_peft") else 2.0 + 6.0 * share  # embeddings keep 32 bits


def _checkpoints(settings: Settings) -> int:
    """Return how many checkpoints are on the disk at once, as `checks.check_disk` counts them."""
    if getattr(settings["save_strategy"], "value", settings["save_strategy"]) == "no":
        return 0
    if settings["save_total_limit"]:
        return int(settings["save_total_limit"]) + 1
    steps, every = settings["max_steps"], settings["save_steps"]
    return math.ceil(steps / every) if steps > 0 and every >= 1 else 2


def _data(settings: Settings) -> tuple[DataArguments, Any]:
    """Return the data arguments of a stage, and the kind of its rows."""
    kinds = {"pretrain": "text", "sft": "conversation", "reward": "preference"}
    return settings.build(DataArguments), kinds.get(settings.kind, "prompt")


def _local(settings: Settings) -> Dataset | None:
    """Return the training rows of a stage if its data are on this disk."""
    args, kind = _data(settings)
    if not all(Path(name).exists() for name in args.dataset_names) or args.dataset_streaming:
        return None
    logging.disable(logging.WARNING)
    try:
        with contextlib.suppress(UserError):  # the stage itself reports it
            return load_splits(args, kind, evaluation=False)[0]
    finally:
        logging.disable(logging.NOTSET)
    return None


def pairs(settings: Settings) -> int:
    """Return about how many pairs a step of preferences writes; identical answers and ties form none."""
    prompts = settings["max_prompts"] or _rows(settings, {})
    return round(prompts * settings["pairs_per_prompt"] * KEPT_PAIRS)


def _rows(settings: Settings, made: Mapping[str, Any]) -> int:
    """Return the training rows of a stage: those on this disk, of an earlier step or of the Hub, or a limit.

    Raises:
        UserError: If none of them is known.
    """
    args, _ = _data(settings)
    limit = settings.get("max_train_samples")
    if (rows := _local(settings)) is not None:
        return len(rows)
    if limit:
        return int(limit)
    if all(name in made for name in args.dataset_names):
        return sum(made[name] for name in args.dataset_names)
    count = 0
    for name in args.dataset_names:
        try:
            splits = load_dataset_builder(name, args.dataset_config).info.splits or {}
            count += splits[args.dataset_train_split].num_examples
        except Exception as error:  # each way of not being there raises another one
            remedy = "is neither here nor described on the Hub, so its rows are unknown; give --max_train_samples"
            raise UserError(Problem("dataset_name", name, remedy)) from error
    return count


def _tokens(settings: Settings, made: Mapping[str, Any], mean: float) -> tuple[float, float]:
    """Return the mean and most tokens of the first rows of a stage; `mean` is assumed where its data are not here."""
    names = [settings.get("tokenizer_name_or_path"), settings.get("model_name_or_path"), *made]
    name = next((name for name in names if name and (Path(name) / "tokenizer.json").exists()), None)
    if name is None or (rows := _local(settings)) is None:
        return mean, PADDING * mean
    with contextlib.suppress(Exception):  # only an assumption would be better founded
        tokenizer = load_tokenizer(name, "tokenizer_name_or_path")
        first = rows.take(min(MEASURED, len(rows)))
        texts = {"sft": ("messages",), "reward": ("chosen", "rejected")}.get(settings.kind, ("prompt",))
        counts = []
        for row in first:
            for column in texts:
                messages = row[column] if settings.kind != "reward" else [*row["prompt"], *row[column]]
                encoded = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=column == "prompt", tokenize=True, return_dict=True
                )
                counts.append(len(encoded["input_ids"]))
        return sum(counts) / len(counts), max(counts)
    return mean, PADDING * mean
