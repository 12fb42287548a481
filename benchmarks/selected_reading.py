"""Decoding where reading all entries would copy them: what it gains that only the selected ones are gathered and unpacked.

    python benchmarks/selected_reading.py        bench-s with random weights; both ways in one process, in turn

A cache in the released formats must unpack what is read, and several rows of the engine's pool lie scattered in it. "all" makes every
stream say that its entries lie ready, so that they are read as they were before: copied whole, and then selected from.
"""

import random
import statistics
import time

import torch

from fathom.checkpoint.layouts import use_rounding
from fathom.engine.paged_cache import PagedCache, Row, _PagedStream
from fathom.lab.bench.plan import BENCH_S as CONFIG
from fathom.model.cache import Stream
from fathom.model.transformer import Transformer
from fathom.ops.rounding import ReleasedRounding

CASES = [("released", 1, 8192), ("released", 1, 65536), ("released", 8, 8192), ("float32", 8, 8192), ("float32", 8, 32768)]
REPEATS, WARM_UP = 60, 5
AS_IT_IS = Stream.lies_ready, _PagedStream.lies_ready


def filled(rows: int, blocks: int, quantized: bool) -> PagedCache:
    """A pool full of random numbers."""
    pool = PagedCache(CONFIG, rows * blocks, rows, torch.float32, torch.device("cpu"), quantized=quantized)
    for layer in pool._pages:
        for stream in (layer.entries, layer.keys):
            if stream is not None:
                channels = getattr(stream.record, "channels", stream.record.width)
                for part in stream.records_BMC.split(1 << 16, 1):
                    part.copy_(stream.record.pack(torch.randn(1, part.shape[1], channels)))
    return pool


def main() -> None:
    """Print milliseconds of a step both ways."""
    torch.manual_seed(0)
    model = Transformer(CONFIG).initialise(0).eval()
    use_rounding(model, ReleasedRounding(CONFIG.qk_rope_head_dim), set())
    for cache, rows, context in CASES:
        blocks = context // 128 + 2
        pool, order = filled(rows, blocks, cache == "released"), list(range(rows * blocks))
        if rows > 1:
            random.Random(0).shuffle(order)
        seconds: dict[str, list[float]] = {"all": [], "selected": []}
        token = torch.randint(0, CONFIG.vocab_size, (rows, 1))
        for repeat in range(REPEATS):
            for way in seconds:
                Stream.lies_ready, _PagedStream.lies_ready = (True, True) if way == "all" else AS_IT_IS
                view = pool.view([Row(row, order[row * blocks:(row + 1) * blocks], context + repeat) for row in range(rows)], context + 2 * REPEATS)
                began = time.perf_counter()
                with torch.inference_mode():
                    model(token, cache=view, last_only=True)
                seconds[way].append(time.perf_counter() - began)
        whole, chosen = (1e3 * statistics.median(times[WARM_UP:]) for times in seconds.values())
        print(f"{cache}, {rows} rows after {context:,} tokens: all {whole:.1f} ms, selected {chosen:.1f} ms, {whole / chosen:.2f}x", flush=True)


if __name__ == "__main__":
    main()
