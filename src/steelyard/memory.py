"""Freed memory is kept for the next arrays of the same size."""

from __future__ import annotations

import ctypes
import os

MMAP_THRESHOLD = 1 << 28  # bytes: arrays below come from the heap; larger ones, such as weights, are mapped as before
TRIM_THRESHOLD = 1 << 30  # bytes free at the heap's end from which on they are given back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Ask the C library to keep up to 1 GiB of freed memory; whether it will.

    A training step makes and frees the same large arrays over and over. By default glibc returns them to the system
    each time, which then clears every page anew when it is first touched. Does nothing where the environment sets the
    allocator itself (`MALLOC_...`, `GLIBC_TUNABLES`) and where there is no glibc.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(set_option(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) and set_option(_M_TRIM_THRESHOLD, TRIM_THRESHOLD))
