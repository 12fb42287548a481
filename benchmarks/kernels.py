"""Every heavy operator on its own: its time, and its share of what the device can do at most.

    python benchmarks/kernels.py --device cuda --out FILE      at V4-Flash's shape in bfloat16; FILE (JSON) gets a row each
    python benchmarks/kernels.py --predict                     nothing is run: the least time that an H200's rates allow
    python benchmarks/kernels.py --device cpu --shape small    the script itself, where there is no GPU

An operator is bound by matrix products or by memory. Its work is counted once, whatever an implementation does twice: products of the
definition, or bytes that must be read and written. Shares are of this device's own measured rates (`fathom.lab.bench.ceilings`).
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fathom import ops
from fathom.devices import use_device
from fathom.files import write_text
from fathom.lab.bench.ceilings import measure_ceilings
from fathom.lab.bench.measure import timed
from fathom.lab.bench.shares import matmul
from fathom.quant.formats import quantise_fp4, quantise_fp8
from fathom.quant.records import EntryRecord, KeyRecord

H200 = {"products": 989e12, "memory": 4.8e12}  # FLOPs (dense, bfloat16) and bytes a second, as its maker says
REPEATS = 11


@dataclass(frozen=True)
class Shape:
    """Sizes; letters as in docs/architecture.md. `tokens` are prefilled or trained, `rows` decode, after `context` tokens (`far` for the indexer)."""

    W: int = 4096
    H: int = 64
    D: int = 512
    rotary: int = 64
    index_H: int = 64
    index_D: int = 128
    K: int = 512
    window: int = 128
    E: int = 64  # as one of four ranks holds
    active: int = 6
    F: int = 2048
    V: int = 129_280
    N: int = 4
    tokens: int = 4096
    rows: int = 128
    context: int = 65_536
    far: int = 1_048_576


SHAPES = {"flash": Shape(), "small": Shape(W=64, H=4, D=32, rotary=16, index_H=4, index_D=32, K=8, window=16, E=8, active=2, F=32, V=300, tokens=40,
                                           rows=3, context=256, far=512)}


@dataclass(frozen=True)
class Case:
    """An operator's work, FLOPs or bytes as it is `bound`, what to aim at least for, and what makes its call on a device."""

    name: str
    bound: str
    work: float
    make: Callable[[Callable], Callable[[], object]]
    share: float | None = None


def cases(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """All of them; `make` gets new(*sizes, dtype, grad), random numbers on the device."""
    s, e = shape, dtype.itemsize
    M, S, B = s.context // 4, s.tokens, s.rows
    dense = max(1, s.context // 128)

    def attention(queries: int, batch: int, entries: int, selected: bool, grad: bool = False) -> Callable:
        def make(new: Callable) -> Callable:
            q, kv, entry = new(batch, queries, s.H, s.D, grad=grad), new(batch, queries + s.window, s.D, grad=grad), new(batch, entries, s.D, grad=grad)
            sink, place = new(s.H, dtype=torch.float32, grad=grad), torch.arange(queries + s.window, device=q.device).expand(batch, -1)
            window = ops.Window(kv, place, place[:, s.window:], torch.full((batch, queries), s.window - 1, device=q.device))
            zero = torch.zeros(batch, queries, dtype=torch.int64, device=q.device)
            slots = None
            if selected:
                slots = torch.rand(batch, queries, min(s.K, entries), device=q.device).mul_(entries // s.K or 1).long()
                slots = slots + torch.arange(slots.shape[2], device=q.device) * (entries // s.K or 1)  # ascending, each once
            read = ops.Entries(entry, zero, zero + entries, slots)
            if not grad:
                return lambda: ops.attention(q, window, read, sink)
            return lambda: torch.autograd.grad(ops.attention(q, window, read, sink).float().sum(), (q, kv, entry, sink))
        return make

    def index(queries: int, batch: int, entries: int, packed: bool) -> Callable:
        def make(new: Callable) -> Callable:
            q, weight, keys = new(batch, queries, s.index_H, s.index_D), new(batch, queries, s.index_H), new(batch, entries, s.index_D)
            count = torch.full((batch, queries), entries, device=q.device)
            if packed:
                record = KeyRecord(s.index_D, dtype)
                keys = ops.Recorded(ops.pack(keys, record), record)
            return lambda: ops.index_topk(q, weight, keys, torch.zeros_like(count), count, s.K)
        return make

    def experts(tokens: int, store: Callable) -> Callable:
        def make(new: Callable) -> Callable:
            x, weight = new(tokens, s.W), new(tokens, s.active, dtype=torch.float32).abs()
            chosen = (torch.arange(tokens * s.active, device=x.device) % s.E).view(tokens, s.active)
            gate, up, down = (store(new(s.E, *sides) * 0.02) for sides in ((s.F, s.W), (s.F, s.W), (s.W, s.F)))
            return lambda: ops.routed_experts(x, chosen, weight, gate, up, down, 10.0)
        return make

    attended = 4 * S * s.H * s.D
    yield Case("attention, prefill, window and selected entries", "products", attended * (s.window + s.K), attention(S, 1, M, True), 0.35)
    yield Case("attention, prefill, window and all entries", "products", attended * (s.window + dense), attention(S, 1, dense, False), 0.35)
    yield Case("attention, forward and backward, selected", "products", 3.5 * attended * (s.window + s.K), attention(S, 1, M, True, grad=True))
    yield Case("attention, decode", "memory", B * e * s.D * (s.window + s.K + 2 * s.H), attention(1, B, M, True), 0.5)
    yield Case("indexer, prefill", "products", 2 * S * s.index_H * s.index_D * M, index(S, 1, M, False))
    far = s.far // 4
    yield Case("indexer, decode, bfloat16 keys", "memory", 4 * far * s.index_D * e, index(1, 4, far, False), 0.5)
    yield Case("indexer, decode, FP4 keys", "memory", 4 * far * KeyRecord(s.index_D, dtype).width, index(1, 4, far, True), 0.5)
    for name, store, bits in (("bfloat16", lambda x: x, 8 * e), ("FP8", quantise_fp8, 8), ("FP4", quantise_fp4, 4.25)):
        yield Case(f"experts, prefill, {name}", "products", 6 * 2 * S * s.active * s.W * s.F, experts(2 * S, store), 0.45)
        touched = min(s.E, B * s.active)
        yield Case(f"experts, decode, {name}", "memory", touched * 3 * s.W * s.F * bits / 8, experts(B, store))
    for name, store, bits in (("FP8", quantise_fp8, 8), ("FP4", quantise_fp4, 4.25)):
        yield Case(f"linear, decode, {name}", "memory", 4 * s.W * s.W * bits / 8, _linear(s, store))
    yield from _small(s, dtype)
    yield from _training(s, dtype)


def _linear(s: Shape, store: Callable) -> Callable:
    def make(new: Callable) -> Callable:
        x, weight = new(s.rows, s.W), store(new(4 * s.W, s.W))
        return lambda: ops.linear(x, weight)
    return make


def _small(s: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """What reads and writes, and multiplies little."""
    e, S = dtype.itemsize, 2 * s.tokens
    R = (2 + s.N) * s.N

    def opened(new: Callable) -> Callable:
        X = new(1, S, s.N, s.W)
        fn, base, scale = new(R, s.N * s.W, dtype=torch.float32), new(R, dtype=torch.float32), new(3, dtype=torch.float32)
        return lambda: ops.open_streams(X, fn, base, scale, 20, 1e-6, 1e-6)

    def closed(new: Callable) -> Callable:
        arguments = new(1, S, s.N, s.W), new(1, S, s.W), new(1, S, s.N, dtype=torch.float32), new(1, S, s.N, s.N, dtype=torch.float32)
        return lambda: ops.streams_out(*arguments)

    def normalised(new: Callable) -> Callable:
        x, weight = new(1, S, s.W), new(s.W)
        return lambda: ops.rms_normalise(x, 1e-6, weight)

    def rotated(new: Callable) -> Callable:
        x = new(1, s.tokens, s.H, s.D)
        turn = torch.ones(1, s.tokens, 1, s.rotary // 2, dtype=torch.complex64, device=x.device)
        return lambda: ops.rotate(x, turn)

    def rounded(new: Callable) -> Callable:
        x = new(1, S, s.W)
        return lambda: ops.round_inputs(x)

    def packed(new: Callable) -> Callable:
        x, record = new(1, 8 * S, s.D), EntryRecord(s.D, s.rotary, dtype)
        return lambda: ops.unpack(ops.pack(x, record), record)

    def pooled(new: Callable) -> Callable:
        value, score = new(1, S, 2 * s.D), new(1, S, 2 * s.D)
        current = torch.arange(S, device=value.device).view(-1, 4)
        return lambda: ops.pool_blocks(value, score, current, (current - 4).clamp(min=0), current[:, 0] >= 4)

    yield Case("hyper-connections, open", "memory", S * s.W * e * (s.N + 1), opened)
    yield Case("hyper-connections, close", "memory", S * s.W * e * (2 * s.N + 1), closed)
    yield Case("norm", "memory", 2 * S * s.W * e, normalised)
    yield Case("rotation", "memory", 2 * s.tokens * s.H * s.D * e, rotated)
    yield Case("rounding of inputs to FP8", "memory", 2 * S * s.W * e, rounded)
    width = EntryRecord(s.D, s.rotary, dtype).width
    yield Case("records of entries, packed and unpacked", "memory", 8 * S * 2 * (s.D * e + width), packed)
    yield Case("pooling of overlapping blocks of 4", "memory", S * 4 * s.D * e + S // 4 * s.D * 4, pooled)


def _training(s: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Losses with their gradients, and Muon's steps."""
    def entropy(new: Callable) -> Callable:
        hidden, head = new(s.tokens, s.W, grad=True), new(s.V, s.W, grad=True)
        target = torch.arange(s.tokens, device=hidden.device) % s.V
        return lambda: torch.autograd.grad(ops.cross_entropy(hidden, head, target), (hidden, head))

    def divergence(new: Callable) -> Callable:
        hidden, head, teacher = new(s.tokens, s.W, grad=True), new(s.V, s.W, grad=True), new(s.tokens, s.W)
        other = new(s.V, s.W)
        return lambda: torch.autograd.grad(ops.reverse_kl(hidden, head, teacher, other).sum(), (hidden, head))

    def settled(new: Callable) -> Callable:
        matrices = new(4, s.F, s.W, dtype=torch.float32)
        return lambda: ops.orthogonalize(matrices, dtype=dtype)

    yield Case("cross-entropy, forward and backward", "products", 6 * s.tokens * s.V * s.W, entropy)
    yield Case("divergence over the vocabulary, forward and backward", "products", 8 * s.tokens * s.V * s.W, divergence)
    yield Case("Newton-Schulz, 4 matrices, 10 steps", "products", 4 * 10 * (4 * s.F**2 * s.W + 2 * s.F**3), settled)


def measure(case: Case, device: torch.device, dtype: torch.dtype, rates: dict[str, float]) -> dict:
    """A row: the implementation's median time, its rate, and that rate's share of the device's."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*sizes: int, dtype: torch.dtype = dtype, grad: bool = False) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype).requires_grad_(grad)

    with torch.set_grad_enabled("backward" in case.name):
        run = case.make(new)
        first = [timed(run) for _ in range(3)]  # the first call compiles
        calls = max(1, min(100, int(2e-3 / min(first))))  # so that what it takes to be called hides behind the call before

        def together() -> None:
            for _ in range(calls):
                run()

        middle = statistics.median(timed(together) for _ in range(REPEATS)) / calls
    return {"operator": case.name, "bound": case.bound, "work": case.work, "ms": 1e3 * middle, "rate": case.work / middle,
            "share": case.work / middle / rates[case.bound], "wanted": case.share}


def main() -> None:
    """Measure, or predict, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", choices=SHAPES, default="flash")
    parser.add_argument("--only", default="", help="operators with this in their name")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--out")
    wanted = parser.parse_args()
    chosen = [case for case in cases(SHAPES[wanted.shape], torch.bfloat16) if wanted.only in case.name]
    if wanted.predict:
        rows = [{"operator": case.name, "bound": case.bound, "work": case.work, "ms": 1e3 * case.work / H200[case.bound], "share": 1.0, "wanted": case.share}
                for case in chosen]
        report = {"device": "an H200 as its maker says", "rates": H200, "rows": rows}
    else:
        device = use_device(wanted.device)
        ceilings = measure_ceilings(json.dumps({"threads": None, "device": wanted.device}))
        rates = {"products": 1e9 * matmul(ceilings, "bfloat16"), "memory": 1e9 * max(ceilings["read"], ceilings["copy"])}
        report = {"device": ceilings.get("device", "cpu"), "torch": torch.__version__, "rates": rates, "rows": []}
    print(f"{report['device']}: {report['rates']['products'] / 1e12:.3g} TFLOP/s, {report['rates']['memory'] / 1e12:.3g} TB/s")
    for number, case in enumerate(chosen):
        if not wanted.predict:
            try:
                report["rows"].append(measure(case, device, torch.bfloat16, rates))
            except Exception as error:  # a kernel that does not compile or fit must not cost the others' figures
                report["rows"].append({"operator": case.name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
        row = report["rows"][number]
        if "error" in row:
            print(f"{row['operator']:<58} failed: {row['error']}", flush=True)
        else:
            aim = f"  (at least {row['wanted']:.0%})" if row["wanted"] else ""
            print(f"{row['operator']:<58} {row['ms']:10.3f} ms  {row['share']:7.1%} of {row['bound']}{aim}", flush=True)
        if wanted.out:
            write_text(wanted.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
