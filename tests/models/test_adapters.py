"""A stage may start from an adapter: it trains on the two merged, and what it saves loads as one."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, ModelConfig, RewardConfig, SFTConfig
from trl import SFTTrainer as TRLSFTTrainer
from trl.trainer.utils import create_model_from_path

from pipeline import hardware
from pipeline.models.adapters import starting_model
from pipeline.rl.grpo import GRPOTrainer
from pipeline.training.reliable import Reliable
from pipeline.training.train import train_and_save
from tests.helpers.small_model import conversation, save_model, tokenizer

IDS = torch.arange(10, 30)[None]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


class SFTTrainer(Reliable, TRLSFTTrainer):
    """TRL's `SFTTrainer` as the recipes use it, without their kernels."""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Save a base model and an adapter whose weights are not zero, and return the adapter's folder."""
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, **more}


def test_training_starts_from_the_adapter_merged_into_its_base(adapter: Path, tmp_path: Path) -> None:
    args = SFTConfig(**options(tmp_path / "run"))
    name = str(adapter.parent / "model")
    assert starting_model(ModelConfig(model_name_or_path=name), args) == name, "TRL loads a model itself"
    assert args.model_init_kwargs is not None
    args = SFTConfig(**options(tmp_path / "run"))
    model = starting_model(ModelConfig(model_name_or_path=str(adapter)), args)
    assert isinstance(model, PreTrainedModel) and not isinstance(model, PeftModel)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(name)), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [None, "auto"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_training_never_multiplies_in_the_dtype_of_the_file_if_the_machine_emulates_it(
    adapter: Path, tmp_path: Path, dtype: str | None, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter.parent / "model"
    AutoModelForCausalLM.from_pretrained(folder).to(stored).save_pretrained(folder)
    for machine in ("bf16", "fp32"):
        monkeypatch.setattr(hardware, "accelerator", lambda: None)
        monkeypatch.setattr(hardware, "precision", lambda machine=machine: hardware.Choice(machine, ""))
        native = stored == torch.bfloat16 and machine == "bf16"
        for name in (folder, adapter):
            args = SFTConfig(**options(tmp_path / "run"))
            model = starting_model(ModelConfig(model_name_or_path=str(name), dtype=dtype), args)
            if isinstance(model, str):
                model = create_model_from_path(model, **args.model_init_kwargs)
            assert model.dtype == (stored if native else torch.float32), (machine, name)


def test_a_reward_model_starts_from_the_adapter_of_a_language_model(adapter: Path, tmp_path: Path) -> None:
    models = [
        starting_model(
            ModelConfig(model_name_or_path=str(adapter)), RewardConfig(**options(tmp_path / "run", max_length=64))
        )
        for _ in range(2)
    ]
    merged = starting_model(ModelConfig(model_name_or_path=str(adapter)), SFTConfig(**options(tmp_path / "run")))
    for name, weight in merged.model.state_dict().items():
        assert torch.equal(weight, models[0].model.state_dict()[name]), name
    assert models[0].config.num_labels == 1
    assert torch.equal(models[0].score.weight, models[1].score.weight), "a resumed run draws the same head"


def train(adapter: Path, folder: Path, lora: bool) -> SFTTrainer:
    """Train two steps from an adapter."""
    args = SFTConfig(**options(folder, max_length=64, learning_rate=1e-2, max_steps=2, save_steps=1))
    trainer = SFTTrainer(
        starting_model(ModelConfig(model_name_or_path=str(adapter)), args),
        args,
        train_dataset=Dataset.from_dict({"messages": [conversation(f"What is {i}?", "Four.") for i in range(16)]}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if lora else None,
    )
    torch.testing.assert_close(
        logits(trainer.model), logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), **TOLERANCE
    )
    train_and_save(trainer)
    return trainer


@pytest.mark.parametrize("lora", [True, False])
def test_what_is_saved_loads_as_what_was_trained_and_a_resumed_run_ends_the_same(
    adapter: Path, tmp_path: Path, lora: bool
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained = logits(train(adapter, whole, lora).model)
    assert not torch.allclose(trained, logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), atol=1e-4)
    auto = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    for folder in (whole, whole / "checkpoint-2"):
        torch.testing.assert_close(logits(auto.from_pretrained(folder)), trained, **TOLERANCE)

    # Without its other checkpoints, the run looks as if it was killed after one step.
    shutil.copytree(whole / "checkpoint-1", parts / "checkpoint-1")
    train(adapter, parts, lora)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()


def in_bfloat16(tmp_path: Path, name: str, adapter: PeftConfig | None = None) -> tuple[SFTTrainer, list[int]]:
    """Train two steps, with LoRA by default, and return also whether each layer casts its inputs."""
    args = SFTConfig(**options(tmp_path / name, bf16=True, max_length=64, learning_rate=1e-2, max_steps=2))
    trainer = SFTTrainer(
        save_model(tmp_path / "model"),
        args,
        train_dataset=Dataset.from_dict({"messages": [conversation(f"What is {i}?", "Four.") for i in range(16)]}),
        processing_class=tokenizer(),
        peft_config=adapter
        or LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=["lm_head"]),
    )
    casts: list[int] = []
    for layer in trainer.model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.register_forward_pre_hook(
                lambda layer, _: casts.append(int(getattr(layer, "cast_input_dtype_enabled", True)))
            )
    train_and_save(trainer)
    return trainer, casts


def test_under_autocast_frozen_weights_take_half_the_memory_and_inputs_are_not_cast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, casts = in_bfloat16(tmp_path, "run")
    assert casts and not any(casts)
    kinds = {weight.requires_grad: set() for weight in trainer.model.parameters()}
    for name, weight in trainer.model.named_parameters():
        if "original_module" not in name:
            kinds[weight.requires_grad].add(weight.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}

    monkeypatch.setattr("pipeline.training.reliable.disable_input_dtype_casting", lambda *_, **__: nullcontext())
    other, casts = in_bfloat16(tmp_path, "other")
    assert casts and all(casts)
    weights = other.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(target_modules=["q_proj"], use_dora=True),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        VeraConfig(target_modules=["q_proj"]),
        LoKrConfig(target_modules=["q_proj"]),
    ],
    ids=["DoRA", "IA3", "VeRA", "LoKr"],
)
def test_other_adapters_train_under_autocast(tmp_path: Path, adapter: PeftConfig) -> None:
    adapter.task_type = "CAUSAL_LM"
    trainer, _ = in_bfloat16(tmp_path, "run", adapter)
    assert trainer.state.global_step == 2


def grpo_trainer(adapter: Path, folder: Path, peft_config: LoraConfig | None = None, **more: Any) -> GRPOTrainer:
    """Return a trainer that starts from an adapter, on one prompt."""
    batch = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    args = GRPOConfig(**options(folder, **batch, **more))
    return GRPOTrainer(
        model=starting_model(ModelConfig(model_name_or_path=str(adapter)), args),
        reward_funcs=lambda completions, **_: [float(len(text[0]["content"])) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [conversation("What?", "")[:1]] * 8}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def test_the_reference_of_grpo_is_the_merged_model(adapter: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(adapter, tmp_path / "run", beta=0.1, sync_ref_model=True)
    assert trainer.beta == trainer.args.beta == 0.1 and trainer.args.sync_ref_model
    for reference, trained in zip(trainer.ref_model.parameters(), trainer.model.parameters(), strict=True):
        assert reference is not trained and torch.equal(reference, trained) and not reference.requires_grad
    trainer.train()
    assert "kl" in trainer.state.log_history[0] or "kl" in trainer._metrics["train"]


@pytest.mark.parametrize("bf16", [False, True])
def test_grpo_keeps_what_it_does_not_train_in_the_precision_of_training(
    adapter: Path, tmp_path: Path, bf16: bool
) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = grpo_trainer(adapter, tmp_path / "run", lora, bf16=bf16)
    trainer.train()
    dtypes = {weight.requires_grad: weight.dtype for weight in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16 if bf16 else torch.float32}
