"""Signals of commands that run other processes: none is lost, and no child outlives what has asked for it."""

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


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


@contextmanager
def child_process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """`subprocess.Popen(command, **options)` for a block: when it ends, by Ctrl-C too, the process is killed and waited for."""
    with interrupts_held() as answer, subprocess.Popen(command, **options) as process:
        try:
            answer()
            yield process
        finally:
            process.kill()
            process.wait()


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM wait until the function that this gives is called, and are as they were from then on.

    For the moment in which a process is started: an exception raised there would leave one that nobody knows of.
    """
    before: dict[int, Any] = {}
    arrived: list[tuple[int, Any]] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def answer() -> None:
        restore()
        for number, frame in arrived:
            before[number](number, frame)

    try:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals stay with their owner
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(handler := signal.getsignal(number)):  # not ignored, not the system's own
                    before[number] = handler
                    signal.signal(number, lambda *signalled: arrived.append(signalled))
        yield answer
    finally:
        restore()
