"""What the machine can do at most: `python -m fathom.lab.bench.ceilings JSON` with {"threads": N or null, "device": "cpu"}.

Matrix products in two ways: torch's own, and on a CPU oneDNN called directly, which on some processors is twice as fast in float32. An
accelerator gets larger products and more to read.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.devices import use_device
from fathom.lab.bench.measure import serve, timed
from fathom.ops.native.library import library

SHAPES = {"2048x2048x2048": (2048, 2048, 2048), "1024x512x2048": (1024, 512, 2048)}  # rows, inner, columns
LARGE_SHAPES = {"8192x8192x8192": (8192, 8192, 8192), "16384x4096x4096": (16384, 4096, 4096)}
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
BANDWIDTH_BYTES, LARGE_BYTES = 256 << 20, 2 << 30  # beyond any cache
BUDGET_SECONDS = 0.3  # for each measurement; the best of what fits, and of three at least


def measure_ceilings(text: str) -> dict[str, Any]:
    """GFLOP/s of matrix products for each dtype, way and shape, GB/s of reading and of copying; and whether there are kernels in C."""
    settings = json.loads(text)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = use_device(settings["device"])
    on_cpu = device.type == "cpu"
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "kernels": library() is not None}
    if not on_cpu:
        found["device"] = getattr(torch.get_device_module(device), "get_device_name", str)(device)
    ways = [("torch", F.linear), ("onednn", _onednn)] if on_cpu and ONEDNN else [("torch", F.linear)]
    with torch.inference_mode():
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            found[name] = {way: {shape: _matmul(*sizes, dtype, device, product) for shape, sizes in (SHAPES if on_cpu else LARGE_SHAPES).items()}
                           for way, product in ways}
        source = torch.ones((BANDWIDTH_BYTES if on_cpu else LARGE_BYTES) // 4, device=device)
        target = torch.empty_like(source)
        vector = torch.ones(4096, device=device)
        matrix = source.view(-1, 4096)
        found["copy"] = 2 * source.nbytes / _best(lambda: target.copy_(source)) / 1e9
        found["read"] = source.nbytes / min(_best(source.sum), _best(lambda: matrix @ vector)) / 1e9
    return found


def _matmul(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device, product: Callable[[Tensor, Tensor], Tensor]) -> float:
    """GFLOP/s of [rows, inner] times [inner, columns], with the weight laid out as a Linear's."""
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (columns, inner)))
    return 2 * rows * inner * columns / _best(lambda: product(x, weight)) / 1e9


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return ONEDNN(x, weight, None, "none", [], "")


def _best(run: Callable[[], Tensor]) -> float:
    run()
    seconds, end = [], time.perf_counter() + BUDGET_SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        seconds.append(timed(run))
    return min(seconds)


if __name__ == "__main__":
    serve(measure_ceilings)
