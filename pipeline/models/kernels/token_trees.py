"""Forward passes over the texts of a batch, without padding, in which equal beginnings are computed only once.

A batch as TRL has it, of two completions of one prompt and one of another (letters are tokens, `.` is padding):

    . p p | a a b .          p p a ─┬─ a b      a row of a forward pass:      p p a a b c
    . p p | a c . .    ──►          └─ c        (its positions)               0 1 2 3 4 3
    q q q | d d d d          q q q d d d d      another, in the same pass:    q q q d d d d

In a row, each token sees itself and what comes before it in its own texts. On a CPU, rows are grouped by length, and
padded to the longest one of their pass. Elsewhere each text is a row, and all are in one pass. Only rounding differs.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast

from pipeline.models.kernels.sampler import accepts_argument, unwrap
from pipeline.models.patches import replace_method

CPU_TOKENS = 768
"""Tokens in a forward pass on a CPU, enough to keep it busy. An accelerator takes the whole batch at once."""

ATTENTION_COSTS = 256
"""Row length at which attention takes about as long as everything else in a small model (less in a large one)."""


class ForwardPass(NamedTuple):
    """Part of a batch: arguments of the model, and the N tokens of the completions."""

    inputs: dict[str, Tensor | bool]
    # (N,), the positions in the flattened `input_ids` of the tokens of the completions, and of the tokens before them.
    own: Tensor
    before: Tensor
    # (N,), the tokens, and their positions in the flattened completions of the batch.
    tokens: Tensor
    places: Tensor


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
        compute: Takes a model and a forward pass; returns any number of tensors (N, ...), for its completions' tokens.
        ids: (B, L), prompts padded on the left followed by completions padded on either side.
        attention_mask: (B, L).
        length: Number of columns of the completions, which come last.
        batch_size: Maximum number of texts in a pass, unless they share a row; None for all.
        autocast: Makes the context of the forward passes, as `Accelerator.autocast` does.
        twice: Whether the backward pass computes each forward pass again, which takes less memory.

    Returns:
        As many tensors (B, `length`, ...), 0 at padding.
    """
    passes = forward_passes(model, ids, attention_mask, length, batch_size)
    # Processes may have different numbers of passes, and DDP communicates in each, so only the first goes through it.
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    # With one context for all passes, weights are cast only once.
    with autocast():
        parts = [compute(model, passes[0])]
        for batch in passes[1:]:
            parts.append(checkpoint(compute, inside, batch, use_reentrant=False) if twice else compute(inside, batch))
    places = torch.cat([batch.places for batch in passes])
    whole = []
    for several in zip(*parts, strict=True):
        part = torch.cat(several)
        flat = part.new_zeros(ids.shape[0] * length, *part.shape[1:]).index_copy_(0, places, part)
        whole.append(flat.unflatten(0, (-1, length)))
    return tuple(whole)


@dataclass
class Row:
    """Texts with a common beginning."""

    # The place in the row of each token, by the place of the token before it (-1 at the beginning) and its id.
    nodes: dict[tuple[int, int], int] = field(default_factory=dict)
    # The position of each of them in its texts.
    positions: list[int] = field(default_factory=list)
    # The places of the tokens of each text, by its number in the batch.
    paths: dict[int, list[int]] = field(default_factory=dict)


def forward_passes(
    model: nn.Module, ids: Tensor, attention_mask: Tensor, length: int, batch_size: int | None
) -> list[ForwardPass]:
    """Lay out a batch, each text in one forward pass; the arguments are as for `over_passes`."""
    on_cpu, start = ids.device.type == "cpu", ids.shape[1] - length
    # Rows differ more in length if beginnings are shared, which does not pay off in a single pass.
    shares = on_cpu and shares_beginnings(model)
    texts = [row[mask.bool()].tolist() for row, mask in zip(ids, attention_mask, strict=True)]
    sizes = attention_mask[:, :start].sum(1).tolist()
    begins = attention_mask[:, start:].int().argmax(1).tolist()
    rows, latest = [Row()], list[int]()
    # In this order, each text follows the one with which it has most in common.
    for number in sorted(range(len(texts)), key=texts.__getitem__):
        text, row = texts[number], rows[-1]
        differs = (place for place, (one, other) in enumerate(zip(latest, text, strict=False)) if one != other)
        shared = next(differs, min(len(latest), len(text))) if shares else 0
        # After others, a text costs attention over them. In a row of its own, its beginning is computed again.
        costs = 2 * (len(text) - shared) * (len(row.nodes) - shared)
        if row.paths and (not shared or costs > shared * (shared + ATTENTION_COSTS)):
            rows.append(row := Row())
            shared = 0
        node, path = -1, []
        for token in text:
            node = row.nodes.setdefault((node, token), len(row.nodes))
            path.append(node)
        row.positions += range(shared, len(text))
        row.paths[number], latest = path, text

    groups: list[list[Row]] = [[]]
    most = batch_size or len(texts)
    for row in sorted(rows, key=lambda row: len(row.nodes)):
        group = groups[-1]
        fits = not on_cpu or (len(group) + 1) * len(row.nodes) <= CPU_TOKENS
        if group and not (fits and sum(len(other.paths) for other in group) + len(row.paths) <= most):
            groups.append(group := [])
        group.append(row)

    def padded(lists: Iterable[Iterable[int]]) -> Tensor:
        return pad_sequence([torch.from_numpy(np.array([*values], np.int64)) for values in lists], True).to(ids.device)

    positioned, dtype = accepts_argument(model, "position_ids"), next(model.parameters()).dtype
    passes = []
    for group in groups:
        inputs: dict[str, Tensor | bool] = {"use_cache": False}
        inputs["input_ids"] = padded([token for _, token in row.nodes] for row in group)
        inputs["attention_mask"] = padded([1] * len(row.nodes) for row in group)
        if positioned:
            inputs["position_ids"] = padded(row.positions for row in group)
        width = max(len(row.nodes) for row in group)
        if any(len(row.paths) > 1 for row in group):
            seen = torch.zeros(len(group), width, width, dtype=torch.bool)
            causal = seen.new_ones(width, width).tril().numpy()
            for place, row in enumerate(group):
                for path in row.paths.values():
                    seen[place].numpy()[np.ix_(path, path)] = causal[: len(path), : len(path)]
            bias = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
            inputs["attention_mask"] = bias[:, None].to(ids.device)
        own, before, tokens, places = list[int](), list[int](), list[int](), list[int]()
        for place, row in enumerate(group):
            for number, path in row.paths.items():
                size, flat = sizes[number], [place * width + node for node in path]
                own += flat[size:]
                before += flat[size - 1 : -1] if size else []
                tokens += texts[number][size:]
                first = number * length + begins[number]
                places += range(first, first + len(path) - size)
        columns = (torch.tensor(of, dtype=torch.long, device=ids.device) for of in (own, before, tokens, places))
        passes.append(ForwardPass(inputs, *columns))
    return passes


def shares_beginnings(model: nn.Module) -> bool:
    """Return whether a model, wrapped or not, can compute several texts after their common beginning in one row.

    Its layers must see all tokens that the mask allows, and know their order only from the given positions.
    """
    config = unwrap(model).config.get_text_config()
    return (
        accepts_argument(model, "position_ids")
        and config._attn_implementation in ("eager", "sdpa")
        # ALiBi measures distances within the row, and GPT-Neo makes its own mask.
        and not getattr(config, "alibi", False)
        and not hasattr(config, "window_size")
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )


def share_beginnings(classifier: nn.Module, short: bool = False) -> bool:
    """Make a causal sequence classifier on a CPU, wrapped or not, compute its hidden states in such passes.

    They are 0 at padding. Return whether it does; other classifiers are left as they are. For `short` texts, of a few
    hundred tokens, plain products replace torch's attention: they are faster, but keep all scores in memory.
    """
    if not isinstance(model := unwrap(classifier), GenericForSequenceClassification) or model.device.type != "cpu":
        return False
    if short and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    body = getattr(model, model.base_model_prefix)
    # A new function with the signature of the body, which tells what it accepts.
    in_passes = wraps(type(body).forward)(lambda *args, **kwargs: _in_passes(*args, **kwargs))
    replace_method(body, "forward", in_passes, bind=True)
    return True


def _in_passes(body: Any, input_ids: Any = None, attention_mask: Tensor | None = None, **others: Any) -> Any:
    forward = partial(type(body).forward, body)
    # A critic that was copied from such a model gets the masks of passes, and sharded models move to a GPU later.
    plain = attention_mask is None or attention_mask.dim() != 2 or attention_mask.device.type != "cpu"
    if plain or input_ids is None or others.get("output_hidden_states"):
        return forward(input_ids, attention_mask=attention_mask, **others)

    (states,) = over_passes(
        lambda _, batch: (forward(**others | batch.inputs).last_hidden_state.flatten(0, 1)[batch.own],),
        *(body, input_ids, attention_mask, input_ids.shape[1], None, nullcontext),
    )
    return BaseModelOutputWithPast(last_hidden_state=states)
