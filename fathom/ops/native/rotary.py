"""Rotary turns in one pass, in the dtype that the numbers have."""

import torch
from torch import Tensor

from fathom.ops.native.library import library, runs, threads
from fathom.ops.rotary import rotate


def _supports(x: Tensor, turn: Tensor, inverse: bool = False) -> bool:
    """Where the turns have the leading axes of x, those behind being 1."""
    if x.numel() == 0 or turn.numel() == 0 or turn.dtype is not torch.complex64 or not turn.is_cpu or x.dim() != turn.dim() or not runs(x):
        return False
    if 2 * turn.shape[-1] > x.shape[-1]:
        return False
    ahead, behind = list(x.shape[:-1]), list(turn.shape[:-1])
    while behind and behind[-1] == 1:
        behind.pop()
    return behind == ahead[:len(behind)]


@rotate.register("native", supports=_supports)
def rotate_native(x: Tensor, turn: Tensor, inverse: bool = False) -> Tensor:
    """`rotate` for turns that are shared by the rows of an axis, if by any."""
    D, C = x.shape[-1], turn.shape[-1]
    x_NAD, turn_NC = x.contiguous(), turn.resolve_conj().contiguous()
    N, out = turn.numel() // C, torch.empty_like(x_NAD)
    library().fathom_rotate(x_NAD.data_ptr(), x.dtype is torch.bfloat16, turn_NC.data_ptr(), N, x.numel() // (N * D), D, C, inverse, out.data_ptr(),
                            threads(x.numel()))
    return out
