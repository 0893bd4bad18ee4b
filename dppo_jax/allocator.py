"""glibc's allocator, told to keep freed memory: XLA on CPU frees and asks anew at every step.

Without this each temporary buffer is unmapped, mapped and zeroed by the kernel page by page.
"""

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Takes buffers from one heap that never shrinks; does nothing where there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_TOP_PAD, 64 * 2**20)
    mallopt(_ARENA_MAX, 1)
