"""The cache on disk: records come back bit for bit or not at all, whatever happens to the process, the disk or the files."""

import ctypes
import errno
import hashlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fathom.engine import disk_cache
from fathom.engine.disk_cache import DTYPES, MAGIC, PREFIX, DiskCache
from fathom.errors import InputError

MODEL = "a model"
LARGE = 1 << 30
SKIPPED = 77  # exit code of a child that may not do what the test needs


@pytest.fixture
def opened(tmp_path):
    """Opens caches, in tmp_path/cache unless told otherwise, and closes them afterwards."""
    caches = []

    def open_cache(max_bytes: int = LARGE, fingerprint: str = MODEL, sync: bool = False, folder: Path = tmp_path / "cache"):
        caches.append(DiskCache(folder, max_bytes, fingerprint, sync))
        return caches[-1]

    yield open_cache
    for cache in caches:
        cache.close()


def name_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def record(name: str) -> dict[str, Tensor]:
    """What the record of a name holds: a few tensors made of the name's own bytes."""
    size = 16 * (1 + int(name[-1], 16))
    data = torch.frombuffer(bytearray(hashlib.shake_128(name.encode()).digest(4 * size)), dtype=torch.uint8)
    return {"0.entries": data[:2 * size].view(2, size), "0.keys": data[2 * size:3 * size].view(torch.bfloat16),
            "1.window": data[3 * size:].view(torch.float32).view(2, -1)}


def bits(records: dict[str, Tensor]) -> dict[str, tuple]:
    return {part: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for part, tensor in records.items()}


def store(cache: DiskCache, *numbers: int) -> None:
    for number in numbers:
        cache.put("block", name_of(number), record(name_of(number)), meta=str(number).encode())
        assert cache.flush(30)


def is_exact(cache: DiskCache, number: int) -> bool:
    """Whether the record is there; what is there must be what was stored."""
    found = cache.get("block", name_of(number))
    if found is not None:
        assert bits(found[0]) == bits(record(name_of(number))) and found[1] == str(number).encode()
    return found is not None


def present(cache: DiskCache, numbers: range) -> list[int]:
    """Which of the records the index has."""
    return [number for number in numbers if cache.contains("block", name_of(number))]


def path_of(cache: DiskCache, number: int) -> Path:
    return next(cache.folder.rglob(f"{name_of(number)}.block"))


def temporary_files(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child process, which exits with 0, or with 1 and a traceback; its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# ---- records come back

@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 0, 2), (5, 3), (2, 64, 3)], ids=str)
def test_every_type_and_shape_comes_back_bit_for_bit(opened, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    tensor = (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape)
    records = {"x": tensor, "transposed": tensor.movedim(0, -1) if shape else tensor}
    cache = opened()
    cache.put("state", name_of(0), records, b"\0\xff meta")
    assert cache.flush(30)
    found, meta = cache.get("state", name_of(0))
    assert bits(found) == bits(records) and list(found) == list(records) and meta == b"\0\xff meta"


def test_a_record_without_tensors_or_meta_comes_back(opened):
    cache = opened()
    cache.put("state", name_of(0), {})
    assert cache.flush(30) and cache.get("state", name_of(0)) == ({}, b"")


def test_tensors_are_writable_and_outlive_their_file(opened):
    cache = opened()
    store(cache, 1)
    found, _ = cache.get("block", name_of(1))
    path_of(cache, 1).unlink()
    assert bits(found) == bits(record(name_of(1)))
    found["1.window"].add_(1)
    assert cache.get("block", name_of(1)) is None and cache.dropped == cache.errors == 0
    assert not cache.contains("block", name_of(1)) and cache.nbytes == 0


def test_records_are_there_after_a_restart_and_belong_to_kind_and_model(opened):
    first = opened()
    store(first, 1, 2)
    first.put("state", name_of(3), record(name_of(3)))
    first.close()
    second = opened()
    assert second.keys("block") == [name_of(1), name_of(2)] and second.keys("state") == [name_of(3)]
    assert is_exact(second, 1) and is_exact(second, 2) and second.nbytes == first.nbytes > 0
    assert not second.contains("state", name_of(1)) and second.get("state", name_of(1)) is None
    other = opened(fingerprint="another model")
    assert other.keys("block") == [] and other.get("block", name_of(1)) is None and other.nbytes == first.nbytes


def test_a_record_that_exists_is_not_written_again(opened, monkeypatch):
    cache = opened()
    store(cache, 1, 2)
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("written again"))
    store(cache, 1)
    assert cache.keys("block") == [name_of(2), name_of(1)] and cache.errors == 0


def test_put_does_not_wait_and_a_full_queue_skips(opened, monkeypatch):
    disk, write = threading.Event(), os.write
    monkeypatch.setattr(os, "write", lambda *arguments: disk.wait(30) and write(*arguments))
    monkeypatch.setattr(disk_cache, "QUEUE_BYTES", 3000)
    cache = opened()
    for number in range(20):
        cache.put("block", name_of(number), {"x": torch.full((250,), float(number))})
        cache.put("block", name_of(0), {"x": torch.zeros(250)})  # waits already: not counted twice
    assert cache.skipped == 17 and not cache.flush(0.01) and present(cache, range(20)) == []
    disk.set()
    assert cache.flush(30) and present(cache, range(20)) == [0, 1, 2] and cache.errors == 0
    cache.close()
    cache.put("block", name_of(9), {"x": torch.zeros(250)})
    assert cache.skipped == 18 and cache.get("block", name_of(2)) is not None


def test_close_writes_what_waits(opened):
    cache = opened()
    for number in range(50):
        cache.put("block", name_of(number), record(name_of(number)), str(number).encode())
    cache.close()
    assert all(is_exact(cache, number) for number in range(50))


def test_what_is_written_is_on_the_disk_before_it_has_its_name(opened, monkeypatch):
    calls = []
    for name in ("write", "fsync", "replace"):
        def noted(*arguments, name=name, original=getattr(os, name)):
            calls.append(name)
            return original(*arguments)
        monkeypatch.setattr(os, name, noted)
    store(opened(sync=True), 1)
    assert calls == ["write", "fsync", "replace", "fsync"]
    store(opened(sync=False), 2)
    assert calls[4:] == ["write", "replace"]


# ---- the budget

def store_equal(cache: DiskCache, *labels: int, kind: str = "block") -> None:
    for label in labels:
        cache.put(kind, name_of(label), {"x": torch.full((100,), float(label))})
        assert cache.flush(30)


def test_the_least_recently_used_go_first_also_after_a_restart(opened):
    probe = opened(fingerprint="probe")
    store_equal(probe, 0)
    size = probe.nbytes
    path_of(probe, 0).unlink()
    cache = opened(5 * size + 10)
    store_equal(cache, 0, 1, 2, 3, 4)
    assert cache.get("block", name_of(0)) and cache.get("block", name_of(2))
    store_equal(cache, 5, 6)
    assert present(cache, range(7)) == [0, 2, 4, 5, 6] and cache.nbytes == 5 * size
    assert cache.get("block", name_of(4)) and cache.get("block", name_of(0))
    cache.close()
    cache = opened(5 * size + 10)
    assert cache.keys("block") == [name_of(number) for number in (2, 5, 6, 4, 0)]
    store_equal(cache, 7, 8)
    assert present(cache, range(9)) == [0, 4, 6, 7, 8]
    assert sum(path.stat().st_size for path in cache.folder.rglob("*.block")) == cache.nbytes == 5 * size


def test_a_smaller_budget_and_a_new_model_make_room_among_old_files(opened):
    old = opened()
    store_equal(old, 0, 1, 2, 3)
    store_equal(old, 4, kind="state")
    size = old.nbytes // 5
    old.close()
    new = opened(3 * size + size // 2, fingerprint="a new model")
    store_equal(new, 5)
    assert present(new, range(6)) == [5] and 2 * size < new.nbytes <= 3 * size + size // 2
    old = opened(fingerprint=MODEL)
    assert old.keys("block") == [name_of(3)] and old.keys("state") == [name_of(4)]


def test_what_alone_passes_the_budget_is_skipped_and_removes_nothing(opened):
    cache = opened(4096)
    store_equal(cache, 0, 1)
    cache.put("block", name_of(2), {"x": torch.zeros(4096, dtype=torch.uint8)})  # with its header
    cache.put("block", name_of(3), {"x": torch.zeros(5000, dtype=torch.uint8)})
    assert cache.flush(30) and cache.skipped == 2 and present(cache, range(4)) == [0, 1] and cache.errors == 0


def test_files_of_another_process_count_and_are_found(opened):
    first, second = opened(16_000), opened(16_000)
    store_equal(first, *range(8))
    assert second.get("block", name_of(3)) and present(second, range(8)) == [3]
    store_equal(second, *range(100, 140))
    on_disk = sum(path.stat().st_size for path in first.folder.rglob("*.block"))
    assert on_disk <= 16_000 + 16_000 // 16 + 1000
    assert first.get("block", name_of(0)) is None and first.dropped == first.errors == second.errors == 0
    store_equal(first, 0)  # thought to be there, then written again
    assert first.get("block", name_of(0))


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


# ---- damaged files

def damage(content: bytes, other: bytes, numbers: random.Random) -> bytes:
    """The content with a bit flipped, cut, lengthened, partly zero, or swapped for another record's."""
    place = numbers.randrange(len(content))
    match numbers.randrange(8):
        case 0:
            return content[:place]
        case 1:
            return content + numbers.randbytes(numbers.choice([1, 64, 500]))
        case 2:
            return other
        case 3 if any(content[place:place + 512]):
            return content[:place] + bytes(min(512, len(content) - place)) + content[place + 512:]
    flipped = content[place] ^ 1 << numbers.randrange(8)
    return content[:place] + bytes([flipped]) + content[place + 1:]


def test_two_thousand_damages_are_all_found_and_two_thousand_clean_loads_pass(opened):
    cache = opened()
    store(cache, *range(20))
    contents = {number: path_of(cache, number).read_bytes() for number in range(20)}
    paths = {number: path_of(cache, number) for number in range(20)}
    for turn in range(2_000):
        assert is_exact(cache, turn % 20)
    assert cache.dropped == cache.errors == 0
    numbers = random.Random(2)
    for turn in range(2_000):
        number, other = turn % 20, (turn + 1 + turn // 20 % 19) % 20
        damaged = damage(contents[number], contents[other], numbers)
        assert damaged != contents[number]
        paths[number].write_bytes(damaged)
        assert cache.get("block", name_of(number)) is None
        assert cache.dropped == turn + 1 and not paths[number].exists() and not cache.contains("block", name_of(number))
        paths[number].write_bytes(contents[number])
    assert cache.errors == 0 and all(is_exact(cache, number) for number in range(20))


def test_a_flip_of_any_bit_is_found(opened):
    cache = opened()
    cache.put("block", name_of(0), {"x": torch.arange(20, dtype=torch.uint8)}, b"m")
    assert cache.flush(30)
    path = path_of(cache, 0)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        path.write_bytes(content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1:])
        assert cache.get("block", name_of(0)) is None, bit
    assert cache.dropped == 8 * len(content)


def test_a_file_under_another_kind_or_model_is_dropped(opened):
    cache, other = opened(), opened(fingerprint="another model")
    store(cache, 1)
    store(other, 2)
    path = path_of(cache, 1)
    path.with_suffix(".state").write_bytes(path.read_bytes())
    assert cache.get("state", name_of(1)) is None and cache.dropped == 1 and is_exact(cache, 1)
    place = path_of(other, 2).parents[1] / path.relative_to(path.parents[1])
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(path.read_bytes())
    assert other.get("block", name_of(1)) is None and other.dropped == 1 and is_exact(other, 2)


def forged(header: object, body: bytes = bytes(64), claimed: int | None = None) -> bytes:
    """A file whose header has the right digest, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return PREFIX.pack(MAGIC, len(text) if claimed is None else claimed, digest) + text + body


EMPTY, ZEROS = (hashlib.blake2b(data, digest_size=16).hexdigest() for data in (b"", bytes(64)))


@pytest.mark.parametrize("sections, body", [
    ([["x", "uint8", [1 << 50], ZEROS]], bytes(64)), ([["x", "float32", [1 << 20, 1 << 20], ZEROS]] * 9, bytes(64)),
    ([["x", "uint8", [10 ** 400], ZEROS]], bytes(64)), ([["x", "uint8", [-8, -8], ZEROS]], bytes(64)),
    ([["x", "uint8", [6.4e1], ZEROS]], bytes(64)), ([["x", "uint8", [True, 64], ZEROS]], bytes(64)),
    ([["x", "complex64", [8], ZEROS]], bytes(64)), ([["x", ["uint8"], [64], ZEROS]], bytes(64)),
    ([[["x"], "uint8", [64], ZEROS]], bytes(64)), ([["x", "uint8", "64", ZEROS]], bytes(64)),
    ([["x", "uint8", [64], "0"]], bytes(64)), ([["x", "uint8", [64]]], bytes(64)), ([["x", "uint8", [64], ZEROS]], bytes(63)),
    ([["x", "uint8", [0, 10 ** 30], EMPTY]], b""),
    ([["x", "uint8", [64], ZEROS]] * 2, bytes(64)), ({"x": 1}, b""), (None, b""), ("sections", b"")])
def test_a_forged_header_is_dropped_without_allocating_what_it_claims(opened, monkeypatch, sections, body):
    cache = opened()
    store(cache, 1)
    path = path_of(cache, 1)
    header = {"place": str(path.relative_to(cache.folder)), "meta": "", "sections": sections}
    check_dropped(cache, monkeypatch, forged(header, body))


@pytest.mark.parametrize("content", [
    b"", b"x", MAGIC, bytes(32), forged(b"", claimed=1 << 62), forged(b"", claimed=1 << 30), forged(b"", claimed=65), forged(b""),
    forged(b"\xff"), forged(b"["), forged(b"[" * 200_000), forged([]), forged({}), forged(None), forged(b"1" * 5000)], ids=lambda _: "")
def test_what_is_no_record_at_all_is_dropped(opened, monkeypatch, content):
    cache = opened()
    store(cache, 1)
    check_dropped(cache, monkeypatch, content)


def check_dropped(cache: DiskCache, monkeypatch, content: bytes) -> None:
    path, asked, empty = path_of(cache, 1), [0], torch.empty
    path.write_bytes(content)
    monkeypatch.setattr(torch, "empty", lambda count, **options: asked.append(count) or empty(count, **options))
    assert cache.get("block", name_of(1)) is None
    assert cache.dropped == 1 and cache.errors == 0 and not path.exists() and max(asked) <= len(content)


def test_a_forged_record_with_the_right_sizes_would_be_read(opened):
    cache = opened()  # so the cases above fail for the reason that they show
    store(cache, 1)
    path = path_of(cache, 1)
    header = {"place": str(path.relative_to(cache.folder)), "meta": "", "sections": [["x", "uint8", [64], ZEROS]]}
    path.write_bytes(forged(header))
    assert cache.get("block", name_of(1))[0]["x"].tolist() == [0] * 64


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)],
                         ids=["pipe", "folder", "device", "loop"])
def test_what_is_not_a_file_is_a_miss(opened, plant):
    cache = opened()
    store(cache, 1)
    path = path_of(cache, 1)
    path.unlink()
    plant(path)
    assert cache.get("block", name_of(1)) is None and not cache.contains("block", name_of(1))
    assert opened().keys("block") == []
    cache.put("block", name_of(1), record(name_of(1)), b"1")
    assert cache.flush(30) and is_exact(cache, 1) != path.is_dir()  # a folder alone is in the way


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


# ---- whom the folder lets in

def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(InputError, match=f"^cannot keep a cache in {folder}: [^\n]+$"):
            DiskCache(folder, LARGE, MODEL)


@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_a_folder_without_permission_is_named(tmp_path, mode):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)

    def work():
        if os.getuid() == 0:
            os.setuid(65534)  # whoever is not root
        for target in (folder, folder / "deeper"):
            with pytest.raises(InputError, match="Permission denied; name a folder that can be written"):
                DiskCache(target, LARGE, MODEL)

    assert exit_code(fork(work)) == 0


def test_only_the_owner_can_read_what_is_stored(tmp_path, opened):
    before = os.umask(0)
    try:
        cache = opened(2_500)
        store(cache, *range(6))
    finally:
        os.umask(before)
    paths = [cache.folder, *cache.folder.rglob("*")]
    assert {path.stat().st_mode & 0o7777 for path in paths if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o7777 for path in paths if path.is_file()} == {0o600}
    assert (cache.folder / ".lock").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/etc/passwd", "..", ".", "abc", "0" * 200, name_of(0) + "\n", name_of(0).upper(),
                                  "\u0660" * 16, "caf\u00e9" * 4, "0" * 16 + "\0", "..\\" * 8, "0123456g", "\ud800" * 8])
@pytest.mark.parametrize("use", [lambda cache, name: cache.put("block", name, {}), lambda cache, name: cache.get("block", name),
                                 lambda cache, name: cache.contains("block", name)], ids=["put", "get", "contains"])
def test_a_name_that_is_no_hash_is_refused(opened, use, name):
    with pytest.raises(InputError, match="name of record is"):
        use(opened(), name)


def test_an_unknown_kind_or_type_is_refused(opened):
    cache = opened()
    with pytest.raises(InputError, match="kind of record is '../block'; allowed: block, state"):
        cache.put("../block", name_of(0), {})
    with pytest.raises(InputError, match="record 'x' is of torch.complex64"):
        cache.put("block", name_of(0), {"x": torch.zeros(1, dtype=torch.complex64)})
