"""Freed memory that stays with the process: pages are asked for once, not once a step."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from fathom.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
    keep_freed_memory()
def step():
    return [torch.ones(3 << 20) for _ in range(8)]  # 96 MiB, freed together
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_steps_that_free_and_allocate_the_same_ask_for_their_pages_once():
    given_back, kept = (int(subprocess.run([sys.executable, "-c", STEPS, wish], capture_output=True, text=True, check=True).stdout)
                        for wish in ("give back", "keep"))
    assert kept < given_back / 10
