"""Keep the memory that a training step frees for the next step, which makes steps on a CPU faster."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's mallopt parameters M_TRIM_THRESHOLD and M_MMAP_MAX
KEPT = 1 << 30  # bytes at the end of the heap that are not returned to the system


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks in its heap instead of returning each to the system. Return whether it does.

    By default glibc maps every large block again, and the system clears its pages at first use. Measured on 2 cores, this
    takes a quarter to a third of a convolutional network's step. The setting holds for the rest of the process. Other C
    libraries keep their settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, KEPT))
