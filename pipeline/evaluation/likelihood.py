"""The likelihood of held-out text under a model: of documents, and of answers in conversations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.packing import IGNORED
from pipeline.models.generation import encode_prompts
from pipeline.models.tokenizer import as_text, special_tokens

BATCH_TOKENS = 16384
"""Tokens in a batch, padding included."""
MAX_LOGITS = 1 << 26
"""Number of logits in memory at once: 256 MB in float32, and as much again for their softmax."""


def document_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context: int = 512
) -> list[float]:
    """Return the negative log-likelihood of each document in nats, summed over its tokens.

    A document longer than the `context` is cut into independent windows of that many tokens. Each begins with the token
    that begins a document (`bos_token`, or `eos_token` if there is none), so that all others are predicted.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = [tokenizer(text, **options)["input_ids"] for text in texts]
    step = context - 1
    windows = [
        (document, [start, *ids[offset : offset + step]])
        for document, ids in enumerate(encoded)
        for offset in range(0, len(ids), step)
    ]
    losses = [0.0] * len(texts)
    found = sequence_losses(model, tokenizer, [(window, 1) for _, window in windows])
    for (document, _), loss in zip(windows, found, strict=True):
        losses[document] += loss
    return losses


def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    *,
    context: int = 512,
    template: Mapping[str, Any] | None = None,
) -> list[tuple[float, str]]:
    """Return the negative log-likelihood of each conversation's last message in nats, and the part that was scored.

    Its end-of-turn token is scored as well; tokens beyond the `context` are not. `template`: chat template arguments.
    """
    tokens, options = special_tokens(tokenizer), dict(template or {})
    whole = [tokenizer.apply_chat_template(as_text(one, tokens), return_dict=False, **options) for one in conversations]
    prompts = encode_prompts(tokenizer, [conversation[:-1] for conversation in conversations], template)
    sequences, texts = [], []
    for conversation, ids, prompt in zip(conversations, whole, prompts, strict=True):
        # The prompt and the whole conversation are tokenized separately. The answer begins where they first differ.
        shared = (place for place, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b)
        first = max(1, next(shared, min(len(ids), len(prompt))))
        scored = ids[first:context]
        # A tool call has no text until the template writes it.
        whole_answer = scored and len(ids) <= context and not conversation[-1].get("tool_calls")
        texts.append(conversation[-1]["content"] if whole_answer else tokenizer.decode(scored))
        sequences.append((ids[:context], first))
    return list(zip(sequence_losses(model, tokenizer, sequences), texts, strict=True))


@torch.inference_mode()
def sequence_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[tuple[list[int], int]]
) -> list[float]:
    """Return the negative log-likelihood of each sequence in nats, summed over the tokens that are predicted.

    `sequences`: pairs of token ids and the index of the first predicted token (>= 1).
    """
    model.eval()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # With a vocabulary of 150,000, all logits of a batch of 16,384 tokens would take 10 GB.
    batch_tokens = min(BATCH_TOKENS, MAX_LOGITS // model.config.get_text_config().vocab_size)
    losses = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number][0]))
    while order:
        # The longest remaining sequence determines the width of the batch, and so how many fit.
        width = len(sequences[order[-1]][0])
        batch = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // width)))]
        # Each position predicts the next token. The causal mask hides the padding on its right.
        #
        #   ids       bos  What  is   it   It   is   red  eos  pad  pad
        #   targets   -    -     -    It   is   red  eos  -    -    -
        ids = torch.full((len(batch), width), pad)
        targets = torch.full((len(batch), width), IGNORED)
        for row, number in enumerate(batch):
            tokens, first = sequences[number]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            targets[row, first - 1 : len(tokens) - 1] = torch.tensor(tokens[first:])
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.flatten(0, 1).float()
        found = cross_entropy(logits, targets.flatten().to(logits.device), ignore_index=IGNORED, reduction="none")
        # Otherwise these logits would still be in memory when the next ones are computed.
        del logits
        # Summed on the CPU, because not every accelerator has float64.
        totals = found.view(len(batch), width).cpu().double().sum(1)
        for number, total in zip(batch, totals.tolist(), strict=True):
            losses[number] = total
    return losses
