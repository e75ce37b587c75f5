"""The n-gram model that stage 1 of recipes/english is compared with."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.english.ngrams import BITS, KneserNey

VOCAB = 9
DOCUMENTS = st.lists(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=30)


def after(context: list[int]) -> np.ndarray:
    """Return the 5-grams of each token after four others."""
    code = 0
    for token in context:
        code = code << BITS | token
    return np.array([code << BITS | token for token in range(1, VOCAB)], dtype=np.uint64)


@given(DOCUMENTS, st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_probabilities_sum_to_one(documents: list[list[int]], context: list[int]) -> None:
    probabilities = KneserNey(documents, VOCAB).probabilities(after(context))
    assert probabilities.min() > 0
    assert probabilities.sum() == pytest.approx(1)


def test_a_token_that_followed_before_is_expected() -> None:
    model = KneserNey([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 6, 7]], VOCAB)
    assert model.loss([1, 2, 3, 4, 5]) < model.loss([1, 2, 3, 4, 7])
    assert model.loss([]) == 0


def test_a_bigram_model_is_counted_by_hand() -> None:
    # Bigrams: start a, a b (twice), b a: of the three, two occur once and one twice, so that the discount is 2 / 4.
    model = KneserNey([[1, 2, 1, 2]], VOCAB, order=2)
    # The token 2 follows one token, and the token 1 two: unigrams are (1 - d) / 3 and (2 - d) / 3, where one of the two
    # counts is 1 and one is 2, so that d is 1 / 3; what is taken from both is shared by all 8 tokens.
    unigram = (1 - 1 / 3) / 3 + 2 * (1 / 3) / 3 / 8
    bigram = (2 - 1 / 2) / 2 + (1 / 2) * 1 / 2 * unigram
    assert model.probabilities(np.array([1 << BITS | 2], dtype=np.uint64))[0] == pytest.approx(bigram)
    assert model.loss([1, 2]) < math.log(VOCAB - 1) * 2
