"""Hyper-connections on CPU (report 2.2, eq. 1-8): the definitions' equations with gradients written out by hand.

Coefficients are computed with the tokens last (T = B S), because sums over streams are then vectorised over tokens; Sinkhorn's matrices are columns
of R = N N numbers, and one product with zeros and ones sums their rows or columns. Backward passes compute the divisors anew rather than keep
them. float32, and bfloat16 where no gradient is asked for, a group of tokens at a time; anything else is left to the definition.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.cpu.products import times
from fathom.ops.precision import wide
from fathom.ops.streams import sinkhorn, stream_coefficients, streams_in, streams_out

_GROUP = 1 << 18  # numbers of a group of bfloat16 tokens: 1 MB in float32, which stays in the cache of a core
_GROUP_TOKENS = 2048  # of a backward pass through Sinkhorn


def _on_cpu(*tensors: Tensor) -> bool:
    """All float32 on a CPU, or some of them bfloat16 and no gradient asked for."""
    if any(x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) for x in tensors):
        return False
    return all(x.dtype == torch.float32 for x in tensors) or not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _tokens_first(x: Tensor) -> Tensor:
    """[B, S, ...] as contiguous [T, ...], which batched products are fast on."""
    return x.contiguous().flatten(0, 1)


def _in_groups(function: Callable[..., Tensor], *tensors: Tensor, dim: int = 0) -> Tensor:
    """What a function makes of tensors [T, ...], a group of tokens at a time, joined along `dim`; the first tensor counts."""
    size = max(1, _GROUP // max(1, tensors[0][:1].numel()))
    if len(tensors[0]) <= size:
        return function(*tensors)
    return torch.cat([function(*group) for group in zip(*(x.split(size) for x in tensors), strict=True)], dim)


@lru_cache
@torch.inference_mode(False)
def _sums(N: int, eps: float) -> tuple[Tensor, Tensor]:
    """Products with these [R, R + 1] put the sum of its column, or of its row, plus eps in the place of each number of an N x N matrix,
    behind whose numbers a 1 stands.
    """
    ones, identity, last = torch.ones(N, N), torch.eye(N), torch.full((N * N, 1), eps)
    return torch.cat([torch.kron(ones, identity), last], 1), torch.cat([torch.kron(identity, ones), last], 1)


@lru_cache
@torch.inference_mode(False)
def _scale_index(N: int) -> Tensor:
    return torch.arange(3).repeat_interleave(torch.tensor([N, N, N * N]))


def _balance(softmax_RT: Tensor, iterations: int, eps: float, divisors: list[Tensor] | None = None) -> Tensor:
    """Doubly stochastic matrices [R, T] from their softmaxes (eq. 8); the 2 iterations - 1 divisors [R, T] go to `divisors`."""
    R, T = softmax_RT.shape
    sums = _sums(round(R**0.5), eps)
    matrix_ZT = softmax_RT.new_ones(R + 1, T)
    matrix_RT = torch.add(softmax_RT, eps, out=matrix_ZT[:R])
    divisor_RT = torch.empty_like(softmax_RT)
    for step in range(2 * iterations - 1):
        torch.mm(sums[step % 2], matrix_ZT, out=divisor_RT)
        matrix_RT.div_(divisor_RT)
        if divisors is not None:
            divisors.append(divisor_RT)
            divisor_RT = torch.empty_like(softmax_RT)
    return matrix_RT


def _softmax(logits_RT: Tensor) -> Tensor:
    """Each row of each N x N matrix."""
    N = round(len(logits_RT)**0.5)
    return logits_RT.view(N, N, -1).softmax(1).flatten(0, 1)


def _balance_backward(grad_RT: Tensor, logits_RT: Tensor, iterations: int, eps: float) -> Tensor:
    """Gradient of the logits [R, T], undoing the divisions one by one from the final matrix.

    With y = x / (sum x + eps) and g = y dy, the gradient with respect to log y, each step is g <- g - y sum g.
    """
    sums = [sums_RZ[:, :-1] for sums_RZ in _sums(round(len(logits_RT)**0.5), eps)]
    groups = []
    for grad_Rt, logits_Rt in zip(grad_RT.split(_GROUP_TOKENS, 1), logits_RT.split(_GROUP_TOKENS, 1), strict=True):
        softmax_Rt, divisors = _softmax(logits_Rt.contiguous()), []
        matrix_Rt = _balance(softmax_Rt, iterations, eps, divisors)
        log_grad_Rt, sum_Rt = grad_Rt * matrix_Rt, torch.empty_like(matrix_Rt)
        for step in reversed(range(len(divisors))):
            torch.mm(sums[step % 2], log_grad_Rt, out=sum_Rt)
            log_grad_Rt.addcmul_(matrix_Rt, sum_Rt, value=-1)
            matrix_Rt.mul_(divisors[step])
        log_grad_Rt.div_(matrix_Rt).mul_(softmax_Rt)  # from log(softmax + eps) to log softmax
        groups.append(log_grad_Rt.addcmul_(softmax_Rt, sums[1] @ log_grad_Rt, value=-1))
    return torch.cat(groups, 1)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
        logits_RT = logits_TNN.flatten(1).T.contiguous()
        ctx.save_for_backward(logits_RT)
        ctx.iterations, ctx.eps = iterations, eps
        return _balance(_softmax(logits_RT), iterations, eps).T.contiguous().view_as(logits_TNN)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TNN: Tensor) -> tuple[Tensor, None, None]:
        grad_RT = _balance_backward(grad_TNN.flatten(1).T.contiguous(), *ctx.saved_tensors, ctx.iterations, ctx.eps)
        return grad_RT.T.unflatten(1, grad_TNN.shape[1:]), None, None


def _products(x_TI: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """fn applied to each token's streams over their RMS, [rows of fn, T], and the inverse RMS [T]."""
    inverse_rms_T = torch.linalg.vector_norm(x_TI, dim=1).square_().div_(x_TI.shape[1]).add_(norm_eps).rsqrt_()
    return times(x_TI, fn).T.mul(inverse_rms_T), inverse_rms_T


def _coefficients(mix_RT: Tensor, base: Tensor, scale_R: Tensor, N: int, iterations: int,
                  eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pre [T, N], post [T, N], res [T, N, N] and the logits [rows of fn, T] that they come from."""
    logits_RT = torch.addcmul(base[:, None], mix_RT, scale_R[:, None])
    pre_NT, post_NT = logits_RT[:2 * N].sigmoid().split(N)
    matrix_RT = _balance(_softmax(logits_RT[2 * N:]), iterations, eps)
    return (pre_NT.T + eps).contiguous(), 2 * post_NT.T.contiguous(), matrix_RT.T.contiguous().unflatten(1, (N, N)), logits_RT


class _StreamCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI: Tensor, fn: Tensor, base: Tensor, scale_R: Tensor, N: int, iterations: int, eps: float,
                norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mix_RT, inverse_rms_T = _products(x_TI, fn, norm_eps)
        *coefficients, logits_RT = _coefficients(mix_RT, base, scale_R, N, iterations, eps)
        ctx.save_for_backward(x_TI, fn, scale_R, inverse_rms_T, mix_RT, logits_RT)
        ctx.N, ctx.iterations, ctx.eps = N, iterations, eps
        return tuple(coefficients)

    @staticmethod
    @once_differentiable
    def backward(ctx, pre_grad_TN: Tensor, post_grad_TN: Tensor, res_grad_TNN: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, fn, scale_R, inverse_rms_T, mix_RT, logits_RT = ctx.saved_tensors
        gate_RT = logits_RT[:2 * ctx.N].sigmoid()
        gate_grad_RT = torch.cat([pre_grad_TN.T, 2 * post_grad_TN.T]) * gate_RT * (1 - gate_RT)
        res_grad_RT = _balance_backward(res_grad_TNN.flatten(1).T.contiguous(), logits_RT[2 * ctx.N:], ctx.iterations, ctx.eps)
        logits_grad_RT = torch.cat([gate_grad_RT, res_grad_RT])
        along_mix_RT = logits_grad_RT * mix_RT
        product_grad_RT = logits_grad_RT * scale_R[:, None] * inverse_rms_T
        # The RMS divides after the product, so its gradient is a multiple of x for each token.
        radial_T = (scale_R @ along_mix_RT).mul_(inverse_rms_T.square()).div_(-x_TI.shape[1])
        x_grad_TI = times(product_grad_RT.T, fn.T).addcmul_(x_TI, radial_T[:, None])
        return (x_grad_TI, times(product_grad_RT, x_TI.T), logits_grad_RT.sum(1), along_mix_RT.sum(1), *[None] * 4)


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


@sinkhorn.register("cpu", supports=lambda logits_BSNN, iterations, eps: (
    eps > 0 and logits_BSNN.dtype == torch.float32 and _on_cpu(logits_BSNN)))
def sinkhorn_cpu(logits_BSNN: Tensor, iterations: int, eps: float) -> Tensor:
    """`sinkhorn` for float32 and eps > 0, which keeps every entry away from zero."""
    return _Sinkhorn.apply(logits_BSNN.flatten(0, 1), iterations, eps).unflatten(0, logits_BSNN.shape[:2])


@stream_coefficients.register("cpu", supports=lambda X_BSNW, fn, base, scale_3, iterations, eps, norm_eps: (
    eps > 0 and _on_cpu(X_BSNW, fn, base, scale_3)))
def stream_coefficients_cpu(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                            norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`stream_coefficients` for eps > 0."""
    N, x_TI = X_BSNW.shape[2], _tokens_first(X_BSNW).flatten(1)
    fn, base, scale_R = wide(fn), wide(base), wide(scale_3).index_select(0, _scale_index(N))
    if torch.is_grad_enabled():
        coefficients = _StreamCoefficients.apply(x_TI, fn, base, scale_R, N, iterations, eps, norm_eps)
    else:
        mix_RT = (_products(x_TI, fn, norm_eps)[0] if x_TI.dtype == torch.float32 else
                  _in_groups(lambda x_tI: _products(x_tI.float(), fn, norm_eps)[0], x_TI, dim=1))
        *coefficients, _ = _coefficients(mix_RT, base, scale_R, N, iterations, eps)
    return tuple(x.unflatten(0, X_BSNW.shape[:2]) for x in coefficients)


@streams_in.register("cpu", supports=lambda X_BSNW, pre_BSN: (
    _on_cpu(X_BSNW, pre_BSN) and not (torch.is_grad_enabled() and (X_BSNW.requires_grad or pre_BSN.requires_grad))))
def streams_in_cpu(X_BSNW: Tensor, pre_BSN: Tensor) -> Tensor:
    """`streams_in` without gradients; with them the definition is as fast as memory."""
    X_TNW, pre_TN = _tokens_first(X_BSNW), wide(pre_BSN).flatten(0, 1)
    if X_TNW.dtype == torch.float32:
        return torch.bmm(pre_TN[:, None], X_TNW)[:, 0].unflatten(0, X_BSNW.shape[:2])
    x_TW = _in_groups(lambda X_tNW, pre_tN: torch.bmm(pre_tN[:, None], X_tNW.float())[:, 0].to(X_tNW.dtype), X_TNW, pre_TN)
    return x_TW.unflatten(0, X_BSNW.shape[:2])


@streams_out.register("cpu", supports=_on_cpu)
def streams_out_cpu(X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
    """`streams_out`."""
    X_TNW, y_TW, post_TN, res_TNN = (_tokens_first(x) for x in (X_BSNW, y_BSW, post_BSN, res_BSNN))
    if X_TNW.dtype == y_TW.dtype == torch.float32:
        out_TNW = _StreamsOut.apply(X_TNW, y_TW, wide(post_TN), wide(res_TNN))
    else:
        out_TNW = _in_groups(lambda X_tNW, y_tW, post_tN, res_tNN: (
            post_tN[..., None] * y_tW[:, None]).baddbmm_(res_tNN.mT, X_tNW.float()).to(X_tNW.dtype), X_TNW, y_TW, wide(post_TN), wide(res_TNN))
    return out_TNW.unflatten(0, X_BSNW.shape[:2])
