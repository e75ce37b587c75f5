"""Completions of conversations by a chat model, with the sampler of `pipeline.models.kernels.sampler`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.files import as_list
from pipeline.models.kernels.sampler import batches, sample
from pipeline.models.tokenizer import escape_tokens, special_tokens

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
    """Return the token ids of each conversation, followed by the generation prompt.

    Args:
        tokenizer: A tokenizer with a chat template.
        prompts: Conversations. Special tokens in their texts are broken by a space.
        template: Further arguments of the chat template, `chat_template_kwargs` in YAML files.
    """
    tokens = special_tokens(tokenizer)
    options = dict(template or {})
    return [
        tokenizer.apply_chat_template(
            escape_tokens(prompt, tokens), add_generation_prompt=True, return_dict=False, **options
        )
        for prompt in prompts
    ]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the eos tokens of the tokenizer and of generation_config.json.

    Chat models often have two such tokens, for the end of a turn and of a document.
    """
    ids = {*as_list(tokenizer.eos_token_id), *as_list(model.generation_config.eos_token_id)}
    return sorted(ids - {None})


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
        samples: Completions of each prompt. More than one makes sense only with a temperature.
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        min_p: Never sample tokens less probable than this share of the most probable one (Nguyen et al. 2024).
        seed: Seed of the sampling.
        batch_size: Maximum number of sequences in a batch (prompts times samples). Default: see `batches`.
        on_batch: Called with the number of sequences of each finished batch.

    Returns:
        `samples` completions of each prompt, in the order of `prompts`.
    """
    model.eval()
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, do_sample=temperature > 0)
    if config.do_sample:
        config.update(temperature=temperature, min_p=min_p or None)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    completions: list[list[Completion]] = [[] for _ in prompts]
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in batches(lengths, model.device, samples, batch_size):
        # The number of the prompt of each row: each prompt `samples` times.
        rows = [number for number in batch for _ in range(samples)]
        tokens = sample(model, [prompts[number] for number in rows], config, generator)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for number, ids, text in zip(rows, tokens, texts, strict=True):
            stopped = not set(ends).isdisjoint(ids)
            completions[number].append(Completion(text.strip(), ids, stopped))
        on_batch(len(rows))
    return completions
