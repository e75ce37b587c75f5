"""Values that no numeric and no text field accepts, by the dataclasses of every recipe."""

import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from trl import GRPOConfig, RLOOConfig, SFTConfig

from pipeline import hardware
from pipeline.config.checks import check_supported
from pipeline.config.fields import argument_types
from pipeline.config.parser import check_values
from pipeline.files.bounded import MAX_LAYERS
from pipeline.models.scratch import ScratchArguments
from pipeline.rl.ppo_config import PPOConfig
from pipeline.training.checks import preflight

RECIPES = ("data", "tokenizer", "pretrain", "sft", "preferences", "reward", "dpo", "kto", "ppo", "grpo")
TYPES = {kind for name in RECIPES for kind in argument_types(importlib.import_module(f"recipes.{name}").main)}
FIELDS = sorted(
    {(item.name, kind) for kind in TYPES for item in dataclasses.fields(kind) if item.init},
    key=lambda pair: (pair[0], pair[1].__name__),
)
HALF_PRECISION = {
    ("bf16", True): "bf16",
    ("bf16_full_eval", True): "bf16",
    ("fp16", True): "fp16",
    ("fp16_full_eval", True): "fp16",
    ("dtype", "bfloat16"): "bf16",
    ("dtype", "float16"): "fp16",
    ("frozen_dtype", "bfloat16"): "bf16",
}
"""Values that ask for products in half precision, and which."""


def is_refused(name: str, kind: type, value: Any) -> bool:
    _, problems = check_values({name: value}, [kind])
    return [problem.field for problem in problems if problem.remedy != "is required"] == [name]


@pytest.mark.parametrize("kind", [GRPOConfig, PPOConfig])
def test_prompts_have_a_number_of_completions(kind: type) -> None:
    assert is_refused("num_generations", kind, None)
    assert not is_refused("num_generations_eval", kind, None)


def of_type(*types: type) -> list[Any]:
    """Return the fields whose type is, or contains, one of `types`, except for mappings."""
    parameters, hints = [], {kind: get_type_hints(kind) for kind in {kind for _, kind in FIELDS}}
    for name, kind in FIELDS:
        hint = str(hints[kind][name])
        if "dict" not in hint and any(item.__name__ in hint for item in types):
            parameters.append(pytest.param(name, kind, id=f"{kind.__name__}.{name}"))
    return parameters


@pytest.mark.parametrize(("name", "kind"), of_type(int, float))
def test_a_number_is_finite_and_not_astronomical_and_not_of_another_type(name: str, kind: type) -> None:
    # 2^53 is the first whole number that floats do not tell from the next one, and 10^400 is larger than any float.
    for value in (math.nan, math.inf, -math.inf, 2**53, float(2**53), 10**400, True, {"a": 1}, [[1]]):
        assert is_refused(name, kind, value), value
    # A weight may be negative.
    if name != "reward_weights":
        assert is_refused(name, kind, -2)


@pytest.mark.parametrize(("name", "kind"), of_type(str))
def test_a_text_is_not_empty_and_does_not_contain_nul(name: str, kind: type) -> None:
    assert is_refused(name, kind, "a\0b")
    assert is_refused(name, kind, "") or name in ("debug", "system_prompt")


@pytest.mark.parametrize("kind", [SFTConfig, GRPOConfig, PPOConfig])
def test_a_field_that_takes_an_object_is_null(kind: type) -> None:
    for value in ([], {}, [1], {"tp_size": 2}, "a", 1, True):
        assert is_refused("parallelism_config", kind, value), value
    assert not is_refused("parallelism_config", kind, None)


def test_a_new_model_has_at_most_the_layers_with_which_it_can_be_loaded() -> None:
    assert is_refused("num_hidden_layers", ScratchArguments, MAX_LAYERS + 1)
    assert not is_refused("num_hidden_layers", ScratchArguments, MAX_LAYERS)


@pytest.mark.parametrize(
    "name", [item.name for item in dataclasses.fields(ScratchArguments) if "int" in str(item.type)]
)
def test_a_size_of_a_new_model_is_at_least_one(name: str) -> None:
    assert all(is_refused(name, ScratchArguments, size) for size in (0, -1))


def test_the_losses_of_a_new_models_router_are_not_paid_back() -> None:
    assert all(is_refused(f"router_{name}_loss_coef", ScratchArguments, -1.0) for name in ("z", "aux"))


@pytest.mark.parametrize(("name", "value"), HALF_PRECISION)
def test_a_precision_that_the_machine_emulates_is_refused(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for machine, gpu in (("fp32", None), ("fp16", "cuda"), ("bf16", "cuda")):
        monkeypatch.setattr(hardware, "accelerator", lambda gpu=gpu: gpu)
        monkeypatch.setattr(hardware, "precision", lambda machine=machine: hardware.Choice(machine, "because"))
        refused = [problem.field for problem in check_supported({name: value})]
        # A GPU without bfloat16 casts what is stored in it to fp16, and multiplies in that.
        native = gpu if HALF_PRECISION[name, value] == "fp16" or name == "frozen_dtype" else machine == "bf16"
        assert refused == ([] if native else [name])
    monkeypatch.setattr(hardware, "precision", lambda: hardware.Choice("fp16", "because"))
    assert check_supported({"frozen_dtype": "bfloat16", "fp16": False})


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_generations": 1}, "num_generations"),
        ({"per_device_train_batch_size": 2}, "num_generations"),
        ({"data_seed": 3}, "data_seed"),
        ({"top_p": 0.9}, "top_p"),
        ({}, ""),
    ],
)
def test_another_method_that_samples_is_checked_as_grpo_is(values: dict[str, Any], field: str, tmp_path: Path) -> None:
    # Each of the two processes has half of a group of 8, if its batch is 4.
    valid = {"per_device_train_batch_size": 4, "num_generations": 8, "report_to": "none"}
    values = {"output_dir": str(tmp_path / "run"), **valid, **values}
    built, problems = check_values(values, [RLOOConfig], processes=2)
    problems += [problem for args in built for problem in preflight(args, early=True)]
    assert [problem.field for problem in problems] == ([field] if field else [])
