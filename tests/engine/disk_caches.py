"""What tests of the cache on disk share: records made of their names, children that crash."""

import hashlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fathom.engine.disk_cache import DiskCache

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
