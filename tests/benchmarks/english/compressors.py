"""Compressors as language models: the bytes that a text takes, alone or after a program has read other text."""

import lzma
from collections.abc import Sequence

MEMORY = 1 << 31
"""Bytes that PPMd may use, so that it never starts afresh."""
ORDER = 12
"""Bytes of context. On the validation text, after the training text, 6 and 8 were worse."""


def joined(texts: Sequence[str]) -> bytes:
    """Return texts as one file: the line break after each is a byte of it, and is paid for."""
    return "".join(f"{text}\n" for text in texts).encode()


def xz(text: bytes) -> int:
    """Return the bytes that `xz -9` needs for a text."""
    return len(lzma.compress(text, preset=9))


def ppmd(text: bytes, before: bytes = b"") -> int:
    """Return the bytes that PPMd (variant H) needs for a text after the text before it."""
    return _ppmd(before + text) - (_ppmd(before) if before else 0)


def _ppmd(text: bytes) -> int:
    # Imported here so that `--help` works without the package, which no other part of the project needs.
    import pyppmd

    encoder = pyppmd.Ppmd7Encoder(ORDER, MEMORY)
    return len(encoder.encode(text)) + len(encoder.flush())
