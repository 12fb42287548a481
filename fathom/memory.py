"""What the C library does with memory that a training step frees."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt
_ALL, _AHEAD, _LARGE = -1, 1 << 24, 1 << 25  # bytes; glibc takes no larger _MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Keep what this process frees, in pieces of up to 32 MiB, for its next allocations, rather than give it back at once.

    A training step allocates the same tensors as the one before. Given back in between, each page is asked for, cleared and mapped again: up
    to a sixth of a step. The process then always holds what its largest step needs. Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for setting, value in ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _ALL), (_TOP_PAD, _AHEAD)):
        mallopt(setting, value)
