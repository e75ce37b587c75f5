"""Attention for packed documents: given a mask, torch's kernels compute the whole square of scores.

Documents need little of it: a row of 512 tokens with documents of 65 tokens needs a third of the square. `blockwise`,
for CPUs, cuts queries and keys into blocks of 64, and computes the blocks in which some query sees some key (x):

                    keys 0    1    2    3    4    5
    queries 0            x
    queries 1            x    x                          one document in blocks 0 and 1
    queries 2                 x    x                     another one begins in the middle of block 1
    queries 3                      x    x

`varlen`, for GPUs, is FlashAttention, which reads each document alone, or torch's attention if that cannot be used.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from pipeline import hardware
from pipeline.errors import Problem, UserError

logger = logging.getLogger(__name__)

BLOCKWISE, SINGLE, VARLEN = "blockwise", "single", "varlen"
BLOCK = 64
"""Number of queries, and of keys, in a block."""


@dataclass(frozen=True)
class BlockMask:
    """For each block of queries, the blocks of keys in which some query sees some key, and what is added to their
    scores, of shape (batch, 1, queries, keys)."""

    keys: list[slice]
    biases: list[Tensor]


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which autocast multiplies on a device, or `dtype` if autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def blockwise_mask(dtype: torch.dtype = torch.float32, **kwargs: Any) -> BlockMask:
    """Cut the mask of a forward pass into blocks, in the place of `transformers.masking_utils.sdpa_mask`."""
    # Request the mask itself: transformers would return None for plain causal attention.
    mask = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    dtype = autocast_dtype(mask.device, dtype)
    # A query that sees no key is padding. Its scores are all equally low, so that the softmax is not NaN.
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    keys, biases = [], []
    for seen, part in zip(mask.split(BLOCK, 2), bias.split(BLOCK, 2), strict=True):
        # Blocks of keys that any query of this block sees, in any row of the batch.
        some = seen.flatten(0, 2).any(0).nonzero()
        first, last = (int(some.min()) // BLOCK, int(some.max()) // BLOCK) if len(some) else (0, 0)
        keys.append(slice(first, last + 1))
        biases.append(part[..., first * BLOCK : (last + 1) * BLOCK])
    return BlockMask(keys, biases)


@torch.compiler.disable
def blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention block by block, as an attention function of transformers.

    Args:
        query: Shape (batch, heads, queries, channels).
        key, value: Shape (batch, key heads, keys, channels).
        scaling: Factor of the scores. Default: the channels to the power of -0.5.

    Returns:
        Output of shape (batch, queries, heads, channels), and None for the attention weights.
    """
    # With grouped-query attention, several query heads share one key head.
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    # Rotary embeddings return float32 even under autocast. Converting each block would take longer than this.
    query, key, value = (x.to(attention_mask.biases[0].dtype).contiguous() for x in (query, key, value))
    keys, values = key.split(BLOCK, 2), value.split(BLOCK, 2)
    outputs = []
    for queries, seen, bias in zip(query.split(BLOCK, 2), attention_mask.keys, attention_mask.biases, strict=True):
        weights = (queries @ torch.cat(keys[seen], 2).mT + bias).softmax(-1)
        weights = nn.functional.dropout(weights, dropout, module.training)
        outputs.append(weights @ torch.cat(values[seen], 2))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def single_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of one query per head by plain products; arguments and results are as above.

    Query heads that share a key head become queries of one head, where transformers would copy the keys for each.
    """
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    weights = grouped @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling) + attention_mask
    output = weights.softmax(-1, torch.float32).to(value.dtype) @ value
    return output.reshape(len(query), 1, query.shape[1], -1), None


@dataclass(frozen=True)
class Documents:
    """The documents of a batch whose rows are put one after the other."""

    # (documents + 1,), positions at which they begin, then the number of tokens, in int32.
    bounds: Tensor
    # Number of tokens of the longest document.
    longest: int


def varlen_mask(batch_size: int, q_length: int, kv_length: int, mask_function: Any, **kwargs: Any) -> Any:
    """Find the `Documents` of a forward pass, in the place of `transformers.masking_utils.sdpa_mask`.

    Returns torch's mask if there is padding or a cache, or if attention is computed in float32.
    """
    padding, device = kwargs.get("attention_mask"), torch.device(kwargs.get("device", "cpu"))
    dtype = autocast_dtype(device, kwargs.get("dtype", torch.float32))
    cached = kwargs.get("q_offset", 0) or kwargs.get("kv_offset", 0) or q_length != kv_length
    if cached or kwargs.get("use_vmap") or dtype == torch.float32 or (padding is not None and not padding.all()):
        return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, **kwargs)
    row, place = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)
    # A token that does not see the one before it begins a document, and so does the first token of each row.
    sees = mask_function(row, row.new_zeros(()), place, place - 1).expand(batch_size, q_length)
    begins = (~sees | (place == 0)).flatten().nonzero()[:, 0]
    bounds = torch.cat([begins, begins.new_tensor([batch_size * q_length])]).int()
    return Documents(bounds, int(bounds.diff().max()))


@torch.compiler.disable
def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention within each document; `attention_mask` comes from `varlen_mask`, the rest is as above."""
    # Imported here, because not every release of torch has it.
    from torch.nn.attention.varlen import varlen_attn

    if not isinstance(attention_mask, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    rows, bounds, longest = len(query), attention_mask.bounds, attention_mask.longest
    # Rotary embeddings return float32 even under autocast.
    dtype = autocast_dtype(query.device, query.dtype)
    states = [x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value)]
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": query.shape[1] != key.shape[1]}
    return varlen_attn(*states, bounds, bounds, longest, longest, **options).unflatten(0, (rows, -1)), None


AttentionInterface.register(BLOCKWISE, blockwise_attention)
AttentionMaskInterface.register(BLOCKWISE, blockwise_mask)
AttentionInterface.register(SINGLE, single_attention)
AttentionMaskInterface.register(SINGLE, eager_mask)
AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)


def choose_attention(model: PreTrainedModel, requested: str | None = None) -> None:
    """Set the requested attention, or the one that suits the model and the machine; log which, and why."""
    config, device = model.config.get_text_config(), hardware.accelerator()
    if requested == "flex_attention" and device is None:
        raise UserError(Problem("attn_implementation", requested, "has no gradients on a CPU; omit it"))
    chosen, reason = (requested, "requested") if requested else hardware.attention()
    # transformers loads most models with sdpa. The others need more than a mask, such as sinks or soft caps.
    if not requested and config._attn_implementation != "sdpa":
        chosen, reason = None, "transformers' choice for this model"
    elif not requested and chosen == VARLEN and (fault := validate_varlen(model, device)):
        chosen, reason = None, fault
    if chosen:
        model.set_attn_implementation(chosen)
    logger.info("%-11s %s (%s)", "attention", config._attn_implementation, reason)


def validate_varlen(model: PreTrainedModel, device: str | None) -> str | None:
    """Return why FlashAttention cannot be used on a device for a model (on any device), or None.

    It is tried on two documents, because not every build of torch and not every GPU has its kernels.
    """
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) or {*(getattr(config, "layer_types", None) or [])}
    dropouts = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    drops = any(getattr(config, name, 0.0) for name in dropouts)
    # In multi-head latent attention, the sizes of values and queries differ.
    others = drops or hasattr(config, "v_head_dim") or windows not in (set(), {"full_attention"})
    if others or not model._supports_flash_attn:
        return "FlashAttention does not compute what this model asks for"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
    try:
        # Drawing random numbers here would change the ones that training draws.
        states = [torch.ones(1, heads, 12, size, **options) for heads in (config.num_attention_heads, keys, keys)]
        bounds = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
        # Training needs the backward pass as well, which is another kernel.
        varlen_attention(model, *states, Documents(bounds, 7))[0].sum().backward()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return f"FlashAttention fails here: {str(error).splitlines()[0]}"
    return None
