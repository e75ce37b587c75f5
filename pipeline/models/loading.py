"""Tokenizers and models of the stages that begin with a trained model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig

from pipeline.errors import Problem, UserError


@contextmanager
def user_error_for(field: str, name: object, what: str = "model") -> Iterator[None]:
    """Tell a model or a tokenizer (`what`) that cannot be loaded as a problem of `field`, which named it.

    Raises:
        UserError: If it isn't there, is damaged or doesn't fit its own configuration.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(Problem(field, name, f"no {what} can be loaded from there ({reason})")) from None


def load_tokenizer(name: str | None, field: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name: A folder or an id on the Hub.
        field: Argument that named it, for messages.
        revision: Branch, tag or commit on the Hub. Default: "main".

    Raises:
        UserError: If there is no tokenizer.
    """
    if not name:
        raise UserError(Problem(field, "nothing", "give a Hub id or a folder"))
    with user_error_for(field, name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")


def model_init_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """What TRL's trainers pass to `from_pretrained`, as TRL's own scripts do, without code from the Hub."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }


ARCHITECTURES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""What transformers calls the classes for some of PEFT's task types."""


def base_of(name: str) -> str | None:
    """Which model an adapter belongs to; None for a model that is none.

    Args:
        name: A folder or an id on the Hub.
    """
    if find_adapter_config_file(name) is None:
        return None
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model, or of the base that an adapter belongs to.

    A classifier that is an adapter has one label, as `RewardTrainer` makes it, and an architecture that says so.

    Args:
        name: A folder or an id on the Hub.

    Raises:
        OSError, ValueError: There is none.
    """
    base = base_of(name)
    config = AutoConfig.from_pretrained(base or name)
    task = PeftConfig.from_pretrained(name).task_type if base else None
    if task in ARCHITECTURES:
        config.num_labels = 1
        config.architectures = [ARCHITECTURES[task]]
    return config


def without_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself if it has no adapter; else a copy that has its active adapters merged into its weights.

    Args:
        model: Also one whose adapters transformers has loaded, which is no `PeftModel`.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if not any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    adapted: list[str] = []  # what lies inside of one of these is part of it
    for name, module in list(merged.named_modules()):
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or name.startswith(tuple(adapted)):
            continue
        adapted.append(f"{name}.")
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            module.merge()
            plain = module.get_base_layer()
        merged.set_submodule(name, plain)
    return merged
