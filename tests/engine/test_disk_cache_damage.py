"""The cache on disk and files that are damaged, forged or none at all."""

import hashlib
import json
import os
import random

import pytest
import torch

from fathom.engine.disk_cache import MAGIC, PREFIX, DiskCache
from tests.engine.disk_caches import is_exact, name_of, opened, path_of, record, store  # noqa: F401  (a fixture)


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
