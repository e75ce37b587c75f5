"""No method of another library's class or object is replaced from outside, except in `pipeline/models/patches.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn, optim
from torch.utils.data import DataLoader
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import GRPOTrainer, RewardTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration

ROOT = Path(__file__).parents[1]
CLASSES: list[type] = [
    *(Trainer, SFTTrainer, RewardTrainer, GRPOTrainer, TrainerCallback, VLLMGeneration),
    *(nn.Module, PreTrainedModel, GenerationMixin, PeftModel, PreTrainedTokenizerBase),
    *(optim.Optimizer, DataLoader, Dataset, IterableDataset),
]
FIELDS = {"push_to_hub", "parameters"}
"""Names of methods that are also fields of dataclasses: the trainer's arguments, and a stage of the report."""
METHODS = {name for cls in CLASSES for name in dir(cls) if callable(getattr(cls, name, None))} - FIELDS | {"__class__"}


def replaced(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of everything that is put in the place of a method."""
    nodes = list(ast.walk(tree))
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    foreign = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("pipeline")
        for alias in node.names
        if alias.name[0].isupper()
    }
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("MethodType"):
            yield node.lineno, "MethodType"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__"):
            _, name, value = node.args
            is_function = isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in functions)
            if is_function or (isinstance(name, ast.Constant) and name.value in METHODS):
                yield node.lineno, ast.unparse(name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) and not targets else targets
        for target in [part for whole in targets for part in ast.walk(whole)]:
            is_named = isinstance(target, ast.Subscript) and ast.unparse(target.slice).strip("'") in METHODS
            if is_named and ast.unparse(target.value).endswith(("__dict__", ")")):
                yield node.lineno, ast.unparse(target)
            if not isinstance(target, ast.Attribute) or not isinstance(target.ctx, ast.Store):
                continue
            owner = ast.unparse(target.value)
            if owner in foreign or target.attr == "__class__" or (target.attr in METHODS and owner != "self"):
                yield node.lineno, f"{owner}.{target.attr}"


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("pipeline/**/*.py")), *sorted(ROOT.glob("recipes/**/*.py"))])
def test_no_method_is_replaced_from_outside(path: Path) -> None:
    replacements = list(replaced(ast.parse(path.read_text(encoding="utf-8"))))
    if path == ROOT / "pipeline" / "models" / "patches.py":
        assert replacements
    else:
        assert not replacements, f"{path}: subclass instead, or add it to pipeline/models/patches.py with the reason"


@pytest.mark.parametrize(
    "code",
    [
        "trainer.training_step = checked_step",
        "trainer._save_checkpoint, trainer.log = save, log",
        "from transformers import Llama4ForCausalLM\nLlama4ForCausalLM.base_model_prefix = 'model'",
        "def forward(x): ...\nsetattr(model, name, forward)",
        "setattr(model, 'forward', other)",
        "install(MethodType(forward, model))",
        "model.__class__ = Other",
        "model.__dict__['forward'] = other",
        "vars(model)['forward'] = other",
    ],
)
def test_every_way_of_replacing_is_found(code: str) -> None:
    assert list(replaced(ast.parse(code)))
