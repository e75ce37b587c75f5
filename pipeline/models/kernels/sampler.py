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
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from pipeline import hardware
from pipeline.files import as_list
from pipeline.models.kernels.attention import BLOCKWISE, SINGLE, autocast_dtype

SETTINGS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "suppress_tokens", "max_new_tokens",
    "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "disable_compile",
)  # fmt: skip
"""Settings that `sample` honours, or that cannot change what it returns."""

SMALL_VOCABULARY = 8192
"""Number of tokens up to which a token is drawn in one step, instead of a block of tokens and then one of them."""

GENERATE = GenerationMixin.generate
"""The method that `sample` replaces, saved before anything overrides it."""


def unsupported_settings(config: GenerationConfig, supported: Sequence[str] = SETTINGS) -> dict[str, Any]:
    """Return the settings other than `supported`, with their values, that change what `model.generate` does."""
    defaults = config._get_default_generation_params()
    ignored = (*supported, "transformers_version", "_from_model_config")
    settings = {}
    for name, value in config.to_diff_dict().items():
        if name not in ignored and value and value != defaults.get(name):
            settings[name] = value
    return settings


def overrides_generate(model: nn.Module) -> bool:
    """Return whether the class or the instance of a model, wrapped or not, overrides transformers' `generate`."""
    return "generate" in vars(model) or getattr(unwrap(model).generate, "__func__", None) is not GENERATE


def accepts_argument(model: nn.Module, argument: str) -> bool:
    """Return whether the forward method of a model, wrapped or not, has an argument of this name."""
    return argument in inspect.signature(unwrap(model).forward).parameters


def batches(lengths: Sequence[int], device: torch.device, copies: int = 1, most: int | None = None) -> list[list[int]]:
    """Return the places of texts of these lengths, from the shortest on, in batches that contain little padding.

    With lengths (9, 2, 8, 3) and `most` 2, that is [[1, 3], [2, 0]].

    Args:
        lengths: Number of tokens of each text, including those to be generated.
        device: Where the batches are computed.
        copies: Number of rows that each text has in its batch.
        most: Maximum number of rows in a batch. Default: on a CPU 256 rows and 2**15 tokens, which take 1.5 GB in
            SmolLM2's cache in float32, and more at once are no faster; elsewhere 1,024 rows and 2**17 tokens.
    """
    tokens, rows = (2**15, 256) if device.type == "cpu" else (2**17, 1024)
    grouped: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        # The texts are sorted, so this one is the longest of its batch.
        limit = most or min(rows, tokens // lengths[place])
        if not grouped or (len(grouped[-1]) + 1) * copies > limit:
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
    bare = unwrap(model)
    device = model.device
    limit = config.max_new_tokens
    # Each prompt once, and its place in the batch.
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    cache, room = _new_cache(model)
    grows = {type(layer) for layer in cache.layers} == {GrowingLayer}
    accepted = [name for name in ("position_ids", "logits_to_keep") if accepts_argument(model, name)]

    def last_logits(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        inputs = {"input_ids": ids, "attention_mask": mask} | {name: optional[name] for name in accepted}
        return model(**inputs, cache=cache, use_cache=True).logits[:, -1].float()

    # The tokens with which all begin, if it is worth a pass. Windows of attention would count the padding after them.
    shared = _common_length(distinct)
    if shared < 16 or "position_ids" not in accepted or not grows:
        shared = 0
    ids = _lay_out(distinct, shared, device)
    width = ids.shape[1]
    mask = pad((ids >= 0).long(), (0, limit + room))
    positions = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
    # Padding repeats the last token of each prompt, which does not affect a repetition penalty.
    ids = ids.where(ids >= 0, ids[:, -1:])
    # If nothing ends a completion, use -1, which no token equals.
    ends = as_list(-1 if config.eos_token_id is None else config.eos_token_id)
    process = bare._get_logits_processor(config, width, device=device)
    # With frozen weights, torch would copy the head for each text: 14 GB for 256 texts and SmolLM2's 49,152 tokens.
    head = bare.get_output_embeddings() or nn.Identity()
    with head.register_forward_pre_hook(lambda _, inputs: tuple(map(Tensor.contiguous, inputs))):
        # Number of keys in the first pass over whole prompts: all tokens, and the spare room if the cache has any yet.
        keys = width
        if shared:
            last_logits(ids[:1, :shared], mask[:1, :shared], positions[:1, :shared])
            cache.reorder_cache(ids.new_zeros(len(ids)))
            keys = round_up(width, room)
        logits = last_logits(ids[:, shared:], mask[:, :keys], positions[:, shared:])

    # The row of the batch in which each completion is: its own, or that of all texts that are the same so far.
    rows = ids.new_tensor([distinct[tuple(prompt)] for prompt in prompts])
    ids = ids[rows]
    completions = ids.new_zeros(len(rows), limit)
    # The completions that are still in the batch, by number, and whether each of them has ended.
    active = torch.arange(len(rows), device=device)
    finished = torch.zeros_like(rows, dtype=torch.bool)
    # Elsewhere, and in small models, many rows take little longer than few. Other caches would be copied as a whole.
    shares = grows and device.type == "cpu" and bare.num_parameters() > 10**7
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
            # From here on, `rows` are those of the next batch, which continue the rows `sources` of this one.
            if shares:
                sources, token, rows = _continue_rows(rows, token, logits.shape[-1])
            else:
                sources = rows
                rows = torch.arange(len(rows), device=device)
            if sources.tolist() != [*range(len(mask))]:
                cache.reorder_cache(sources)
                mask = mask[sources]
            mask[:, width + step] = 1
            keys = round_up(width + step + 1, room)
            logits = last_logits(token[:, None], mask[:, :keys], mask.sum(1)[:, None] - 1)
    return [_up_to_end(tokens, ends) for tokens in completions.tolist()]


def _new_cache(model: nn.Module) -> tuple[DynamicCache, int]:
    """Return an empty cache, and the number of tokens by which its memory grows: 1 if it has no spare room."""
    bare = unwrap(model)
    cache = DynamicCache(config=bare.config)
    # Only these models support caches with spare room.
    if not bare._can_compile_fullgraph:
        return cache, 1
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache, GrowingLayer.room


def _lay_out(texts: Collection[Sequence[int]], shared: int, device: torch.device) -> Tensor:
    """Return texts as rows that end in the same column, shape (texts, longest text).

    All begin with the same `shared` tokens. Padding, which is -1, follows those, or is on the left if there are none.
    """
    width = max(map(len, texts))
    rows = []
    for text in texts:
        padding = [-1] * (width - len(text))
        rows.append([*text[:shared], *padding, *text[shared:]])
    return torch.tensor(rows, device=device)


def _common_length(texts: Iterable[Sequence[int]]) -> int:
    """Return the number of tokens with which all texts begin; 0 if one text is the beginning of all others."""
    for length, tokens in enumerate(zip(*texts, strict=False)):
        if len(set(tokens)) > 1:
            return length
    return 0


def _up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens up to the first one that ends a completion, or all of them."""
    for length, token in enumerate(tokens, start=1):
        if token in ends:
            return tokens[:length]
    return tokens


def _continue_rows(rows: Tensor, token: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out the next batch, in which only completions with the same row and token share a row.

    One text that continues a row stays in its place, so that little of the cache moves. Three completions, of which the
    first two are in row 0 and the third in row 1, get the tokens 7, 7 and 8:

        rows [0, 0, 1], token [7, 7, 8]    ->    sources [0, 1], token [7, 8], rows [0, 0, 1]

    Args:
        rows: Row of each completion, shape (completions,).
        token: Its next token.
        vocabulary: Number of tokens that there are.

    Returns:
        The row that each new one continues, its token, and the new row of each completion.
    """
    texts, numbers = torch.unique(rows * vocabulary + token, return_inverse=True)
    sources = texts // vocabulary
    # The first text that continues a row stays there, if the next batch has a row of that number.
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
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model


@contextmanager
def _attention_for_single_tokens(model: nn.Module) -> Iterator[None]:
    """On a CPU, compute attention by plain products, which are faster than torch's kernel for a single query."""
    model = unwrap(model)
    config = model.config.get_text_config()
    previous = config._attn_implementation
    if model.device.type != "cpu" or previous not in ("sdpa", BLOCKWISE):
        yield
        return
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", heads)
    model.set_attn_implementation("eager" if key_heads == heads else SINGLE)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample ids, shape (rows,), from `logits` of shape (rows, vocabulary).

    This is inverse transform sampling: one random number per row, where `torch.multinomial` draws one per token. Sums
    are in float64, where the device has it, so that improbable tokens of a large vocabulary are not lost.
    """
    dtype = hardware.sum_dtype(logits.device)
    # Above 0 and at most 1, so that a token of probability 0 is never the first to reach it.
    share = 1 - torch.rand(len(logits), 1, generator=generator, dtype=dtype, device=logits.device)
    weights = torch.softmax(logits, dim=-1)
    vocabulary = logits.shape[-1]
    if vocabulary <= SMALL_VOCABULARY:
        token, _ = _first_reaching(weights, share)
        return token[:, 0]
    # From a large vocabulary, first a block is drawn, because a sum in float64 for each token takes a while.
    size = math.gcd(vocabulary, 256)
    blocks = weights.unflatten(-1, (-1, size))
    block, share = _first_reaching(blocks.sum(-1), share)
    weights = blocks.take_along_dim(block[:, :, None], 1)[:, 0]
    place, _ = _first_reaching(weights, share)
    return (block * size + place)[:, 0]


def _first_reaching(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Find where each row's running sum reaches a share of its total.

    With weights (2, 3, 5) and a share of 0.4, that is place 1: the sum must reach 4, and place 0 only has 2. Of the 3
    at place 1, two thirds are needed.

    Args:
        weights: Shape (rows, places), not negative.
        share: Shape (rows, 1), above 0 and at most 1.

    Returns:
        The place in each row, and the share of its weight that is needed, each of shape (rows, 1).
    """
    sums = weights.cumsum(-1, dtype=share.dtype)
    target = share * sums[:, -1:]
    place = torch.searchsorted(sums, target).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, place)
    needed_share = (target - sums.gather(-1, place) + weight) / weight
    # Rounding must not make it 0, which a weight of 0 reaches.
    return place, needed_share.clamp(min=torch.finfo(share.dtype).eps)


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
        missing = len(beam_idx) - len(self.keys)
        if missing > 0:
            # `pad` takes the amounts before and after of each dimension, from the last one to the first.
            spare = (0, 0, 0, 0, 0, 0, 0, max(missing, len(self.keys) // 4))
            self.keys = pad(self.keys, spare)
            self.values = pad(self.values, spare)
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero()[:, 0]
        for states in (self.keys, self.values):
            states[moved] = states[beam_idx[moved]]

    def get_seq_length(self) -> int:
        """Return the number of tokens in use."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that attention gets along with `query_length` new tokens, and their offset."""
        if self.length == 0:
            return query_length, 0
        return round_up(self.length + query_length, self.room), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all of them with the spare room (the first time, only the new ones)."""
        # Rotary embeddings return float32 keys under autocast, which would cast all of them again for each token.
        keys = key_states.to(autocast_dtype(key_states.device, key_states.dtype))
        values = value_states.to(autocast_dtype(value_states.device, value_states.dtype))
        start = self.length
        stop = start + keys.shape[-2]
        size = round_up(stop, self.room)
        self.length = stop
        if start == 0:
            self.keys = pad(keys, (0, 0, 0, size - stop))
            self.values = pad(values, (0, 0, 0, size - stop))
            self.device = keys.device
            self.is_initialized = True
            return keys, values
        count = len(keys)
        missing = size - self.keys.shape[-2]
        if missing > 0:
            self.keys = pad(self.keys[:count], (0, 0, 0, missing))
            self.values = pad(self.values[:count], (0, 0, 0, missing))
        used_keys = self.keys[:count]
        used_values = self.values[:count]
        used_keys[..., start:stop, :] = keys
        used_values[..., start:stop, :] = values
        return used_keys, used_values


def round_up(length: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `length`."""
    return -(-length // multiple) * multiple
