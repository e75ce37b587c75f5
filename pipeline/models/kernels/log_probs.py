"""Log-probabilities from a model's plain logits, without the padding of the batch, and with each prompt only once.

A batch as TRL has it, of two completions of one prompt and one of another (letters are tokens, `.` is padding):

    . p p | a a a .          one row of a forward pass here:        p p a a a b
    . p p | b . . .    ──►   and another one, in the same pass:     q q q c c c c
    q q q | c c c c                                                 (padded to the longest row of its pass)

Completions of one prompt follow it in one row. Each of them sees only the prompt and itself, and its positions continue
from the prompt's. On a CPU, rows are grouped by length. Results are the same apart from rounding.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.models.kernels.sampler import accepts_argument

CPU_TOKENS = 768
"""Tokens in a forward pass on a CPU, enough to keep it busy. An accelerator takes the whole batch at once."""

MAX_LOGITS = 1 << 28
"""Logits that a batch keeps on a CPU until its backward pass (1 GiB in float32). With more, each pass is computed
twice, and only one pass is in memory. For SmolLM2-135M, 64 completions of 40 tokens then take 3.7 instead of 6.6 GB,
and 1.1 times (all weights, float32) to 1.5 times (all weights or LoRA, bfloat16) as long."""

ATTENTION_COSTS = 256
"""Row length at which attention takes about as long as everything else in a small model (less in a large one)."""


class ForwardPass(NamedTuple):
    """Part of a batch: arguments of the model, and the N tokens of the completions."""

    inputs: dict[str, Tensor | bool]
    # (N,), the position in the flattened `input_ids` of the token before each token of the completions.
    before: Tensor
    # (N,), the tokens, and their positions in the flattened completions of the batch.
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
        model: A causal language model, wrapped or not. Other arguments are as for `over_passes`.
        temperature: Divisor of the logits.
        entropy_gradient: Whether gradients flow through entropies, if those are requested.

    Returns:
        Log-probabilities, and the entropies of the tokens' distributions, or None; each (B, `length`), in nats.
    """
    bare = extract_model_from_parallel(model)
    head = bare.get_output_embeddings()
    kept = int(attention_mask[:, -length:].sum()) * bare.config.get_text_config().vocab_size

    def of_pass(model: nn.Module, batch: ForwardPass) -> tuple[Tensor, ...]:
        # The head is the largest matrix of a small model, and most tokens belong to prompts.
        with head.register_forward_pre_hook(lambda _, x: (x[0].flatten(0, 1).index_select(0, batch.before)[None],)):
            logits = model(**batch.inputs).logits[0].float()
        log_probs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        # With a large vocabulary, each of these tensors takes more memory than the rest of the model.
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
    """Compute something for each token of the completions. Positions are counted from each text's first token.

    Args:
        compute: Takes a model and a forward pass; returns any number of tensors (N,), for its completions' tokens.
        ids: (B, L), prompts padded on the left followed by completions padded on the right.
        attention_mask: (B, L).
        length: Number of columns of the completions, which come last; less than L.
        batch_size: Maximum number of texts in a pass, unless they share a row; None for all.
        autocast: Makes the context of the forward passes, as `Accelerator.autocast` does.
        twice: Whether the backward pass computes each forward pass again, which takes less memory.

    Returns:
        As many tensors (B, `length`), 0 at padding.
    """
    passes = forward_passes(model, ids, attention_mask, length, batch_size)
    # Processes may have different numbers of passes, and DDP communicates in each pass through it.
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    # With one context for all passes, weights are cast only once.
    with autocast():
        parts = [compute(model, passes[0])]
        for batch in passes[1:]:
            parts.append(checkpoint(compute, inside, batch, use_reentrant=False) if twice else compute(inside, batch))
    places = torch.cat([batch.places for batch in passes])
    whole = (torch.cat(several) for several in zip(*parts, strict=True))
    return tuple(part.new_zeros(ids.shape[0] * length).scatter(0, places, part).view(-1, length) for part in whole)


def with_positions(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a model, wrapped or not, with the positions of its inputs if it accepts them."""
    if not accepts_argument(model, "position_ids"):
        return model

    def call(**inputs: Any) -> Any:
        return model(position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0), **inputs)

    return call


@dataclass
class Row:
    """A prompt of `size` tokens, then completions; lists have an entry per token, or per token of completions."""

    ids: list[int]
    size: int
    positions: list[int]
    # What each token belongs to: 0 is the prompt, 1 and up are the completions.
    owners: list[int]
    texts: int = 0
    # Position in the row of the token before each token of the completions, and `places` as in `ForwardPass`.
    before: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


def forward_passes(
    model: nn.Module, ids: Tensor, attention_mask: Tensor, length: int, batch_size: int | None
) -> list[ForwardPass]:
    """Lay out a batch, each text in one forward pass; the arguments are as for `over_passes`."""
    on_cpu, start = ids.device.type == "cpu", ids.shape[1] - length
    # Rows differ more in length if prompts are shared, which does not pay off in a single pass.
    shares = on_cpu and shares_prompts(model)
    by_prompt: dict[Any, list[tuple[list[int], int]]] = defaultdict(list)
    for text, (tokens, mask) in enumerate(zip(ids.tolist(), attention_mask.tolist(), strict=True)):
        prompt = tuple(tokens[start - sum(mask[:start]) : start])
        completion = tokens[start : start + sum(mask[start:])]
        by_prompt[prompt, 0 if shares else text].append((completion, text * length))
    rows: list[Row] = []
    for (prompt, _), completions in by_prompt.items():
        size, row = len(prompt), None
        for completion, place in sorted(completions, key=lambda completion: len(completion[0])):
            # After others, a completion costs attention over them. In a separate row, the prompt is computed again.
            if row is None or 2 * len(completion) * (len(row.ids) - size) > size * (size + ATTENTION_COSTS):
                row = Row(list(prompt), size, list(range(size)), [0] * size)
                rows.append(row)
            first, more = len(row.ids), len(completion)
            row.texts += 1
            row.ids += completion
            row.positions += range(size, size + more)
            row.owners += [row.texts] * more
            # The token before the first one of a completion is always the last one of the prompt.
            row.before += [size - 1, *range(first, first + more - 1)][:more]
            row.places += range(place, place + more)

    groups: list[list[Row]] = [[]]
    texts = batch_size or len(ids)
    for row in sorted(rows, key=lambda row: len(row.ids)):
        group = groups[-1]
        fits = not on_cpu or (len(group) + 1) * len(row.ids) <= CPU_TOKENS
        if group and not (fits and sum(other.texts for other in group) + row.texts <= texts):
            groups.append(group := [])
        group.append(row)

    def padded(lists: list[list[int]], padding: int = 0) -> Tensor:
        return pad_sequence([torch.tensor(values) for values in lists], True, padding).to(ids.device)

    positioned, dtype = accepts_argument(model, "position_ids"), next(model.parameters()).dtype
    passes = []
    for group in groups:
        owners = padded([row.owners for row in group], -1)
        inputs: dict[str, Tensor | bool] = {"input_ids": padded([row.ids for row in group]), "use_cache": False}
        inputs["attention_mask"] = (owners >= 0).long()
        if any(row.texts > 1 for row in group):
            of_prompt, same = owners[:, None, :] == 0, owners[:, None, :] == owners[:, :, None]
            seen = (of_prompt | same).tril()
            allowed = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
            inputs["attention_mask"] = allowed[:, None]
        if positioned:
            inputs["position_ids"] = padded([row.positions for row in group])
        before = [number * owners.shape[1] + place for number, row in enumerate(group) for place in row.before]
        drawn = [token for row in group for token in row.ids[row.size :]]
        places = [place for row in group for place in row.places]
        of_tokens = (torch.tensor(of, dtype=torch.long, device=ids.device) for of in (before, drawn, places))
        passes.append(ForwardPass(inputs, *of_tokens))
    return passes


def shares_prompts(model: nn.Module) -> bool:
    """Return whether a model, wrapped or not, can compute several completions after one prompt in a row.

    Its layers must see all tokens that the mask allows, and know their order only from the given positions.
    """
    config = extract_model_from_parallel(model).config.get_text_config()
    return (
        accepts_argument(model, "position_ids")
        and config._attn_implementation in ("eager", "sdpa")
        # ALiBi measures distances within the row, and GPT-Neo makes its own mask.
        and not getattr(config, "alibi", False)
        and not hasattr(config, "window_size")
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )
