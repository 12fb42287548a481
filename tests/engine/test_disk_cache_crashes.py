"""The cache on disk while processes are killed and the disk fails."""

import ctypes
import errno
import logging
import os
import random
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from fathom.engine.disk_cache import DiskCache
from tests.engine.disk_caches import (  # noqa: F401  (a fixture)
    LARGE, MODEL, SKIPPED, exit_code, fork, is_exact, name_of, opened, path_of, present, record, store, temporary_files,
)


# ---- several processes, killed processes

def write_forever(folder: Path, seed: int, rounds: int = 1_000_000, sync: bool = True) -> None:
    """Write, read and evict records of a small set in a random order."""
    numbers = random.Random(seed)
    cache = DiskCache(folder, 20_000, MODEL, sync)
    for _ in range(rounds):
        number = numbers.randrange(60)
        cache.put("block", name_of(number), record(name_of(number)), str(number).encode())
        if numbers.random() < 0.3:
            cache.flush()
            is_exact(cache, numbers.randrange(60))
    cache.close()
    assert cache.errors == cache.dropped == 0


def test_two_processes_share_a_folder(tmp_path, opened):
    children = [fork(lambda seed=seed: write_forever(tmp_path / "cache", seed, 400, sync=False)) for seed in range(2)]
    assert [exit_code(child) for child in children] == [0, 0]
    cache = opened(20_000)
    assert 5_000 < cache.nbytes <= 20_000 + 20_000 // 16 + 2_000
    assert all(is_exact(cache, number) for number in present(cache, range(60))) and cache.dropped == 0
    assert temporary_files(cache.folder) == []


def check_after_a_kill(folder: Path) -> int:
    """Open a folder whose writer was killed; the number of temporary files that it had left behind."""
    left = len(temporary_files(folder))
    cache = DiskCache(folder, 20_000, MODEL)
    assert temporary_files(folder) == []
    readable = sum(is_exact(cache, number) for number in range(60))
    assert readable == len(cache.keys("block")) and cache.errors == cache.dropped == 0 and cache.nbytes <= 20_000
    cache.close()
    return left


def test_a_hundred_kills_at_random_moments_leave_only_whole_records(tmp_path):
    moments, left = random.Random(1), 0
    for run in range(100):
        child = fork(lambda run=run: write_forever(tmp_path / "cache", run))
        time.sleep(moments.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        left += check_after_a_kill(tmp_path / "cache")
    assert left > 5  # so it was in the middle of writing at times


def die_at(monkeypatch, call: str, moment: int) -> None:
    """Let the process die in the middle of the moment-th call."""
    original, calls = getattr(os, call), iter(range(1, 1_000_000))

    def dying(*arguments, **named):
        if next(calls) == moment:
            if call == "write":
                original(arguments[0], arguments[1][:len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    monkeypatch.setattr(os, call, dying)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "replace", "unlink", "utime", "mkdir"])
def test_a_kill_in_every_system_call_leaves_only_whole_records(tmp_path, call):
    def work():
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, call, moment)
            cache = DiskCache(tmp_path / "cache", 2_500, MODEL)
            store(cache, *range(6))

    for moment in range(1, 100):
        code = exit_code(fork(work))
        check_after_a_kill(tmp_path / "cache")
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert 3 < moment < 99


def test_temporary_files_of_the_dead_are_removed_and_nothing_else(opened):
    cache = opened()
    store(cache, 1)
    folder = path_of(cache, 1).parent
    dead = fork(lambda: None)
    exit_code(dead)
    kept = [folder / f".tmp-{os.getpid()}-{'0' * 16}", folder / f".tmp-{dead}-mine", folder / "notes.txt",
            cache.folder / f".tmp-{dead}-{'0' * 16}"]
    gone = [folder / f".tmp-{dead}-{'0' * 16}", folder / f".tmp-{os.getpid()}-{'1' * 16}"]
    for path in kept + gone:
        path.write_text("x")
    os.utime(gone[1], (0, 0))
    nbytes = opened().nbytes
    assert [path.exists() for path in kept + gone] == [True] * 4 + [False] * 2 and nbytes == cache.nbytes


# ---- a disk that fails

class Failing:
    """Replaces system calls by ones that fail from the `first`-th to the `last`-th call of `name`; fsync does nothing."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, code: int, first: int, last: float):
        self.calls, self.first, self.last, self.code = 0, first, last, code
        patch.setattr(os, "fsync", lambda _: None)
        self.original = getattr(os, name)
        patch.setattr(os, name, self)

    @property
    def failed(self) -> bool:
        return self.calls >= self.first

    def __call__(self, *arguments, **named):
        self.calls += 1
        if self.first <= self.calls <= self.last:
            raise OSError(self.code, os.strerror(self.code), "a path")
        return self.original(*arguments, **named)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "unlink", "mkdir", "preadv", "fstat"])
def test_each_system_call_may_fail_once(tmp_path, opened, call, code):
    for moment in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            cache = opened(2_500, sync=True, folder=tmp_path / f"{moment}")
            failing = Failing(patch, call, code, moment, moment)
            store(cache, *range(5))
            readable = [is_exact(cache, number) for number in range(5)]
            harmless = call == "mkdir" and cache.errors == 0  # the folder was there
            assert (harmless or cache.errors == failing.failed) and cache.dropped == cache.skipped == 0 and cache.disabled is None
            assert temporary_files(cache.folder) == [] and cache.nbytes <= 2_500
        store(cache, 7, 8)
        assert is_exact(cache, 7) and is_exact(cache, 8)
        cache.close()
        if not failing.failed:
            break
        again = opened(2_500, folder=cache.folder)
        assert again.nbytes <= 2_500 and all(is_exact(again, number) for number in present(again, range(9)))
    assert 1 < moment < 199 and any(readable)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "mkdir"])
def test_a_disk_that_fails_again_and_again_is_left_alone_for_a_while(opened, monkeypatch, caplog, call):
    cache = opened(sync=True)
    store(cache, 0)
    with monkeypatch.context() as patch:
        Failing(patch, call, errno.ENOSPC, 1, float("inf"))
        store(cache, 1, 2)
        assert cache.errors == 2 and cache.disabled is None
        store(cache, 3)
        assert cache.errors == 3 and cache.disabled == "No space left on device"
        store(cache, 4, 5)
        assert cache.errors == 3 and cache.skipped == 2
        cache._rest_until = 0.0  # a minute later
        store(cache, 6)
        assert cache.errors == 4 and cache.disabled
    cache._rest_until = 0.0
    store(cache, 7, 8)
    assert cache.disabled is None and is_exact(cache, 7) and is_exact(cache, 8) and is_exact(cache, 0)
    lines = [line.getMessage() for line in caplog.records if line.name == "fathom.engine.disk_cache"]
    assert len(lines) == 1 and "No space left on device" in lines[0] and "\n" not in lines[0]
    assert caplog.records[0].levelno == logging.WARNING and name_of(1) not in lines[0]


def test_what_waits_when_writing_stops_is_skipped(opened, monkeypatch):
    disk = threading.Event()

    def full(*_):
        disk.wait(30)
        raise OSError(errno.ENOSPC, "full")

    cache = opened()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for number in range(10):
            cache.put("block", name_of(number), record(name_of(number)))
        disk.set()
        assert cache.flush(30) and cache.errors == 3 and cache.skipped == 7


def test_a_tensor_that_cannot_be_copied_costs_only_its_record(opened):
    cache = opened()
    cache.put("block", name_of(0), {"x": torch.empty(3, device="meta")})
    store(cache, 1)
    assert cache.errors == 1 and is_exact(cache, 1)


def test_a_file_that_grows_no_further_is_an_error_and_serving_goes_on(tmp_path):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        cache = DiskCache(tmp_path / "cache", LARGE, MODEL)
        cache.put("block", name_of(0), {"x": torch.zeros(2_000, dtype=torch.uint8)})
        store(cache, 1)
        assert cache.errors == 1 and is_exact(cache, 1) and cache.get("block", name_of(0)) is None
        assert temporary_files(cache.folder) == []

    assert exit_code(fork(work)) == 0


def test_a_full_disk_is_an_error_and_serving_goes_on(tmp_path):
    def work():
        new_mounts = 0x20000
        if ctypes.CDLL(None).unshare(new_mounts):
            raise SystemExit(SKIPPED)
        for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]):
            if subprocess.run(command, capture_output=True).returncode:
                raise SystemExit(SKIPPED)
        cache = DiskCache(tmp_path / "cache", LARGE, MODEL)
        store(cache, *range(100))
        stored = present(cache, range(100))
        assert cache.errors >= 3 and cache.disabled == "No space left on device" and 10 < len(stored) < 90
        assert all(is_exact(cache, number) for number in stored) and temporary_files(cache.folder) == []
        for number in stored:
            path_of(cache, number).unlink()
        cache._rest_until = 0.0
        store(cache, 200)
        assert is_exact(cache, 200) and cache.disabled is None

    code = exit_code(fork(work))
    if code == SKIPPED:
        pytest.skip("no permission to mount a small disk")
    assert code == 0
