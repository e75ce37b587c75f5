"""Models that are saved or held as a PEFT adapter of another one."""

from __future__ import annotations

import copy

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

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
