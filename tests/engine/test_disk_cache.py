"""The cache on disk: records come back bit for bit or not at all; its budget; whom its folder lets in."""

import os
import threading

import pytest
import torch

from fathom.engine import disk_cache
from fathom.engine.disk_cache import DTYPES, DiskCache
from fathom.errors import InputError
from tests.engine.disk_caches import (  # noqa: F401  (a fixture)
    LARGE, MODEL, bits, exit_code, fork, is_exact, name_of, opened, path_of, present, record, store,
)


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
