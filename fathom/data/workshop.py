"""Where a corpus is made: a hidden folder beside the result, with finished parts that a later attempt takes over.

A part is a folder that appears when it is whole (`files.new_folder`) and says by a key what it was made from. One
process at a time works here; parts may be made by several processes of its own.
"""

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path

from fathom.errors import DataError, FathomError
from fathom.files import alone_in

Job = tuple[Path, Callable[..., None], tuple]  # the part's folder, and what makes it: function(folder, *arguments)


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """The work folder of `out`, this process's alone; what a killed one left unfinished is cleared away first."""
    folder = out.with_name(f".{out.name}.work")
    try:
        with alone_in(folder, f"another process prepares {out}; wait for it, or choose another out"):
            for left in (*folder.glob(".*.partial"), *folder.glob(".*.replaced"), *out.parent.glob(f".{out.name}.*.partial")):
                shutil.rmtree(left, ignore_errors=True)
            yield folder
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; choose another out") from error


def finished(folder: Path, key: str) -> bool:
    """Whether a part stands there, made from what `key` stands for."""
    try:
        return json.loads((folder / "part.json").read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, KeyError):
        return False


def make_parts(jobs: Sequence[Job], workers: int, watch: Callable[[list[Path]], None]) -> None:
    """Make the parts of all jobs, `workers` at a time; the result does not depend on their number.

    `watch` is called now and then with the unfinished folders, to show progress. The first error ends all others; so does
    the end of this process, however it ends.
    """
    if workers == 1:
        for folder, make, arguments in jobs:
            watch([folder])
            make(folder, *arguments)
        return
    context, waiting, running = multiprocessing.get_context("spawn"), list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                folder, make, arguments = waiting.pop(0)
                ours, theirs = context.Pipe()
                process = context.Process(target=_make, args=(theirs, os.getpid(), make, folder, arguments), daemon=True)
                process.start()
                theirs.close()
                running[process.sentinel] = (process, ours, folder)
            for sentinel in wait(list(running), timeout=0.5):
                process, ours, folder = running.pop(sentinel)
                process.join()
                if error := _result(ours, process.exitcode, folder):
                    raise error
            watch([folder for _, _, folder in running.values()])
    finally:
        for process, _, _ in running.values():
            process.terminate()
            process.join()


def unfinished_bytes(folder: Path) -> int:
    """Bytes that have been written to a part so far, by whichever process makes it."""
    size = 0
    for partial in folder.parent.glob(f".{folder.name}.*.partial"):
        for file in partial.rglob("*"):
            try:
                size += file.stat().st_size if file.is_file() else 0
            except OSError:
                pass  # renamed meanwhile
    return size


def _result(pipe: Connection, code: int, folder: Path) -> Exception | None:
    """What a process ended with: nothing, the error of what a user caused, or a report that it died."""
    try:
        outcome = pipe.recv() if pipe.poll() else DataError(
            f"the process that made {folder.name} ended with code {code}; out of memory? Try again with workers=1")
    except EOFError:
        outcome = DataError(f"the process that made {folder.name} was killed (code {code}); out of memory? Try again with workers=1")
    return outcome


def _make(pipe: Connection, parent: int, make: Callable[..., None], folder: Path, arguments: tuple) -> None:
    """The life of a process: make one part, say how it went, and do not outlive the parent."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        make(folder, *arguments)
        pipe.send(None)
    except FathomError as error:
        pipe.send(error)
    except KeyboardInterrupt:
        pipe.send(DataError("stopped"))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
