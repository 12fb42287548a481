"""Products of a few rows with plain matrices: each row of the matrix is read once, for all rows of x."""

import torch
from torch import Tensor

from fathom.ops.linear import Matrix, grouped_linear, linear
from fathom.ops.native.library import library, ready, runs, threads

_ROWS = {torch.float32: 8, torch.bfloat16: 4}  # by the matrix's dtype: with more rows, oneDNN's blocks of them are faster
_BLOCK = 16  # rows of a matrix that a thread takes together
_MATRIX = 1 << 12  # numbers: below it, torch's own call is as fast


def _few(x: Tensor, weight: Matrix, row: int) -> bool:
    return (isinstance(weight, Tensor) and runs(x, weight) and 0 < x.numel() <= _ROWS[weight.dtype] * row and weight.numel() >= _MATRIX
            and weight.is_contiguous())


def _product(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """[N, O] in float32 of x with N G I numbers and [O, I]."""
    (O, I), x_NGI = weight.shape, ready(x)
    N = x_NGI.numel() // (groups * I)
    out_NO = torch.empty(N, O)
    library().fathom_linear(weight.data_ptr(), weight.dtype is torch.bfloat16, O, I, x_NGI.data_ptr(), N, groups, out_NO.data_ptr(),
                            threads(O * I))
    return out_NO


@linear.register("native", supports=lambda x, weight: _few(x, weight, x.shape[-1]))
def linear_native(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` for few rows; sums in float32 whatever the dtypes."""
    return _product(x, weight, 1).view(*x.shape[:-1], -1).to(x.dtype)


@grouped_linear.register("native", supports=lambda x_BSGI, weight: (
    _few(x_BSGI, weight, x_BSGI.shape[2] * x_BSGI.shape[3]) and len(weight) % (_BLOCK * x_BSGI.shape[2]) == 0))
def grouped_linear_native(x_BSGI: Tensor, weight: Tensor) -> Tensor:
    """`grouped_linear` for few tokens; sums in float32 whatever the dtypes."""
    return _product(x_BSGI, weight, x_BSGI.shape[2]).view(*x_BSGI.shape[:2], -1).to(x_BSGI.dtype)
