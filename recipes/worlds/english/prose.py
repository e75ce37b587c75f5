"""The Brown corpus: tagged words turned into prose."""

import re
from collections.abc import Iterator
from pathlib import Path

from recipes.worlds.english.packages import read_members
from recipes.worlds.english.text import Document, plain


def read_brown(file: Path) -> Iterator[Document]:
    """Yield the 500 texts of the Brown corpus: `ca01` to `cr09`, whose second letter is the genre."""
    for name, text in read_members(file, "*/c[a-r][0-9][0-9]"):
        paragraphs = []
        # The/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' ./.
        for block in re.split(r"\n\s*\n", text):
            words = [token.rpartition("/")[0] for token in block.split()]
            if words:
                paragraphs.append(join_words(words))
        yield Document("brown", (name.rpartition("/")[2],), "\n".join(paragraphs))


def join_words(words: list[str]) -> str:
    """Return a text from its words and signs, with spaces only where prose has them.

    >>> join_words(["``", "No", "''", ",", "he", "said", "(", "twice", ")", "."])
    '"No", he said (twice).'
    """
    text = " ".join(words)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" ([,.;:!?)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    # A sentence that ends in two signs has them twice: "? ?".
    text = re.sub(r"([;?!])\1", r"\1", text)
    return plain(text)
