"""RMS normalisation in one pass, in the dtype that the numbers have, where torch makes seven; and its gradients in one."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.native.library import library, ready, runs, threads, trains
from fathom.ops.norm import rms_normalise

_PART = 64  # rows whose gradients of the weight are summed together


def _supports(x: Tensor, eps: float, weight: Tensor | None = None) -> bool:
    tensors = [x] if weight is None else [x, weight]
    return x.numel() > 0 and (weight is None or weight.shape == x.shape[-1:]) and (runs(*tensors) or trains(*tensors))


@rms_normalise.register("native", supports=_supports)
def rms_normalise_native(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """`rms_normalise`."""
    return _RMSNormalise.apply(x, weight, eps) if torch.is_grad_enabled() else _normalised(x, weight, eps)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x, D, weight = x.contiguous(), x.shape[-1], None if weight is None else ready(weight)
    out = torch.empty_like(x)
    library().fathom_rms_normalise(x.data_ptr(), x.dtype is torch.bfloat16, None if weight is None else weight.data_ptr(), x.numel() // D, D, eps,
                                   out.data_ptr(), threads(x.numel()))
    return out


class _RMSNormalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normalised(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, grad = (None if each is None else each.contiguous() for each in (*ctx.saved_tensors, grad))  # which may be read only once
        x_grad, D = torch.empty_like(x), x.shape[-1]
        N = x.numel() // D
        parts_ND = None if weight is None else torch.empty(-(-N // _PART), D)
        library().fathom_rms_backward(x.data_ptr(), grad.data_ptr(), None if weight is None else weight.data_ptr(), N, D, ctx.eps, x_grad.data_ptr(),
                                      None if parts_ND is None else parts_ND.data_ptr(), threads(x.numel()))
        return x_grad, None if parts_ND is None else parts_ND.sum(0), None
