"""Hyper-connections (report 2.2): coefficients of a few tokens, a thousand small operations of torch for one of them, and mixing in one pass."""

import torch
from torch import Tensor

from fathom.ops.native.library import library, ready, runs, threads
from fathom.ops.streams import open_streams, stream_coefficients, streams_in, streams_out

_TOKENS = 64  # whose coefficients are made here: for more, a product for all of them is faster


def _few(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, *others: float) -> bool:
    B, S, N, W = X_BSNW.shape
    return 0 < B * S <= _TOKENS and N <= 16 and fn.shape == ((2 + N) * N, N * W) and runs(X_BSNW, fn, base, scale_3)


@stream_coefficients.register("native", supports=_few)
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


@streams_in.register("native", supports=lambda X_BSNW, pre_BSN: X_BSNW.numel() > 0 and runs(X_BSNW, pre_BSN))
def streams_in_native(X_BSNW: Tensor, pre_BSN: Tensor) -> Tensor:
    """`streams_in` without gradients."""
    B, S, N, W = X_BSNW.shape
    x, pre, out_BSW = X_BSNW.contiguous(), ready(pre_BSN), torch.empty(B, S, W, dtype=X_BSNW.dtype)
    library().fathom_streams_in(x.data_ptr(), x.dtype is torch.bfloat16, pre.data_ptr(), B * S, N, W, out_BSW.data_ptr(), threads(x.numel()))
    return out_BSW


@streams_out.register("native", supports=lambda X_BSNW, y_BSW, post_BSN, res_BSNN: (
    X_BSNW.numel() > 0 and X_BSNW.dtype is y_BSW.dtype and runs(X_BSNW, y_BSW, post_BSN, res_BSNN)))
def streams_out_native(X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
    """`streams_out` without gradients."""
    B, S, N, W = X_BSNW.shape
    x, y, post, res = X_BSNW.contiguous(), y_BSW.contiguous(), ready(post_BSN), ready(res_BSNN)
    out_BSNW = torch.empty_like(x)
    library().fathom_streams_out(x.data_ptr(), y.data_ptr(), x.dtype is torch.bfloat16, post.data_ptr(), res.data_ptr(), B * S, N, W,
                                 out_BSNW.data_ptr(), threads(x.numel()))
    return out_BSNW


@open_streams.register("native", supports=_few)
def open_streams_native(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                        norm_eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`open_streams` for few tokens."""
    (B, S, N, W), x = X_BSNW.shape, X_BSNW.contiguous()
    fn, base, scale_3 = ready(fn), ready(base), ready(scale_3)
    out_BSW, pre_BSN, post_BSN, res_BSNN = x.new_empty(B, S, W), torch.empty(B, S, N), torch.empty(B, S, N), torch.empty(B, S, N, N)
    library().fathom_open_streams(
        x.data_ptr(), x.dtype is torch.bfloat16, fn.data_ptr(), base.data_ptr(), scale_3.data_ptr(), B * S, N, W, iterations, eps, norm_eps,
        out_BSW.data_ptr(), pre_BSN.data_ptr(), post_BSN.data_ptr(), res_BSNN.data_ptr(), torch.get_num_threads())
    return out_BSW, pre_BSN, post_BSN, res_BSNN
