"""Attention for CPUs: only those blocks of the scores are computed in which some query sees some key.

Packed documents see little of a row: with 65 tokens in a document, 512 tokens need a third of the square. The kernels
of torch for CPUs compute all of it whenever there is a mask.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from pipeline import hardware

logger = logging.getLogger(__name__)

BLOCKWISE = "blockwise"
BLOCK = 64
"""Queries, and keys, of a block."""


@dataclass(frozen=True)
class BlockMask:
    """Attention mask of a forward pass, which the model hands to each of its layers.

    Attributes:
        keys: For each block of queries, the range of blocks of keys in which some query sees some key.
        biases: For each block of queries, what is added to its scores, of shape (batch, 1, queries, keys).
    """

    keys: list[slice]
    biases: list[Tensor]


def blockwise_mask(dtype: torch.dtype = torch.float32, **kwargs: Any) -> BlockMask:
    """Cut the mask of a forward pass into blocks, in the place of `transformers.masking_utils.sdpa_mask`."""
    mask = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    if torch.is_autocast_enabled(mask.device.type):
        dtype = torch.get_autocast_dtype(mask.device.type)
    # A query that sees no key is padding: all its scores are equally low, so that their softmax is a number.
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    keys, biases = [], []
    for seen, part in zip(mask.split(BLOCK, 2), bias.split(BLOCK, 2), strict=True):
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
        module: Layer of the model.
        query: Shape (batch, heads, queries, channels).
        key, value: Shape (batch, key heads, keys, channels).
        attention_mask: Result of `blockwise_mask`.
        scaling: Factor of the scores. Default: the channels to the power of -0.5.
        dropout: Probability with which an attention weight is dropped.
        **kwargs: What other implementations need.

    Returns:
        Output of shape (batch, queries, heads, channels), and None for the attention weights.
    """
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    # Rotary embeddings leave float32, also under autocast: conversions of each block would take longer.
    query, key, value = (x.to(attention_mask.biases[0].dtype).contiguous() for x in (query, key, value))
    keys, values = key.split(BLOCK, 2), value.split(BLOCK, 2)
    outputs = []
    for queries, seen, bias in zip(query.split(BLOCK, 2), attention_mask.keys, attention_mask.biases, strict=True):
        weights = (queries @ torch.cat(keys[seen], 2).mT + bias).softmax(-1)
        weights = nn.functional.dropout(weights, dropout, module.training)
        outputs.append(weights @ torch.cat(values[seen], 2))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(BLOCKWISE, blockwise_attention)
AttentionMaskInterface.register(BLOCKWISE, blockwise_mask)


def choose_attention(model: PreTrainedModel, requested: str | None = None) -> None:
    """Compute attention block by block if that suits the machine and the model; log which attention is used, and why.

    Args:
        model: The model to train, changed in place.
        requested: `attn_implementation` of the arguments, which is left alone.
    """
    config, reason = model.config.get_text_config(), "requested"
    if requested is None:
        choice = hardware.attention()
        # Models that torch's kernels cannot express have more arguments than a mask, such as sinks or soft caps.
        if choice.value and config._attn_implementation == "sdpa":
            model.set_attn_implementation(BLOCKWISE)
        reason = choice.reason if choice.value == BLOCKWISE else "transformers' choice for this model"
    logger.info("%-11s %s (%s)", "attention", config._attn_implementation, reason)
