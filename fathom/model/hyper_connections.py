"""Manifold-constrained hyper-connections: the parameters and use of the residual streams (report 2.2)."""

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.config import ModelConfig


class HyperConnection(nn.Module):
    """Carries N residual streams around one sublayer; the mixing between streams is doubly stochastic."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        N, self.iterations, self.eps = config.hc_mult, config.hc_sinkhorn_iters, config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty((2 + N) * N, N * config.hidden_size))
        self.base = nn.Parameter(torch.empty((2 + N) * N))
        self.scale = nn.Parameter(torch.empty(3))

    def open(self, X_BSNW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sublayer's input [B, S, W], and the post [B, S, N] and res [B, S, N, N] that `close` needs."""
        x_BSW, _, post_BSN, res_BSNN = ops.open_streams(X_BSNW, self.fn, self.base, self.scale, self.iterations, self.eps, self.norm_eps)
        return x_BSW, post_BSN, res_BSNN

    @staticmethod
    def close(X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
        """The streams [B, S, N, W] after the sublayer's output y."""
        return ops.streams_out(X_BSNW, y_BSW, post_BSN, res_BSNN)


class StreamCollapse(nn.Module):
    """Sums the N streams up to one, before the final norm; there is one for the model and one for each MTP block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        N, self.eps, self.norm_eps = config.hc_mult, config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(N, N * config.hidden_size))
        self.base = nn.Parameter(torch.empty(N))
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, X_BSNW: Tensor) -> Tensor:
        """[B, S, N, W] -> [B, S, W]."""
        weight_BSN = ops.collapse_coefficients(X_BSNW, self.fn, self.base, self.scale, self.eps, self.norm_eps)
        return ops.streams_in(X_BSNW, weight_BSN)
