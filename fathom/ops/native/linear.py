"""Products of a few rows with a matrix, plain or packed, each row of which is read once for all rows of x; and of many rows, in tiles."""

import math

import torch
from torch import Tensor

from fathom.ops.linear import Matrix, grouped_linear, linear
from fathom.ops.native.library import kind_of, library, places, reads, runs, threads
from fathom.ops.native.tiles import suits_tiles, tiled_product
from fathom.quant.formats import Packed

_ROWS = {torch.float32: 8, torch.bfloat16: 8}  # by the matrix's dtype: with more rows, oneDNN's blocks of them are faster
_PACKED_ROWS, _SMALL_ROWS = 32, 64
_SMALL = 1 << 21  # multiplications: of so few, starting another product costs more than it gains
_BLOCK = 16  # rows of a matrix that a thread takes together
_MATRIX = 1 << 12  # numbers: below it, torch's own call is as fast


def most_rows(weight: Matrix) -> int:
    """How many rows at most are multiplied with a matrix here."""
    least = _PACKED_ROWS if isinstance(weight, Packed) else _ROWS.get(weight.dtype, 0)
    return max(least, min(_SMALL_ROWS, _SMALL // max(1, math.prod(weight.shape)))) if least else 0


def _few(x: Tensor, weight: Matrix, row: int) -> bool:
    """Whether there are few rows, of x that fits the matrix: what does not is left to torch, which says so."""
    return (0 < x.numel() <= most_rows(weight) * row and len(weight.shape) == 2 and x.shape[-1] == weight.shape[1] and math.prod(weight.shape) >= _MATRIX
            and runs(x) and reads(weight))


def _product(x: Tensor, weight: Matrix, groups: int) -> Tensor:
    """[N, O] of x with N G I numbers and [O, I]."""
    (O, I), x = weight.shape, x.contiguous()
    N = x.numel() // (groups * I)
    out_NO = x.new_empty(N, O)
    library().fathom_linear(*places(weight), kind_of(weight), O, I, x.data_ptr(), x.dtype is torch.bfloat16, N, groups, out_NO.data_ptr(), threads(O * I))
    return out_NO


def _many(x: Tensor, weight: Matrix, groups: int) -> bool:
    """Whether tiles suit the product of each of the groups, which all have x's last dimension."""
    return (isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) % groups == 0 and runs(x, weight)
            and suits_tiles(x[..., 0, :] if groups > 1 else x, weight[:len(weight) // groups]))


@linear.register("native", supports=lambda x, weight: _few(x, weight, x.shape[-1]) or _many(x, weight, 1))
def linear_native(x: Tensor, weight: Matrix) -> Tensor:
    """`linear`; sums in float32 whatever the dtypes."""
    if not _few(x, weight, x.shape[-1]):
        return tiled_product(x, weight)
    return _product(x, weight, 1).view(*x.shape[:-1], -1)


@grouped_linear.register("native", supports=lambda x_BSGI, weight: (
    _few(x_BSGI, weight, x_BSGI.shape[2] * x_BSGI.shape[3]) and weight.shape[0] % (_BLOCK * x_BSGI.shape[2]) == 0
    or _many(x_BSGI, weight, x_BSGI.shape[2])))
def grouped_linear_native(x_BSGI: Tensor, weight: Matrix) -> Tensor:
    """`grouped_linear`; sums in float32 whatever the dtypes."""
    B, S, G, I = x_BSGI.shape
    if _few(x_BSGI, weight, G * I):
        return _product(x_BSGI, weight, G).view(B, S, -1)
    out_BSO = x_BSGI.new_empty(B, S, len(weight))
    for x_NI, matrix_RI, out_NR in zip(x_BSGI.flatten(0, 1).unbind(1), weight.chunk(G), out_BSO.flatten(0, 1).chunk(G, 1), strict=True):
        tiled_product(x_NI, matrix_RI, out_NO=out_NR)
    return out_BSO
