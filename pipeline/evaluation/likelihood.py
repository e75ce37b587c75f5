"""How well a model predicts held-out text, document by document."""

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
    """Negative log-likelihood of each document, in nats.

    Each document stands alone, after the token that begins one (`bos_token`, or `eos_token` where there is
    none), so that its first token is predicted too. One longer than the context is cut into windows that
    start afresh.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: the documents, of any length.
        context: longest window in tokens, the first token that is only read included.
        batch_tokens: tokens in a batch, padding included.

    Returns:
        One sum over all tokens of the document each.
    """
    model.eval()
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    step = context - 1
    windows = [
        (document, [start, *ids[offset : offset + step]])
        for document, ids in enumerate(encoded)
        for offset in range(0, len(ids), step)
    ]
    windows.sort(key=lambda window: len(window[1]))
    losses = [0.0] * len(texts)
    while windows:
        # The longest first: the widest batch decides how many fit.
        width = len(windows[-1][1])
        batch = [windows.pop() for _ in range(min(len(windows), max(1, batch_tokens // width)))]
        ids = torch.tensor([w + [pad] * (width - len(w)) for _, w in batch], device=model.device)
        lengths = torch.tensor([len(w) for _, w in batch], device=model.device)
        real = torch.arange(width, device=model.device) < lengths[:, None]
        # Padding on the right is never seen by a real token under the causal mask.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for (document, _), loss in zip(batch, (nll * real[:, 1:]).double().sum(1).tolist(), strict=True):
            losses[document] += loss
    return losses
