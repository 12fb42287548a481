"""The prefix cache's records on disk: there again after a restart, checked before use, and never a reason to stop serving.

A record is some named tensors and a few bytes of `meta`. It has a file of its own, named by a hash of what the record stands for:

    folder / digest of the model / first two letters of the name / name.kind
    magic, the header's length and digest | header: JSON, padded | the tensors' bytes, each padded to ALIGNMENT

Every byte is covered by the magic or by a digest, and the header says where the file belongs, so damage, a cut and a swap of two
files are all found out. Files are written beside their place, synced and renamed: they appear whole or not at all. The folder is
the only truth, the index in memory is read from it, and several processes may share it. Files are read rather than mapped,
because a mapping turns a bad sector, or a file that somebody cuts short, into SIGBUS.
"""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.errors import InputError
from fathom.files import sync as sync_folder

KINDS = ("block", "state")
QUEUE_BYTES = 256 << 20  # of records that wait to be written; more are skipped
FAILURES = 3  # in a row, after which writing rests
REST_SECONDS = 60.0
CLOSE_SECONDS = 30.0  # that close() waits for the queue
LOG_SECONDS = 60.0  # between two lines in the log
STALE_SECONDS = 3600.0  # after which a temporary file has no owner, whichever process has its number now
SCAN_SHARE = 16  # the folder is read again when this part of the budget has been written

MAGIC = b"FATHKV01"
PREFIX = struct.Struct("<8sQ16s")  # magic; the header's length and digest
ALIGNMENT = 64
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}

_NAME = re.compile(r"[0-9a-f]{8,128}")
_MODEL, _SHARD = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{2}")
_TEMPORARY = re.compile(r"\.tmp-([0-9]{1,9})-[0-9a-f]{16}")
_OURS = re.compile(rf"{_NAME.pattern}\.(?:{'|'.join(KINDS)})|{_TEMPORARY.pattern}")
_MALFORMED = ValueError, TypeError, KeyError, OverflowError, RuntimeError  # what reading wrong contents may raise

_log = logging.getLogger(__name__)


class _Job(NamedTuple):
    records: dict[str, Tensor]
    meta: bytes
    nbytes: int


class DiskCache:
    """At most `max_bytes` of records in `folder`, the least recently used removed first, whichever model they belong to.

    `fingerprint` is any text that changes with everything the records depend on; records of another are never seen. Several
    processes on one folder may pass the budget by a sixteenth for each after the first. `sync` waits for the disk before a
    record counts as written. InputError if the folder cannot be made or used; after that only wrong arguments raise.
    `errors` counts failed writes and reads, `dropped` damaged files that were removed, `skipped` records that were not
    written because the queue was full, writing rested, or they alone pass the budget.
    """

    def __init__(self, folder: Path, max_bytes: int, fingerprint: str, sync: bool = True):
        self.folder, self.max_bytes, self.sync = Path(folder), max_bytes, sync
        self.nbytes = self.errors = self.dropped = self.skipped = 0  # nbytes: of all files known, other models' included
        self._model = _digest(fingerprint.encode())
        self._changed = threading.Condition()  # guards what two threads change
        self._index: dict[str, int] = {}  # bytes of each file by its place in the folder, least recently used first
        self._jobs: dict[str, _Job] = {}  # the one being written, then those that wait
        self._job_bytes = self._unscanned = self._failures = 0
        self._reason, self._rest_until, self._logged, self._closed = "", -math.inf, -math.inf, False
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._scan()
        except OSError as error:
            raise InputError(f"cannot keep a cache in {folder}: {_one_line(error)}; name a folder that can be written") from error
        self._writer = threading.Thread(target=self._work, name="disk-cache", daemon=True)
        self._writer.start()

    @property
    def disabled(self) -> str | None:
        """Why nothing is written at present; None while writing works."""
        return self._reason if time.monotonic() < self._rest_until else None

    def put(self, kind: str, name: str, records: dict[str, Tensor], meta: bytes = b"") -> None:
        """Hand a record over to be written in the background; the tensors must not change from now on.

        `name` is a hash, in hex, of all that determines the record; so a record that exists is only marked as used.
        """
        key = self._key(kind, name)
        for part, tensor in records.items():
            if tensor.dtype not in DTYPES.values():
                raise InputError(f"record {part!r} is of {tensor.dtype}, which the cache on disk does not store")
        job = _Job(records, meta, sum(tensor.nbytes for tensor in records.values()) + len(meta))
        with self._changed:
            if key in self._jobs:
                return
            full = self._jobs and self._job_bytes + job.nbytes > QUEUE_BYTES
            if full or self._closed or self.disabled or job.nbytes > self.max_bytes:
                self.skipped += 1
                return
            self._jobs[key] = job
            self._job_bytes += job.nbytes
            self._changed.notify_all()

    def get(self, kind: str, name: str) -> tuple[dict[str, Tensor], bytes] | None:
        """A record's tensors, in memory of their own, and its meta; None if there is none, or none that is whole."""
        key = self._key(kind, name)
        try:
            handle = os.open(self.folder / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = _decode(handle, key)
            finally:
                os.close(handle)
            self._touch(key)
            return found
        except (FileNotFoundError, NotADirectoryError):
            self._forget(key)
        except OSError as error:
            self._forget(key)
            self._count("errors", f"reading failed: {_one_line(error)}")
        except _MALFORMED as error:
            with suppress(OSError):
                os.unlink(self.folder / key)
            self._forget(key)
            self._count("dropped", f"a damaged file was removed: {_one_line(error)}")
        return None

    def contains(self, kind: str, name: str) -> bool:
        """Whether a record is known to be on disk. Only `get` can tell that it is whole."""
        with self._changed:
            return self._key(kind, name) in self._index

    def keys(self, kind: str) -> list[str]:
        """Names of this model's records on disk, the least recently used first."""
        start, end = f"{self._model}/", f".{kind}"
        with self._changed:
            return [key[len(start) + 3:-len(end)] for key in self._index if key.startswith(start) and key.endswith(end)]

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to write; False if `timeout` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout)

    def close(self) -> None:
        """Write what is left, for CLOSE_SECONDS at most, and take no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writer.join(CLOSE_SECONDS)

    # ---- writing, in the background

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                key, job = next(iter(self._jobs.items()))
            try:
                if self.disabled:
                    self._count("skipped")
                elif not self._touch(key):
                    self._write(key, job)
            except Exception as error:  # a full disk, a device that fails: whatever it is, serving goes on
                self._failures += 1
                if self._failures >= FAILURES:
                    self._reason, self._rest_until = _one_line(error), time.monotonic() + REST_SECONDS
                self._count("errors", f"writing failed: {_one_line(error)}")
            with self._changed:
                del self._jobs[key]
                self._job_bytes -= job.nbytes
                self._changed.notify_all()

    def _write(self, key: str, job: _Job) -> None:
        content = _encode(key, job)
        if len(content) > self.max_bytes:
            self._count("skipped")
            return
        self._make_room(len(content))
        path = self.folder / key
        for folder in (self.folder, path.parent.parent, path.parent):
            folder.mkdir(0o700, exist_ok=True)
        temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
        try:
            _write_file(temporary, content, self.sync)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._touch(key)
        self._unscanned += len(content)
        if self.sync:
            sync_folder(path.parent)
        self._failures = 0

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files until `size` bytes fit into the budget; one process at a time."""
        scan_due = self._unscanned > self.max_bytes // SCAN_SHARE
        if not scan_due and self.nbytes + size <= self.max_bytes:
            return
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if scan_due:
                self._scan()
            for oldest in list(self._index):
                if self.nbytes + size <= self.max_bytes:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(self.folder / oldest)
                self._forget(oldest)
        finally:
            os.close(lock)

    # ---- the index and the counters

    def _scan(self) -> None:
        """Make the index what the folder holds, in the order of use."""
        files = sorted(_files(self.folder), key=lambda file: file[2])
        with self._changed:
            self._index = {key: size for key, size, _ in files}
            self.nbytes = sum(self._index.values())
        self._unscanned = 0

    def _touch(self, key: str) -> bool:
        """Mark a file as used, for other processes and later starts too; False if there is none."""
        path, now = self.folder / key, time.time_ns()
        with suppress(OSError):
            os.utime(path, ns=(now, now), follow_symlinks=False)
        try:
            status = os.lstat(path)
        except OSError:
            status = None
        with self._changed:
            self._forget(key)
            if status is None or not stat.S_ISREG(status.st_mode):
                return False
            self._index[key] = status.st_size
            self.nbytes += status.st_size
        return True

    def _forget(self, key: str) -> None:
        with self._changed:
            self.nbytes -= self._index.pop(key, 0)

    def _count(self, counter: str, line: str | None = None) -> None:
        with self._changed:
            setattr(self, counter, getattr(self, counter) + 1)
            due = line and time.monotonic() - self._logged >= LOG_SECONDS
            self._logged = time.monotonic() if due else self._logged
        if due:
            _log.warning("cache in %s: %s; answers are not affected (so far %d errors, %d damaged files, %d records skipped)",
                         self.folder, line, self.errors, self.dropped, self.skipped)

    def _key(self, kind: str, name: str) -> str:
        if kind not in KINDS:
            raise InputError(f"kind of record is {kind!r}; allowed: {', '.join(KINDS)}")
        if not _NAME.fullmatch(name):
            raise InputError(f"name of record is {name!r}; allowed: a hash in hex, 8 to 128 lower-case digits")
        return f"{self._model}/{name[:2]}/{name}.{kind}"


# ---- the contents of a file

def _encode(key: str, job: _Job) -> bytes:
    sections, parts = [], []
    for name, tensor in job.records.items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        parts.append(data.ljust(_aligned(len(data)), b"\0"))
        sections.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _digest(parts[-1])))
    header = json.dumps({"place": key, "meta": job.meta.hex(), "sections": sections}).encode()
    header = header.ljust(_aligned(PREFIX.size + len(header)) - PREFIX.size)
    return b"".join([PREFIX.pack(MAGIC, len(header), bytes.fromhex(_digest(header))), header, *parts])


def _decode(handle: int, key: str) -> tuple[dict[str, Tensor], bytes]:
    """Tensors and meta of an open file; one of _MALFORMED if anything about it is not as it was written for `key`.

    A size that the file only claims is compared with the file's before anything is allocated.
    """
    status = os.fstat(handle)
    size = status.st_size
    if not stat.S_ISREG(status.st_mode) or size < PREFIX.size:
        raise ValueError("no file, or cut short")
    magic, length, digest = PREFIX.unpack(_read(handle, 0, PREFIX.size).numpy())
    begin = PREFIX.size + length
    if magic != MAGIC or begin > size:
        raise ValueError("no record, or cut short")
    text = _read(handle, PREFIX.size, length).numpy().tobytes()
    if _digest(text) != digest.hex():
        raise ValueError("its header is wrong")
    header = json.loads(text)
    lengths = [_nbytes(dtype, shape) for _, dtype, shape, _ in header["sections"]]
    if header["place"] != key or begin + sum(map(_aligned, lengths)) != size:
        raise ValueError("another record, or another length")
    body, records, offset = _read(handle, begin, size - begin), {}, 0
    data = memoryview(body.numpy())
    for (name, dtype, shape, digest), length in zip(header["sections"], lengths, strict=True):
        if _digest(data[offset:offset + _aligned(length)]) != digest:
            raise ValueError("a tensor is wrong")
        records[name] = body[offset:offset + length].view(DTYPES[dtype]).view(shape)
        offset += _aligned(length)
    return records, bytes.fromhex(header["meta"])


def _digest(data) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _nbytes(dtype: str, shape: list[int]) -> int:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("not a shape")
    return math.prod(shape) * DTYPES[dtype].itemsize


# ---- files

def _write_file(path: Path, content: bytes, sync: bool) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(handle, rest):]
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def _read(handle: int, offset: int, count: int) -> Tensor:
    data = torch.empty(count, dtype=torch.uint8)
    rest = memoryview(data.numpy())
    while rest:
        got = os.preadv(handle, [rest], offset)
        if not got:
            raise ValueError("cut short while it was read")
        rest, offset = rest[got:], offset + got
    return data


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Place, bytes and time of last use of each record in a cache's folder; temporary files of dead processes are removed on the way."""
    for model, shard in ((model, shard) for model in _entries(folder, _MODEL) for shard in _entries(model, _SHARD)):
        for entry in _entries(shard, _OURS):
            with suppress(FileNotFoundError):  # removed by another process in between
                status = entry.stat(follow_symlinks=False)
                if temporary := _TEMPORARY.fullmatch(entry.name):
                    if _dead(int(temporary[1])) or time.time() - status.st_mtime > STALE_SECONDS:
                        os.unlink(entry.path)
                elif stat.S_ISREG(status.st_mode):
                    yield f"{model.name}/{shard.name}/{entry.name}", status.st_size, status.st_mtime_ns


def _entries(folder: os.PathLike, pattern: re.Pattern) -> list[os.DirEntry]:
    with suppress(PermissionError, FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return [entry for entry in entries if pattern.fullmatch(entry.name)]
    return []


def _dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _one_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None  # without the path
    return " ".join((reason or f"{type(error).__name__}: {error}").split())
