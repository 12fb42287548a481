"""Manifold-constrained hyper-connections (report 2.2, eq. 1-8): coefficients, Sinkhorn, mixing in and out.

The residual is X [B, S, N, W], N streams. `fn` stacks the three maps: N rows for pre, N for post, N * N for res.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.dispatch import composed, op
from fathom.ops.precision import wide


@op
def sinkhorn(logits_BSNN: Tensor, iterations: int, eps: float) -> Tensor:
    """Doubly stochastic [B, S, N, N]: softmax over the last axis, columns once, then rows and columns in turn (eq. 8)."""
    matrix_BSNN = logits_BSNN.softmax(-1) + eps
    matrix_BSNN = matrix_BSNN / (matrix_BSNN.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix_BSNN = matrix_BSNN / (matrix_BSNN.sum(-1, keepdim=True) + eps)
        matrix_BSNN = matrix_BSNN / (matrix_BSNN.sum(-2, keepdim=True) + eps)
    return matrix_BSNN


@op
def stream_coefficients(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                        norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """pre [B, S, N], post [B, S, N], res [B, S, N, N] in float32 (eq. 3-8)."""
    N = X_BSNW.shape[2]
    mix = _normalised_product(X_BSNW, fn, norm_eps)
    parts = zip(wide(scale_3), *(x.split([N, N, N * N], -1) for x in (mix, wide(base))), strict=True)
    pre_BSN, post_BSN, res_BSR = (product * scale + shift for scale, product, shift in parts)
    res_BSNN = sinkhorn(res_BSR.unflatten(-1, (N, N)), iterations, eps)
    return pre_BSN.sigmoid() + eps, 2 * post_BSN.sigmoid(), res_BSNN


@op
def collapse_coefficients(X_BSNW: Tensor, fn_NI: Tensor, base_N: Tensor, scale_1: Tensor, eps: float,
                          norm_eps: float) -> Tensor:
    """Weights [B, S, N] in float32 that sum the streams up before the final norm."""
    return (_normalised_product(X_BSNW, fn_NI, norm_eps) * wide(scale_1) + wide(base_N)).sigmoid() + eps


@op
def streams_in(X_BSNW: Tensor, pre_BSN: Tensor) -> Tensor:
    """A sublayer's input [B, S, W] = sum_n pre_n X_n (eq. 1)."""
    return torch.einsum("bsn,bsnw->bsw", pre_BSN, wide(X_BSNW)).to(X_BSNW.dtype)


@composed
def open_streams(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                 norm_eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A sublayer's input [B, S, W], and the pre [B, S, N] that made it; post [B, S, N] and res [B, S, N, N] for its output (eq. 1-8)."""
    pre_BSN, post_BSN, res_BSNN = stream_coefficients(X_BSNW, fn, base, scale_3, iterations, eps, norm_eps)
    return streams_in(X_BSNW, pre_BSN), pre_BSN, post_BSN, res_BSNN


@op
def streams_out(X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
    """New streams [B, S, N, W]: X_k = post_k y + sum_j res[j, k] X_j (eq. 1; the first index is summed)."""
    mixed_BSNW = res_BSNN.transpose(-1, -2) @ wide(X_BSNW)
    return (mixed_BSNW + post_BSN[..., None] * wide(y_BSW)[..., None, :]).to(X_BSNW.dtype)


def _normalised_product(X_BSNW: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """fn applied to the flattened streams over their RMS; the division comes after the product, where it is cheaper."""
    x_BSI = wide(X_BSNW).flatten(2)
    return F.linear(x_BSI, wide(fn)) * (x_BSI.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
