"""The sampler: many completions in few forward passes, for evaluation, preferences and rollouts.

`model.generate` keeps finished rows in the batch until the slowest is done, encodes a prompt again for each of its
samples, copies the cache for each token, and draws a random number for each token of the vocabulary. Here, greedy
output equals its output for each prompt alone, and samples follow the same distribution. On a CPU, texts that are equal
so far share a row, unless the model is small. Two prompts, the first of them three times:

    rows of the batch     step 0     step 1     step 2     returned
    . . a b c             d    ─┬─   e          END        d e END, twice
                                └─   END                   d END
    p q r s t             u          v          w          u v w
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from pipeline.files import as_list
from pipeline.models.kernels.attention import BLOCKWISE, SINGLE, autocast_dtype

SETTINGS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "suppress_tokens", "max_new_tokens",
    "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "disable_compile",
)  # fmt: skip
"""Settings that `sample` honours, or that cannot change what it returns."""

GENERATE = GenerationMixin.generate
"""The method that `sample` replaces, saved before anything overrides it."""


def unsupported_settings(config: GenerationConfig, supported: Sequence[str] = SETTINGS) -> dict[str, Any]:
    """Return the settings other than `supported`, with their values, that change what `model.generate` does."""
    defaults = config._get_default_generation_params()
    known = (*supported, "transformers_version", "_from_model_config")
    saved = {name: value for name, value in config.to_diff_dict().items() if name not in known and value}
    return {name: value for name, value in saved.items() if value != defaults.get(name)}


def overrides_generate(model: nn.Module) -> bool:
    """Return whether the class or the instance of a model, wrapped or not, overrides transformers' `generate`."""
    return "generate" in vars(model) or getattr(unwrap(model).generate, "__func__", None) is not GENERATE


def accepts_argument(model: nn.Module, argument: str) -> bool:
    """Return whether the forward method of a model, wrapped or not, has an argument of this name."""
    return argument in inspect.signature(unwrap(model).forward).parameters


def batches(lengths: Sequence[int], device: torch.device, copies: int = 1, most: int | None = None) -> list[list[int]]:
    """Return the places of texts of these lengths, from the shortest on, in batches that contain little padding.

    Each has at most `most` rows, with `copies` of each text. Default: on a CPU 256 rows and 2**15 tokens, which take
    1.5 GB in SmolLM2's cache in float32, and more at once are no faster; elsewhere 1,024 rows and 2**17 tokens.
    """
    tokens, rows = (2**15, 256) if device.type == "cpu" else (2**17, 1024)
    grouped: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not grouped or (len(grouped[-1]) + 1) * copies > (most or min(rows, tokens // lengths[place])):
            grouped.append([])
        grouped[-1].append(place)
    return grouped


@torch.inference_mode()
def sample(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Complete each prompt once, all of them in one batch. Return the ids, with the end of the turn if there is one.

    Equal prompts, and what all begin with, are encoded once. Under autocast, each forward pass casts the weights unless
    the caller has already entered it: it then keeps the cast copies until the caller leaves.

    Args:
        model: A causal language model in evaluation mode, on its device.
        prompts: Token ids, at least one each.
        config: The settings, only from `SETTINGS` (see `unsupported_settings`); unset ones are off.
        generator: Random numbers, one for each token. Default: the global ones of the model's device.
    """
    limit = config.max_new_tokens
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    cache, room = DynamicCache(config=model.config), 1
    # Only these models support caches with spare room.
    if unwrap(model)._can_compile_fullgraph:
        room = GrowingLayer.room
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    grows = {*map(type, cache.layers)} == {GrowingLayer}
    accepted = [name for name in ("position_ids", "logits_to_keep") if accepts_argument(model, name)]

    def last_logits(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        inputs = {"input_ids": ids, "attention_mask": mask} | {name: optional[name] for name in accepted}
        return model(**inputs, cache=cache, use_cache=True).logits[:, -1].float()

    # The tokens with which all begin, if it is worth a pass. Windows of attention would count the padding after them.
    shared = next((i for i, some in enumerate(zip(*distinct, strict=False)) if len({*some}) > 1), 0)
    if shared < 16 or "position_ids" not in accepted or not grows:
        shared = 0
    width = max(map(len, distinct))
    padded = [[*text[:shared], *[-1] * (width - len(text)), *text[shared:]] for text in distinct]
    ids = torch.tensor(padded, device=model.device)
    mask = pad((ids >= 0).long(), (0, limit + room))
    positions = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
    # Padding repeats the last token of each prompt, which does not affect a repetition penalty.
    ids = ids.where(ids >= 0, ids[:, -1:])
    # If nothing ends a completion, use -1, which no token equals.
    ends = as_list(-1 if config.eos_token_id is None else config.eos_token_id)
    process = unwrap(model)._get_logits_processor(config, width, device=ids.device)
    # With frozen weights, torch would copy the head for each text: 14 GB for 256 texts and SmolLM2's 49,152 tokens.
    head = unwrap(model).get_output_embeddings() or nn.Identity()
    with head.register_forward_pre_hook(lambda _, inputs: tuple(map(Tensor.contiguous, inputs))):
        if shared:
            last_logits(ids[:1, :shared], mask[:1, :shared], positions[:1, :shared])
            cache.reorder_cache(ids.new_zeros(len(ids)))
        logits = last_logits(ids[:, shared:], mask[:, : round_up(width, room if shared else 1)], positions[:, shared:])
    # The row of the batch in which each completion is: its own, or that of all texts that are the same so far.
    rows = ids.new_tensor([distinct[tuple(prompt)] for prompt in prompts])
    ids, completions = ids[rows], ids.new_zeros(len(rows), limit)
    active, finished = torch.arange(len(rows), device=ids.device), torch.zeros_like(rows, dtype=torch.bool)
    # Elsewhere, and in small models, many rows take little longer than few. Other caches would be copied as a whole.
    shares = grows and ids.device.type == "cpu" and unwrap(model).num_parameters() > 10**7
    with _attention_for_single_tokens(model):
        for step in range(limit):
            logits = logits[rows]
            if process:
                logits = process(torch.cat([ids[active], completions[active, :step]], dim=1), logits)
            token = _draw(logits, generator) if config.do_sample else logits.argmax(-1)
            completions[active, step] = token
            finished |= torch.isin(token, ids.new_tensor(ends))
            if step == limit - 1 or bool(finished.all()):
                break
            # Where dropping rows copies the cache, it pays once an eighth of the batch has finished.
            if shares or int(finished.sum()) * 8 >= len(active):
                active, token, rows, finished = (x[~finished] for x in (active, token, rows, finished))
            own = rows, token, torch.arange(len(rows), device=ids.device)
            sources, token, rows = _continue(rows, token, logits.shape[-1]) if shares else own
            if sources.tolist() != [*range(len(mask))]:
                cache.reorder_cache(sources)
                mask = mask[sources]
            mask[:, width + step] = 1
            logits = last_logits(token[:, None], mask[:, : round_up(width + step + 1, room)], mask.sum(1)[:, None] - 1)
    return [row[: next((i for i, token in enumerate(row, 1) if token in ends), limit)] for row in completions.tolist()]


def _continue(rows: Tensor, token: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out the next batch, in which only completions with the same row and token share a row.

    Return the row that each new one continues, its token, and the new row of each completion. One text that continues a
    row stays in its place, so that little of the cache moves.
    """
    texts, numbers = torch.unique(rows * vocabulary + token, return_inverse=True)
    sources = texts // vocabulary
    stays = (sources < len(texts)) & (sources != pad(sources[:-1], (1, 0), value=-1))
    free = torch.ones_like(stays).index_fill(0, sources[stays], False)
    places = sources.masked_scatter(~stays, free.nonzero())
    order = places.argsort()
    return sources[order], texts[order] % vocabulary, places[numbers]


def unwrap(model: nn.Module) -> Any:
    """Return the model inside wrappers for several processes or for an adapter."""
    # Otherwise, accelerate would search the disk for DeepSpeed at every pass, even if the model is not wrapped.
    if not isinstance(model, PreTrainedModel | PeftModel):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _attention_for_single_tokens(model: nn.Module) -> Iterator[None]:
    """On a CPU, compute attention by plain products, which are faster than torch's kernel for a single query."""
    model = unwrap(model)
    config = model.config.get_text_config()
    kept, heads = config._attn_implementation, config.num_attention_heads
    if model.device.type != "cpu" or kept not in ("sdpa", BLOCKWISE):
        yield
        return
    model.set_attn_implementation("eager" if getattr(config, "num_key_value_heads", heads) == heads else SINGLE)
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
    # Above 0 and at most 1, so that a token of probability 0 is never the first to reach it.
    share = 1 - torch.rand(len(logits), 1, generator=generator, dtype=dtype, device=logits.device)
    weights, start = torch.softmax(logits, dim=-1), 0
    # From a large vocabulary, first a block is drawn, because a sum in float64 for each token takes a while.
    if logits.shape[-1] > 8192:
        size = math.gcd(logits.shape[-1], 256)
        blocks = weights.unflatten(-1, (-1, size))
        block, share = _reach(blocks.sum(-1), share)
        weights, start = blocks.take_along_dim(block[:, :, None], 1)[:, 0], block * size
    return (start + _reach(weights, share)[0])[:, 0]


def _reach(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each row's running sum reaches `share` of its total, and what share of the weight there it needs."""
    sums = weights.cumsum(-1, dtype=share.dtype)
    target = share * sums[:, -1:]
    place = torch.searchsorted(sums, target).clamp(max=weights.shape[-1] - 1)
    own = weights.gather(-1, place)
    # Rounding must not make it 0, which a weight of 0 reaches.
    return place, ((target - sums.gather(-1, place) + own) / own).clamp(min=torch.finfo(share.dtype).eps)


class GrowingLayer(DynamicLayer):
    """The cache of a layer with spare room, while transformers' would copy everything for each token.

    Attention also gets the spare room, which the mask hides, so that kernels need not copy the used part every time.
    """

    keys: Tensor
    values: Tensor
    room = 16
    """Number of tokens by which the memory grows."""
    length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Copy only rows that move, or all of them if there is no memory for more rows: then it grows by a quarter."""
        if not self.length:
            return
        beam_idx = beam_idx.to(self.keys.device)
        if (missing := len(beam_idx) - len(self.keys)) > 0:
            spare = (0, 0, 0, 0, 0, 0, 0, max(missing, len(self.keys) // 4))
            self.keys, self.values = (pad(states, spare) for states in (self.keys, self.values))
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero()[:, 0]
        for states in (self.keys, self.values):
            states[moved] = states[beam_idx[moved]]

    def get_seq_length(self) -> int:
        """Return the number of tokens in use."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that attention gets along with `query_length` new tokens, and their offset."""
        return (round_up(self.length + query_length, self.room) if self.length else query_length), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all of them with the spare room (the first time, only the new ones)."""
        # Rotary embeddings return float32 keys under autocast, which would cast all of them again for each token.
        keys, values = (x.to(autocast_dtype(x.device, x.dtype)) for x in (key_states, value_states))
        start, stop = self.length, self.length + keys.shape[-2]
        self.length, size = stop, round_up(stop, self.room)
        if start == 0:
            self.keys, self.values = (pad(states, (0, 0, 0, size - stop)) for states in (keys, values))
            self.device, self.is_initialized = keys.device, True
            return keys, values
        if (missing := size - self.keys.shape[-2]) > 0:
            rows = (states[: len(keys)] for states in (self.keys, self.values))
            self.keys, self.values = (pad(states, (0, 0, 0, missing)) for states in rows)
        used = self.keys[: len(keys)], self.values[: len(keys)]
        used[0][..., start:stop, :], used[1][..., start:stop, :] = keys, values
        return used


def round_up(length: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `length`."""
    return -(-length // multiple) * multiple
