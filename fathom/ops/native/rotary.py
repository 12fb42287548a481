"""Rotary turns in one pass, in the dtype that the numbers have; their gradients are turned back."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.native.library import library, runs, threads, trains
from fathom.ops.rotary import rotate


def _supports(x: Tensor, turn: Tensor, inverse: bool = False) -> bool:
    """Where the turns have the leading axes of x, those behind being 1."""
    if x.numel() == 0 or turn.numel() == 0 or turn.dtype is not torch.complex64 or not turn.is_cpu or x.dim() != turn.dim() or not (runs(x) or trains(x)):
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
    return _Rotate.apply(x, turn, inverse) if torch.is_grad_enabled() else _rotated(x, turn, inverse)


def _rotated(x: Tensor, turn: Tensor, inverse: bool) -> Tensor:
    D, C = x.shape[-1], turn.shape[-1]
    x_NAD, turn_NC = x.contiguous(), turn.resolve_conj().contiguous()
    N, out = turn.numel() // C, torch.empty_like(x_NAD)
    library().fathom_rotate(x_NAD.data_ptr(), x.dtype is torch.bfloat16, turn_NC.data_ptr(), N, x.numel() // (N * D), D, C, inverse, out.data_ptr(),
                            threads(x.numel()))
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, turn: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(turn)
        ctx.inverse = inverse
        return _rotated(x, turn, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, not ctx.inverse), None, None
