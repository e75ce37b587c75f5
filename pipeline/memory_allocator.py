"""Memory that training frees and needs again at once stays with the process.

glibc gives every large block back to the kernel when it is freed, and the kernel clears the pages of the next one:
for small models on a CPU this costs up to a third of the time of a training step.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

from pipeline.hardware import Choice

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
NEVER_TRIM = 2**31 - 1
"""Bytes that must be free at the end of the heap before they are given back: the most that `mallopt` takes."""
LARGEST_KEPT = (2**30, 2**25)
"""Bytes from which on a block is taken from the kernel and given back to it. Older releases refuse the first."""
OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables by which a user has decided otherwise."""


@cache
def keep_freed_memory() -> Choice:
    """Tell the allocator to keep what is freed, where it is glibc's and nobody has told it anything else.

    The process then holds its peak until it ends. The peak itself is higher: by a few percent in the recipes, by a
    third where the sizes of batches differ much.

    Returns:
        Whether freed memory is kept, and why.
    """
    if platform.libc_ver()[0] != "glibc":
        return Choice(False, "not glibc's allocator")
    if told := [name for name in OWN_SETTINGS if name in os.environ]:
        return Choice(False, f"{told[0]} is set")
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_TRIM_THRESHOLD, NEVER_TRIM) and any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT)
    return Choice(bool(kept), "glibc would clear its pages anew in every step" if kept else "the allocator refused")
