"""What a server's memory allocator and garbage collector have to be told."""

from __future__ import annotations

import ctypes
import gc

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_ARENA_MAX = -8
# Each may keep as much as is kept at all; threads beyond the first have to share one.
_ARENAS = 2
# glibc takes no more than 32 MiB on machines of 64 bits.
_KEPT_BYTES = 128 * 2**20
_HEAP_BYTES = 32 * 2**20


def keep_freed_memory() -> bool:
    """Have the allocator of this process keep some of what is freed, for the next request.

    glibc gives large blocks back to the system at once, and each request then pays for their pages anew: for a tensor
    of 600 KB that is more than half of all its processor time in the server. Up to 128 MiB stay with the process.

    It would also give each thread that allocates a heap of its own, eight times as many as there are cores, each of
    which keeps what it once needed: under load, memory grows for as long as another thread meets its largest request.

    Returns:
        Whether the allocator is one that can be told (glibc's).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    told = ((_MMAP_THRESHOLD, _HEAP_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES), (_ARENA_MAX, _ARENAS))
    return all([mallopt(*option) for option in told])


def set_what_stays_aside() -> None:
    """Keep what is there now, modules above all, from being looked through and counted by the garbage collector.

    CPython collects what has lived for long only once that has grown by a quarter. A server's modules are hundreds of
    thousands of objects, so that as many more could gather that nobody can reach, with the tensors that they hold.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # by what is left of this one it is decided when the next is due
