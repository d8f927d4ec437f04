"""How a process that works on images keeps its memory."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_LARGEST_KEPT = 2**25  # bytes: glibc takes no more
_KEPT = 2**30  # bytes of freed memory at most


def keep_freed_memory() -> None:
    """Keep freed arrays for the next ones instead of giving them back to the system, where the C library can.

    An image's worth of fresh memory is a thousand page faults, which cost more than most operations on it: without
    this a plane's segmentation takes half as long again (``benchmarks/site.py``).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
