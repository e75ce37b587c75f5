"""The likelihood of held-out text under a model: of documents, and of answers in conversations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.generation import encode_prompts
from pipeline.models.tokenizer import as_text, special_tokens

Sequences = Sequence[tuple[int, list[int], int]]
"""What a sequence is part of, its tokens, and the position of the first token that is predicted."""


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
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = [tokenizer(text, **options)["input_ids"] for text in texts]
    step = context - 1
    windows = [
        (document, [start, *ids[offset : offset + step]], 1)
        for document, ids in enumerate(encoded)
        for offset in range(0, len(ids), step)
    ]
    return _losses(model, windows, len(texts), _padding(tokenizer), batch_tokens)


def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    *,
    context: int = 512,
    batch_tokens: int = 16384,
) -> list[tuple[float, int]]:
    """Return the negative log-likelihood of the last message of each conversation in nats, and its size in bytes.

    Its end-of-turn token is predicted as well. Of what exceeds the context, nothing is scored: its bytes do not count.

    Args:
        model: A causal language model.
        tokenizer: A tokenizer with a chat template.
        conversations: Messages that end with the assistant's.
        context: Length in tokens up to which conversations are scored.
        batch_tokens: Tokens per batch, padding included.
    """
    tokens = special_tokens(tokenizer)
    whole = [tokenizer.apply_chat_template(as_text(one, tokens), return_dict=False) for one in conversations]
    sequences, sizes = [], []
    prompts = encode_prompts(tokenizer, [conversation[:-1] for conversation in conversations])
    for index, (ids, prompt) in enumerate(zip(whole, prompts, strict=True)):
        shared = (place for place, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b)
        first = next(shared, min(len(ids), len(prompt)))
        scored = ids[first:context]
        text = conversations[index][-1]["content"] if len(ids) <= context else tokenizer.decode(scored)
        sizes.append(len(text.encode()) if scored else 0)
        if scored:
            sequences.append((index, ids[:context], first))
    return list(zip(_losses(model, sequences, len(whole), _padding(tokenizer), batch_tokens), sizes, strict=True))


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad


@torch.inference_mode()
def _losses(model: PreTrainedModel, sequences: Sequences, count: int, pad: int, batch_tokens: int) -> list[float]:
    """Return the negative log-likelihood of the predicted tokens of each of `count` texts, which may be in pieces."""
    model.eval()
    losses = [0.0] * count
    windows = sorted(sequences, key=lambda window: len(window[1]))
    while windows:
        # The longest remaining window determines the width of the batch, and so how many fit.
        width = len(windows[-1][1])
        batch = [windows.pop() for _ in range(min(len(windows), max(1, batch_tokens // width)))]
        ids = torch.tensor([w + [pad] * (width - len(w)) for _, w, _ in batch], device=model.device)
        first, stop = (torch.tensor(ends, device=model.device)[:, None] for ends in _ends(batch))
        place = torch.arange(width, device=model.device)
        predicted = (first <= place) & (place < stop)
        # Under the causal mask, tokens do not attend to the padding on their right.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        totals = (nll * predicted[:, 1:]).cpu().double().sum(1).tolist()  # not every accelerator has float64
        for (text, _, _), loss in zip(batch, totals, strict=True):
            losses[text] += loss
    return losses


def _ends(batch: Sequences) -> tuple[list[int], list[int]]:
    return [first for _, _, first in batch], [len(window) for _, window, _ in batch]
