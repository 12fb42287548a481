"""A long text read in chunks: time, memory and the cost of one more token on the way. A process of its own:

    python -m fathom.lab.million_run FOLDER

FOLDER holds job.json (a `Job`) and tokens.npy. Writes one JSON object a line, each with its "event": "start", then "chunk" and "mark"
while it reads, "end" with the bytes of the whole cache, and "fact" where the job plants one afterwards.
"""

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fathom.checkpoint.released import load_model
from fathom.engine.engine import dtype_of
from fathom.lab.million_facts import observe, place_at
from fathom.lab.million_reader import Reader, restore, state
from fathom.model.transformer import Transformer

WARM_UP, MEASURED = 2, 16  # tokens decoded at a mark
ROOM = WARM_UP + MEASURED
FULL_FACT_DEPTH = 0.1
JOB, TOKENS = "job.json", "tokens.npy"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to read: a model folder, how, how many ids have a text (the rest is never chosen), where to measure, and the fact to plant
    when all is read (none: empty).
    """

    model: str
    dtype: str
    chunk: int
    vocabulary: int
    marks: list[int]
    fact: list[int]


def measure(model: Transformer, token_T: Tensor, job: Job) -> Iterator[dict[str, Any]]:
    """Read the whole text and yield what happens, in order. Seconds are those of reading, without decoding."""
    place = place_at(len(token_T), FULL_FACT_DEPTH)
    reader = Reader(model, token_T, job.chunk, job.marks, [place] if job.fact else [], ROOM)
    yield {"event": "start", "threads": torch.get_num_threads(), "memory_before": memory("VmRSS")}
    seconds = stretch = 0.0
    last_mark = 0
    for begin, end in reader.chunks():
        began = time.perf_counter()
        logits_V = reader.read_chunk(begin, end)
        took = time.perf_counter() - began
        seconds, stretch = seconds + took, stretch + took
        yield {"event": "chunk", "tokens": end, "seconds": seconds}
        if end in job.marks:
            decode_ms, ids = decode(reader, logits_V, job.vocabulary)
            yield {"event": "mark", "tokens": end, "seconds": seconds, "tokens_per_second": (end - last_mark) / stretch,
                   "decode_ms": decode_ms, "peak_memory": memory("VmHWM"), "decoded": ids}
            last_mark, stretch = end, 0.0
    yield {"event": "end", "cache_tokens": reader.cache.max_tokens, "cache_nbytes": reader.cache.nbytes}
    if job.fact:
        yield from _plant(reader, logits_V, place, torch.tensor(job.fact))


def _plant(reader: Reader, plain_V: Tensor, place: int, fact_F: Tensor) -> Iterator[dict[str, Any]]:
    """The fact in the whole text; the bar that waits for it is told as it goes."""
    read = 0

    def seen(tokens: int) -> None:
        nonlocal read
        read += tokens
        send({"event": "again", "tokens": read})

    yield {"event": "fact"} | dataclasses.asdict(observe(reader, plain_V, place, fact_F, seen))


def decode(reader: Reader, logits_V: Tensor, vocabulary: int) -> tuple[float, list[int]]:
    """Median milliseconds of one more token, greedily chosen among the first ids, and the tokens; the reader stays where it is."""
    saved, milliseconds, ids = state(reader.cache), [], []
    for _ in range(ROOM):
        ids.append(int(logits_V[:vocabulary].argmax()))
        began = time.perf_counter()
        logits_V = reader.step(torch.tensor(ids[-1:]))
        milliseconds.append(1000 * (time.perf_counter() - began))
    restore(reader.cache, saved)
    return statistics.median(milliseconds[WARM_UP:]), ids


def memory(field: str) -> int:
    """Bytes this process holds (VmRSS) or held at most (VmHWM); where /proc is missing, the most it held either way."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def send(event: dict[str, Any]) -> None:
    """One event, one line."""
    print(json.dumps(event), flush=True)


def main(folder: str) -> None:
    """Do the job that a folder describes."""
    job = Job(**json.loads(Path(folder, JOB).read_text(encoding="utf-8")))
    token_T = torch.from_numpy(numpy.load(Path(folder, TOKENS)))
    with torch.inference_mode():
        for event in measure(load_model(job.model, dtype_of(job.dtype)), token_T, job):
            send(event)


if __name__ == "__main__":
    main(sys.argv[1])
