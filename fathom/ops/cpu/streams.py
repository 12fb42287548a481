"""Hyper-connections on CPU (report 2.2, eq. 1-8): the definitions' equations with gradients written out by hand.

Coefficients are computed with the tokens last (T = B S), because sums over streams are then vectorised over tokens; the
residual is read as few times as its gradients allow. float32 only: anything else is left to the definition, as is
`streams_in`, whose definition is as fast as memory already.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.streams import sinkhorn, stream_coefficients, streams_out


def _float32_on_cpu(*tensors: Tensor) -> bool:
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


def _tokens_first(x: Tensor) -> Tensor:
    """[B, S, ...] as contiguous [T, ...], which batched products are fast on."""
    return x.contiguous().flatten(0, 1)


def _balance(logits_NNT: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Doubly stochastic [N, N, T], the softmax it started from and its 2 iterations - 1 divisors [., N, T] (eq. 8)."""
    softmax_NNT = logits_NNT.softmax(1)
    matrix_NNT = softmax_NNT + eps
    divisors = []
    for step in range(2 * iterations - 1):
        divisors.append(matrix_NNT.sum(step % 2).add_(eps))  # columns (over the first axis) on even steps
        matrix_NNT.div_(divisors[-1].unsqueeze(step % 2))
    return matrix_NNT, softmax_NNT, torch.stack(divisors)


def _balance_backward(grad_NNT: Tensor, matrix_NNT: Tensor, softmax_NNT: Tensor, divisors: Tensor) -> Tensor:
    """Gradient of the logits [N, N, T], undoing the divisions one by one from the final matrix.

    With y = x / (sum x + eps) and g = y dy, the gradient with respect to log y, each step is g <- g - y sum g.
    """
    log_grad_NNT, matrix_NNT = grad_NNT * matrix_NNT, matrix_NNT.clone()
    for step in reversed(range(len(divisors))):
        log_grad_NNT.addcmul_(matrix_NNT, log_grad_NNT.sum(step % 2, keepdim=True), value=-1)
        matrix_NNT.mul_(divisors[step].unsqueeze(step % 2))
    log_grad_NNT.div_(matrix_NNT).mul_(softmax_NNT)  # from log(softmax + eps) to log softmax
    return log_grad_NNT.addcmul_(softmax_NNT, log_grad_NNT.sum(1, keepdim=True), value=-1)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
        matrix_NNT, softmax_NNT, divisors = _balance(logits_TNN.permute(1, 2, 0).contiguous(), iterations, eps)
        ctx.save_for_backward(matrix_NNT, softmax_NNT, divisors)
        return matrix_NNT.permute(2, 0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TNN: Tensor) -> tuple[Tensor, None, None]:
        grad_NNT = _balance_backward(grad_TNN.permute(1, 2, 0).contiguous(), *ctx.saved_tensors)
        return grad_NNT.permute(2, 0, 1), None, None


class _StreamCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI: Tensor, fn: Tensor, base: Tensor, scale_R: Tensor, N: int, iterations: int, eps: float,
                norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
        inverse_rms_T = torch.linalg.vector_norm(x_TI, dim=1).square_().div_(x_TI.shape[1]).add_(norm_eps).rsqrt_()
        mix_RT = (fn @ x_TI.T).mul_(inverse_rms_T)
        logits_RT = torch.addcmul(base[:, None], mix_RT, scale_R[:, None])
        gate_RT = logits_RT[:2 * N].sigmoid()
        matrix_NNT, softmax_NNT, divisors = _balance(logits_RT[2 * N:].unflatten(0, (N, N)), iterations, eps)
        ctx.save_for_backward(x_TI, fn, scale_R, inverse_rms_T, mix_RT, gate_RT, matrix_NNT, softmax_NNT, divisors)
        pre_NT, post_NT = gate_RT.split(N)
        return (pre_NT.T + eps).contiguous(), 2 * post_NT.T.contiguous(), matrix_NNT.permute(2, 0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, pre_grad_TN: Tensor, post_grad_TN: Tensor, res_grad_TNN: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, fn, scale_R, inverse_rms_T, mix_RT, gate_RT, *balance = ctx.saved_tensors
        gate_grad_RT = torch.cat([pre_grad_TN.T, 2 * post_grad_TN.T]) * gate_RT * (1 - gate_RT)
        res_grad_NNT = _balance_backward(res_grad_TNN.permute(1, 2, 0).contiguous(), *balance)
        logits_grad_RT = torch.cat([gate_grad_RT, res_grad_NNT.flatten(0, 1)])
        along_mix_RT = logits_grad_RT * mix_RT
        product_grad_RT = logits_grad_RT * scale_R[:, None] * inverse_rms_T
        # The RMS divides after the product, so its gradient is a multiple of x for each token.
        radial_T = (scale_R @ along_mix_RT).mul_(inverse_rms_T.square()).div_(-x_TI.shape[1])
        x_grad_TI = (x_TI * radial_T[:, None]).addmm_(product_grad_RT.T, fn)
        return (x_grad_TI, product_grad_RT @ x_TI, logits_grad_RT.sum(1), along_mix_RT.sum(1), *[None] * 4)


class _StreamsOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X_TNW: Tensor, y_TW: Tensor, post_TN: Tensor, res_TNN: Tensor) -> Tensor:
        ctx.save_for_backward(X_TNW, y_TW, post_TN, res_TNN)
        return (post_TN[..., None] * y_TW[:, None]).baddbmm_(res_TNN.mT, X_TNW)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TNW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        X_TNW, y_TW, post_TN, res_TNN = ctx.saved_tensors
        grad_TNW = grad_TNW.contiguous()
        return (torch.bmm(res_TNN, grad_TNW), torch.bmm(post_TN[:, None], grad_TNW)[:, 0],
                torch.bmm(y_TW[:, None], grad_TNW.mT)[:, 0], torch.bmm(X_TNW, grad_TNW.mT))


@sinkhorn.register("cpu", supports=lambda logits_BSNN, iterations, eps: eps > 0 and _float32_on_cpu(logits_BSNN))
def sinkhorn_cpu(logits_BSNN: Tensor, iterations: int, eps: float) -> Tensor:
    """`sinkhorn` for float32 and eps > 0, which keeps every entry away from zero."""
    return _Sinkhorn.apply(logits_BSNN.flatten(0, 1), iterations, eps).unflatten(0, logits_BSNN.shape[:2])


@stream_coefficients.register("cpu", supports=lambda X_BSNW, fn, base, scale_3, iterations, eps, norm_eps: (
    eps > 0 and _float32_on_cpu(X_BSNW, fn, base, scale_3)))
def stream_coefficients_cpu(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                            norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`stream_coefficients` for float32 and eps > 0."""
    N = X_BSNW.shape[2]
    scale_R = scale_3.repeat_interleave(torch.tensor([N, N, N * N]), output_size=len(base))
    coefficients = _StreamCoefficients.apply(
        _tokens_first(X_BSNW).flatten(1), fn, base, scale_R, N, iterations, eps, norm_eps)
    return tuple(x.unflatten(0, X_BSNW.shape[:2]) for x in coefficients)


@streams_out.register("cpu", supports=lambda X_BSNW, y_BSW, post_BSN, res_BSNN: (
    _float32_on_cpu(X_BSNW, y_BSW, post_BSN, res_BSNN)))
def streams_out_cpu(X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
    """`streams_out` for float32."""
    flat = [_tokens_first(x) for x in (X_BSNW, y_BSW, post_BSN, res_BSNN)]
    return _StreamsOut.apply(*flat).unflatten(0, X_BSNW.shape[:2])
