"""A world so small that PPO takes a second: ten words, and models of a few thousand parameters."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.models.scratch import ScratchArguments, build_model
from pipeline.rl.ppo import PPOConfig
from tests.helpers.word_model import word_model_config, word_tokenizer

WORDS = ["red", "green", "blue", "one", "two", "three", "yes", "no", "hello", "why"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    return word_tokenizer(WORDS)


def llama_config(**changes: Any) -> LlamaConfig:
    """Two layers of width 16."""
    return word_model_config(WORDS, **changes)


def policy(seed: int = 0) -> LlamaForCausalLM:
    """A random causal language model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config())


def reward_model(seed: int = 1) -> LlamaForSequenceClassification:
    """A random sequence classifier with one label."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(num_labels=1))


def policy_of_experts(seed: int = 0) -> PreTrainedModel:
    """A random Llama 4, whose second layer has four experts."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    args = ScratchArguments(model_type="llama4_text", max_position_embeddings=64, initializer_range=0.1, **sizes)
    return build_model(args, tokenizer(), seed)


def reward_model_of_experts(seed: int = 1) -> PreTrainedModel:
    """A random sequence classifier with one label, of the same kind."""
    torch.manual_seed(seed)
    config = policy_of_experts(seed).config
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)


def end_detector() -> LlamaForSequenceClassification:
    """A reward model that gives 1 to texts whose last token is the end of turn, and 0 to others."""
    model = reward_model()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            # What remains is the embedding of the token, scaled to a root mean square of 1.
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(15, 16))
        model.score.weight.zero_()
        model.score.weight[0, tokenizer().eos_token_id] = 16**-0.5
    return model


def prompts(rows: int = 16) -> Dataset:
    """Questions of one to three words, so that padding matters."""
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": " ".join(WORDS[: 1 + i % 3])}], "row": i} for i in range(rows)]
    )


def share_of_red(completions: list[Any], **kwargs: Any) -> list[float]:
    """Reward: how much of the answer is "red"."""
    texts = [completion[0]["content"].split() for completion in completions]
    return [text.count("red") / max(len(text), 1) for text in texts]


def its_text(completions: list[Any], **kwargs: Any) -> list[Any]:
    """Return text instead of numbers."""
    return [completion[0]["content"] for completion in completions]


def always_fails(completions: list[Any], **kwargs: Any) -> list[float]:
    """Raise an exception whatever the completion."""
    raise LookupError("an index is missing")


def infinite(completions: list[Any], **kwargs: Any) -> list[float]:
    """Return infinite rewards."""
    return [float("inf")] * len(completions)


def not_a_number(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward function that divides nothing by nothing."""
    return [float("nan")] * len(completions)


async def not_a_number_later(completions: list[Any], **kwargs: Any) -> list[float]:
    """The same, asynchronous."""
    return not_a_number(completions)


def only_one(completions: list[Any], **kwargs: Any) -> list[float]:
    """Return a single reward, however many completions there are."""
    return [1.0]


async def fails_later(completions: list[Any], **kwargs: Any) -> list[float]:
    """Raise an exception once it is awaited."""
    raise LookupError("an index is missing")


def rounding_errors(head: nn.Module) -> list[float]:
    """Return a list to which every product of the linear layers in a module adds how far it is from exact."""
    errors: list[float] = []

    def compare(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        exact = nn.functional.linear(inputs[0].double(), layer.weight.double())
        errors.append((output - exact).abs().max().item())

    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(compare)
    return errors


def config(output_dir: Any, **changes: Any) -> PPOConfig:
    """One CPU process, fp32, everything logged at each step."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "num_iterations": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "disable_tqdm": True,
    }
    return PPOConfig(str(output_dir), **(defaults | changes))
