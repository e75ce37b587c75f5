"""Loads what a stage trains on and with, and tells everything that is wrong with it together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from datasets import Dataset
from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from pipeline.data.arguments import DataArguments
from pipeline.data.columns import Kind, Split
from pipeline.data.splits import load_splits
from pipeline.errors import Problem, UserError
from pipeline.models.checks import check_lengths, check_model, check_room, check_tokenizer
from pipeline.models.llama import build_model
from pipeline.models.loading import base_of, is_reward_model, load_tokenizer, validate_weights
from pipeline.training import checks
from pipeline.training.checks import rehearse

logger = logging.getLogger(__name__)

T = TypeVar("T")

LAYERS = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)
"""Layers that PEFT can put a LoRA adapter on."""

ROWS_MEASURED = 1000
"""Rows whose tokens are counted to find out whether they leave room; counting all of a large data set takes
minutes."""

ROWS_MEASURED_OF_STREAM = 100
"""The same of a stream, which reads them over the network."""

KINDS: dict[str, Kind] = {
    "block_size": "text",
    "assistant_only_loss": "conversation",
    "center_rewards_coefficient": "preference",
    "num_generations": "prompt",
}
"""What a stage's data hold, by a field that only its training arguments have."""


@runtime_checkable
class RewardChecks(Protocol):
    """Arguments that say what is rewarded (`pipeline.rl.arguments`, `pipeline.rl.arguments`)."""

    def find_problems(
        self, training_args: Any, tokenizer: PreTrainedTokenizerBase | None, train: Split | None
    ) -> list[Problem]:
        """What is wrong with the rewards, by themselves and with what else is known; None is what is not."""


def load_inputs(
    kind: Kind,
    data_args: DataArguments,
    training_args: Any,
    model_args: Any,
    reward_args: RewardChecks | None = None,
) -> tuple[PreTrainedTokenizerBase, Split, Split | None]:
    """Load a stage's tokenizer and data, and check them, the model's configuration and the arguments
    together.

    Args:
        kind: What the data hold, as for `load_splits`.
        data_args: Data and tokenizer.
        training_args: Any `TrainingArguments`; they say whether an evaluation split is needed.
        model_args: `trl.ModelConfig`, or `LlamaArguments` for a model that is yet to be made.
        reward_args: What is rewarded, if anything is.

    Returns:
        The tokenizer, the training split, and the evaluation split or `None`.

    Raises:
        UserError: With everything that is wrong, as far as it could be found out.
    """
    problems: list[Problem] = []

    def attempt(load: Callable[[], T]) -> T | None:
        try:
            return load()
        except UserError as error:
            problems.extend(error.problems)
            return None

    name = getattr(model_args, "model_name_or_path", None)
    config = attempt(lambda: _load_config(model_args)) if hasattr(model_args, "model_name_or_path") else None
    own = data_args.tokenizer_name_or_path
    field, revision = (
        ("tokenizer_name_or_path", None) if own or not name else ("model_name_or_path", model_args.model_revision)
    )
    tokenizer = None
    if own is not None or config is not None or not hasattr(model_args, "use_peft"):
        tokenizer = attempt(lambda: load_tokenizer(own or name, field, revision))
    evaluation = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
    splits = attempt(lambda: load_splits(data_args, kind, evaluation))
    if tokenizer is not None:
        problems += _set_template(tokenizer, training_args)
        if (pad := getattr(training_args, "pad_token", None)) and pad == tokenizer.eos_token:
            problems.append(Problem("pad_token", pad, "is the tokenizer's eos token; give it a token of its own"))
        problems += check_tokenizer(
            tokenizer,
            field,
            own or str(name),
            chat=kind != "text",
            assistant_only_loss=bool(getattr(training_args, "assistant_only_loss", False)),
        )
    if config is not None:
        problems += check_model(config, tokenizer, training_args, str(name))
        if not getattr(config, "is_encoder_decoder", False):
            problems += _check_weights(config, training_args, model_args)
    elif not hasattr(model_args, "model_name_or_path"):
        problems += check_lengths(model_args.max_position_embeddings, training_args)
        with torch.device("meta"):
            made = attempt(lambda: build_model(model_args, tokenizer, 0)) if tokenizer is not None else None
        if made is not None:
            size = made.num_parameters()
            problems += checks.check_disk(size, size, training_args)
    if splits is not None:
        train = splits[0]
        problems += checks.check_batches(len(train) if isinstance(train, Dataset) else None, training_args)
        if tokenizer is not None and (kind == "text" or tokenizer.chat_template):
            positions = getattr(config.get_text_config(), "max_position_embeddings", None) if config else None
            checked = splits if kind == "preference" else splits[:1]
            try:
                for split in checked:
                    if split is not None:
                        problems += _check_tokens(kind, split, tokenizer, training_args, positions)
            except TemplateError as error:
                remedy = f"its chat template refuses a conversation of the data ({error}); correct one of them"
                problems.append(Problem(field, own or name, remedy))
    if reward_args is not None:
        problems += reward_args.find_problems(training_args, tokenizer, splits[0] if splits else None)
    problems += rehearse(training_args)
    if problems or tokenizer is None or splits is None:
        raise UserError(*problems)
    return tokenizer, *splits


def preflight_inputs(arguments: Sequence[Any], types: Iterable[type]) -> list[Problem]:
    """Look at the inputs of a configuration that is wrong already, so that all is told at once.

    Args:
        arguments: Those argument dataclasses of a recipe that could be built.
        fields: Names of all its fields, also of those that could not.

    Returns:
        What is wrong with its data, its model and its rewards besides.
    """
    known = {field.name for kind in types for field in dataclasses.fields(kind)}
    kind = next((kind for field, kind in KINDS.items() if field in known), None)
    data_args = next((item for item in arguments if isinstance(item, DataArguments)), None)
    training_args = next((item for item in arguments if hasattr(item, "world_size")), None)
    model_args = next((item for item in arguments if hasattr(item, "use_peft") or hasattr(item, "rope_theta")), None)
    reward_args = next((item for item in arguments if isinstance(item, RewardChecks)), None)
    if kind is None or data_args is None:
        return []
    problems: list[Problem] = []
    try:
        if training_args is not None and model_args is not None:
            load_inputs(kind, data_args, training_args, model_args, reward_args)
        else:
            problems = reward_args.find_problems(training_args, None, None) if reward_args else []
            if training_args is None:  # which hold the weights
                problems = [problem for problem in problems if problem.field != "reward_weights"]
            load_splits(data_args, kind, evaluation=False)
    except UserError as error:
        problems += error.problems
    except (ValueError, TypeError, ArithmeticError, OSError):
        pass  # a consequence of what is known to be wrong
    return problems


def _set_template(tokenizer: PreTrainedTokenizerBase, args: Any) -> list[Problem]:
    """Give the tokenizer the chat template that SFT is told to use, as TRL will."""
    path = getattr(args, "chat_template_path", None)
    if path is None:
        return []
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [Problem("chat_template_path", path, f"cannot be read ({error}); give a Jinja template")]
    return []


def _load_config(model_args: Any) -> Any:
    name = model_args.model_name_or_path
    if not name:
        raise UserError(Problem("model_name_or_path", "nothing", "give a Hub id or a folder"))
    try:
        if base := base_of(name):
            remedy = f"is an adapter of {base}; put them together with `python -m pipeline merge` and name the result"
            raise UserError(Problem("model_name_or_path", name, remedy))
        return AutoConfig.from_pretrained(name, revision=model_args.model_revision or "main")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(Problem("model_name_or_path", name, f"holds no model ({reason})")) from None


def _check_weights(config: Any, args: Any, model_args: Any) -> list[Problem]:
    """Weights, attention, LoRA targets and room on the disk, by a model without weights."""
    name = model_args.model_name_or_path
    reward = hasattr(args, "center_rewards_coefficient")
    if reward and not is_reward_model(config):
        config.num_labels = 1
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    attention = model_args.attn_implementation
    try:
        with torch.device("meta"):
            model = kind.from_config(config, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        if attention is not None and type(config) in kind._model_mapping:
            return [Problem("attn_implementation", attention, f"{reason}; leave it out, or use sdpa or eager")]
        return [Problem("model_name_or_path", name, f"{config.model_type} cannot be used here")]
    problems = []
    if fault := validate_weights(name, config, kind):
        problems.append(Problem("model_name_or_path", name, fault))
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, LAYERS)]
    problems += checks.check_lora(model_args, modules, layers, [weight for weight, _ in model.named_parameters()])
    size = trained = model.num_parameters()
    if getattr(model_args, "use_peft", False):
        trained = round(0.05 * size)  # adapters are smaller; how much depends on ranks and targets
    if hasattr(args, "vf_coef"):
        trained += size  # PPO's critic, which is trained and saved in full
    return problems + checks.check_disk(trained, trained, args)


def _check_tokens(
    kind: Kind, train: Split, tokenizer: PreTrainedTokenizerBase, args: Any, positions: int | None
) -> list[Problem]:
    """Rows that leave no room: a first look at the beginning of the data."""
    number = min(ROWS_MEASURED, len(train)) if isinstance(train, Dataset) else ROWS_MEASURED_OF_STREAM
    rows = list(train.take(number))
    if kind == "text":
        return _check_blocks(rows, train, tokenizer, args)

    def count(messages: Any, add_generation_prompt: bool = False) -> int:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
        return len(encoded["input_ids"])

    length = getattr(args, "max_length", None)
    if kind == "prompt":
        longest = max(count(row["prompt"], add_generation_prompt=True) for row in rows)
        completion = getattr(args, "max_completion_length", None) or 0
        return check_room("max_completion_length", completion, longest, positions)
    if kind == "conversation" and length is not None:
        room = [
            count(
                row["messages"][: next(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")],
                True,
            )
            for row in rows
            if any(m["role"] == "assistant" for m in row["messages"])
        ]
        if room and min(room) >= length:
            remedy = (
                f"every prompt is longer (the shortest takes {min(room)} tokens): no answer would be left; raise it"
            )
            return [Problem("max_length", length, remedy)]
    if kind == "preference" and length is not None:
        sizes = [max(count(row["prompt"] + row[answer]) for answer in ("chosen", "rejected")) for row in rows]
        if min(sizes) > length:
            remedy = f"every pair is longer (the shortest takes {min(sizes)} tokens) and would be dropped; raise it"
            return [Problem("max_length", length, remedy)]
        if longer := sum(size > length for size in sizes):
            logger.warning(
                "max_length %d: %d of the first %d pairs are longer (up to %d tokens), and are dropped.",
                *(length, longer, len(sizes), max(sizes)),
            )
    return []


def _check_blocks(
    rows: list[dict[str, Any]], train: Split, tokenizer: PreTrainedTokenizerBase, args: Any
) -> list[Problem]:
    if not isinstance(train, Dataset) or len(rows) < len(train):
        return []  # a thousand documents fill blocks enough
    tokens = sum(len(tokenizer(row["text"], add_special_tokens=False)["input_ids"]) + 2 for row in rows)
    if tokens >= args.block_size:
        return checks.check_batches(tokens // args.block_size, args, what="blocks")
    remedy = f"the training data have {tokens} tokens, which fill no block; lower it or give more text"
    return [Problem("block_size", args.block_size, remedy)]
