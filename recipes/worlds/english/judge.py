"""A judge of replies that was not trained here: how much more probable the turns before make a reply.

    log p(reply | turns before) - log p(reply)

is how many nats the turns before say about the reply, by a model that has read much English. A reply that fits any turn
gets about 0, however fluent or long it is, and one that answers gets more.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.messages import as_messages
from pipeline.errors import Problem, UserError
from pipeline.models.loading import load_model

MODEL = "models/smollm2"
"""Folder of the judging model, as recipes/smollm2 makes it."""
BATCH = 16


def relevance(completions: Sequence[Any], prompts: Sequence[Any], **columns: Any) -> list[float]:
    """Return how many nats the prompt says about each completion: a reward function, so that the higher one wins.

    Raises:
        UserError: If the model is not there.
    """
    model, tokenizer = _load()
    replies = [as_messages(completion)[-1]["content"] for completion in completions]
    contexts = [list(prompt) for prompt in prompts]
    # An empty turn says nothing about the reply.
    informed = _logprobs(model, tokenizer, contexts, replies)
    uninformed = _logprobs(model, tokenizer, [[{"role": "user", "content": ""}]] * len(replies), replies)
    return [with_context - without for with_context, without in zip(informed, uninformed, strict=True)]


@functools.cache
def _load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not Path(MODEL).is_dir():
        raise UserError(
            Problem("judge", MODEL, "there is no such folder; recipes/smollm2/README.md says how to make it")
        )
    model, tokenizer = load_model(MODEL, "judge", dtype=torch.float32)
    return model.eval(), tokenizer


@torch.inference_mode()
def _logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[list[dict[str, str]]],
    replies: Sequence[str],
) -> list[float]:
    """Return the log-probability of each reply, in nats, after its context and the beginning of the answer."""
    totals: list[float] = []
    for start in range(0, len(replies), BATCH):
        sequences, lengths = [], []
        for context, reply in zip(contexts[start : start + BATCH], replies[start : start + BATCH], strict=True):
            prompt = tokenizer.apply_chat_template(context, add_generation_prompt=True, tokenize=False)
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            reply_ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
            sequences.append(torch.tensor(prompt_ids + reply_ids))
            lengths.append(len(prompt_ids))
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=0)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(sequence) for sequence in sequences])[:, None]
        logprobs = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float().log_softmax(-1)
        of_tokens = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            totals.append(float(of_tokens[row, length - 1 : len(sequence) - 1].sum()))
    return totals
