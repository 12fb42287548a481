"""One layer of V4-Flash at its real size, with random weights in the released formats: written to disk, loaded, run.

`python -m tests.checkpoint.real_layer FOLDER` prints what loading and running took, as JSON.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import fathom
from fathom.checkpoint.layouts import stored_tensors
from fathom.checkpoint.released import write_configs
from fathom.checkpoint.shards import plan_shards, shard_names, write_index, write_shard
from fathom.config import ModelConfig
from fathom.quant.formats import E4M3, E8M0

PROMPT, STEPS = 640, 8


def config() -> ModelConfig:
    """Flash with its third layer only (CSA, 256 experts, learned routing) and a small vocabulary."""
    return ModelConfig.preset("flash", num_hidden_layers=1, compress_ratios=[4], num_hash_layers=0, vocab_size=4096,
                              num_nextn_predict_layers=0)


def write(folder: Path) -> int:
    """Make the folder, a shard at a time; its bytes."""
    stored = stored_tensors(config(), "official-fp4")
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(-128, 128, (1 << 24,), dtype=torch.int8, generator=generator)

    def random(name: str) -> torch.Tensor:
        dtype, shape = stored[name]
        if dtype == torch.int8:
            first = int(torch.randint(len(bytes_) - torch.Size(shape).numel() + 1, (), generator=generator))
            return bytes_[first:first + torch.Size(shape).numel()].view(shape).clone()  # drawing each anew takes four times as long
        if dtype == E8M0:  # weights of about 0.02: FP4 values average 2.6, FP8 codes reach 448
            exponent = 120 if ".experts." in name else 113
            return torch.full(shape, exponent, dtype=torch.uint8).view(E8M0)
        if dtype == E4M3:
            return (torch.randn(shape, generator=generator) * 160).clamp(-448, 448).to(E4M3)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    folder.mkdir(parents=True)
    write_configs(config(), folder)
    plan = plan_shards([{name: each} for name, each in stored.items()], 1 << 29)
    files = shard_names(len(plan))
    for file, units in zip(files, plan, strict=True):
        write_shard(folder, file, units, lambda name: {name: random(name)})
    write_index(folder, plan, files)
    return sum(each.nbytes for each in stored.values())


def run(folder: Path) -> dict[str, float]:
    """Load it packed, prefill, decode with the released cache; seconds, and the process's peak memory in bytes."""
    torch.manual_seed(0)
    before, began = _status("RssAnon"), time.monotonic()
    with _watched() as seen:
        model = fathom.load_model(folder, torch.bfloat16, packed=True, simulate_quantization=True)
    loaded = time.monotonic()
    cache = model.new_cache(1, PROMPT + STEPS, quantized=True)
    logits = model(torch.randint(0, 4096, (1, PROMPT)), cache=cache, last_only=True).logits
    prefilled = time.monotonic()
    for _ in range(STEPS):
        logits = model(logits[:, -1].argmax(-1, keepdim=True), cache=cache).logits
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {"load_seconds": loaded - began, "prefill_seconds": prefilled - loaded,
            "decode_seconds_a_token": (time.monotonic() - prefilled) / STEPS, "finite": bool(logits.isfinite().all()),
            "logit_std": float(logits.std()), "held_bytes": held,
            "load_peak_bytes": max(seen) - before, "peak_bytes": _status("VmHWM")}  # unlike getrusage, not what the parent held


def _status(field: str) -> int:
    """Bytes as Linux counts them: RssAnon is what the process holds of its own, without the pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@contextmanager
def _watched() -> Iterator[list[int]]:
    """Collects what the process holds of its own, every two milliseconds while the block runs."""
    seen, over = [_status("RssAnon")], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(_status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))
