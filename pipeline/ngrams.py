"""Word n-grams: whether texts share runs of words (the usual test for contamination; Brown et al. 2020, appendix C)."""

import re
from collections.abc import Iterable, Iterator

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-cased words of a text; punctuation and white space do not count."""
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int) -> Iterator[str]:
    """The n-grams of a text, words joined by a space. A text of fewer than `n` words has none."""
    tokens = words(text)
    return (" ".join(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


class NgramIndex:
    """The n-grams of a set of texts, to look other texts up in.

    A text of fewer than `n` words is indexed whole, and overlaps with every text that contains it.

    Args:
        n (`int`): words of an n-gram.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._grams: dict[int, set[str]] = {n: set()}

    def add(self, texts: Iterable[str]) -> None:
        """Adds the n-grams of `texts`."""
        for text in texts:
            size = min(self.n, len(words(text)))
            if size:
                self._grams.setdefault(size, set()).update(ngrams(text, size))

    def shared(self, text: str) -> Iterator[str]:
        """The indexed n-grams that `text` contains, in order, shorter indexed texts last."""
        for size, grams in self._grams.items():
            yield from (gram for gram in ngrams(text, size) if gram in grams)

    def overlaps(self, text: str) -> bool:
        """Whether `text` shares an n-gram with, or contains, an indexed text."""
        return next(self.shared(text), None) is not None
