"""The sampler draws from the distribution that the model defines, and from the one that `model.generate` draws from."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoConfig,
    PreTrainedModel,
)

from pipeline.models.kernels.sampler import sample, unsupported_settings
from tests.helpers import ppo_toy as toy

ROWS, LENGTH, END = 6000, 3, 2
PROMPTS = [[5, 6, 7, 8, 5], [9], [10, 11]]
SIZES: dict[str, Any] = {"vocab_size": 15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
ARCHITECTURES = {
    "llama": toy.llama_config(),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SIZES),
    "distances in place of positions": BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SIZES),
    "masks of its own": GPTNeoConfig(
        hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=3, **SIZES
    ),
    "sliding windows": Gemma3TextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"], **SIZES,
    ),
}  # fmt: skip


def model(architecture: str = "llama") -> PreTrainedModel:
    """Build a model whose next token depends much on those before it, and that often ends its turn."""
    torch.manual_seed(3)
    network = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.35)
    return network


def settings(**changes: Any) -> GenerationConfig:
    defaults = {"max_new_tokens": LENGTH, "do_sample": True, "top_k": 0, "eos_token_id": END, "pad_token_id": 0}
    return GenerationConfig(**(defaults | changes))


def sampled(network: PreTrainedModel, config: GenerationConfig, prompts: list[list[int]]) -> Counter[Any]:
    torch.manual_seed(11)
    return Counter(map(tuple, sample(network, prompts, config)))


def generated(network: PreTrainedModel, config: GenerationConfig, prompt: list[int]) -> Counter[Any]:
    torch.manual_seed(12)
    ids = torch.tensor([prompt] * ROWS)
    rows = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[:, len(prompt) :]
    return Counter(tuple(row[: row.index(END) + 1] if END in row else row) for row in rows.tolist())


def excess(first: Counter[Any], second: Counter[Any]) -> float:
    """Return by how many of its standard deviations chi-squared of two samples is above its mean."""
    common = [key for key in first | second if first[key] + second[key] >= 10]
    rare = sum(first.values()) - sum(first[key] for key in common)
    remaining = sum(second.values()) - sum(second[key] for key in common)
    pairs = [*((first[key], second[key]) for key in common), *([(rare, remaining)] if rare + remaining else [])]
    chi_squared = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    degrees = len(pairs) - 1
    return (chi_squared - degrees) / (2 * max(degrees, 1)) ** 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sequences_are_as_probable_as_a_forward_pass_says(architecture: str) -> None:
    """Also beside prompts of other lengths, and after other rows have finished."""
    network = model(architecture)
    torch.manual_seed(5)
    prompts = [prompt for prompt in PROMPTS for _ in range(ROWS)]
    completions = sample(network, prompts, settings())
    for number, prompt in enumerate(PROMPTS):
        counts = Counter(map(tuple, completions[number * ROWS : (number + 1) * ROWS]))
        assert len({len(row) for row in counts}) == LENGTH
        expected = {}
        for length in {len(row) for row in counts}:
            rows = [row for row in counts if len(row) == length]
            ids = torch.tensor([[*prompt, *row] for row in rows])
            with torch.no_grad():
                logs = network(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
            chances = logs.gather(2, ids[:, len(prompt) :, None]).sum((1, 2)).exp()
            expected |= dict(zip(rows, (ROWS * chances).tolist(), strict=True))
        common = [row for row in counts if expected[row] >= 5]
        chi_squared = sum((counts[row] - expected[row]) ** 2 / expected[row] for row in common)
        assert len(common) > 20
        assert (chi_squared - len(common)) / (2 * len(common)) ** 0.5 < 4


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 2.0},
        {"suppress_tokens": [7, 8, 9]},
        {"eos_token_id": [END, 9]},
        {"temperature": 2.0, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
        {"do_sample": False, "repetition_penalty": 3.0},
    ],
    ids=str,
)
def test_each_setting_gives_the_distribution_of_generate(changes: dict[str, Any]) -> None:
    network, prompt = model(), PROMPTS[0]
    config = settings(**changes)
    assert not unsupported_settings(config)
    ours = sampled(network, config, [prompt] * ROWS)
    theirs = generated(network, config, prompt)
    if changes.get("eos_token_id"):
        theirs = Counter()
        for row, count in generated(network, config, prompt).items():
            theirs[row[: row.index(9) + 1] if 9 in row else row] += count
    assert excess(ours, theirs) < 4
    assert excess(sampled(network, settings(), [prompt] * ROWS), theirs) > 20, "the setting changes nothing here"


def test_what_the_sampler_does_not_honour_is_named() -> None:
    assert unsupported_settings(settings(num_beams=2, no_repeat_ngram_size=0)) == {"num_beams": 2}
    assert unsupported_settings(settings(stop_strings=["a"])) == {"stop_strings": ["a"]}
    config = model().generation_config
    assert config._from_model_config and not unsupported_settings(config), (
        "a model saved without generation_config.json"
    )


def test_samples_of_one_prompt_differ_and_repeat_with_the_random_state() -> None:
    network = model()
    first, again = (sampled(network, settings(), [PROMPTS[1]] * 50) for _ in range(2))
    assert len(first) > 20
    assert first == again


def test_a_long_completion_outgrows_the_room_that_the_cache_starts_with() -> None:
    network = model()
    greedy = settings(do_sample=False, max_new_tokens=150, eos_token_id=None)
    network.generation_config.eos_token_id = None
    for prompt, completion in zip(PROMPTS, sample(network, PROMPTS, greedy), strict=True):
        whole = network.generate(torch.tensor([prompt]), generation_config=greedy)[0]
        assert completion == whole[len(prompt) :].tolist()
        assert len(set(completion)) > 1
