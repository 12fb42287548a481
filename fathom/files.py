"""Files that appear whole or not at all, and folders that one process holds. Everything that outlives a process is written through here."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fathom.errors import CheckpointError, FathomError


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and vanishes when it does not.

    A full disk or a missing permission becomes a CheckpointError that names `path`; what stood there before stays.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        if path.exists():
            os.replace(path, replaced)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically; CheckpointError names the path if it cannot be written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: str | Path, refusal: str = "") -> Iterator[None]:
    """Hold a folder for this process as long as the block lasts; FathomError, with `refusal` for its text, where another one holds it.

    The lock ends with the process, however it ends. Where the file system knows no locks nothing is guarded. CheckpointError for a
    folder that cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FathomError(refusal or f"another process works in {folder}; wait for it or stop it, or choose another folder") from None
        except OSError:
            pass
        yield


def remove_folder(path: Path) -> None:
    """Delete a folder; under its name it is there whole or not at all, whenever the process ends."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a rename never outruns the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
