"""One case in this process: warm-up, timed runs, memory. Shared by Fathom's and the peers' processes."""

import ctypes
import gc
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fathom.devices import finish, use_device
from fathom.lab.bench.plan import DECODE_WARM_UP, Case, decode_tokens

try:
    import resource
except ImportError:  # not a Unix
    resource = None

WARM_UP_TOKENS = 8192  # a longer prompt is warmed up with its beginning
STATUS = Path("/proc/self/status")


class Subject(Protocol):
    """A program under measurement, with its weights in memory. `settings` are those it may choose from for decoding."""

    chunk: int
    settings: tuple[str, ...]
    facts: dict[str, Any]  # how it ran, for the record

    def use(self, setting: str) -> None:
        """Compute with this setting from now on."""

    def new_cache(self, batch: int, tokens: int) -> Any:
        """An empty cache."""

    def feed(self, cache: Any, token_BS: Tensor) -> None:
        """Extend the cache by tokens [B, S] and compute the logits after the last one."""

    def train(self, token_BS: Tensor) -> None:
        """One whole training step on rows [B, S]."""


def serve(measurement: Callable[[str], dict[str, Any]]) -> None:
    """The main of a measuring process: JSON in as the only argument, JSON out as the last line."""
    _live_with_the_parent()
    print("\n" + json.dumps(measurement(sys.argv[1])), flush=True)


def measure(case: Case, load: Callable[[Case], Subject]) -> dict[str, Any]:
    """Seconds of each timed run, and the memory of the process, or of its accelerator: with the weights only, and the peak from then on."""
    if case.threads:
        torch.set_num_threads(case.threads)
    device = use_device(case.device)
    subject = load(case)
    before = _reset_peak(device)
    token_BS = torch.randint(0, case.config.vocab_size, (case.batch, case.length),
                             generator=torch.Generator().manual_seed(case.seed)).to(device)
    seconds = {"prefill": _prefill, "decode": _decode, "train": _train}[case.kind](case, subject, token_BS)
    return {"seconds": seconds, "bytes_before": before, "bytes_peak": _memory(device)[1], "threads": torch.get_num_threads(),
            "chunk": subject.chunk if case.kind != "train" else None} | subject.facts


def timed(run: Callable[[], None]) -> float:
    """Seconds that a call takes, until an accelerator has done it too."""
    finish()
    began = time.perf_counter()
    run()
    finish()
    return time.perf_counter() - began


def _prefill(case: Case, subject: Subject, token_BS: Tensor) -> list[float]:
    _read(subject, subject.new_cache(case.batch, case.length), token_BS[:, :WARM_UP_TOKENS])
    return [timed(lambda: _read(subject, subject.new_cache(case.batch, case.length), token_BS)) for _ in range(case.repeats)]


def _decode(case: Case, subject: Subject, token_BS: Tensor) -> list[float]:
    """Seconds for each run of `steps` tokens, at the fastest of the program's settings."""
    cache = subject.new_cache(case.batch, case.length + decode_tokens(case.repeats, case.steps, len(subject.settings)))
    _read(subject, cache, token_BS)

    def write(steps: int) -> None:
        for step in range(steps):
            subject.feed(cache, token_BS[:, step % case.length, None])

    warm = {}
    for setting in subject.settings:
        subject.use(setting)
        write(1)
        warm[setting] = timed(lambda: write(DECODE_WARM_UP))
    subject.use(min(warm, key=warm.__getitem__))
    return [timed(lambda: write(case.steps)) for _ in range(case.repeats)]


def _train(case: Case, subject: Subject, token_BS: Tensor) -> list[float]:
    subject.train(token_BS)
    return [timed(lambda: subject.train(token_BS)) for _ in range(case.repeats)]


def _read(subject: Subject, cache: Any, token_BS: Tensor) -> None:
    for chunk_BS in token_BS.split(subject.chunk, 1):
        subject.feed(cache, chunk_BS)


def _reset_peak(device: torch.device) -> int:
    """Give freed memory back, forget the peak, and return the bytes in memory now."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return _memory(device)[0]
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass  # another C library: nothing to give back by hand
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak then counts from the start of the process
    return _memory(device)[0]


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes in memory now and at most; where the system tells only the latter, that twice."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device), torch.accelerator.max_memory_allocated(device)
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        if "VmRSS" in lines and "VmHWM" in lines:
            now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
            return now, max(now, peak)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) if resource else 0
    return peak, peak


def _live_with_the_parent() -> None:
    """End with the parent, however it ends (its pipe closes), and be the first to go where memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass  # the system then chooses by itself

    def watch() -> None:
        os.read(0, 1)
        os._exit(1)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=watch, daemon=True).start()
