"""PPO trains policies of other architectures than Llama, resumes them exactly, and loads their critics again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    TrainingArguments,
)

from pipeline.rl.ppo import PPOTrainer
from pipeline.training.reliable import Reliable
from tests.helpers import ppo_toy as toy

TOKENS: dict[str, Any] = {"vocab_size": 15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {**TOKENS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT = {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2 (absolute positions, dropout)": GPT2Config(**GPT),
    "gptj (a body that is not called model, without a token classifier)": GPTJConfig(**GPT, rotary_dim=4),
    "gpt_neox (a head that is renamed)": GPTNeoXConfig(**SIZES),
    "mixtral (experts that are renamed)": MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1
    ),
    "gemma3 (a configuration within another)": Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
}


def model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def trainer(output_dir: Path, policy: PreTrainedModel, value_model: Any = None, **options: Any) -> PPOTrainer:
    own = {name: options.pop(name) for name in ("peft_config", "value_use_peft") if name in options}
    args = toy.config(output_dir, num_iterations=2, save_strategy="steps", save_steps=1, learning_rate=1e-2, **options)
    return PPOTrainer(
        policy,
        toy.share_of_red,
        args,
        toy.prompts(),
        processing_class=toy.tokenizer(),
        eval_dataset=toy.prompts(4) if "eval_strategy" in options else None,
        value_model=value_model,
        **own,
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_trains_resumes_exactly_and_loads(kind: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", model(CONFIGS[kind]))
    whole.train()
    ratios = [entry["val/ratio"] for entry in whole.state.log_history if "val/ratio" in entry]
    assert [ratios[step] for step in (0, 2)] == pytest.approx([1.0, 1.0], abs=1e-4), "just after sampling"
    assert not torch.equal(weights(whole.model), weights(model(CONFIGS[kind])))

    resumed = trainer(tmp_path / "resumed", model(CONFIGS[kind]))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert torch.equal(weights(whole.value_model), weights(resumed.value_model))

    whole.save_model(str(tmp_path / "saved"))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again = trainer(tmp_path / "again", policy, value_model=str(tmp_path / "saved" / "value_model"))
    assert torch.equal(weights(whole.model), weights(again.model))
    assert torch.equal(weights(whole.value_model), weights(again.value_model))


def test_the_best_model_is_loaded_whole(tmp_path: Path) -> None:
    config = CONFIGS["mixtral (experts that are renamed)"]
    best = {"load_best_model_at_end": True, "metric_for_best_model": "objective/scores", "greater_is_better": False}
    ppo = trainer(tmp_path, model(config), eval_strategy="steps", eval_steps=1, **best)
    ppo.train()
    expected = AutoModelForCausalLM.from_pretrained(ppo.state.best_model_checkpoint)
    assert torch.equal(weights(ppo.model), weights(expected))


def test_any_trainer_resumes_renamed_weights(tmp_path: Path) -> None:
    def train(folder: Path, checkpoint: Path | None = None) -> torch.Tensor:
        rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)} for _ in range(8)]
        options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "use_cpu": True, "report_to": "none"}
        network = model(CONFIGS["mixtral (experts that are renamed)"])
        plain = Reliable(network, TrainingArguments(str(folder), **options), train_dataset=rows)
        plain.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return weights(plain.model)

    whole = train(tmp_path / "whole")
    assert torch.equal(whole, train(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [5, 6]}], ids=str
)
def test_adapted_embeddings_of_a_policy_are_merged_into_the_critic(tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    ppo = trainer(tmp_path, toy.policy(), peft_config=adapter, value_use_peft=False)
    body = weights(toy.policy().model)
    assert torch.equal(weights(ppo.value_model.model), body)
    ppo.train()
    assert not torch.equal(weights(ppo.value_model.model), body)
