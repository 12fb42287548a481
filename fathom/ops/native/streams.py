"""Hyper-connections for a few tokens (report 2.2): what is a thousand small operations of torch for one decoded token is a call each."""

import torch
from torch import Tensor

from fathom.ops.native.library import library, ready, runs, threads
from fathom.ops.streams import stream_coefficients, streams_in, streams_out

_TOKENS = 64


def _few(X_BSNW: Tensor, *others: Tensor) -> bool:
    B, S, N, _ = X_BSNW.shape
    return 0 < B * S <= _TOKENS and N <= 16 and runs(X_BSNW, *others)


@stream_coefficients.register("native", supports=lambda X_BSNW, fn, base, scale_3, iterations, eps, norm_eps: _few(X_BSNW, fn, base, scale_3))
def stream_coefficients_native(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                               norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`stream_coefficients` for few tokens."""
    B, S, N, W = X_BSNW.shape
    x, fn, base, scale_3 = ready(X_BSNW), ready(fn), ready(base), ready(scale_3)
    mix, pre_BSN, post_BSN, res_BSNN = (torch.empty(B, S, *shape) for shape in ((len(base),), (N,), (N,), (N, N)))
    library().fathom_stream_coefficients(
        x.data_ptr(), fn.data_ptr(), base.data_ptr(), scale_3.data_ptr(), B * S, N, W, iterations, eps, norm_eps, mix.data_ptr(), pre_BSN.data_ptr(),
        post_BSN.data_ptr(), res_BSNN.data_ptr(), threads(fn.numel()))
    return pre_BSN, post_BSN, res_BSNN


@streams_in.register("native", supports=_few)
def streams_in_native(X_BSNW: Tensor, pre_BSN: Tensor) -> Tensor:
    """`streams_in` for few tokens."""
    B, S, N, W = X_BSNW.shape
    x, pre, out_BSW = ready(X_BSNW), ready(pre_BSN), torch.empty(B, S, W)
    library().fathom_streams_in(x.data_ptr(), pre.data_ptr(), B * S, N, W, out_BSW.data_ptr())
    return out_BSW.to(X_BSNW.dtype)


@streams_out.register("native", supports=_few)
def streams_out_native(X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
    """`streams_out` for few tokens."""
    B, S, N, W = X_BSNW.shape
    x, y, post, res, out_BSNW = ready(X_BSNW), ready(y_BSW), ready(post_BSN), ready(res_BSNN), torch.empty(B, S, N, W)
    library().fathom_streams_out(x.data_ptr(), y.data_ptr(), post.data_ptr(), res.data_ptr(), B * S, N, W, out_BSNW.data_ptr())
    return out_BSNW.to(X_BSNW.dtype)
