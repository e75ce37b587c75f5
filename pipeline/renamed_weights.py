"""Resuming models whose weights have other names in a file than in memory.

transformers 5 writes some architectures (Mixtral's experts, GPT-NeoX's head) as they were named before, and renames
them in `from_pretrained`. `Trainer` does not: it leaves such weights as they were, with a warning.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from pipeline.weight_files import stored_shapes


def load_renamed_weights(trainer: Trainer, folder: str | Path) -> None:
    """Load all weights of a folder by `from_pretrained`, if the model does not know some of their names.

    Args:
        trainer: Has loaded what it could of the folder. Nothing is done for adapters, which have names of their own,
            and for models that are loaded in shards.
        folder: A checkpoint.
    """
    model = trainer.model
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded or not isinstance(model, PreTrainedModel) or set(stored_shapes(Path(folder))) <= set(model.state_dict()):
        return
    with torch.random.fork_rng(devices=[]):
        saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def resume_renamed_weights(trainer: Trainer) -> None:
    """Let a trainer of any class load such weights, when it resumes and when it takes its best model.

    Args:
        trainer: Changed in place, before `train`.
    """
    load_from_checkpoint, load_best_model = trainer._load_from_checkpoint, trainer._load_best_model

    def load_named(resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_from_checkpoint(resume_from_checkpoint, model)
        load_renamed_weights(trainer, resume_from_checkpoint)

    def load_best() -> None:
        load_best_model()
        load_renamed_weights(trainer, trainer.state.best_model_checkpoint)

    trainer._load_from_checkpoint = load_named
    trainer._load_best_model = load_best
