"""Freed memory that stays with the process, as the C library's own books show it."""

import ctypes
import platform
import subprocess
import sys

import pytest

FREED = """
import ctypes, sys
import torch
from fathom.memory import keep_freed_memory

class Books(ctypes.Structure):  # of malloc, in bytes; `free` is what the process holds and no one uses
    _fields_ = [(name, ctypes.c_size_t) for name in "arena pieces small mapped mapped_bytes unused small_free used free top".split()]

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
    keep_freed_memory()
books = ctypes.CDLL(None).mallinfo2
books.restype = Books
small = [torch.ones(1) for _ in range(1000)]
del small[::2]  # places for what is small of a tensor: behind a large one, it would keep that from being given back
before = books().free
tensors = [torch.ones(6 << 20) for _ in range(10)]  # 24 MiB each
del tensors
print(books().free - before)
"""


def has_books() -> bool:
    return platform.libc_ver()[0] == "glibc" and hasattr(ctypes.CDLL(None), "mallinfo2")


@pytest.mark.skipif(not has_books(), reason="asks glibc, 2.33 or newer")
def test_what_a_step_frees_stays_for_the_next_one():
    given_back, kept = (int(subprocess.run([sys.executable, "-c", FREED, wish], capture_output=True, text=True, check=True).stdout)
                        for wish in ("give back", "keep"))
    assert given_back < 1 << 20 < 240 << 20 <= kept
