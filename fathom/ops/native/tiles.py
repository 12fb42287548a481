"""Products of many rows, in tiles that stay in registers, where the processor has vectors of 16 numbers and no matrix instructions.

On two cores of Zen 4 they reach 117 GFLOP/s a core in float32 and 234 in bfloat16, oneDNN 109 and 217 on large matrices, and of 128 rows 84 and 150
(docs/performance.md).
"""

from functools import lru_cache

import torch
from torch import Tensor

from fathom.ops.dispatch import preferred
from fathom.ops.native.library import library

_KINDS = {torch.float32: 1, torch.bfloat16: 2}
_PLAIN = Tensor, torch.nn.Parameter
_COLUMNS, _ROWS, _SPAN = 16, 8, 48  # that are packed together; columns of a tile
_PACKED = 1 << 24  # words of columns that exist at a time beside the matrix
_LEAST_ROWS, _LEAST_WORK = 12, 1 << 18  # rows, and multiplications: with fewer, packing costs more than it gains


@lru_cache
def kinds() -> int:
    """What this processor multiplies well in tiles: 1 for float32, 2 for bfloat16, or their sum."""
    return library().fathom_tile_kinds() if library() is not None else 0


def in_tiles(dtype: torch.dtype) -> bool:
    """Whether matrices of this dtype are multiplied here, unless other implementations are asked for."""
    return bool(kinds() & _KINDS.get(dtype, 0)) and preferred() in (None, "native")


def suits_tiles(x_NI: Tensor, matrix_OI: Tensor) -> bool:
    """Whether `tiled_product` takes x [..., I] and a matrix [O, I], and is faster than other products."""
    (O, I), N = matrix_OI.shape, x_NI.numel() // max(1, x_NI.shape[-1])
    return (N >= _LEAST_ROWS and O >= _COLUMNS and N * O * I >= _LEAST_WORK and x_NI.dtype is matrix_OI.dtype and in_tiles(x_NI.dtype)
            and x_NI.shape[-1] == I and 1 in matrix_OI.stride() and all(x.is_cpu and type(x) in _PLAIN for x in (x_NI, matrix_OI)))


def tiled_product(x_NI: Tensor, matrix_OI: Tensor, dtype: torch.dtype | None = None, relu: bool = False, out_NO: Tensor | None = None) -> Tensor:
    """x [..., I] times the transposed matrix [O, I] -> [..., O], in x's dtype or another; either may be a transposed view.

    Sums are in float32; negative numbers become 0 if `relu`. A row's result does not depend on other rows.
    """
    x, (O, I) = x_NI if x_NI.dim() == 2 else x_NI.flatten(0, -2), matrix_OI.shape
    x = x if 1 in x.stride() else x.contiguous()
    N, narrow = len(x), x.dtype is torch.bfloat16
    if out_NO is None:
        out_NO = x.new_empty(N, O, dtype=dtype or x.dtype)
    words, threads = (I + 1) // 2 if narrow else I, torch.get_num_threads()
    step = max(_SPAN, _PACKED // words // _SPAN * _SPAN)  # columns that are packed at a time
    columns = torch.empty(min(step, _up(O, _COLUMNS)) * words, dtype=torch.int32)
    turned = x.stride(1) != 1 or (narrow and I % 2)
    rows = torch.empty(_up(N, _ROWS) * words, dtype=torch.int32) if turned else None
    for begin in range(0, O, step):
        matrix, out = matrix_OI[begin:begin + step], out_NO[:, begin:begin + step]
        library().fathom_product(
            x.data_ptr(), *x.stride(), matrix.data_ptr(), *matrix.stride(), narrow, N, len(matrix), I, relu, out.data_ptr(), out_NO.stride(0),
            out_NO.dtype is torch.bfloat16, columns.data_ptr(), None if rows is None else rows.data_ptr(), threads)
    return out_NO.view(*x_NI.shape[:-1], O) if x_NI.dim() != 2 else out_NO


def suits_groups(x_PI: Tensor, matrix_GOI: Tensor) -> bool:
    """Whether the two functions below take x [P, I] and matrices [G, O, I], or what they are the transposed of."""
    return (in_tiles(x_PI.dtype) and x_PI.dtype is matrix_GOI.dtype and x_PI.is_cpu and matrix_GOI.is_cpu and 1 in matrix_GOI.stride()[1:]
            and not (x_PI.dtype is torch.bfloat16 and x_PI.shape[1] % 2))


def grouped_product(x_PI: Tensor, matrix_GOI: Tensor, end_G: Tensor) -> Tensor:
    """Rows of x before each group's end times the group's transposed matrix [P, O]; a matrix may be a transposed view."""
    (G, O, I), x, ends = matrix_GOI.shape, x_PI.contiguous(), end_G.contiguous()
    out_PO = x.new_empty(len(x), O)
    _grouped(x, matrix_GOI, ends, 0, O, I, _up(O, _COLUMNS) * I, out_PO)
    return out_PO


def grouped_outer(y_PO: Tensor, x_PI: Tensor, end_G: Tensor) -> Tensor:
    """The sum of y x^T over each group's rows [G, O, I]."""
    y, x, ends = y_PO.contiguous(), x_PI.contiguous(), end_G.contiguous()
    out_GOI = x.new_empty(len(ends), y.shape[1], x.shape[1])
    most = int(ends.diff(prepend=ends.new_zeros(1)).max())
    _grouped(y, x[None], ends, y.shape[1], x.shape[1], 0, (_up(x.shape[1], _COLUMNS) + _up(y.shape[1], _ROWS)) * most, out_GOI)
    return out_GOI


def _up(length: int, block: int) -> int:
    return -(-length // block) * block


def _grouped(x: Tensor, m: Tensor, end_G: Tensor, N: int, O: int, I: int, room: int, out: Tensor) -> None:  # noqa: E741
    threads, outer = torch.get_num_threads(), N > 0
    space = torch.empty(threads, room, dtype=torch.int32)
    library().fathom_grouped_products(x.data_ptr(), m.data_ptr(), *m.stride(), x.dtype is torch.bfloat16, end_G.data_ptr(), len(end_G), N, O, I, outer,
                                      out.data_ptr(), space.data_ptr(), room, threads)
