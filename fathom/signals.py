"""Termination signals for commands that run other processes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, as Ctrl-C does: children are asked to save and waited for, whoever asks."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: signals stay with their owner
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
