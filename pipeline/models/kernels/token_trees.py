"""Forward passes over the texts of a batch, without padding, in which equal beginnings are computed only once.

A batch as TRL has it, of two completions of one prompt and one of another (letters are tokens, `.` is padding):

    . p p | a a b .          p p a ─┬─ a b      a row of a forward pass:      p p a a b c
    . p p | a c . .    ──►          └─ c        (its positions)               0 1 2 3 4 3
    q q q | d d d d          q q q d d d d      another, in the same pass:    q q q d d d d

In a row, each token sees itself and what comes before it in its own texts. On a CPU, rows are grouped by length, and
padded to the longest one of their pass. Elsewhere each text is a row, and all are in one pass. Only rounding differs.
"""

from collections.abc import Callable, Iterable, Sequence
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
    """Part of a batch: arguments of the model, and where the N tokens of the completions are."""

    inputs: dict[str, Tensor | bool]
    # (N,), the positions of these tokens in the flattened `input_ids`.
    positions: Tensor
    # (N,), the positions there of the tokens before them, whose hidden states predict them.
    predecessors: Tensor
    # (N,), the tokens.
    tokens: Tensor
    # (N,), their places in the flattened completions of the batch.
    places: Tensor


def compute_in_passes(
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
        compute: Function of a model and a forward pass that returns any number of tensors (N, ...), one value for each
            of the pass's N tokens.
        model: A model, wrapped or not. It goes to `compute`.
        ids: (B, L), prompts padded on the left followed by completions padded on either side.
        attention_mask: (B, L).
        length: Number of columns of the completions, which come last.
        batch_size: Maximum number of texts in a pass, unless they share a row; None for all.
        autocast: Makes the context of the forward passes, as `Accelerator.autocast` does.
        twice: Whether the backward pass computes each forward pass again, which needs less memory.

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
    # Put the values of all passes where their tokens are in the batch.
    places = torch.cat([batch.places for batch in passes])
    results = []
    for values_of_passes in zip(*parts, strict=True):
        values = torch.cat(values_of_passes)
        flat = values.new_zeros(ids.shape[0] * length, *values.shape[1:]).index_copy_(0, places, values)
        results.append(flat.unflatten(0, (-1, length)))
    return tuple(results)


@dataclass
class Row:
    """Texts with a common beginning.

    With `p p a a b` and `p p a c`, which are texts 0 and 1 of the batch:

    row          p p a a b c
    nodes        {(-1, p): 0, (0, p): 1, (1, a): 2, (2, a): 3, (3, b): 4, (2, c): 5}
    positions    0 1 2 3 4 3
    paths        {0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 5]}
    """

    # The place in the row of each token, by the place of the token before it (-1 at the beginning) and its id.
    nodes: dict[tuple[int, int], int] = field(default_factory=dict)
    # The position of each of them in its texts.
    positions: list[int] = field(default_factory=list)
    # The places of the tokens of each text, by its number in the batch.
    paths: dict[int, list[int]] = field(default_factory=dict)

    def add(self, number: int, text: Sequence[int], shared: int) -> None:
        """Add text `number` of the batch, of which the row has the first `shared` tokens already."""
        node = -1
        path = []
        for token in text:
            node = self.nodes.setdefault((node, token), len(self.nodes))
            path.append(node)
        self.positions += range(shared, len(text))
        self.paths[number] = path


@dataclass
class Texts:
    """The texts of a batch, without padding."""

    tokens: list[list[int]]
    # Number of tokens of each prompt.
    prompt_lengths: list[int]
    # The columns of the batch in which the completions begin, counted from the first column of completions.
    begins: list[int]


def forward_passes(
    model: nn.Module, ids: Tensor, attention_mask: Tensor, length: int, batch_size: int | None
) -> list[ForwardPass]:
    """Lay out a batch, each text in one forward pass; the arguments are as for `compute_in_passes`."""
    on_cpu = ids.device.type == "cpu"
    start = ids.shape[1] - length
    texts = Texts(
        tokens=[row[mask.bool()].tolist() for row, mask in zip(ids, attention_mask, strict=True)],
        prompt_lengths=attention_mask[:, :start].sum(1).tolist(),
        begins=attention_mask[:, start:].int().argmax(1).tolist(),
    )
    # Rows differ more in length if beginnings are shared, which does not pay off in a single pass.
    rows = arrange_rows(texts.tokens, on_cpu and shares_beginnings(model))
    groups = group_rows(rows, batch_size or len(texts.tokens), CPU_TOKENS if on_cpu else None)
    has_positions = accepts_argument(model, "position_ids")
    dtype = next(model.parameters()).dtype
    return [build_pass(group, texts, length, has_positions, dtype, ids.device) for group in groups]


def arrange_rows(texts: Sequence[list[int]], share: bool) -> list[Row]:
    """Put texts into rows. With `share`, those with a common beginning share one if that saves work."""
    rows = [Row()]
    previous: list[int] = []
    # In this order, each text follows the one with which it has most in common.
    for number in sorted(range(len(texts)), key=texts.__getitem__):
        text = texts[number]
        row = rows[-1]
        shared = _common_length(previous, text) if share else 0
        # After the others of the row, a text costs attention over them. In a row of its own, its beginning is computed
        # again.
        costs = 2 * (len(text) - shared) * (len(row.nodes) - shared)
        if row.paths and (shared == 0 or costs > shared * (shared + ATTENTION_COSTS)):
            row = Row()
            rows.append(row)
            shared = 0
        row.add(number, text, shared)
        previous = text
    return rows


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens with which both texts begin."""
    for length, (first_token, second_token) in enumerate(zip(first, second, strict=False)):
        if first_token != second_token:
            return length
    return min(len(first), len(second))


def group_rows(rows: Sequence[Row], most_texts: int, most_tokens: int | None) -> list[list[Row]]:
    """Divide rows among forward passes, sorted by length, so that little is padded.

    A pass has at most `most_texts` texts and `most_tokens` tokens with padding (None: any number), or a single row.
    """
    groups: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.nodes)):
        group = groups[-1]
        # The rows are sorted, so this one is the longest of its pass.
        tokens = (len(group) + 1) * len(row.nodes)
        texts = sum(len(member.paths) for member in group) + len(row.paths)
        if group and (texts > most_texts or (most_tokens is not None and tokens > most_tokens)):
            group = []
            groups.append(group)
        group.append(row)
    return groups


def build_pass(
    group: Sequence[Row], texts: Texts, length: int, has_positions: bool, dtype: torch.dtype, device: torch.device
) -> ForwardPass:
    """Return the forward pass over the rows of a group.

    Args:
        group: Rows, padded to the longest one.
        texts: The texts of the batch.
        length: Number of columns of the completions in the batch.
        has_positions: Whether the model accepts `position_ids`.
        dtype: Of the mask, if rows have several texts.
        device: Of all tensors.
    """

    def padded(lists: Iterable[Iterable[int]]) -> Tensor:
        return pad_sequence([torch.from_numpy(np.array([*values], np.int64)) for values in lists], True).to(device)

    inputs: dict[str, Tensor | bool] = {"use_cache": False}
    inputs["input_ids"] = padded([token for _, token in row.nodes] for row in group)
    if any(len(row.paths) > 1 for row in group):
        inputs["attention_mask"] = tree_mask(group, dtype).to(device)
    else:
        inputs["attention_mask"] = padded([1] * len(row.nodes) for row in group)
    if has_positions:
        inputs["position_ids"] = padded(row.positions for row in group)

    width = max(len(row.nodes) for row in group)
    positions: list[int] = []
    predecessors: list[int] = []
    tokens: list[int] = []
    places: list[int] = []
    for row_number, row in enumerate(group):
        for number, path in row.paths.items():
            flat = [row_number * width + node for node in path]
            size = texts.prompt_lengths[number]
            positions += flat[size:]
            # Nothing predicts the first token of a text without a prompt.
            if size > 0:
                predecessors += flat[size - 1 : -1]
            tokens += texts.tokens[number][size:]
            first = number * length + texts.begins[number]
            places += range(first, first + len(path) - size)
    columns = [
        torch.tensor(column, dtype=torch.long, device=device) for column in (positions, predecessors, tokens, places)
    ]
    return ForwardPass(inputs, *columns)


def tree_mask(group: Sequence[Row], dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of attention, shape (rows, 1, longest row, longest row).

    It is 0 where a token sees another one, which is of one of its own texts and not after it, else the lowest number.
    """
    width = max(len(row.nodes) for row in group)
    visible = torch.zeros(len(group), width, width, dtype=torch.bool)
    causal = visible.new_ones(width, width).tril().numpy()
    for row_number, row in enumerate(group):
        for path in row.paths.values():
            visible[row_number].numpy()[np.ix_(path, path)] = causal[: len(path), : len(path)]
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return bias[:, None]


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
    model = unwrap(classifier)
    if not isinstance(model, GenericForSequenceClassification) or model.device.type != "cpu":
        return False
    if short and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    body = getattr(model, model.base_model_prefix)
    # A new function with the signature of the body, which tells what it accepts.
    in_passes = wraps(type(body).forward)(lambda *args, **kwargs: _in_passes(*args, **kwargs))
    replace_method(body, "forward", in_passes, bind=True)
    return True


def _in_passes(body: Any, input_ids: Any = None, attention_mask: Tensor | None = None, **options: Any) -> Any:
    """Compute the hidden states of a batch in forward passes, instead of by the forward method of a model's body.

    Call that method itself for inputs that it has to see as they are.
    """
    forward = partial(type(body).forward, body)
    # A critic that was copied from such a model gets the masks of passes, and sharded models move to a GPU later.
    is_plain = attention_mask is None or attention_mask.dim() != 2 or attention_mask.device.type != "cpu"
    if is_plain or input_ids is None or options.get("output_hidden_states"):
        return forward(input_ids, attention_mask=attention_mask, **options)

    def hidden_states(_: nn.Module, batch: ForwardPass) -> tuple[Tensor]:
        states = forward(**options | batch.inputs).last_hidden_state
        return (states.flatten(0, 1)[batch.positions],)

    # All tokens count as those of completions.
    length = input_ids.shape[1]
    (states,) = compute_in_passes(hidden_states, body, input_ids, attention_mask, length, None, nullcontext)
    return BaseModelOutputWithPast(last_hidden_state=states)
