"""Where bfloat16 is emulated, which takes up to 30 times as long as float32, nothing is multiplied in it."""

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline import hardware
from pipeline.__main__ import main
from pipeline.app import watch
from pipeline.app.models import load
from pipeline.runner.steps import smoke_overrides
from pipeline.stages import STAGES
from pipeline.training import entry
from recipes.worlds.pocket.build import PocketArguments, build
from tests.helpers.small_model import ROOT, save_model

PRODUCT = re.compile("mm|mv|dot|linear|matmul|einsum|convol|attention")
"""What the names of torch's operators have in common that multiply matrices or vectors."""
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "lora_r": 2}
PRETRAINING = {"hidden_size": 32, "intermediate_size": 32, "max_train_samples": 100, "block_size": 128}
SAMPLING = {"max_prompts": 30, "max_eval_prompts": 8, "max_new_tokens": 8}


class NoHalfProducts(TorchDispatchMode):
    """Raises at a product of numbers in half precision, in forward and backward passes and in optimizers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if PRODUCT.search(func.name()):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            half = {x.dtype for x in tensors if x.is_floating_point() and x.itemsize < 4}
            assert not half, f"{func.name()} in {half}"
        return result


def multiplies_in_the_backward_pass() -> None:
    x = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    with _disable_current_modes():
        product = x @ x
    product.sum().backward()


def multiplies_in_the_optimizer() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    torch.optim.Muon([weight]).step()


def half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


def under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        nn.Linear(2, 2)(torch.ones(2, 2))


@pytest.mark.parametrize(
    "multiply",
    [
        multiplies_in_the_backward_pass,
        multiplies_in_the_optimizer,
        under_autocast,
        lambda: half(2, 2) @ half(2, 2),
        lambda: half(1, 2, 2) @ half(1, 2, 2),
        lambda: half(2, 2) @ half(2),
        lambda: half(2) @ half(2),
        lambda: half(2, 2, dtype=torch.float16) @ half(2, 2, dtype=torch.float16),
        lambda: torch.baddbmm(half(1, 2, 2), half(1, 2, 2), half(1, 2, 2)),
        lambda: torch.einsum("ij,kj->ik", half(2, 2), half(2, 2)),
        lambda: functional.linear(half(2, 2), half(2, 2), half(2)),
        lambda: functional.scaled_dot_product_attention(half(1, 1, 2, 2), half(1, 1, 2, 2), half(1, 1, 2, 2)),
        lambda: functional.conv1d(half(1, 1, 4), half(1, 1, 2)),
    ],
)
def test_a_product_in_half_precision_is_seen(multiply: Callable[[], object]) -> None:
    with NoHalfProducts(), pytest.raises(AssertionError, match=r"in .torch\."):
        multiply()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take this machine for one with AVX2 alone, and watch what it multiplies."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    hardware.precision.cache_clear()
    with NoHalfProducts():
        yield
    hardware.precision.cache_clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pocket") / "data"
    build(PocketArguments(str(folder), size_mb=0.1, sft_rows=100, preference_rows=60, reasoning_rows=60))
    return folder


def take_two_steps(run: Path, kind: str, output: str, **changes: Any) -> None:
    """Run a recipe of pocket in miniature."""
    (file,) = (ROOT / "recipes" / "pocket").glob(f"?_{kind}.yaml")
    values = yaml.safe_load(file.read_text().replace("runs/pocket", str(run)))
    values |= smoke_overrides(kind, values) | {"output_dir": str(run / output)} | changes
    config = run / f"{output}.yaml"
    config.write_text(yaml.safe_dump(values))
    entry.run(importlib.import_module(STAGES[kind].module).main, ["--config", str(config)])


def measured(run: Path, stage: str, *options: str) -> set[str]:
    """Evaluate a stage, and return the names of its metrics."""
    sizes = ("--limit", "2", "--max_new_tokens", "4", "--samples", "2", "--against", "2_sft")
    assert main(["evaluate", str(run), "--stage", stage, *sizes, *options]) == 0
    return set(json.loads((run / "evaluations" / f"{stage}.json").read_text())["metrics"])


@pytest.mark.usefixtures("machine")
def test_every_recipe_and_evaluation_multiplies_in_float32(data: Path) -> None:
    run = data.parent
    take_two_steps(run, "tokenizer", "tokenizer", vocab_size=300)
    experts = {"model_type": "llama4_text", "num_local_experts": 2}
    take_two_steps(run, "pretrain", "1_experts", **PRETRAINING, **experts)
    take_two_steps(run, "pretrain", "1_pretrain", **PRETRAINING, eval_steps=2)
    take_two_steps(run, "sft", "2_sft", eval_steps=2)
    take_two_steps(run, "preferences", "3_preferences", **SAMPLING)
    take_two_steps(run, "reward", "3_reward", eval_steps=2)
    take_two_steps(run, "ppo", "3_ppo", cast_lm_head_to_fp32=True)
    take_two_steps(run, "grpo", "4_grpo")
    assert measured(run, "2_sft") >= {"bits_per_byte", "instruction_accuracy", "pass@1", "pass@2", "win_rate"}
    assert "reward_accuracy" in measured(run, "3_reward")


@pytest.mark.usefixtures("machine")
def test_so_do_adapters_and_models_that_are_stored_in_half_precision(data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(data)
    judge, base = str(tmp_path / "judge"), str(tmp_path / "base")
    save_model(tmp_path / "base")
    save_model(tmp_path / "judge", seed=1)
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1).half().save_pretrained(judge)
    take_two_steps(tmp_path, "preferences", "3_preferences", **SAMPLING, model_name_or_path=base)
    take_two_steps(
        tmp_path, "sft", "2_sft", **LORA, embedding_learning_rate=None, model_name_or_path=base, dtype="auto"
    )
    take_two_steps(tmp_path, "reward", "3_reward", **LORA, embedding_learning_rate=None)
    # The judge's file decides on its dtype, because the policy is an adapter that was merged.
    take_two_steps(tmp_path, "ppo", "3_ppo", **LORA, reward_model_path=judge)
    take_two_steps(tmp_path, "grpo", "4_grpo", **LORA, beta=0.1)
    assert "win_rate" in measured(tmp_path, "3_ppo", "--judge", str(tmp_path / "3_reward"))
    row = {"prompt": [{"role": "user", "content": "What?"}], "answer": "7"}
    policy, reference = (load(str(tmp_path / stage), "RUN", stage) for stage in ("3_ppo", "2_sft"))
    settings = watch.stage_settings(tmp_path, "3_ppo")
    group = watch.sample_group(policy, row, settings, 2, seed=0)
    watch.token_view(policy, reference, tmp_path, "3_ppo", settings, row, group[0])
    watch.update(policy, reference, watch.stage_settings(tmp_path, "4_grpo"), row, group)
