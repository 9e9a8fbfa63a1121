"""How the system's allocator treats memory that is freed."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory for what comes next, where it is glibc's.

    By default every array above 32 MiB comes from the system and goes back to it, page by page;
    a training step on a CPU then takes a tenth longer. The process keeps its largest size until
    it ends. Without effect elsewhere, or where the environment sets MALLOC_MMAP_MAX_ itself.

    Returns
    -------
    bool
        Whether it took effect.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_MAX_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another libc
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
