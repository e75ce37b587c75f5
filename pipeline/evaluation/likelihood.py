"""The likelihood of held-out text under a model: of documents, and of answers in conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.generation import encode_prompts
from pipeline.models.tokenizer import as_text, special_tokens

BATCH_TOKENS = 16384
"""Tokens in a batch, padding included."""

MAX_LOGITS = 1 << 26
"""Logits in memory at once: 256 MB in float32, and as much again for their softmax."""


def document_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context: int = 512,
    batch_tokens: int = BATCH_TOKENS,
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
    # A window is the token that begins a document and `step` tokens of it, each of which is predicted.
    step = context - 1
    windows = [
        (document, [start, *ids[offset : offset + step]], 1)
        for document, ids in enumerate(encoded)
        for offset in range(0, len(ids), step)
    ]
    return _losses(model, windows, len(texts), padding(tokenizer), batch_tokens)


def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    *,
    context: int = 512,
    batch_tokens: int = BATCH_TOKENS,
    template: Mapping[str, Any] | None = None,
) -> list[tuple[float, int]]:
    """Return the negative log-likelihood of the last message of each conversation in nats, and its size in bytes.

    Its end-of-turn token is predicted as well. Of what exceeds the context, nothing is scored: its bytes do not count.

    Args:
        model: A causal language model.
        tokenizer: A tokenizer with a chat template.
        conversations: Messages that end with the assistant's.
        context: Length in tokens up to which conversations are scored.
        batch_tokens: Tokens per batch, padding included.
        template: Further arguments of the chat template, `chat_template_kwargs`.
    """
    tokens, options = special_tokens(tokenizer), dict(template or {})
    whole = [tokenizer.apply_chat_template(as_text(one, tokens), return_dict=False, **options) for one in conversations]
    sequences, sizes = [], []
    prompts = encode_prompts(tokenizer, [conversation[:-1] for conversation in conversations], template)
    for index, (ids, prompt) in enumerate(zip(whole, prompts, strict=True)):
        # The prompt and the whole conversation are tokenized by themselves. Where they first differ, the answer begins.
        shared = (place for place, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b)
        first = max(1, next(shared, min(len(ids), len(prompt))))
        scored = ids[first:context]
        text = conversations[index][-1]["content"] if len(ids) <= context else tokenizer.decode(scored)
        sizes.append(len(text.encode()) if scored else 0)
        if scored:
            sequences.append((index, ids[:context], first))
    return list(zip(_losses(model, sequences, len(whole), padding(tokenizer), batch_tokens), sizes, strict=True))


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills up the rows of a batch."""
    pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad


def _losses(
    model: PreTrainedModel, sequences: Sequence[tuple[int, list[int], int]], count: int, pad: int, batch_tokens: int
) -> list[float]:
    """Return the negative log-likelihood of each of `count` texts, which may be in pieces.

    A sequence is the number of its text, its tokens, and the position of the first token that is predicted.
    """
    losses = [0.0] * count
    passes = [(ids, range(first - 1, len(ids) - 1), ids[first:]) for _, ids, first in sequences]
    for number, found in over_tokens(model, passes, pad, batch_tokens):
        # Summed on the CPU, because not every accelerator has float64.
        losses[sequences[number][0]] += float(found.cpu().double().sum())
    return losses


@torch.inference_mode()
def over_tokens(
    model: PreTrainedModel,
    sequences: Sequence[tuple[list[int], Sequence[int], list[int]]],
    pad: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, Tensor]]:
    """Compute the negative log-likelihoods of tokens in each sequence, the longest sequences first.

    Args:
        model: A causal language model.
        sequences: Its input tokens, places among them, and the token that is to follow each place.
        pad: Token that fills up the rows of a batch.
        batch_tokens: Tokens per batch, padding included.

    Yields:
        The number of a sequence, and in nats what the tokens at its places cost.
    """
    model.eval()
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number][0]))
    while order:
        # The longest remaining sequence determines the width of the batch, and so how many fit.
        width = len(sequences[order[-1]][0])
        batch = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // width)))]
        rows = [sequences[number] for number in batch]
        # Under the causal mask, tokens do not attend to the padding on their right.
        padded = [row + [pad] * (width - len(row)) for row, _, _ in rows]
        places = [number * width + place for number, (_, some, _) in enumerate(rows) for place in some]
        targets = [token for _, _, some in rows for token in some]
        ids, at, following = (torch.tensor(x, dtype=torch.long, device=model.device) for x in (padded, places, targets))
        results = _in_pieces(model, ids, at, following)
        yield from zip(batch, results.split([len(some) for _, _, some in rows]), strict=True)


def _in_pieces(model: PreTrainedModel, ids: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Return what the `targets` cost in nats at `places` of the flattened batch `ids` (rows, tokens).

    With a vocabulary of 150,000, all logits of a batch would take 10 GB, and their softmax as much again. So the hidden
    states of the batch are computed once, and their logits in pieces:

        ids  ->  layers  ->  hidden states at `places`  ->  piece 1  ->  head  ->  logits  ->  losses
                                                            piece 2  ->  head  ->  logits  ->  losses
                                                            ...

    A hook on the head cuts the pieces out of its input. Some models cap or scale what their head returns, so each piece
    passes through the model: from the second piece on it takes the place of a single token, which costs little.
    """
    size = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    head = model.get_output_embeddings() or nn.Identity()
    hidden: list[Tensor] = []
    losses: list[Tensor] = []

    def narrow(
        _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        if not hidden:
            states = [*inputs, *named.values()][0]
            hidden.extend(states.flatten(0, 1)[places].split(size))
        return (hidden[len(losses)].unsqueeze(0),), {}

    hook = head.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        for piece in targets.split(size):
            tokens = ids[:1, :1] if losses else ids
            logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
            if not hidden:
                # The model does not call a head of its own: these are all its logits.
                return cross_entropy(logits[places].float(), targets, reduction="none")
            losses.append(cross_entropy(logits.float(), piece, reduction="none"))
            # Otherwise these logits would be in memory beside the next ones.
            del logits
    finally:
        hook.remove()
    return torch.cat(losses)
