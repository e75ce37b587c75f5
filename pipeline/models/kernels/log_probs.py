"""Log-probabilities from a model's plain logits, in forward passes without the padding of the batch, each prompt once.

A batch as TRL has it, of two completions of one prompt and one of another (`p`, `q` and letters are tokens, `.` is
padding), is a rectangle as wide as the longest prompt and the longest completion together:

    . p p | a a a .          one row of a forward pass here:        p p a a a b
    . p p | b . . .    ──►   and another one, in the same pass:     q q q c c c c
    q q q | c c c c                                                 (padded to the longest row of its pass)

Completions of one prompt follow it in one row. Each of them sees the prompt and itself, and its positions go on from
the prompt's. On a CPU, rows are grouped by length into passes of about `CPU_TOKENS` tokens. None of this changes what
is computed for a token, apart from rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.models.kernels.sampler import accepts_argument

CPU_TOKENS = 768
"""Tokens in a forward pass on a CPU, enough to keep it busy. An accelerator takes all of them at once."""

MAX_LOGITS = 1 << 28
"""Logits that a batch keeps on a CPU until its backward pass (1 GiB in float32). With more, each pass is computed
twice, and only one pass is in memory. Of SmolLM2-135M, 64 completions of 40 tokens then take 3.7 GB, not 6.6, and 1.1
(all weights, float32) to 1.5 times the seconds (all weights or LoRA, bfloat16)."""

ATTENTION_COSTS = 256
"""Length of a row at which attention takes about as long as everything else in a small model, and less in a large."""


@dataclass(frozen=True)
class ForwardPass:
    """Some of the texts of a batch.

    Attributes:
        inputs: Arguments of the model.
        before: (N,), the token before each token of the completions, as its place in the flattened `input_ids`.
        tokens: (N,), the tokens of the completions.
        places: (N,), their places in the flattened completions of the batch.
    """

    inputs: dict[str, Tensor | bool]
    before: Tensor
    tokens: Tensor
    places: Tensor


def token_log_probs(
    model: nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    length: int,
    *,
    batch_size: int | None,
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[Tensor, Tensor | None]:
    """Compute the log-probabilities of the last tokens of each text.

    Args:
        model: A causal language model, wrapped or not.
        ids: As for `over_passes`, like `attention_mask`, `length`, `batch_size` and `autocast`.
        temperature: What the logits are divided by.
        entropy: Whether to compute entropies, too.
        entropy_gradient: Whether gradients flow through them.

    Returns:
        Log-probabilities, and the entropies of the distributions that the tokens were drawn from, or None; each
        (B, `length`), in nats.
    """
    bare = extract_model_from_parallel(model)
    head = bare.get_output_embeddings()
    kept = int(attention_mask[:, -length:].sum()) * bare.config.get_text_config().vocab_size

    def of_pass(model: nn.Module, batch: ForwardPass) -> tuple[Tensor, ...]:
        # The head is the largest matrix of a small model, and most tokens are the prompts'.
        with head.register_forward_pre_hook(lambda _, inputs: (at(inputs[0], batch.before).unsqueeze(0),)):
            logits = model(**batch.inputs).logits[0].float()
        log_probs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        # With a large vocabulary, each of these takes more memory than the rest of the model.
        del logits
        scored = log_probs.gather(-1, batch.tokens.unsqueeze(-1)).squeeze(-1)
        if not entropy:
            return (scored,)
        if torch.is_grad_enabled() and entropy_gradient:
            return scored, -(log_probs.exp() * log_probs).sum(-1)
        with torch.no_grad():
            return scored, -log_probs.exp().mul_(log_probs).sum(-1)

    twice = ids.device.type == "cpu" and kept > MAX_LOGITS
    scored, *entropies = over_passes(of_pass, model, ids, attention_mask, length, batch_size, autocast, twice)
    return scored, entropies[0] if entropy else None


def over_passes(
    compute: Callable[[nn.Module, ForwardPass], tuple[Tensor, ...]],
    model: nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    length: int,
    batch_size: int | None,
    autocast: Callable[[], AbstractContextManager[None]],
    twice: bool = False,
) -> tuple[Tensor, ...]:
    """Compute something for each token of the completions.

    Positions are counted from each text's first token, as they are during sampling.

    Args:
        compute: Takes a model and the layout of a forward pass; returns any number of tensors (N,), for the N tokens of
            the completions in it.
        model: The model, bare or wrapped for DDP.
        ids: As for `forward_passes`, like `attention_mask`, `length` and `batch_size`.
        autocast: Makes the context of the forward passes, as `Accelerator.autocast` does.
        twice: Whether the backward pass computes each forward pass again, in place of keeping what it needs.

    Returns:
        As many tensors (B, `length`), 0 at padding.
    """
    passes = forward_passes(model, ids, attention_mask, length, batch_size)
    # Processes may differ in their number of passes, and DDP communicates in each that goes through it.
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    # One context for all passes casts the weights only once.
    with autocast():
        parts = [compute(model, passes[0])]
        for batch in passes[1:]:
            parts.append(checkpoint(compute, inside, batch, use_reentrant=False) if twice else compute(inside, batch))
    places = torch.cat([batch.places for batch in passes])
    whole = (torch.cat(several) for several in zip(*parts, strict=True))
    return tuple(part.new_zeros(ids.shape[0] * length).scatter(0, places, part).view(-1, length) for part in whole)


def at(batch: Tensor, places: Tensor) -> Tensor:
    """Return the vectors (N, D) of a batch (R, L, D) at places in its flattened first two dimensions."""
    return batch.flatten(0, 1).index_select(0, places)


def with_positions(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a model, wrapped or not, with the positions of its inputs if it accepts them."""
    if not accepts_argument(model, "position_ids"):
        return model

    def call(**inputs: Any) -> Any:
        return model(position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0), **inputs)

    return call


# ---- The layout


@dataclass(frozen=True)
class Row:
    """A prompt and some of its completions, as token ids; `texts` says which of the batch they are."""

    prompt: list[int]
    completions: list[list[int]]
    texts: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


def forward_passes(
    model: nn.Module, ids: Tensor, attention_mask: Tensor, length: int, batch_size: int | None
) -> list[ForwardPass]:
    """Lay out a batch, each text in one forward pass.

    Args:
        model: The model, wrapped or not, which decides on whether completions share a row.
        ids: (B, L), prompts padded on the left followed by completions padded on the right.
        attention_mask: (B, L).
        length: Columns of the completions, which come last; less than L.
        batch_size: Texts in a pass, at most, unless they are in one row; None for all of them.
    """
    start = ids.shape[1] - length
    before, after = attention_mask[:, :start].sum(1).tolist(), attention_mask[:, start:].sum(1).tolist()
    prompts = [text[start - n : start] for text, n in zip(ids.tolist(), before, strict=True)]
    completions = [text[start : start + n] for text, n in zip(ids.tolist(), after, strict=True)]
    tokens = CPU_TOKENS if ids.device.type == "cpu" else None
    # Rows differ more in length where prompts are shared, which does not pay in one pass of all of them.
    rows = _rows(prompts, completions, shares=tokens is not None and shares_prompts(model))
    positioned = accepts_argument(model, "position_ids")
    dtype = next(model.parameters()).dtype
    return [
        _forward_pass(group, length, positioned, dtype, ids.device)
        for group in _groups(rows, batch_size or len(ids), tokens)
    ]


def shares_prompts(model: nn.Module) -> bool:
    """Return whether a model, wrapped or not, computes the same for several completions behind one prompt.

    Its layers have to see every token that the mask allows, wherever it is, and have no other sense of order than the
    positions they are given.
    """
    config = extract_model_from_parallel(model).config.get_text_config()
    return (
        accepts_argument(model, "position_ids")
        and config._attn_implementation in ("eager", "sdpa")
        # ALiBi counts distances as they are in the row, and GPT-Neo masks by itself.
        and not getattr(config, "alibi", False)
        and not hasattr(config, "window_size")
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )


def _rows(prompts: list[list[int]], completions: list[list[int]], shares: bool) -> list[Row]:
    """Put completions behind their prompts, several behind one where that is cheaper."""
    by_prompt: dict[tuple[int, ...] | int, list[int]] = {}
    for text, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(prompt) if shares else text, []).append(text)
    rows = []
    for texts in by_prompt.values():
        row = None
        for text in sorted(texts, key=lambda text: len(completions[text])):
            alone = Row(prompts[text], [completions[text]], [text])
            if row is not None and _cost(len(row) + len(completions[text])) <= _cost(len(row)) + _cost(len(alone)):
                row.completions.append(completions[text])
                row.texts.append(text)
            else:
                row = alone
                rows.append(row)
    return rows


def _cost(length: int) -> int:
    """Return what a row costs, in any unit."""
    return length * (length + ATTENTION_COSTS)


def _groups(rows: list[Row], texts: int, tokens: int | None) -> Iterator[list[Row]]:
    """Yield rows of similar length that make up at most so many texts and, padded, tokens."""
    group: list[Row] = []
    for row in sorted(rows, key=len):
        within = tokens is None or (len(group) + 1) * len(row) <= tokens
        if group and not (within and sum(len(other.texts) for other in group) + len(row.texts) <= texts):
            yield group
            group = []
        group.append(row)
    yield group


def _forward_pass(
    rows: list[Row], length: int, positioned: bool, dtype: torch.dtype, device: torch.device
) -> ForwardPass:
    """Lay out rows; `length` is the length of the batch's completions."""
    width = max(map(len, rows))
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    # Whose each token is: 0 stands for the prompt, 1 and up for the completions of the row, -1 for padding.
    owners: list[list[int]] = []
    before: list[int] = []
    tokens: list[int] = []
    places: list[int] = []
    for number, row in enumerate(rows):
        start = number * width
        size = len(row.prompt)
        row_ids, row_positions, row_owners = list(row.prompt), list(range(size)), [0] * size
        for owner, (text, completion) in enumerate(zip(row.texts, row.completions, strict=True), start=1):
            # The token before the first one of a completion is the last one of the prompt, wherever in the row it is.
            first = len(row_ids)
            previous = [size - 1, *range(first, first + len(completion) - 1)][: len(completion)]
            before += [start + place for place in previous]
            places += [text * length + step for step in range(len(completion))]
            tokens += completion
            row_ids += completion
            row_positions += range(size, size + len(completion))
            row_owners += [owner] * len(completion)
        ids.append(row_ids)
        positions.append(row_positions)
        owners.append(row_owners)

    def padded(rows: list[list[int]], padding: int) -> Tensor:
        return torch.tensor([row + [padding] * (width - len(row)) for row in rows], dtype=torch.long, device=device)

    owner_of = padded(owners, -1)
    inputs: dict[str, Tensor | bool] = {"input_ids": padded(ids, 0), "use_cache": False}
    if any(len(row.texts) > 1 for row in rows):
        same = owner_of[:, None, :] == owner_of[:, :, None]
        of_prompt = owner_of[:, None, :] == 0
        seen = (of_prompt | same).tril()
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        inputs["attention_mask"] = mask[:, None]
    else:
        inputs["attention_mask"] = (owner_of >= 0).long()
    if positioned:
        inputs["position_ids"] = padded(positions, 0)
    of_tokens = (torch.tensor(values, dtype=torch.long, device=device) for values in (before, tokens, places))
    return ForwardPass(inputs, *of_tokens)
