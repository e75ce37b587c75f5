"""The likelihood of held-out text under a model: of documents, and of answers in conversations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.packing import IGNORED
from pipeline.models.generation import encode_prompts
from pipeline.models.tokenizer import escape_tokens, special_tokens

BATCH_TOKENS = 16384
"""Tokens in a batch, padding included."""
MAX_LOGITS = 1 << 26
"""Number of logits in memory at once: 256 MB in float32, and as much again for their softmax."""


def document_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context: int = 512
) -> list[float]:
    """Return the negative log-likelihood of each document in nats, summed over its tokens.

    A document longer than the `context` is cut into independent windows of that many tokens. Each begins with the token
    that begins a document (`bos_token`, or `eos_token` if there is none), so that all others are predicted:

        tokens                   The fox is red .  It sleeps .
        windows of 5 tokens      bos The fox is red     bos . It sleeps .
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = [tokenizer(text, **options)["input_ids"] for text in texts]
    step = context - 1
    windows = []
    documents = []
    for document, ids in enumerate(encoded):
        for offset in range(0, len(ids), step):
            windows.append(([start, *ids[offset : offset + step]], 1))
            documents.append(document)
    losses = [0.0] * len(texts)
    for document, loss in zip(documents, sequence_losses(model, tokenizer, windows), strict=True):
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
    """Return the negative log-likelihood of each conversation's last message in nats, and the text that was scored.

    Its end-of-turn token is scored as well; tokens beyond the `context` are not, and do not belong to the text.

    Args:
        model: A causal language model.
        tokenizer: A tokenizer with a chat template.
        conversations: Messages that end with the assistant's.
        context: Length in tokens up to which conversations are scored.
        template: Arguments of the chat template.
    """
    pattern = special_tokens(tokenizer)
    options = dict(template or {})
    whole = []
    for conversation in conversations:
        messages = escape_tokens(conversation, pattern)
        whole.append(tokenizer.apply_chat_template(messages, return_dict=False, **options))
    prompts = encode_prompts(tokenizer, [conversation[:-1] for conversation in conversations], template)
    sequences = []
    texts = []
    for conversation, ids, prompt in zip(conversations, whole, prompts, strict=True):
        # The prompt and the whole conversation are tokenized separately. The answer begins where they first differ.
        first = max(1, _common_length(ids, prompt))
        scored = ids[first:context]
        sequences.append((ids[:context], first))
        is_whole = scored and len(ids) <= context
        # A tool call has no text until the template writes it.
        if is_whole and not conversation[-1].get("tool_calls"):
            texts.append(conversation[-1]["content"])
        else:
            texts.append(tokenizer.decode(scored))
    return list(zip(sequence_losses(model, tokenizer, sequences), texts, strict=True))


def _common_length(conversation: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    length = 0
    for token, token_of_prompt in zip(conversation, prompt, strict=False):
        if token != token_of_prompt:
            break
        length += 1
    return length


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
        targets = targets.flatten().to(logits.device)
        of_tokens = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        # Otherwise these logits would still be in memory when the next ones are computed.
        del logits
        # Summed on the CPU, because not every accelerator has float64.
        totals = of_tokens.view(len(batch), width).cpu().double().sum(1)
        for number, total in zip(batch, totals.tolist(), strict=True):
            losses[number] = total
    return losses
