"""Products of a few rows with a matrix, plain or packed: each row of the matrix is read once, for all rows of x."""

import math

import torch
from torch import Tensor

from fathom.ops.linear import Matrix, grouped_linear, linear
from fathom.ops.native.library import kind_of, library, places, reads, ready, runs, threads
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
    """[N, O] in float32 of x with N G I numbers and [O, I]."""
    (O, I), x_NGI = weight.shape, ready(x)
    N = x_NGI.numel() // (groups * I)
    out_NO, space = torch.empty(N, O), torch.empty_like(x_NGI) if isinstance(weight, Packed) else x_NGI
    library().fathom_linear(*places(weight), kind_of(weight), O, I, x_NGI.data_ptr(), N, groups, space.data_ptr(), out_NO.data_ptr(),
                            threads(O * I))
    return out_NO


@linear.register("native", supports=lambda x, weight: _few(x, weight, x.shape[-1]))
def linear_native(x: Tensor, weight: Matrix) -> Tensor:
    """`linear` for few rows; sums in float32 whatever the dtypes."""
    return _product(x, weight, 1).view(*x.shape[:-1], -1).to(x.dtype)


@grouped_linear.register("native", supports=lambda x_BSGI, weight: (
    _few(x_BSGI, weight, x_BSGI.shape[2] * x_BSGI.shape[3]) and weight.shape[0] % (_BLOCK * x_BSGI.shape[2]) == 0))
def grouped_linear_native(x_BSGI: Tensor, weight: Matrix) -> Tensor:
    """`grouped_linear` for few tokens; sums in float32 whatever the dtypes."""
    return _product(x_BSGI, weight, x_BSGI.shape[2]).view(*x_BSGI.shape[:2], -1).to(x_BSGI.dtype)
