"""Products with a weight matrix: plain, or packed in FP8 or FP4 and dequantised where it is used (report 5.2.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.dispatch import op
from fathom.quant.formats import Packed, dequantise

Matrix = Tensor | Packed


@op
def dense(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """The matrix [..., O, I] in `dtype`, dequantised where it is packed."""
    return dequantise(weight, dtype) if isinstance(weight, Packed) else weight.to(dtype)


@op
def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., I] times the transposed matrix [O, I] -> [..., O], in the dtype of x."""
    return F.linear(x, dense(weight, x.dtype))
