"""Hyper-connections (report 2.2) in one pass over each token's numbers: of a few tokens, where torch makes a thousand small operations, and in training.

The product with `fn` of many tokens is made in tiles where the processor suits them, else left to oneDNN, and so are those of its gradients.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.cpu.products import times
from fathom.ops.native.library import library, ready, runs, threads, trains
from fathom.ops.native.tiles import in_tiles
from fathom.ops.streams import open_streams, streams_in, streams_out

_TOKENS = 64  # whose coefficients are made here: for more, a product for all of them is faster
_LANES = 16  # numbers of a vector
_TOGETHER = 48  # tokens that a thread opens together
_KEPT = 1 << 12  # numbers of the Sinkhorn steps of a token that fit a thread's stack, sixteen tokens at a time


def _fits(X_BSNW: Tensor, fn: Tensor) -> bool:
    B, S, N, W = X_BSNW.shape
    return X_BSNW.numel() > 0 and N <= 16 and fn.shape == ((2 + N) * N, N * W)


def _taken(*tensors: Tensor) -> bool:
    return tensors[0].numel() > 0 and (runs(*tensors) or trains(*tensors))


@streams_in.register("native", supports=_taken)
def streams_in_native(X_BSNW: Tensor, pre_BSN: Tensor) -> Tensor:
    """`streams_in`."""
    return _StreamsIn.apply(X_BSNW, pre_BSN) if torch.is_grad_enabled() else _streams_in(X_BSNW, pre_BSN)


@streams_out.register("native", supports=lambda X_BSNW, y_BSW, post_BSN, res_BSNN: (
    X_BSNW.dtype is y_BSW.dtype and _taken(X_BSNW, y_BSW, post_BSN, res_BSNN)))
def streams_out_native(X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
    """`streams_out`."""
    function = _StreamsOut.apply if torch.is_grad_enabled() else _streams_out
    return function(X_BSNW, y_BSW, post_BSN, res_BSNN)


def _opens(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float, norm_eps: float) -> bool:
    small = iterations >= 1 and iterations * X_BSNW.shape[2]**2 <= _KEPT and eps > 0
    return small and _fits(X_BSNW, fn) and (trains(X_BSNW, fn, base, scale_3) or runs(X_BSNW, fn, base, scale_3))


@open_streams.register("native", supports=_opens)
def open_streams_native(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                        norm_eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`open_streams`: of few tokens without gradients in one call of C, else between products of oneDNN."""
    if torch.is_grad_enabled():
        return _OpenStreams.apply(X_BSNW, fn, base, scale_3, iterations, eps, norm_eps)
    (B, S, N, W), x = X_BSNW.shape, X_BSNW.contiguous()
    fn, base, scale_3 = ready(fn), ready(base), ready(scale_3)
    if B * S > _TOKENS:
        out_BSW, *coefficients = _opened(x, fn, base, scale_3, iterations, eps, norm_eps, kept=False)[:4]
        return out_BSW.to(x.dtype), *coefficients
    out_BSW, pre_BSN, post_BSN, res_BSNN = x.new_empty(B, S, W), torch.empty(B, S, N), torch.empty(B, S, N), torch.empty(B, S, N, N)
    library().fathom_open_streams(
        x.data_ptr(), x.dtype is torch.bfloat16, fn.data_ptr(), base.data_ptr(), scale_3.data_ptr(), B * S, N, W, iterations, eps, norm_eps,
        out_BSW.data_ptr(), pre_BSN.data_ptr(), post_BSN.data_ptr(), res_BSNN.data_ptr(), torch.get_num_threads())
    return out_BSW, pre_BSN, post_BSN, res_BSNN


def _streams_in(X_BSNW: Tensor, pre_BSN: Tensor) -> Tensor:
    B, S, N, W = X_BSNW.shape
    x, pre, out_BSW = X_BSNW.contiguous(), ready(pre_BSN), torch.empty(B, S, W, dtype=X_BSNW.dtype)
    library().fathom_streams_in(x.data_ptr(), x.dtype is torch.bfloat16, pre.data_ptr(), B * S, N, W, out_BSW.data_ptr(), threads(x.numel()))
    return out_BSW


def _streams_out(X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
    B, S, N, W = X_BSNW.shape
    x, y, post, res = X_BSNW.contiguous(), y_BSW.contiguous(), ready(post_BSN), ready(res_BSNN)
    out_BSNW = torch.empty_like(x)
    library().fathom_streams_out(x.data_ptr(), y.data_ptr(), x.dtype is torch.bfloat16, post.data_ptr(), res.data_ptr(), B * S, N, W,
                                 out_BSNW.data_ptr(), threads(x.numel()))
    return out_BSNW


def _opened(x_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float, norm_eps: float, kept: bool) -> list[Tensor | None]:
    """A sublayer's input [B, S, W], pre, post and res; and if kept, for the backward pass, the products with fn [T, R] and the inverse RMS [T]."""
    (B, S, N, W), T, R, tiled = x_BSNW.shape, x_BSNW.shape[0] * x_BSNW.shape[1], len(fn), in_tiles(torch.float32)
    x = x_BSNW if tiled else x_BSNW.float()
    mix_TR = times(x.view(T, N * W), fn) if not tiled else torch.empty(T, R) if kept else None
    inverse_rms_T, own = torch.empty(T) if kept else None, threads(x.numel())
    space = torch.empty(own, N * W * _TOGETHER) if tiled else None
    made = [x.new_empty(B, S, W), *(torch.empty(B, S, *shape) for shape in ((N,), (N,), (N, N)))]
    places = [None if each is None else each.data_ptr() for each in (mix_TR, inverse_rms_T, *made, space)]
    library().fathom_streams_opened(x.data_ptr(), x.dtype is torch.bfloat16, fn.data_ptr() if tiled else None, base.data_ptr(), scale_3.data_ptr(), T, N, W,
                                    iterations, eps, norm_eps, *places, own)
    return [*made, mix_TR, inverse_rms_T]


class _OpenStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                norm_eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, fn, base, scale_3 = X_BSNW.contiguous(), fn.contiguous(), base.contiguous(), scale_3.contiguous()
        *outputs, mix_TR, inverse_rms_T = _opened(x, fn, base, scale_3, iterations, eps, norm_eps, kept=True)
        ctx.save_for_backward(x, fn, base, scale_3, mix_TR, inverse_rms_T, outputs[1])
        ctx.iterations, ctx.eps = iterations, eps
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, fn, base, scale_3, mix_TR, inverse_rms_T, pre_BSN = ctx.saved_tensors
        grad_BSW, pre_grad_BSN, post_grad_BSN, res_grad_BSNN = (grad.contiguous() for grad in grads)
        (_, _, N, W), (T, R) = x.shape, mix_TR.shape
        logits_grad_TR, mix_grad_TR, radial_T = torch.empty(T, R), torch.empty(T, R), torch.empty(T)
        library().fathom_streams_opened_backward(
            x.data_ptr(), mix_TR.data_ptr(), inverse_rms_T.data_ptr(), base.data_ptr(), scale_3.data_ptr(), grad_BSW.data_ptr(),
            pre_grad_BSN.data_ptr(), post_grad_BSN.data_ptr(), res_grad_BSNN.data_ptr(), T, N, W, ctx.iterations, ctx.eps,
            logits_grad_TR.data_ptr(), mix_grad_TR.data_ptr(), radial_T.data_ptr(), threads(x.numel()))
        if W % _LANES == 0 and in_tiles(torch.float32):
            x_grad_TI, fn_grad_RI, columns = torch.empty(T, N * W), torch.empty_like(fn), torch.empty_like(fn)
            library().fathom_streams_gradients(
                *(each.data_ptr() for each in (x, fn, mix_grad_TR, pre_BSN, radial_T, grad_BSW)), T, N, W, x_grad_TI.data_ptr(),
                fn_grad_RI.data_ptr(), columns.data_ptr(), threads(x.numel()))
        else:
            x_grad_TI, fn_grad_RI = times(mix_grad_TR, fn.T), times(mix_grad_TR.T, x.view(T, N * W).T)
            library().fathom_streams_in_backward(x.data_ptr(), pre_BSN.data_ptr(), radial_T.data_ptr(), grad_BSW.data_ptr(), T, N, W,
                                                 x_grad_TI.data_ptr(), None, threads(x.numel()))
        along_R = (logits_grad_TR * mix_TR).mul_(inverse_rms_T[:, None]).sum(0)
        scale_grad_3 = torch.stack([part.sum() for part in along_R.split([N, N, N * N])])
        return x_grad_TI.view_as(x), fn_grad_RI, logits_grad_TR.sum(0), scale_grad_3, *[None] * 3


class _StreamsIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X_BSNW: Tensor, pre_BSN: Tensor) -> Tensor:
        ctx.save_for_backward(X_BSNW, pre_BSN)
        return _streams_in(X_BSNW, pre_BSN)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSW: Tensor) -> tuple[Tensor, Tensor]:
        x, pre, grad = (each.contiguous() for each in (*ctx.saved_tensors, grad_BSW))
        B, S, N, W = x.shape
        x_grad_BSNW, pre_grad_BSN = torch.empty_like(x), torch.empty_like(pre)
        library().fathom_streams_in_backward(x.data_ptr(), pre.data_ptr(), None, grad.data_ptr(), B * S, N, W, x_grad_BSNW.data_ptr(),
                                             pre_grad_BSN.data_ptr(), threads(x.numel()))
        return x_grad_BSNW, pre_grad_BSN


class _StreamsOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
        ctx.save_for_backward(X_BSNW, y_BSW, post_BSN, res_BSNN)
        return _streams_out(X_BSNW, y_BSW, post_BSN, res_BSNN)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSNW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y, post, res, grad = (each.contiguous() for each in (*ctx.saved_tensors, grad_BSNW))
        (B, S, N, W), grads = x.shape, [torch.empty_like(each) for each in (x, y, post, res)]
        library().fathom_streams_out_backward(*(each.data_ptr() for each in (x, y, post, res, grad)), B * S, N, W,
                                              *(each.data_ptr() for each in grads), threads(x.numel()))
        return tuple(grads)
