"""A Kneser-Ney n-gram model over token ids: what can be said about the next token by counting.

Interpolated, with one discount per order (Chen and Goodman 1999, "An empirical study of smoothing techniques for
language modeling", section 2.7 and equation 21). All n-grams of an order are one sorted array of integers:

    tokens                 bos  The  fox  is         as 12 bits each
    code of a 4-gram       bos << 36 | The << 24 | fox << 12 | is
    its context            code >> 12
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

BITS = 12
"""Bits of a token id, so that a 5-gram fits in 64 bits."""
START = 0
"""Id of the tokens before a document; no document contains it."""


@dataclass(frozen=True)
class Order:
    """The n-grams of one length.

    Attributes:
        codes: The n-grams, sorted, shape (n-grams,).
        counts: How often each occurs; below the highest order, before how many distinct tokens, shape (n-grams,).
        contexts: Their first n - 1 tokens, sorted and distinct, shape (contexts,).
        totals: Sum of the counts after each context, shape (contexts,).
        types: Number of distinct tokens after each context, shape (contexts,).
        discount: What is subtracted from each count.
    """

    codes: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    types: np.ndarray
    discount: float


class KneserNey:
    """An n-gram model of documents, which are sequences of ids from 1 to `vocab_size` - 1."""

    def __init__(self, documents: Iterable[Sequence[int]], vocab_size: int, order: int = 5) -> None:
        if vocab_size > 1 << BITS or order * BITS > 64:
            raise ValueError(f"{order} tokens of a vocabulary of {vocab_size} do not fit in 64 bits")
        self.vocab_size = vocab_size
        self.order = order
        codes, counts = np.unique(np.concatenate([self._codes(ids) for ids in documents]), return_counts=True)
        self.orders: list[Order] = []
        for length in range(order, 0, -1):
            self.orders.append(_order(codes, counts, length))
            # Below the highest order, an n-gram counts once for each token that it follows.
            if length > 1:
                codes, counts = np.unique(codes & _mask(length - 1), return_counts=True)

    def _codes(self, ids: Sequence[int]) -> np.ndarray:
        """Return the n-gram that ends at each token of a document, shape (tokens,)."""
        padded = np.array([START] * (self.order - 1) + list(ids), dtype=np.uint64)
        codes = np.zeros(len(ids), dtype=np.uint64)
        for place in range(self.order):
            codes = codes << np.uint64(BITS) | padded[place : place + len(ids)]
        return codes

    def loss(self, ids: Sequence[int]) -> float:
        """Return the negative log-likelihood of a document in nats, summed over its tokens."""
        if not len(ids):
            return 0.0
        return float(-np.log(self.probabilities(self._codes(ids))).sum())

    def probabilities(self, codes: np.ndarray) -> np.ndarray:
        """Return the probability of the last token of each n-gram after the tokens before it, shape (n-grams,)."""
        # Every id but START, which comes after nothing.
        probabilities = np.full(len(codes), 1 / (self.vocab_size - 1))
        for length in range(1, self.order + 1):
            grams = self.orders[self.order - length]
            suffix = codes & _mask(length)
            counts = _look_up(grams.codes, grams.counts, suffix)
            context = suffix >> np.uint64(BITS)
            totals = _look_up(grams.contexts, grams.totals, context)
            types = _look_up(grams.contexts, grams.types, context)
            seen = totals > 0
            discounted = np.maximum(counts - grams.discount, 0) + grams.discount * types * probabilities
            # After a context that was never seen, the shorter one decides.
            probabilities[seen] = discounted[seen] / totals[seen]
        return probabilities


def _mask(length: int) -> np.uint64:
    """Return the bits of the last tokens of a code."""
    return np.uint64((1 << length * BITS) - 1)


def _order(codes: np.ndarray, counts: np.ndarray, length: int) -> Order:
    contexts, starts = np.unique(codes >> np.uint64(BITS), return_index=True)
    totals = np.add.reduceat(counts, starts)
    types = np.diff(np.append(starts, len(codes)))
    once, twice = (int((counts == times).sum()) for times in (1, 2))
    discount = once / (once + 2 * twice) if once else 0.5
    return Order(codes, counts, contexts, totals, types, discount)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key, and 0 for a key that is not there."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
