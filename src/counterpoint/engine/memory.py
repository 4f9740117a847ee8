"""Memory that a training step frees, kept for the next one: fewer pages asked of the system, and so faster steps on a CPU."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's mallopt parameters M_TRIM_THRESHOLD and M_MMAP_MAX
KEPT = 1 << 30  # bytes at the end of the heap that are not given back


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks in its heap instead of returning each to the system; return whether it does.

    By default glibc maps every large block anew, and the system clears its pages at first use: measured on 2 cores, a quarter to
    a third of a convolutional network's step. It holds for the process from then on. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, KEPT))
