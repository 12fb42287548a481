"""Products with a weight matrix: plain, or packed in FP8 or FP4 and dequantised where it is used (report 5.2.1)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.dispatch import op, product
from fathom.ops.rounding import EXACT, Rounding
from fathom.quant.formats import Packed, dequantise

Matrix = Tensor | Packed


Layer = Callable[[Tensor], Tensor]  # of `fathom.model.layers`, or what somebody put in its place


class Projection(NamedTuple):
    """What a linear layer is where it is no more than that: its matrix [O, I], what rounds its inputs, whether it widens them to float32."""

    matrix: Matrix
    rounding: Rounding = EXACT
    in_float32: bool = False


class Norm(NamedTuple):
    """What a normalising layer is where it is no more than that: its weight [D] and epsilon."""

    weight: Tensor
    eps: float


@op
def dense(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """The matrix [..., O, I] in `dtype`, dequantised where it is packed."""
    return dequantise(weight, dtype) if isinstance(weight, Packed) else weight.to(dtype)


@product(0, 1)
def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., I] times the transposed matrix [O, I] -> [..., O], in the dtype of x."""
    return F.linear(x, dense(weight, x.dtype))


@product(0, 1)
def grouped_linear(x_BSGI: Tensor, weight: Matrix) -> Tensor:
    """Each group's own part of a matrix [G R, I] applied to its x [B, S, G, I] -> [B, S, G R] (report 2.3.3)."""
    matrix_GRI = dense(weight, x_BSGI.dtype).unflatten(0, (x_BSGI.shape[2], -1))
    return torch.einsum("bsgi,gri->bsgr", x_BSGI, matrix_GRI).flatten(2)
