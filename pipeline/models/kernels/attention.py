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
    """What each block of queries sees of the keys."""

    # For each block of queries, the blocks of keys in which some query sees some key.
    keys: list[slice]
    # What is added to their scores, of shape (batch, 1, queries, keys).
    biases: list[Tensor]


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which autocast multiplies on a device, or `dtype` if autocast is off."""
    if not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)


def blockwise_mask(dtype: torch.dtype = torch.float32, **kwargs: Any) -> BlockMask:
    """Cut the mask of a forward pass into blocks; called like `transformers.masking_utils.sdpa_mask`."""
    # Request the mask itself: transformers would return None for plain causal attention.
    mask = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    dtype = autocast_dtype(mask.device, dtype)
    # A query that sees no key is padding. Its scores are all equally low, so that the softmax is not NaN.
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    keys = []
    biases = []
    for block_mask, block_bias in zip(mask.split(BLOCK, 2), bias.split(BLOCK, 2), strict=True):
        # The keys that any query of this block sees, in any row of the batch.
        visible = block_mask.flatten(0, 2).any(0).nonzero()
        first = last = 0
        if len(visible) > 0:
            first = int(visible.min()) // BLOCK
            last = int(visible.max()) // BLOCK
        keys.append(slice(first, last + 1))
        biases.append(block_bias[..., first * BLOCK : (last + 1) * BLOCK])
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
        attention_mask: From `blockwise_mask`.
        scaling: Factor of the scores. Default: the channels to the power of -0.5.

    Returns:
        Output of shape (batch, queries, heads, channels), and None for the attention weights.
    """
    # With grouped-query attention, several query heads share one key head.
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
    query = query * _scaling(query, scaling)
    # Rotary embeddings return float32 even under autocast. Converting each block would take longer than this.
    dtype = attention_mask.biases[0].dtype
    query, key, value = (states.to(dtype).contiguous() for states in (query, key, value))
    keys = key.split(BLOCK, 2)
    values = value.split(BLOCK, 2)
    outputs = []
    for queries, blocks, bias in zip(query.split(BLOCK, 2), attention_mask.keys, attention_mask.biases, strict=True):
        weights = (queries @ torch.cat(keys[blocks], 2).mT + bias).softmax(-1)
        weights = nn.functional.dropout(weights, dropout, module.training)
        outputs.append(weights @ torch.cat(values[blocks], 2))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _scaling(query: Tensor, scaling: float | None) -> float:
    """Return the factor of the scores; by default, the number of channels to the power of -0.5."""
    return float(query.shape[-1] ** -0.5) if scaling is None else scaling


def single_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of one query per head by plain products.

    Arguments and results are as for `blockwise_attention`, except that `attention_mask` is a tensor that is added to
    the scores. Query heads that share a key head become queries of one head, where transformers would copy the keys for
    each.
    """
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    weights = grouped @ key.mT * _scaling(query, scaling) + attention_mask
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
    """Find the `Documents` of a forward pass; called like `transformers.masking_utils.sdpa_mask`.

    Return torch's mask if there is padding or a cache, or if attention is computed in float32.
    """
    device = torch.device(kwargs.get("device", "cpu"))
    dtype = autocast_dtype(device, kwargs.get("dtype", torch.float32))
    is_cached = kwargs.get("q_offset", 0) or kwargs.get("kv_offset", 0) or q_length != kv_length
    mask = kwargs.get("attention_mask")
    is_padded = mask is not None and not mask.all()
    if is_cached or is_padded or kwargs.get("use_vmap") or dtype == torch.float32:
        return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, **kwargs)
    row = torch.arange(batch_size, device=device)[:, None]
    place = torch.arange(q_length, device=device)
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
    """Compute attention within each document.

    `attention_mask` comes from `varlen_mask`; everything else is as for `blockwise_attention`.
    """
    # Imported here, because not every release of torch has it.
    from torch.nn.attention.varlen import varlen_attn

    if not isinstance(attention_mask, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    rows = len(query)
    bounds = attention_mask.bounds
    longest = attention_mask.longest
    # Rotary embeddings return float32 even under autocast.
    dtype = autocast_dtype(query.device, query.dtype)
    # The rows of the batch are put one after the other: (tokens, heads, channels).
    states = [x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value)]
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": query.shape[1] != key.shape[1]}
    output = varlen_attn(*states, bounds, bounds, longest, longest, **options)
    return output.unflatten(0, (rows, -1)), None


AttentionInterface.register(BLOCKWISE, blockwise_attention)
AttentionMaskInterface.register(BLOCKWISE, blockwise_mask)
AttentionInterface.register(SINGLE, single_attention)
AttentionMaskInterface.register(SINGLE, eager_mask)
AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)


def choose_attention(model: PreTrainedModel, requested: str | None = None) -> None:
    """Set the requested attention, or the one that suits the model and the machine; log which, and why.

    Args:
        model: Changed in place.
        requested: Value of `attn_implementation`. Default: `hardware.attention`, if the model can use it.

    Raises:
        UserError: If the requested attention has no gradients on this machine.
    """
    config = model.config.get_text_config()
    if requested == "flex_attention" and hardware.accelerator() is None:
        raise UserError(Problem("attn_implementation", requested, "has no gradients on a CPU; omit it"))
    choice = hardware.Choice(requested, "requested") if requested else suitable_attention(model)
    if choice.value:
        model.set_attn_implementation(choice.value)
    logger.info("%-11s %s (%s)", "attention", config._attn_implementation, choice.reason)


def suitable_attention(model: PreTrainedModel) -> hardware.Choice:
    """Return the attention that suits the model and the machine, or None to keep transformers' choice."""
    # transformers loads most models with sdpa. The others need more than a mask, such as sinks or soft caps.
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return hardware.Choice(None, "transformers' choice for this model")
    choice = hardware.attention()
    if choice.value == VARLEN and (fault := validate_varlen(model, hardware.accelerator())):
        return hardware.Choice(None, fault)
    return choice


def validate_varlen(model: PreTrainedModel, device: str | None) -> str | None:
    """Return why FlashAttention cannot be used on a device for a model (on any device), or None.

    It is tried on two documents, because not every build of torch and not every GPU has its kernels.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [])
    has_windows = getattr(config, "sliding_window", None) or not layer_types <= {"full_attention"}
    dropouts = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    has_dropout = any(getattr(config, name, 0.0) for name in dropouts)
    # In multi-head latent attention, the sizes of values and queries differ.
    has_latent_heads = hasattr(config, "v_head_dim")
    if has_windows or has_dropout or has_latent_heads or not model._supports_flash_attn:
        return "FlashAttention does not compute what this model asks for"
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
    try:
        # Drawing random numbers here would change the ones that training draws.
        states = [torch.ones(1, number, 12, size, **options) for number in (heads, key_heads, key_heads)]
        bounds = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
        # Training needs the backward pass as well, which is another kernel.
        varlen_attention(model, *states, Documents(bounds, 7))[0].sum().backward()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return f"FlashAttention fails here: {str(error).splitlines()[0]}"
    return None
