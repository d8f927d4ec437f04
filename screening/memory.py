"""How a process that works on images keeps its memory."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

_KEPT = 2**30  # bytes of freed memory at most


def keep_freed_memory() -> None:
    """Keep freed arrays for the next ones instead of giving them back to the system, where the C library can.

    A plane's worth of fresh memory is a thousand page faults and more, which cost as much as the operations on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
    # By default it maps large arrays each by itself, and unmaps them when they are freed.
    mallopt(_M_MMAP_MAX, 0)
    # Threads that decode in turns would each keep memory of their own.
    mallopt(_M_ARENA_MAX, 1)
