"""Rotary turns of a few rows in one call."""

import torch
from torch import Tensor

from fathom.ops.native.library import library, ready, runs
from fathom.ops.rotary import rotate

_NUMBERS = 1 << 17


def _supports(x: Tensor, turn: Tensor, inverse: bool = False) -> bool:
    """Where the turns have the leading axes of x, those behind being 1."""
    if not 0 < x.numel() <= _NUMBERS or turn.dtype is not torch.complex64 or not turn.is_cpu or x.dim() != turn.dim() or not runs(x):
        return False
    ahead, behind = list(x.shape[:-1]), list(turn.shape[:-1])
    while behind and behind[-1] == 1:
        behind.pop()
    return behind == ahead[:len(behind)]


@rotate.register("native", supports=_supports)
def rotate_native(x: Tensor, turn: Tensor, inverse: bool = False) -> Tensor:
    """`rotate` for few numbers and turns that are shared by the rows of an axis, if by any."""
    D, C = x.shape[-1], turn.shape[-1]
    x_NAD, turn_NC, out = ready(x), turn.resolve_conj().contiguous(), torch.empty(x.shape)
    N = turn.numel() // C
    library().fathom_rotate(x_NAD.data_ptr(), turn_NC.data_ptr(), N, x.numel() // (N * D), D, C, inverse, out.data_ptr())
    return out.to(x.dtype)
