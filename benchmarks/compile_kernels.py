"""Every Triton kernel compiled for GPUs that need not be here: registers, spilled bytes, shared memory, tensor-core products.

    python benchmarks/compile_kernels.py 80 90 100        compute capabilities times ten; figures go to benchmarks/results/kernels.json

The operators are called as training and serving call them, at the shape of V4-Flash (fewer tokens, experts and classes, on which no
kernel depends); each kernel launch is compiled by Triton and its assembler and not run. Under Triton's interpreter, where the tests run
the kernels, code passes that no GPU can be given: this is what shows it. Needs Linux and `pip install 'fathom[gpu]'`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fathom import ops
from fathom.ops.attention import Entries, Window
from fathom.ops.triton import attention, compress, entry_mass, experts, index_topk, linear, losses, norm_rotary, orthogonalize, rounding, streams
from fathom.quant.formats import quantise_fp4, quantise_fp8
from fathom.quant.records import EntryRecord, KeyRecord

ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
RESULTS = Path(__file__).parent / "results" / "kernels.json"
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


class Absent:
    """A driver for a card that is not there: enough to compile for it."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a number of its own: compiled kernels are kept by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[dict]]:
    """Launches compile and do not run; what was compiled, a row for each kernel and set of types and constants."""
    rows, seen, launch = [], set(), JITFunction.run

    def compiled(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            rows.append({"kernel": self.__name__, "capability": capability} | usage(kernel))
        return kernel

    driver.set_active(Absent(capability))
    JITFunction.run = compiled
    try:
        yield rows
    finally:
        JITFunction.run = launch


def usage(kernel) -> dict:
    """What a compiled kernel takes: registers a thread, bytes of stack (spilled registers), bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listed = subprocess.run([ASSEMBLER, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", listed.stdout + listed.stderr).groups()
    products = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", kernel.asm["ptx"]))
    return {"registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps,
            "tensor_core_products": products}


def call_operators(dtype: torch.dtype, W: int, H: int, D: int, F: int, index_D: int, K: int) -> None:
    """Every operator that has kernels, forward and backward; what the tensors hold does not matter, but for indices."""
    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    S, M, N = 32, 256, 4
    X, R = new(1, S, N, W), (2 + N) * N
    pre, post, res = streams.stream_coefficients_triton(X, new(R, N * W, dtype=FLOAT32), new(R, dtype=FLOAT32), new(3, dtype=FLOAT32), 20, 1e-6, 1e-6)
    backward(pre, post, res)
    backward(streams.collapse_coefficients_triton(X, new(N, N * W, dtype=FLOAT32), new(N, dtype=FLOAT32), new(1, dtype=FLOAT32), 1e-6, 1e-6))
    backward(streams.streams_in_triton(X, new(1, S, N, dtype=FLOAT32)))
    backward(streams.streams_out_triton(X, new(1, S, W), new(1, S, N, dtype=FLOAT32), new(1, S, N, N, dtype=FLOAT32)))
    blocks, everywhere = torch.arange(2 * 128).view(-1, 4), torch.ones(64, dtype=torch.bool)
    backward(compress.pool_blocks_triton(new(2, 128, 2 * D), new(2, 128, 2 * D), blocks, blocks, everywhere))
    backward(compress.pool_blocks_triton(new(2, 128, D), new(2, 128, D), torch.arange(256).view(2, 128), None, None))
    backward(losses.cross_entropy_triton(new(64, W), new(4096 + 16, W), torch.arange(64)))
    backward(losses.reverse_kl_triton(new(64, W), new(4096 + 16, W), new(64, 2 * W), new(4096 + 16, 2 * W)))
    orthogonalize.orthogonalize_triton(new(2, 2 * D, W).detach(), dtype=dtype)
    turn = torch.zeros(1, S, D // 16, dtype=torch.complex64)
    backward(norm_rotary.rms_normalise_triton(new(1, S, W), 1e-6, new(W)))
    backward(norm_rotary.rotate_triton(new(1, S, H, D), turn[:, :, None]))
    backward(*norm_rotary.low_rank_queries_triton(new(1, S, H * D), *3 * (torch.nn.Identity(),), H, turn, 1e-6))
    for record, vectors in ((EntryRecord(D, D // 8, dtype), new(1, S, D).detach()), (KeyRecord(index_D, dtype), new(1, S, index_D).detach())):
        rounding.unpack_triton(rounding.pack_triton(vectors, record), record)
    rounding.round_inputs_triton(new(1, S, W).detach())
    rounding.round_entries_triton(new(1, S, D).detach(), D // 8)
    rounding.round_index_triton(new(1, S, index_D).detach())
    call_attention(dtype, S, M, H, D, K)
    q, weight, keys = new(1, S, 64, index_D), new(1, S, 64), new(1, M, index_D)
    backward(index_topk.index_scores_triton(q, weight, keys))
    for length in (M, 3 * 8192):
        index_topk.index_topk_triton(q.detach(), weight.detach(), new(1, length, index_D).detach(), torch.zeros(1, S, dtype=torch.int64),
                                     torch.full((1, S), length), K)
    records = ops.Recorded(torch.zeros(1, M, KeyRecord(index_D, dtype).width, dtype=torch.uint8), KeyRecord(index_D, dtype))
    index_topk.index_topk_triton(q.detach(), weight.detach(), records, torch.zeros(1, S, dtype=torch.int64), torch.full((1, S), M), K)
    packed = torch.ones(F, W)
    for matrix in (quantise_fp8(packed), quantise_fp4(packed)):
        for rows in (1, 128):
            backward(linear.linear_triton(new(rows, W), matrix))
    backward(experts.clamped_swiglu_triton(new(64, F), new(64, F), 10.0))
    gate_and_up, down = torch.ones(2, F, W), torch.ones(2, W, F)
    for store in (lambda matrix: matrix.to(dtype).requires_grad_(), quantise_fp8, quantise_fp4):
        for tokens in (4, 256):
            chosen = torch.arange(2).expand(tokens, 2).contiguous()
            backward(experts.routed_experts_triton(new(tokens, W), chosen, new(tokens, 2, dtype=FLOAT32), store(gate_and_up), store(gate_and_up),
                                                   store(down), 10.0))


def call_attention(dtype: torch.dtype, S: int, M: int, H: int, D: int, K: int) -> None:
    """Window alone, with all entries, with selected ones; training, prefill without gradients, decoding; masses."""
    for queries, gradients in ((S, True), (S, False), (1, False)):
        q, kv, entry, sink = (torch.zeros(shape, dtype=dtype, requires_grad=gradients)
                              for shape in ((1, queries, H, D), (1, S, D), (1, M, D), (H,)))
        places = torch.arange(S)[None]
        window = Window(kv, places, places[:, -queries:], torch.full((1, queries), 127))
        first, count = torch.zeros(1, queries, dtype=torch.int64), torch.full((1, queries), M)
        for selected in (None, torch.arange(K).expand(1, queries, K).contiguous()):
            entries = Entries(entry, first, count, selected)
            backward(attention.attention_triton(q, window, entries, sink.float()))
            entry_mass.entry_mass_triton(q.detach(), window._replace(kv_BTD=kv.detach()), entries._replace(kv_BMD=entry.detach()), sink.detach().float())
        backward(attention.attention_triton(q, window, None, sink.float()))


def backward(*outputs: torch.Tensor) -> None:
    """The backward pass, where there is one."""
    if outputs[0].requires_grad:
        torch.autograd.grad([output.float().sum() for output in outputs], [*leaves(outputs)], allow_unused=True)


def leaves(outputs: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    """The tensors that outputs were made from and that ask for gradients."""
    nodes, seen = [output.grad_fn for output in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [before for before, _ in node.next_functions]


def main(capabilities: list[int]) -> None:
    """Compile for each capability, print what it comes to, and write all figures."""
    if triton.knobs.runtime.interpret or sys.platform != "linux":
        sys.exit("kernels are compiled on Linux, without TRITON_INTERPRET")
    rows = []
    for capability in capabilities:
        for name, dtype, shape in (("flash", BFLOAT16, (4096, 64, 512, 2048, 128, 512)), ("small", FLOAT32, (256, 8, 64, 128, 64, 32))):
            with tempfile.TemporaryDirectory() as cache:
                os.environ["TRITON_CACHE_DIR"] = cache
                with compiling(capability) as found:
                    call_operators(dtype, *shape)
            rows += [{"shape": name, "dtype": str(dtype).removeprefix("torch.")} | row for row in found]
            spilled = [row["stack"] for row in found if row["stack"]]
            print(f"sm_{capability} {name} {dtype}: {len(found)} kernels, at most {max(row['shared'] for row in found) / 1024:.0f} KiB of shared "
                  f"memory, {len(spilled)} spill, at most {max(spilled, default=0)} bytes a thread", flush=True)
    listed = ",\n".join(map(json.dumps, rows))  # a kernel a line
    RESULTS.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{listed}\n]}}\n')


if __name__ == "__main__":
    if not all(word.isdecimal() for word in sys.argv[1:]):
        sys.exit(__doc__)
    main([int(word) for word in sys.argv[1:]] or [80, 90, 100])
