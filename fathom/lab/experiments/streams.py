"""Manifold-constrained hyper-connections against one plain residual and against unconstrained mixing (report 2.2, mHC paper)."""

import torch
from torch import Tensor

from fathom import ops
from fathom.lab.experiment import Experiment, Numbers, Trained, Variant, Verdict, lower, mean, swapped, worst
from fathom.model.hyper_connections import HyperConnection

_constrained = ops.open_streams
START = 6.0  # of the mixing's diagonal bias as the model starts, which Sinkhorn turns into almost the identity


def unconstrained(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                  norm_eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.open_streams`, with the mixing matrix [B, S, N, N] as it comes: no softmax, no Sinkhorn; it starts as the identity."""
    N = X_BSNW.shape[2]
    x_BSW, pre_BSN, post_BSN, _ = _constrained(X_BSNW, fn, base, scale_3, iterations, eps, norm_eps)
    x_BSI = ops.wide(X_BSNW).flatten(2)
    mix_BSR = torch.nn.functional.linear(x_BSI, fn[2 * N:]) * (x_BSI.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    return x_BSW, pre_BSN, post_BSN, ((mix_BSR * scale_3[2] + base[2 * N:]) / START).unflatten(-1, (N, N))


@torch.no_grad()
def amplification(trained: Trained) -> dict[str, float]:
    """The largest sum of absolute values in a row or column of the product of all mixing matrices, over tokens: at most 1 where doubly
    stochastic (mHC paper, figure 3); and of the largest single one.
    """
    found: list[Tensor] = []
    original = HyperConnection.open

    def noted(self: HyperConnection, X_BSNW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        opened = original(self, X_BSNW)
        found.append(opened[2].flatten(0, 1).double())
        return opened

    batch = trained.held_out[0]
    with swapped((HyperConnection, "open", noted)):
        trained.model(batch.tokens_BS[:1], position_BS=batch.positions_BS[:1])
    product = found[0]
    for matrix in found[1:]:
        product = product @ matrix

    def gain(matrices: Tensor) -> float:
        return float(torch.maximum(matrices.abs().sum(-1).amax(-1), matrices.abs().sum(-2).amax(-1)).max())

    return {"amplification": gain(product), "amplification_of_one": max(gain(matrix) for matrix in found)}


def _judge(numbers: Numbers) -> Verdict:
    bounded, free = mean(numbers, "mHC", "amplification"), mean(numbers, "unconstrained", "amplification")
    stable = Verdict("reproduced" if bounded <= 1.1 < free else "not",
                     f"amplification through all layers {bounded:.2f} (mHC), {free:.2f} (unconstrained); largest gradient norm "
                     f"{mean(numbers, 'mHC', 'largest_gradient'):.2f} and {mean(numbers, 'unconstrained', 'largest_gradient'):.2f}")
    return worst(lower(numbers, "mHC", "residual"), stable)


EXPERIMENT = Experiment(
    "streams", "Hyper-connections on the manifold gain over a plain residual and do not amplify with depth; unconstrained ones do.",
    "report 2.2; mHC paper (2512.24880)",
    "Bits per byte of mHC are below those of a plain residual by more than the noise, and the product of all mixing matrices amplifies by at "
    "most 1.1 with mHC and by more without the constraint. Reproduced where both hold, partly where one does.",
    (Variant("mHC"), Variant("residual", model={"hc_mult": 1}),
     Variant("unconstrained", swap=lambda: swapped((ops, "open_streams", unconstrained)))), _judge, amplification)
