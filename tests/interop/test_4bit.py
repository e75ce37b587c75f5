"""QLoRA: adapters on a base model with 4 bits, in every recipe that loads a model."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from trl import ModelConfig, SFTConfig

from pipeline.__main__ import main
from pipeline.models.kernels.quantized import prepare_for_training, quantization_config, quantized_layers
from pipeline.models.loading import load_model
from tests.helpers import ppo_toy as toy
from tests.helpers.sampling_recipes import run, write_config
from tests.helpers.small_model import equal, run_recipe, save_model
from tests.rl.test_value_model import estimate_at_the_end, reward_of, trainer

pytest.importorskip("bitsandbytes")

QLORA = {"load_in_4bit": True, "use_peft": True, "lora_target_modules": "all-linear"}
IDS = torch.arange(10, 30)[None]
SAMPLING = ("ppo", "grpo")


def train(recipe: str, inputs: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe with `QLORA`, in float32, for 8 steps with a checkpoint every 2 steps."""
    arguments = ["--bf16", "false", "--output_dir", str(output), *more]
    if recipe in SAMPLING:
        inputs.mkdir(exist_ok=True)
        steps = {"max_steps": 8, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
        return run(f"recipes.{recipe}", *write_config(recipe, inputs, **QLORA, **steps), *arguments)
    options: list[str] = []
    for name, value in QLORA.items():
        options += [f"--{name}", str(value)]
    return run_recipe(recipe, inputs, *options, *arguments)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a saved adapter, and those of PPO's critic."""
    weights = load_file(folder / "adapter_model.safetensors")
    if (folder / "value_model").is_dir():
        for name, weight in load_file(folder / "value_model" / "adapter_model.safetensors").items():
            weights[f"value_model.{name}"] = weight
    return weights


def base_in_4_bits(folder: Path) -> PreTrainedModel:
    model = save_model(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype="float32", device_map=None)


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "kto", "ppo", "grpo"])
def test_a_run_trains_resumes_exactly_and_is_not_changed_by_evaluations(tmp_path: Path, recipe: str) -> None:
    whole = tmp_path / "whole"
    result = train(recipe, tmp_path / "inputs", whole)
    assert result.returncode == 0, result.stderr
    assert "4 bits (nf4), computing in float32" in result.stdout + result.stderr
    trained = adapter_of(whole)
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    assert any(weight.abs().max() > 0 for name, weight in trained.items() if "lora_B" in name), "B begins as zeros"

    # As if the run had been killed after the checkpoint of step 6.
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    shutil.copy(whole / "arguments.json", resumed)
    result = train(recipe, tmp_path / "inputs", resumed)
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stdout + result.stderr
    assert equal(adapter_of(resumed), trained)

    unmeasured = tmp_path / "unmeasured"
    result = train(recipe, tmp_path / "inputs", unmeasured, "--eval_strategy", "no")
    assert result.returncode == 0, result.stderr
    if recipe in SAMPLING:
        assert equal(adapter_of(unmeasured), trained)


def test_gradients_are_the_same_after_an_evaluation(tmp_path: Path) -> None:
    """On processors with AVX512-BF16, bitsandbytes repacks layers that run in `eval()` mode."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base_in_4_bits(tmp_path), lora)
    prepare_for_training(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    first = gradients()
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    assert equal(gradients(), first)


def test_gradients_are_those_of_the_same_numbers_in_32_bits(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    quantized = base_in_4_bits(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    for name, layer in quantized_layers(quantized).items():
        plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    gradients = []
    for model in (quantized, plain):
        torch.manual_seed(0)
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, lora)
        prepare_for_training(adapted)
        adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_layers_compute_in_the_precision_of_training(tmp_path: Path, bf16: bool, dtype: torch.dtype) -> None:
    """TRL would take `dtype`, and "auto" is no dtype to compute in."""
    model_args = ModelConfig(load_in_4bit=True, use_peft=True, dtype="auto")
    training_args = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    training_args.bf16 = bf16
    config = quantization_config(model_args, training_args)
    assert config is not None and config.bnb_4bit_compute_dtype == dtype


def test_a_stage_that_starts_from_an_adapter_saves_the_base_of_its_own(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    first = tmp_path / "first"
    second = tmp_path / "second"
    assert train("sft", inputs, first).returncode == 0
    result = train("dpo", inputs, second, "--model_name_or_path", str(first))
    assert result.returncode == 0, result.stderr
    base = json.loads((second / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    assert Path(base) == second / "base"
    # Nothing of the error of 4 bits is in it.
    merged, _ = load_model(str(first), "model_name_or_path")
    torch.testing.assert_close(load_model(base, "model_name_or_path")[0].state_dict(), merged.state_dict())
    assert load_model(str(second), "model_name_or_path")[0].dtype == torch.float32


def quantized_bytes(*networks: torch.nn.Module) -> int:
    """Return the memory of the layers with 4 bits in some models, which may be the same layers."""
    weights: dict[int, int] = {}
    for network in networks:
        for layer in quantized_layers(network).values():
            weights[layer.weight.data_ptr()] = layer.weight.nbytes
    return sum(weights.values())


def build_ppo(folder: Path, rewards: list[Any]) -> Any:
    model = toy.policy()
    model.save_pretrained(folder / "policy")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    return trainer(
        folder,
        rewards,
        {"kl_coef": 0.1},
        model=str(folder / "policy"),
        peft_config=lora,
        quantization_config=config,
    )


def test_policy_reference_and_critic_share_one_base(tmp_path: Path) -> None:
    ppo = build_ppo(tmp_path, [toy.share_of_red])
    assert ppo.ref_model is None, "the reference is the policy without its adapter"
    alone = quantized_bytes(ppo.model)
    assert alone > 0 and quantized_bytes(ppo.model, ppo.value_model) == alone
    assert quantized_bytes(ppo.value_model) == alone
    assert isinstance(ppo.value_model, PeftModel)
    assert estimate_at_the_end(ppo.value_model) == 0.0
    ppo.train()
    assert estimate_at_the_end(ppo.value_model) != 0.0


def test_a_critic_from_a_reward_model_starts_with_its_reward(tmp_path: Path) -> None:
    judge = toy.reward_model()
    ppo = build_ppo(tmp_path, [judge])
    assert estimate_at_the_end(ppo.value_model) == pytest.approx(reward_of(judge), abs=1e-5)
    ppo.train()


def test_a_plan_counts_layers_with_4_bits_once_for_policy_and_critic(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "recipes/pocket", "--gpu", "h100", "--json", "--use_peft", "true", "--load_in_4bit", "true"]
    assert main([*command, "--embedding_learning_rate", "null"]) == 0
    stage = json.loads(capsys.readouterr().out)["stages"]["3_ppo"]
    parameters = stage["parameters"]
    # Four layers, each with four matrices of attention and three of the feed-forward network.
    in_layers = 4 * (4 * 128 * 128 + 3 * 128 * 384)
    # The reward model, embeddings and norms are in bf16; 4.5 bits are 4 and a share of the scale of 64 weights.
    expected = 2 * parameters + 4.5 / 8 * in_layers + 2 * (parameters - in_layers)
    assert stage["memory_bytes"]["frozen"] == pytest.approx(expected, rel=0.001)
