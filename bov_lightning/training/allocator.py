"""What training tells the C library about its memory."""

import ctypes
import sys

# Names and numbers from malloc.h of glibc.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""glibc accepts no more."""


def keep_freed_memory() -> None:
    """Has this process keep the memory that it frees, instead of giving it back to the system.

    Every step allocates the same tensors again, and each new page of one costs a page fault. Where
    the C library is not glibc, nothing changes.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    mallopt(M_TOP_PAD, 256 * 2**20)
    mallopt(M_TRIM_THRESHOLD, -1)
