"""What the C library does with memory that is freed: keep it, where it would be asked for again at once."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 64 * 2**20
# The most that glibc takes; larger blocks go back to the system as before.
_BLOCK_BYTES = 32 * 2**20
_ARENAS = 2


def keep_freed_memory() -> bool:
    """Have freed memory of tensors' size stay with the process; whether this C library can be told so.

    By default glibc gives blocks of some 100 KB and more back to the system when they are freed. A server frees and
    takes such blocks several times a request, and each time the kernel clears them and maps them page by page: 0.7 ms
    of a gRPC request with 600 KB each way. What is kept is bounded, for each of the few heaps.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    told = ((_M_MMAP_THRESHOLD, _BLOCK_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_ARENA_MAX, _ARENAS))
    return all([mallopt(parameter, value) == 1 for parameter, value in told])
