"""Matrix products on CPU: in tiles where the processor suits them (ops/native/tiles.py), else oneDNN's for float32 too, which torch leaves to MKL.

On an AMD processor MKL multiplies float32 with half of AVX-512's width: 220 GFLOP/s on 2 cores of Zen 5 where oneDNN reached 490, and 17 GB/s instead
of 20-40 while a matrix is read for one row (docs/performance.md). oneDNN compiles a kernel for each new shape (0.4 ms), so callers whose
number of rows keeps changing round it up. Where MKL's width is all there is, it is preferred for two kinds of product in training, at the price of its own
buffers: those whose results go to a given place, which oneDNN's call would copy, and those of two transposed views.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.native.tiles import suits_tiles, tiled_product

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_BIG_MATRIX, _BIG_PRODUCT = 1 << 16, 1 << 21  # numbers in the matrix, multiplications: below both, starting oneDNN costs more than it gains
_BIG_ROW = 1 << 23  # multiplications for one row of a batch: below it, one call for all rows is faster
_ROUND = 16  # rows


def _wider_than_mkl() -> bool:
    """Whether this is a processor whose vectors are twice as wide as MKL uses there: AMD's from Zen 5 (family 26) on."""
    try:
        words = [line.split() for line in Path("/proc/cpuinfo").read_text().splitlines()[:4]]
    except OSError:
        return False
    return ["vendor_id", ":", "AuthenticAMD"] in words and any(word[:2] == ["cpu", "family"] and int(word[-1]) >= 26 for word in words)


_WIDER_THAN_MKL = _wider_than_mkl()


def times(x_NI: Tensor, matrix_OI: Tensor) -> Tensor:
    """x [..., I] times the transposed matrix [O, I] -> [..., O], without gradients; either may be a transposed view."""
    if suits_tiles(x_NI, matrix_OI):
        return tiled_product(x_NI, matrix_OI)
    if _suits_onednn(x_NI, matrix_OI):
        return _ONEDNN(_dense(x_NI), _dense(matrix_OI), None, "none", [], "")
    return F.linear(x_NI, matrix_OI)


def times_relu(x_NI: Tensor, matrix_OI: Tensor) -> Tensor:
    """`times` [..., O], negative numbers replaced by 0."""
    if suits_tiles(x_NI, matrix_OI):
        return tiled_product(x_NI, matrix_OI, relu=True)
    if _suits_onednn(x_NI, matrix_OI):
        return _ONEDNN(_dense(x_NI), _dense(matrix_OI), None, "relu", [], "")
    return F.linear(x_NI, matrix_OI).relu_()


def _dense(x: Tensor) -> Tensor:
    """x [..., I], copied if its numbers, or those of its transposed, have gaps: of such a matrix oneDNN's product takes a hundred times as long."""
    return x if x.is_contiguous() or (x.dim() > 1 and x.mT.is_contiguous()) else x.contiguous()


def _suits_onednn(x_NI: Tensor, matrix_OI: Tensor) -> bool:
    if not _WIDER_THAN_MKL and x_NI.dim() == 2 and _transposed(x_NI) and _transposed(matrix_OI):
        return False
    big = matrix_OI.numel() >= _BIG_MATRIX or x_NI.numel() * len(matrix_OI) >= _BIG_PRODUCT
    return big and x_NI.dtype == torch.float32 == matrix_OI.dtype and _ONEDNN is not None and x_NI.numel() > 0


def _transposed(x: Tensor) -> bool:
    return not x.is_contiguous() and x.mT.is_contiguous()


def times_into(x_NI: Tensor, matrix_OI: Tensor, out_NO: Tensor) -> None:
    """`times` of two matrices, written to `out` [N, O]."""
    if out_NO.stride(1) == 1 and suits_tiles(x_NI, matrix_OI):
        tiled_product(x_NI, matrix_OI, out_NO=out_NO)
    elif _WIDER_THAN_MKL and _suits_onednn(x_NI, matrix_OI):
        out_NO.copy_(times(x_NI, matrix_OI))
    else:
        torch.mm(x_NI, matrix_OI.T, out=out_NO)


def rounded_rows(x_PI: Tensor, begin: int, end: int) -> slice:
    """Rows begin ... end of x [P, I] and some of those behind them, up to a round number, so that products have few shapes."""
    return slice(begin, min(len(x_PI), begin + -(-(end - begin) // _ROUND) * _ROUND))


def batch_times(x_BNI: Tensor, y_BOI: Tensor) -> Tensor:
    """x times the transposed y, row of the batch by row [B, N, O], without gradients."""
    if len(x_BNI) == 1 or x_BNI[0].numel() * y_BOI.shape[1] >= _BIG_ROW:
        products = [times(x_NI, y_OI) for x_NI, y_OI in zip(x_BNI, y_BOI, strict=True)]
        return products[0][None] if len(products) == 1 else torch.stack(products)
    return torch.bmm(x_BNI, y_BOI.mT)


class Times(torch.autograd.Function):
    """`times` [N, O] of [N, I] and [O, I], with gradients."""

    @staticmethod
    def forward(ctx, x_NI: Tensor, matrix_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, matrix_OI)
        return times(x_NI, matrix_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, matrix_OI = ctx.saved_tensors
        return (times(grad_NO, matrix_OI.T) if ctx.needs_input_grad[0] else None,
                times(grad_NO.T, x_NI.T) if ctx.needs_input_grad[1] else None)
