"""Shared runs of words, compared with a search by brute force."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.overlap import NgramIndex, ngrams, words

TEXTS = st.lists(st.sampled_from("abc"), max_size=8).map(" ".join)


def has_run(text: str, run: list[str]) -> bool:
    tokens = text.split()
    return any(tokens[start : start + len(run)] == run for start in range(len(tokens) - len(run) + 1))


@given(st.lists(TEXTS, max_size=4), TEXTS, st.integers(1, 5))
def test_an_overlap_is_a_shared_run_of_words_or_a_short_text_that_is_contained(
    indexed: list[str], text: str, n: int
) -> None:
    index = NgramIndex(n)
    index.add(indexed)
    expected = False
    for other in indexed:
        tokens = other.split()
        size = min(n, len(tokens))
        runs = [tokens[start : start + size] for start in range(len(tokens) - size + 1)] if size else []
        expected |= any(has_run(text, run) for run in runs)
    assert index.overlaps(text) == expected
    assert all(has_run(text, gram.split()) for _, gram in index.find(text))


def test_case_punctuation_and_white_space_do_not_count() -> None:
    assert words("The fox,  it's in_the\nDen: 12!") == ["the", "fox", "it", "s", "in_the", "den", "12"]
    index = NgramIndex(3)
    index.add(["A fox is red."])
    assert [gram for _, gram in index.find("so: a FOX\n(is) Red")] == ["a fox is", "fox is red"]
    assert not index.overlaps("a fox was red")


def test_words_are_whole() -> None:
    index = NgramIndex(2)
    index.add(["on top"])
    assert not index.overlaps("bacon topping")


def test_a_text_of_fewer_words_has_no_ngrams() -> None:
    assert list(ngrams(["a", "b"], 3)) == []
    assert list(ngrams(["a", "b", "c"], 3)) == [("a", "b", "c")]
    index = NgramIndex(8)
    index.add(["", "..."])
    assert not index.overlaps("anything at all")
