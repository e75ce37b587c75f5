"""Batched generation: completions of many prompts in few forward passes.

This is a loop over `model(..., cache=...)`, because `model.generate` keeps finished rows in the batch until the slowest
is done, encodes a prompt again for each of its samples, and runs a chain of logits processors at each step. Greedy
output equals that of `model.generate` for each prompt alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, MinPLogitsWarper, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.tokenizer import as_text, special_tokens

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Completion:
    """One generated completion.

    Attributes:
        text: Decoded without special tokens, with white space at both ends removed.
        tokens: Generated ids, including the end-of-turn token if the model generated one.
        stopped: Whether the model ended its turn within the limit.
    """

    text: str
    tokens: list[int]
    stopped: bool


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages]) -> list[list[int]]:
    """Return the token ids of each conversation, followed by the generation prompt."""
    tokens = special_tokens(tokenizer)
    return [
        tokenizer.apply_chat_template(as_text(prompt, tokens), add_generation_prompt=True, return_dict=False)
        for prompt in prompts
    ]


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
    batch_size: int = 256,
) -> list[list[Completion]]:
    """Complete each prompt `samples` times.

    Prompts are sorted by length, so that batches contain little padding, and padded on the left. The same arguments on
    the same machine give the same result.

    Args:
        model: A causal language model, on its device and in its dtype.
        tokenizer: Its tokenizer; `eos_token_id` ends a completion.
        prompts: Token ids, at least one each.
        max_new_tokens: Length at which completions are cut off.
        samples: Completions per prompt; more than one makes sense only with a temperature.
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        min_p: Never sample tokens less probable than this share of the most probable one (Nguyen et al. 2024).
        seed: Seed of the sampling.
        batch_size: Sequences in a batch (prompts times samples).

    Returns:
        `samples` completions for each prompt, in the order of `prompts`.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generator = torch.Generator(device=model.device).manual_seed(seed)
    completions: list[list[Completion]] = [[] for _ in prompts]
    rows = max(1, batch_size // samples)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        batch = [prompts[i] for i in chosen]
        tokens = _generate_batch(model, tokenizer, batch, max_new_tokens, samples, temperature, min_p, generator)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for row, (ids, text) in enumerate(zip(tokens, texts, strict=True)):
            completion = Completion(text.strip(), ids, stopped(ids, tokenizer.eos_token_id))
            completions[chosen[row // samples]].append(completion)
    return completions


@torch.inference_mode()
def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    samples: int,
    temperature: float,
    min_p: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Generate ids, returned without padding; the `samples` sequences of one prompt are adjacent."""
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits = model(**inputs, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        positions = positions.repeat_interleave(samples, 0)
    position = positions[:, -1:]

    sequences: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    active = list(range(len(sequences)))  # index of the sequence in each row of the batch
    finished = torch.zeros(len(active), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token = _next_token(logits, temperature, min_p, generator)
        for sequence, done, value in zip(active, finished.tolist(), token.tolist(), strict=True):
            if not done:
                sequences[sequence].append(value)
        finished |= token == tokenizer.eos_token_id
        if step == max_new_tokens - 1 or bool(finished.all()):
            break
        # Dropping rows copies the cache, which pays once an eighth of the batch has finished.
        if int(finished.sum()) * 8 >= len(active):
            keep = (~finished).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            token, mask, position, finished = token[keep], mask[keep], position[keep], finished[keep]
            active = [active[row] for row in keep.tolist()]
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        inputs = {"input_ids": token[:, None], "attention_mask": mask, "position_ids": position}
        logits = model(**inputs, cache=cache, use_cache=True).logits[:, -1]
    return sequences


def _next_token(logits: torch.Tensor, temperature: float, min_p: float, generator: torch.Generator) -> torch.Tensor:
    """Choose ids, shape (rows,), from `logits` of shape (rows, vocabulary)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if min_p > 0:
        logits = MinPLogitsWarper(min_p)(None, logits)
    cumulative = torch.softmax(logits, dim=-1).cumsum(-1)
    # Inverse transform sampling: one random number per row, where `torch.multinomial` draws one per token.
    draw = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, draw, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def stopped(tokens: Iterable[int], eos_token_id: int | Collection[int]) -> bool:
    """Return whether generated token ids contain an end-of-turn token; padding after it does not matter."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    return not ends.isdisjoint(tokens)
