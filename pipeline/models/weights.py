"""Whether a folder holds all the weights of a model, before any of them is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"


def find_fault(folder: Path, model: Any) -> str | None:
    """Compare a folder's safetensors with the model that they are for; only their headers are read.

    transformers would fill weights that are missing with random numbers, and say so in a table.

    Args:
        folder: A local model.
        model: The model, without weights (on the meta device).

    Returns:
        What is wrong and what to do, or `None`.
    """
    if not _files(folder):
        if any(folder.glob("*.bin")):
            return "holds its weights as a pickle, which may run code; save the model as safetensors"
        return f"holds no weights ({WEIGHTS})"
    if damaged := next(filter(None, map(_file_fault, _files(folder))), None):
        return damaged
    shapes = stored_shapes(folder)
    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    other = [name for name, shape in wanted.items() if name in shapes and shapes[name] != shape]
    if other:
        first = f"{other[0]} has the shape {shapes[other[0]]} instead of {wanted[other[0]]}"
        return f"its weights are not those of its config.json ({first}); copy the model again"
    if type(model).__name__ not in (model.config.architectures or []) or not set(shapes) <= set(wanted):
        return None  # of another class, or under older names: what is missing cannot be told
    missing = sorted(set(wanted) - set(shapes) - set(model._tied_weights_keys or ()))
    return f"lacks the weights {', '.join(missing[:3])}; copy the model again" if missing else None


def find_adapter_fault(folder: Path) -> str | None:
    """What is wrong with the weights of a PEFT adapter in a local folder, and what to do, or `None`."""
    return _file_fault(folder / ADAPTER)


def _file_fault(file: Path) -> str | None:
    if not file.exists():
        return f"holds no {file.name}; copy the model again"
    try:
        _shapes(file)
    except (SafetensorError, OSError) as error:
        return f"{file.name} is damaged ({' '.join(str(error).split())}); copy the model again"
    return None


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of a folder's weights by the names that they have there; empty if it holds none.

    Raises:
        SafetensorError, OSError: A file cannot be read.
    """
    return {name: shape for file in _files(folder) for name, shape in _shapes(file).items()}


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [path for path in [folder / WEIGHTS] if path.exists()]
    try:
        names = json.loads((folder / INDEX).read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [folder / name for name in sorted(set(names))]


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
