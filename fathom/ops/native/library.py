"""Compiles the C files beside it once for this machine, loads it, and says which tensors its kernels take.

The compiled file lies in the user's cache (`XDG_CACHE_HOME`, else ~/.cache) under a name made of all that went into it. FATHOM_NATIVE=0 does without, and so
does a machine without a C compiler.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from fathom.ops.linear import Layer, Matrix, Projection
from fathom.ops.rounding import EXACT, ReleasedRounding, Rounding
from fathom.quant.formats import E4M3, E8M0, Packed

_SOURCES = sorted(Path(__file__).parent.glob("*.c"))
_FLAGS = ["-O3", "-march=native", "-fPIC"]
_PLAIN = (Tensor, nn.Parameter)
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1}
_CODES = {(E4M3, torch.float32): 2, (torch.int8, torch.float32): 3, (E4M3, E8M0): 6, (torch.int8, E8M0): 7}
ROUNDS = 8  # in a matrix's kind: its inputs are rounded
_LISTENING = Lock()
_SHARED_WORK = 1 << 16  # numbers that are read: below it, one thread has done before a second one has begun
_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_PROJECTION = [_P, _P, _I]
_ANSWERS = ("experts_in", "route", "tile_kinds")  # kernels that return a number: the first two 0, or that they refuse
_ARGUMENTS = {
    "linear": [_P, _P, _I, _L, _L, _P, _I, _L, _L, _P, _I],
    "rms_normalise": [_P, _I, _P, _L, _L, _F, _P, _I],
    "rotate": [_P, _I, _P, *[_L] * 4, _I, _P, _I],
    "experts_in": [*[_P] * 7, _I, _I, *[_L] * 5, _F, *[_P] * 3, _I],
    "experts_out": [*[_P] * 5, _I, _I, *[_L] * 4, *[_P] * 3, _I],
    "streams_in": [_P, _I, _P, _L, _L, _L, _P, _I],
    "streams_out": [_P, _P, _I, _P, _P, _L, _L, _L, _P, _I],
    "attention": [_P, _I, _P, _P, _I, *[_P] * 7, *[_L] * 8, _P, _I],
    "index_topk": [*[_P] * 3, _I, _P, _P, *[_L] * 6, *[_P] * 3, _I],
    "low_rank_queries": [_P, _I, *_PROJECTION, _P, *_PROJECTION, _P, *[_L] * 6, _F, _P, _P, _I],
    "index_queries": [_P, _I, *_PROJECTION, _P, *[_L] * 5, _I, _P, _I],
    "shared_key": [_P, _I, *_PROJECTION, _P, _P, *[_L] * 4, _F, _I, _P, _I],
    "join_heads": [_P, _I, _P, *_PROJECTION, *_PROJECTION, *[_L] * 7, _P, _I],
    "compressor_inputs": [_P, _I, *_PROJECTION, *_PROJECTION, _P, _P, *[_L] * 4, _P, _I],
    "swiglu_expert": [_P, _I, *_PROJECTION * 3, *[_L] * 3, _F, _P, _I],
    "route": [_P, _I, _P, _P, _I, *[_L] * 4, _F, _P, _P, _P, _I],
    "pack_entries": [_P, _I, *[_L] * 4, _P],
    "unpack_entries": [_P, *[_L] * 6, _I, _P, _I],
    "pack_keys": [_P, _I, *[_L] * 3, _P],
    "unpack_keys": [_P, *[_L] * 5, _I, _P, _I],
    "open_streams": [_P, _I, *[_P] * 3, *[_L] * 4, _F, _F, *[_P] * 4, _I],
    "streams_opened": [_P, _I, *[_P] * 3, *[_L] * 4, _F, _F, *[_P] * 7, _I],
    "streams_opened_backward": [*[_P] * 9, *[_L] * 4, _F, *[_P] * 3, _I],
    "streams_in_backward": [*[_P] * 4, *[_L] * 3, _P, _P, _I],
    "streams_gradients": [*[_P] * 6, *[_L] * 3, *[_P] * 3, _I],
    "streams_out_backward": [*[_P] * 5, *[_L] * 3, *[_P] * 4, _I],
    "column_probabilities": [_P, _I, _P, *[_L] * 4, _F, *[_P] * 3, _L, *[_P] * 3, _L, _I, _L, _P, _I, _I],
    "column_gradients": [_P, _I, _P, _L, _L, _F, _P, _P, _I],
    "block_divergence": [_P, *[_L] * 4, *[_P] * 3, _L, _L, _I, *[_P] * 3, _I],
    "swiglu": [_P, _P, _I, _P, _L, _L, _F, _P, _I, _I],
    "swiglu_backward": [*[_P] * 3, _I, _P, _L, _L, _F, *[_P] * 4, _I],
    "rms_backward": [*[_P] * 3, _L, _L, _F, _P, _P, _I],
    "sum_rows": [_P, _I, _P, *[_L] * 3, _P, _I],
    "pool_backward": [*[_P] * 3, _L, *[_P] * 3, *[_L] * 3, _P, _P, _I],
    "product": [_P, _L, _L, _P, _L, _L, _I, *[_L] * 3, _I, _P, _L, _I, _P, _P, _I],
    "grouped_products": [_P, _P, *[_L] * 3, _I, _P, *[_L] * 4, _I, _P, _P, _L, _I],
    "experts_of_many": [_P, _I, _P, _L, *[_P] * 5, *[_L] * 3, _F, *[_P] * 3, _I],
    "index_topk_of_many": [*[_P] * 3, _I, _P, _P, *[_L] * 7, *[_P] * 3, _I],
    "attention_of_many": [*[_P] * 3, _I, *[_P] * 7, *[_L] * 9, *[_P] * 3, _L, _P, _I],
    "attention_backward": [*[_P] * 4, _I, *[_P] * 7, *[_L] * 9, *[_P] * 3, _L, *[_P] * 5, _I],
    "newton_schulz": [_P, _I, *[_L] * 3, _P, _L, _L, _P, _L, _I],
    "tile_kinds": [],
    "pool_blocks": [_P, _P, _L, *[_P] * 3, *[_L] * 3, _P, _I],
}


@lru_cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled if they are not yet; None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("FATHOM_NATIVE") == "0" or compiler is None:
        return None
    openmp = _openmp()
    flags = [*_FLAGS, *(["-fopenmp"] if openmp else [])]
    made_of = [*(source.read_bytes() for source in _SOURCES), repr([compiler, *flags]).encode(), _processor()]
    name = f"kernels-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    try:
        if openmp:
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)  # torch's own threads, not a second set of them
        found = ctypes.CDLL(str(_made(compiler, flags, name)))
    except (OSError, subprocess.SubprocessError):
        return None
    for kernel_name, arguments in _ARGUMENTS.items():
        kernel = getattr(found, f"fathom_{kernel_name}")
        kernel.argtypes, kernel.restype = arguments, _I if kernel_name in _ANSWERS else None
    return found


@contextmanager
def listening(heard: Callable[[Callable, tuple, int | None], None]) -> Iterator[None]:
    """Inside the block `heard` is told of each kernel that this thread calls, with its arguments and its answer. One thread at a time may listen."""
    kernels, listener = library(), get_ident()
    if kernels is None:
        yield
        return

    def told(kernel: Callable) -> Callable:
        def call(*arguments: Any) -> int | None:
            answer = kernel(*arguments)
            if get_ident() == listener:
                heard(kernel, arguments, answer)
            return answer

        return call

    with _LISTENING:
        plain = {name: getattr(kernels, name) for name in (f"fathom_{name}" for name in _ARGUMENTS)}
        try:
            for name, kernel in plain.items():
                setattr(kernels, name, told(kernel))
            yield
        finally:
            for name, kernel in plain.items():
                setattr(kernels, name, kernel)


def _made(compiler: str, flags: list[str], name: str) -> Path:
    """The compiled file, and its checksum behind it: in the user's cache, or where that cannot be written in a folder of this process alone."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fathom"
        if _whole(folder / name):
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder))
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        folder = work = Path(tempfile.mkdtemp())
    try:
        # Linked in a call of its own, without -fopenmp, which would bring a second set of threads.
        for command in ([*flags, "-c", str(Path(__file__).with_name("library.c")), "-o", str(work / "kernels.o")], ["-shared", str(work / "kernels.o"), "-o", str(work / name), "-lm"]):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=120)
        content = (work / name).read_bytes()
        (work / name).write_bytes(content + hashlib.sha256(content).digest())
        os.replace(work / name, folder / name)  # no other process finds half a file
    finally:
        if work != folder:
            shutil.rmtree(work, ignore_errors=True)
        else:
            atexit.register(shutil.rmtree, work, ignore_errors=True)
    return folder / name


def _whole(path: Path) -> bool:
    """Whether a compiled file is there and as it was written: loading a part of one can end the process."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _openmp() -> Path | None:
    """The library of threads that torch has loaded."""
    return next(iter(sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))), None)


def _processor() -> bytes:
    """What "native" stands for: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"|".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()} {sysconfig.get_platform()}".encode()


def runs(*tensors: Tensor) -> bool:
    """Whether kernels take these tensors [...]: plain ones of float32 or bfloat16 on the CPU while no gradients are recorded."""
    for x in tensors:
        if type(x) not in _PLAIN or x.dtype not in _NUMBERS or not x.is_cpu:
            return False
    return not torch.is_grad_enabled() and library() is not None


def trains(*tensors: Tensor) -> bool:
    """Whether kernels with gradients take these tensors [...]: plain ones of float32 on the CPU while gradients are recorded."""
    for x in tensors:
        if type(x) not in _PLAIN or x.dtype is not torch.float32 or not x.is_cpu:
            return False
    return torch.is_grad_enabled() and library() is not None


def reads(*matrices: Matrix) -> bool:
    """Whether kernels read these matrices [..., O, I], all in one format."""
    kind = kind_of(matrices[0])
    for matrix in matrices:
        for part in (matrix.codes, matrix.scale) if isinstance(matrix, Packed) else (matrix,):
            if type(part) not in _PLAIN or not part.is_cpu or not part.is_contiguous():
                return False
        if kind is None or kind_of(matrix) != kind:
            return False
    return True


def plain(*layers: Layer) -> list | None:
    """What the layers are (Projection, Norm), if all are no more than that."""
    found = [getattr(layer, "plain", None) for layer in layers]
    return None if None in found else found


def projects(x: Tensor, *projections: Projection, in_float32: bool = False) -> bool:
    """Whether kernels take x [..., I] and these projections of it, or of what comes of it, computed in its dtype or in float32."""
    for projection in projections:
        matrix = projection.matrix
        if not reads(matrix) or len(matrix.shape) != 2 or not known(projection.rounding) or projection.in_float32 != in_float32:
            return False
        if not isinstance(matrix, Packed) and matrix.dtype is not x.dtype and not (in_float32 and matrix.dtype in _NUMBERS):
            return False
    return runs(x)


def known(rounding: Rounding) -> bool:
    """Whether kernels round like this."""
    return rounding is EXACT or type(rounding) is ReleasedRounding


def used(projection: Projection) -> tuple[int, int | None, int]:
    """A projection as kernels are told of it: its places, its kind."""
    kind = kind_of(projection.matrix)
    return *places(projection.matrix), kind if projection.rounding is EXACT else kind | ROUNDS


def kind_of(matrix: Matrix) -> int | None:
    """The number by which kernels know a matrix's format and that of its scales; None for what they cannot read."""
    if isinstance(matrix, Packed):
        return _CODES.get((matrix.codes.dtype, matrix.scale.dtype))
    return _NUMBERS.get(matrix.dtype)


def places(matrix: Matrix) -> tuple[int, int | None]:
    """Where a matrix's numbers lie, and its scales."""
    return (matrix.codes.data_ptr(), matrix.scale.data_ptr()) if isinstance(matrix, Packed) else (matrix.data_ptr(), None)


def ready(x: Tensor) -> Tensor:
    """x [...] in float32 without gaps, as kernels want what is not a matrix; the caller keeps it alive while they run."""
    return x.float().contiguous()


def threads(numbers: int) -> int:
    """How many threads read so many numbers."""
    return torch.get_num_threads() if numbers >= _SHARED_WORK else 1
