"""The weight files of a model: checks of their headers, and resuming from files with older names for the weights."""

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer

from pipeline.files import read_json, read_shapes

WEIGHTS = "model.safetensors"


def _validate_file(file: Path) -> str | None:
    """Return what is wrong with a safetensors file that is missing or has an unreadable header; None if it is fine."""
    if not file.exists():
        return f"does not contain {file.name}; copy the model again"
    try:
        read_shapes(file)
    except (SafetensorError, OSError) as error:
        return f"{file.name} is damaged ({' '.join(str(error).split())}); copy the model again"
    return None


def validate_files(folder: Path, model: Any) -> str | None:
    """Compare the headers of a folder's weight files with the weights that a model expects.

    transformers would fill missing weights with random numbers, and only log a table.

    Args:
        folder: A local model.
        model: The model on the meta device, built by the class that saved the files.

    Returns:
        What is wrong and what to do, as the remedy of a `Problem`, or None.
    """
    files = weight_files(folder)
    if not files:
        if any(folder.glob("*.bin")):
            return "its weights are a pickle, which may run code; save the model as safetensors"
        return f"does not contain weights ({WEIGHTS})"
    stored: dict[str, list[int]] = {}
    for file in files:
        if fault := _validate_file(file):
            return fault
        stored |= read_shapes(file)
    expected = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    for name, shape in expected.items():
        if stored.get(name, shape) != shape:
            difference = f"{name} has the shape {stored[name]} instead of {shape}"
            return f"its weights do not fit its config.json ({difference}); copy the model again"
    is_of_class = type(model).__name__ in (model.config.architectures or [])
    if is_of_class and stored.keys() <= expected.keys():
        return validate_complete(expected.keys() - stored.keys() - set(model._tied_weights_keys or ()))
    # Names of weights may come from a different class or release, so a name that is not in the files says nothing. Only
    # compare the numbers of weights, and not for quantised files, which pack several weights into one number.
    stored_count = sum(math.prod(shape) for shape in stored.values())
    expected_count = model.num_parameters()
    if stored_count >= expected_count / 2 or hasattr(model.config, "quantization_config"):
        return None
    return (
        f"its weight files hold {stored_count:,} of the {expected_count:,} weights of its config.json; "
        "copy the model again"
    )


def validate_adapter(folder: Path) -> str | None:
    """Check the file of an adapter, and that its weights have the ranks that its configuration names.

    Before PEFT reads the weights, it allocates matrices of these ranks, however large they are.

    Return the remedy of a `Problem`, or None if nothing is wrong.
    """
    file = folder / "adapter_model.safetensors"
    if fault := _validate_file(file):
        return fault
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # A rank is one dimension of a weight, so it cannot be larger than the largest one of all.
    largest_size = 0
    for shape in read_shapes(file).values():
        for size in shape:
            largest_size = max(largest_size, size)
    # Prompt tuning has a number of virtual tokens instead of a rank.
    ranks = [config.get("r"), config.get("num_virtual_tokens"), *(config.get("rank_pattern") or {}).values()]
    for rank in ranks:
        if isinstance(rank, int) and rank > largest_size:
            return f"its adapter_config.json asks for the rank {rank}, which its weights do not have; copy it again"
    return None


def validate_complete(missing: Collection[str]) -> str | None:
    """Return what is wrong with a model that lacks the weights `missing`, and what to do; None if there are none."""
    if not missing:
        return None
    return f"lacks the weights {', '.join(sorted(missing)[:3])}; copy the model again"


def validate_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Report NaN or infinite weights, such as a diverged run leaves. Return None if all are finite."""
    for name, weight in weights:
        if weight.is_floating_point() and weight.element_size() > 1 and not torch.isfinite(weight).all():
            return f"its weights are not finite numbers ({name}); train it again"
    return None


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a local model: one file, or several that an index names.

    Return [] if the folder has neither. Files that an index names need not exist.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    names = read_json(folder / f"{WEIGHTS}.index.json").get("weight_map", {})
    return [folder / name for name in sorted(set(names.values())) if isinstance(name, str)]


@dataclass(eq=False)
class RenamedWeights:
    """A part of checkpoints (`pipeline.training.reliable`): weights that the files store under unknown names.

    transformers saves some models under older names, and its trainer would only load weights with current ones. The
    model is loaded again with `from_pretrained`, which knows both. Adapters and sharded models are left alone.
    Guarded by `tests/rl/test_architectures.py`, which resumes such models.
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
        stored: set[str] = set()
        for file in weight_files(folder):
            stored |= read_shapes(file).keys()
        if stored <= set(model.state_dict()):
            return
        # `from_pretrained` draws random weights before it loads the stored ones.
        with torch.random.fork_rng(devices=[]):
            saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
