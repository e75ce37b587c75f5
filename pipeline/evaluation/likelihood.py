"""The likelihood of held-out text under a model, document by document."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def document_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context: int = 512,
    batch_tokens: int = 16384,
) -> list[float]:
    """Return the negative log-likelihood of each document in nats, summed over its tokens.

    Each document is scored alone, after the token that begins one (`bos_token`, or `eos_token` if there is none), so
    that its first token is predicted too. A document longer than the context is cut into independent windows.

    Args:
        model: A causal language model.
        tokenizer: A tokenizer with a bos or an eos token.
        texts: Documents of any length.
        context: Window length in tokens, including the first token, which is not predicted.
        batch_tokens: Tokens per batch, padding included.
    """
    model.eval()
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = [tokenizer(text, **options)["input_ids"] for text in texts]
    step = context - 1
    windows = [
        (document, [start, *ids[offset : offset + step]])
        for document, ids in enumerate(encoded)
        for offset in range(0, len(ids), step)
    ]
    windows.sort(key=lambda window: len(window[1]))
    losses = [0.0] * len(texts)
    while windows:
        # The longest remaining window determines the width of the batch, and so how many fit.
        width = len(windows[-1][1])
        batch = [windows.pop() for _ in range(min(len(windows), max(1, batch_tokens // width)))]
        ids = torch.tensor([w + [pad] * (width - len(w)) for _, w in batch], device=model.device)
        lengths = torch.tensor([len(w) for _, w in batch], device=model.device)
        real = torch.arange(width, device=model.device) < lengths[:, None]
        # Under the causal mask, tokens do not attend to the padding on their right.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for (document, _), loss in zip(batch, (nll * real[:, 1:]).double().sum(1).tolist(), strict=True):
            losses[document] += loss
    return losses
