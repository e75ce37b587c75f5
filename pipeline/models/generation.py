"""Completions of conversations by a chat model, with the sampler of `pipeline.models.kernels.sampler`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.files import as_list
from pipeline.models.kernels.sampler import batches, sample
from pipeline.models.tokenizer import as_text, special_tokens

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Completion:
    """A completion; `stopped` says that the model ended its turn within the limit."""

    # Decoded without special tokens, with white space at both ends removed.
    text: str
    # Generated ids, including the end-of-turn token if the model generated one.
    tokens: list[int]
    stopped: bool
    # The turns of a dialogue with tools, whose last message is the text; () if there are no tools.
    messages: Sequence[dict[str, Any]] = ()
    # The environment that the dialogue was with, if any.
    environment: Any = field(default=None, compare=False)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], template: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Return the token ids of each conversation with the generation prompt; `template` has `chat_template_kwargs`."""
    tokens, options = special_tokens(tokenizer), dict(template or {})
    return [
        tokenizer.apply_chat_template(as_text(prompt, tokens), add_generation_prompt=True, return_dict=False, **options)
        for prompt in prompts
    ]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the eos tokens of the tokenizer and of generation_config.json.

    Chat models often end a turn with a different token than a document.
    """
    return sorted({*as_list(tokenizer.eos_token_id), *as_list(model.generation_config.eos_token_id)} - {None})


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    min_p: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda answers: None,
) -> list[list[Completion]]:
    """Complete each prompt `samples` times. The same arguments on the same machine give the same result.

    Args:
        model: A causal language model, on its device and in its dtype.
        tokenizer: Its tokenizer; see `end_tokens` for what ends a completion.
        prompts: Token ids, at least one each.
        max_new_tokens: Maximum length of a completion.
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        min_p: Never sample tokens less probable than this share of the most probable one (Nguyen et al. 2024).
        batch_size: Most sequences in a batch (prompts times samples). Default: as `batches` has it.
        on_batch: Called with the size of each finished batch.
    """
    model.eval()
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, do_sample=temperature > 0)
    if config.do_sample:
        config.update(temperature=temperature, min_p=min_p or None)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    completions: list[list[Completion]] = [[] for _ in prompts]
    for batch in batches([len(prompt) + max_new_tokens for prompt in prompts], model.device, samples, batch_size):
        chosen = [i for i in batch for _ in range(samples)]
        tokens = sample(model, [prompts[i] for i in chosen], config, generator)
        for i, ids, text in zip(chosen, tokens, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            completions[i].append(Completion(text.strip(), ids, not set(ends).isdisjoint(ids)))
        on_batch(len(chosen))
    return completions
