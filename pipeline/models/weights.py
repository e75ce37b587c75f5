"""The weight files of a model: checks of their headers, and resuming from files with older names for the weights."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer

from pipeline.files import read_json, read_shapes

WEIGHTS = "model.safetensors"


def _validate_file(file: Path) -> str | None:
    if not file.exists():
        return f"does not contain {file.name}; copy the model again"
    try:
        read_shapes(file)
    except (SafetensorError, OSError) as error:
        return f"{file.name} is damaged ({' '.join(str(error).split())}); copy the model again"
    return None


def validate_files(folder: Path, model: Any) -> str | None:
    """Report how a local model's files differ from what a model on the meta device expects; None if they do not."""
    files = weight_files(folder)
    if not files:
        if any(folder.glob("*.bin")):
            return "its weights are a pickle, which may run code; save the model as safetensors"
        return f"does not contain weights ({WEIGHTS})"
    if damaged := next(filter(None, map(_validate_file, files)), None):
        return damaged
    shapes = {name: shape for file in files for name, shape in read_shapes(file).items()}
    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    if other := [name for name, shape in wanted.items() if shapes.get(name, shape) != shape]:
        first = f"{other[0]} has the shape {shapes[other[0]]} instead of {wanted[other[0]]}"
        return f"its weights do not fit its config.json ({first}); copy the model again"
    if type(model).__name__ not in (model.config.architectures or []) or not set(shapes) <= set(wanted):
        # Names may come from a different class or release, so missing weights cannot be recognised by them. Quantized
        # files pack several weights into one number.
        held, expected = sum(map(math.prod, shapes.values())), model.num_parameters()
        if held >= expected / 2 or hasattr(model.config, "quantization_config"):
            return None
        return f"its weight files hold {held:,} of the {expected:,} weights of its config.json; copy the model again"
    return validate_complete(set(wanted) - set(shapes) - set(model._tied_weights_keys or ()))


def validate_adapter(folder: Path) -> str | None:
    """Report an adapter with a damaged file, or a rank larger than its weights, which PEFT would first allocate."""
    file = folder / "adapter_model.safetensors"
    if damaged := _validate_file(file):
        return damaged
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    largest = max((size for shape in read_shapes(file).values() for size in shape), default=0)
    ranks = [config.get("r"), config.get("num_virtual_tokens"), *(config.get("rank_pattern") or {}).values()]
    if wrong := [rank for rank in ranks if isinstance(rank, int) and rank > largest]:
        return f"its adapter_config.json asks for the rank {wrong[0]}, which its weights do not have; copy it again"
    return None


def validate_complete(names: Collection[str]) -> str | None:
    """Return what is wrong with a model that lacks these weights, and what to do; None if there are none."""
    return f"lacks the weights {', '.join(sorted(names)[:3])}; copy the model again" if names else None


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a model whose weights are in one file, or in several that an index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    names = read_json(folder / f"{WEIGHTS}.index.json").get("weight_map", {})
    return [folder / name for name in sorted(set(names.values())) if isinstance(name, str)]


@dataclass(eq=False)
class RenamedWeights:
    """A part of checkpoints (`pipeline.training.reliable`): weights that the files store under unknown names.

    transformers saves some models under older names, and its trainer would only load weights with current ones. The
    model is loaded again with `from_pretrained`, which knows both. Adapters and sharded models are left alone.
    """

    belongs_to_model = True

    trainer: Trainer

    def save(self, folder: Path) -> None:
        """Write nothing: the weights are in the files of the model."""

    def load(self, folder: Path) -> None:
        """Load all weights of a checkpoint if some of their names are unknown to the model."""
        model = self.trainer.model
        sharded = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled
        if sharded or not isinstance(model, PreTrainedModel):
            return
        if {name for file in weight_files(folder) for name in read_shapes(file)} <= set(model.state_dict()):
            return
        # Loading draws random weights before it fills them.
        with torch.random.fork_rng(devices=[]):
            saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
