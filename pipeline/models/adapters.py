"""LoRA adapters merged into their base models, to continue training from them or to save both as one model."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments, set_seed
from trl import ModelConfig, RewardConfig, get_peft_config
from trl.trainer.utils import create_model_from_path

from pipeline import hardware
from pipeline.files import BASE, write_folder
from pipeline.models.loading import base_of, load_config, load_tokenizer, user_error_for

logger = logging.getLogger(__name__)

MERGED = "merged_adapter"
"""Attribute of a model that only exists in memory: the name of the adapter that was merged into it."""


def starting_model(model_args: ModelConfig, training_args: TrainingArguments) -> str | PreTrainedModel:
    """Return what a trainer of TRL starts from: the name of a model, or an adapter merged into its base model.

    TRL loads a model by its name with the `model_init_kwargs` of `training_args`, which this function sets. An adapter
    is loaded here, with the same options. Unless `model_args` name a dtype, a model in a dtype that the machine
    emulates is loaded in float32.

    With `load_in_4bit`, TRL has to load the model by a name, so the merged model is saved as `base/` in the output
    directory, without the error of 4 bits.

    Raises:
        UserError: If the adapter or its base model cannot be loaded.
    """
    name = str(model_args.model_name_or_path)
    dtype: Any = model_args.dtype
    if dtype in (None, "auto"):
        # Both mean the dtype of the file, which may be bfloat16 even if the configuration does not say so.
        stored_dtype = load_config(name, model_args.model_revision).dtype or torch.bfloat16
        if hardware.is_emulated(stored_dtype):
            dtype = "float32"
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": dtype,
        # TRL's default on a GPU, "auto", spreads the layers over all GPUs.
        "device_map": None,
        "trust_remote_code": False,
    }
    base = base_of(name, model_args.model_revision)
    if base is None:
        training_args.model_init_kwargs = options
        return name
    logger.info("%-11s the adapter %s, merged into %s", "model", name, base)
    # The head of a new reward model is random.
    set_seed(training_args.seed)
    model_class: Any = None
    if isinstance(training_args, RewardConfig):
        model_class = AutoModelForSequenceClassification
    with user_error_for("model_name_or_path", name, checked=True):
        merged = merge_into_base(name, model_class, **options)
    if not model_args.load_in_4bit:
        return merged
    folder = Path(training_args.output_dir).absolute() / BASE
    if training_args.should_save:
        # A killed run left this folder complete or not at all, and a resumed run writes the same once more.
        with write_folder(folder) as unfinished:
            merged.save_pretrained(unfinished)
            load_tokenizer(name, "model_name_or_path").save_pretrained(unfinished)
    training_args.distributed_state.wait_for_everyone()
    training_args.model_init_kwargs = options | {"revision": None}
    return str(folder)


def merge_into_base(name: str, model_class: Any = None, revision: str | None = None, **options: Any) -> PreTrainedModel:
    """Load an adapter and its base model, and merge them into a model all of whose weights can be trained.

    Args:
        name: A folder or an id on the Hub, where `revision` is "main" by default.
        model_class: transformers class of a reward model or a critic, which have one label. If the adapter belongs to a
            language model, the head is random. Default: the class that saved the base model.
        **options: For `from_pretrained` of the base model.

    Raises:
        UserWarning: If the adapter lacks weights.
        ValueError: If the merged weights would not be finite.
    """
    config = PeftConfig.from_pretrained(name, revision=revision)
    # PEFT would insist on the task of the adapter, but a reward model may start from the adapter of a language model.
    config.task_type = None
    settings: dict[str, Any] = {
        "device_map": None,
        "trust_remote_code": False,
        "revision": config.revision or "main",
    }
    if model_class is not None:
        settings["num_labels"] = 1
    base = create_model_from_path(config.base_model_name_or_path, model_class, **(settings | options))
    # PEFT only warns about missing weights, and would leave them random.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(base, name, config=config, revision=revision, torch_device=str(base.device))
    model = adapted.merge_and_unload(safe_merge=True).requires_grad_(True)
    setattr(model, MERGED, name)
    return model


def count_trainable(model: PreTrainedModel, model_args: ModelConfig) -> int:
    """Return how many parameters would be trained: all, or only the new adapter's if `model_args` ask for one.

    `model` is on the meta device, and does not change.
    """
    if not model_args.use_peft:
        return model.num_parameters()
    with torch.device("meta"):
        # PEFT changes the model that it adapts, so it gets another one.
        adapted = PeftModel(type(model)(model.config), get_peft_config(model_args))
    return int(adapted.get_nb_trainable_parameters()[0])
