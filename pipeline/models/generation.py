"""The sampler: completions of many prompts in few forward passes, for evaluation, preferences and rollouts.

This is a loop over `model(..., cache=...)`, because `model.generate` keeps finished rows in the batch until the slowest
is done, encodes a prompt again for each of its samples, copies the cache for each token, and draws a random number for
each token of the vocabulary. Greedy output equals that of `model.generate` for each prompt alone, and samples follow
the same distribution.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from pipeline.models.attention import BLOCKWISE, autocast_dtype
from pipeline.models.tokenizer import as_text, special_tokens

Messages = Sequence[dict[str, str]]

PROCESSORS: dict[str, tuple[Any, Any]] = {
    "repetition_penalty": (RepetitionPenaltyLogitsProcessor, 1.0),
    "suppress_tokens": (SuppressTokensLogitsProcessor, None),
    "temperature": (TemperatureLogitsWarper, 1.0),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, 0.0),
}
"""Settings that change logits, in the order in which `model.generate` applies them, and the value that is neutral."""

ALSO_WHEN_GREEDY = ("repetition_penalty", "suppress_tokens")

OTHER_SETTINGS = (
    "do_sample", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id",
    "disable_compile", "transformers_version", "_from_model_config",
)  # fmt: skip
"""Settings that `sample` honours as well, or that cannot change what it returns."""

GENERATE = GenerationMixin.generate
"""The method that `sample` stands in for."""


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


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], template: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Return the token ids of each conversation, followed by the generation prompt.

    Args:
        tokenizer: A tokenizer with a chat template.
        prompts: Conversations.
        template: Further arguments of the chat template, `chat_template_kwargs`.
    """
    tokens, options = special_tokens(tokenizer), dict(template or {})
    return [
        tokenizer.apply_chat_template(as_text(prompt, tokens), add_generation_prompt=True, return_dict=False, **options)
        for prompt in prompts
    ]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the tokenizer's eos token, and those of the model's generation_config.json.

    Chat models often end a turn with another token than the one that ends a document.
    """
    return sorted({*_listed(tokenizer.eos_token_id), *_listed(model.generation_config.eos_token_id)})


def unsupported_settings(config: GenerationConfig) -> dict[str, Any]:
    """Return the settings, with their values, that `model.generate` honours and `sample` does not."""
    defaults = config._get_default_generation_params()
    known = (*PROCESSORS, *OTHER_SETTINGS)
    saved = {name: value for name, value in config.to_diff_dict().items() if name not in known and value}
    return {name: value for name, value in saved.items() if value != defaults.get(name)}


def overrides_generate(model: nn.Module) -> bool:
    """Return whether a model, wrapped or not, has another `generate` than transformers': its class's or its own."""
    bare = _unwrap(extract_model_from_parallel(model, keep_torch_compile=False))
    own = any("generate" in vars(module) for module in (model, bare))
    return own or getattr(type(bare), "generate", GENERATE) is not GENERATE


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

    Prompts are sorted by length, so that batches contain little padding. The same arguments on the same machine give
    the same result. A model that `overrides_generate` completes them by its own method.

    Args:
        model: A causal language model, on its device and in its dtype.
        tokenizer: Its tokenizer; see `end_tokens` for what ends a completion.
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
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, do_sample=temperature > 0, num_beams=1)
    # A model's own method takes what is unset from its generation_config.json.
    applied = PROCESSORS if config.do_sample else ALSO_WHEN_GREEDY
    config.update(**{name: PROCESSORS[name][1] for name in applied})
    if config.do_sample:
        config.update(temperature=temperature, min_p=min_p)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generator = torch.Generator(device=model.device).manual_seed(seed)
    completions: list[list[Completion]] = [[] for _ in prompts]
    rows = max(1, batch_size // samples)
    draw = _call_generate if overrides_generate(model) else sample
    for start in range(0, len(order), rows):
        chosen = [i for i in order[start : start + rows] for _ in range(samples)]
        tokens = draw(model, [prompts[i] for i in chosen], config, generator)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for i, ids, text in zip(chosen, tokens, texts, strict=True):
            completions[i].append(Completion(text.strip(), ids, stopped(ids, ends)))
    return completions


@torch.inference_mode()
def sample(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Complete each prompt once, all of them in one batch.

    Equal prompts are encoded once. Under autocast, weights are cast for each forward pass unless the caller has entered
    it before: it then keeps a copy of them until the caller leaves it.

    Args:
        model: A causal language model in evaluation mode, on its device.
        prompts: Token ids, at least one each.
        config: `max_new_tokens`, `eos_token_id` (one or several, or None), `do_sample` and the settings of
            `PROCESSORS`. Others have no effect (`unsupported_settings`), and what is unset is off.
        generator: Random numbers, one for each token. Default: the global ones of the model's device.

    Returns:
        The ids of each completion, including the end-of-turn token if the model generated one.
    """
    device, limit = model.device, config.max_new_tokens
    ends = torch.tensor(_listed(config.eos_token_id), dtype=torch.long, device=device)
    process = _processors(config, device)
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    width = max(map(len, distinct))
    # Padded with tokens of its own, a prompt does not teach a repetition penalty anything else.
    ids = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in distinct], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    cache = DynamicCache(config=model.config)
    room = 1
    if _unwrap(model)._can_compile_fullgraph:  # knows caches that have room
        room = GrowingLayer.room
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    accepted = [name for name in ("position_ids", "logits_to_keep") if accepts_argument(model, name)]

    def last_logits(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        inputs = {"input_ids": ids, "attention_mask": mask} | {name: optional[name] for name in accepted}
        logits: Tensor = model(**inputs, cache=cache, use_cache=True).logits[:, -1].float()
        return logits

    logits = last_logits(ids, mask, positions)
    rows = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
    cache.reorder_cache(rows)
    ids, mask, logits, position = ids[rows], pad(mask[rows], (0, limit + room)), logits[rows], positions[rows, -1:]

    completions = torch.zeros(len(prompts), limit, dtype=torch.long, device=device)
    active = torch.arange(len(prompts), device=device)  # which completion each row of the batch belongs to
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with _attention_for_single_tokens(model):
        for step in range(limit):
            if process:
                logits = process(torch.cat([ids[active], completions[active, :step]], dim=1), logits)
            token = _draw(logits, generator) if config.do_sample else logits.argmax(-1)
            completions[active, step] = token
            finished |= torch.isin(token, ends)
            if step == limit - 1 or bool(finished.all()):
                break
            # Dropping rows copies the cache, which pays once an eighth of the batch has finished.
            if int(finished.sum()) * 8 >= len(active):
                kept = (~finished).nonzero()[:, 0]
                cache.reorder_cache(kept)
                active, finished, token, mask, position = (x[kept] for x in (active, finished, token, mask, position))
            position = position + 1
            mask[:, width + step] = 1
            logits = last_logits(token[:, None], mask[:, : round_up(width + step + 1, room)], position)
    return _cut(completions, ends)


@torch.inference_mode()
def _call_generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, generator: torch.Generator
) -> list[list[int]]:
    """Complete each prompt once, in one batch, by the model's own `generate`, which draws global random numbers."""
    device, ends = model.device, _listed(config.eos_token_id)
    config.pad_token_id = ends[0] if ends else 0
    width = max(map(len, prompts))
    ids = torch.tensor([[config.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    seed = int(torch.randint(1 << 62, (), generator=generator, device=device))
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        texts = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return _cut(texts[:, width:], torch.tensor(ends, dtype=torch.long, device=device))


def _cut(completions: Tensor, ends: Tensor) -> list[list[int]]:
    """Return the ids of each completion up to the first of `ends`, inclusive."""
    ended = torch.isin(completions, ends)
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, completions.shape[1]).tolist()
    return [row[:length] for row, length in zip(completions.tolist(), lengths, strict=True)]


def _listed(tokens: int | Sequence[int] | None) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)


def _processors(config: GenerationConfig, device: torch.device) -> LogitsProcessorList:
    """Return what changes the logits."""
    processors = LogitsProcessorList()
    for name, (kind, neutral) in PROCESSORS.items():
        value = getattr(config, name)
        if value is None or value == neutral or not (config.do_sample or name in ALSO_WHEN_GREEDY):
            continue
        on_device = {"device": device} if "device" in inspect.signature(kind).parameters else {}
        processors.append(kind(value, **on_device))
    return processors


def accepts_argument(model: nn.Module, argument: str) -> bool:
    """Return whether the forward method of a model, wrapped or not, has an argument of this name."""
    return argument in inspect.signature(_unwrap(model).forward).parameters


def _unwrap(model: nn.Module) -> Any:
    """Return the model itself, where it is wrapped for several processes or for an adapter."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _attention_for_single_tokens(model: nn.Module) -> Iterator[None]:
    """On a CPU, compute attention by plain products, which are faster than torch's kernel where queries are single."""
    model = _unwrap(model)
    kept = model.config.get_text_config()._attn_implementation
    if model.device.type != "cpu" or kept not in ("sdpa", BLOCKWISE):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(kept)


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample ids, shape (rows,), from `logits` of shape (rows, vocabulary).

    This is inverse transform sampling: one random number per row, where `torch.multinomial` draws one per token. Sums
    are in float64, where the device has it, so that improbable tokens of a large vocabulary are not lost.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = torch.softmax(logits, dim=-1).cumsum(-1, dtype=dtype)
    # Above 0 and at most 1, so that no token of probability 0 is ever the first to reach it.
    share = 1 - torch.rand(len(logits), 1, generator=generator, dtype=dtype, device=logits.device)
    return torch.searchsorted(cumulative, share * cumulative[:, -1:])[:, 0].clamp(max=logits.shape[-1] - 1)


class GrowingLayer(DynamicLayer):
    """The cache of a layer, with room for more tokens, where transformers' copies all of it for each token.

    Attention gets the room as well, whose tokens the mask hides, as in a static cache: kernels that need contiguous
    inputs would otherwise copy the used part for each token.
    """

    keys: Tensor
    values: Tensor

    room = 16
    """Tokens by which the memory grows."""

    length = 0
    """Tokens in use."""

    def get_seq_length(self) -> int:
        """Return the number of tokens in use."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that attention gets together with `query_length` new tokens, and their offset."""
        return (round_up(self.length + query_length, self.room) if self.length else query_length), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind the others; return them with the room, or the first ones alone."""
        # Rotary embeddings leave keys in float32 under autocast, which would cast all of them again for each token.
        new = tuple(x.to(autocast_dtype(x.device, x.dtype)) for x in (key_states, value_states))
        start = self.length
        self.length = stop = start + key_states.shape[-2]
        if start == 0 or stop > self.keys.shape[-2]:
            size = round_up(stop, self.room)
            grown = [states.new_zeros(*states.shape[:-2], size, states.shape[-1]) for states in new]
            if start > 0:
                for memory, states in zip(grown, (self.keys, self.values), strict=True):
                    memory[..., :start, :] = states[..., :start, :]
            self.keys, self.values = grown
            self.device, self.is_initialized = key_states.device, True
        for memory, states in zip((self.keys, self.values), new, strict=True):
            memory[..., start:stop, :] = states
        return (self.keys, self.values) if start > 0 else new


def round_up(length: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `length`."""
    return -(-length // multiple) * multiple


def stopped(tokens: Iterable[int], eos_token_id: int | Collection[int]) -> bool:
    """Return whether generated token ids contain an end-of-turn token; padding after it does not matter."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    return not ends.isdisjoint(tokens)
