"""What the C library does with memory that a training step frees."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt
_KEPT, _AHEAD, _LARGE = 1 << 27, 1 << 24, 1 << 25  # bytes; glibc takes no larger _MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Keep up to 128 MiB of what this process frees, for its next allocations, rather than give it back at once.

    A training step allocates the same tensors as the one before. Given back in between, each page is asked for, cleared and mapped again: a
    tenth of a step of a small model. Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for setting, value in ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _AHEAD)):
        mallopt(setting, value)
